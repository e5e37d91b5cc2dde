"""训练以外的命令：写的当口反复 kill -9，再来一次，与一气走完的逐字节相同，什么也不留下；两个同时跑，后来的一行。"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import xarray as xr
import yaml

from tests.engine.runs import ROOT, state_digests, train_here, write_run
from util.atomic import LOCK, TEMPORARY
from util.checkpoint import load_checkpoint

pytestmark = pytest.mark.soak
WAITS = (0.0, 0.6, 0.02, 0.3, 0.1, 0.05)  # 秒：看见它写了什么之后，多久杀


class Command(NamedTuple):
    """words 里的 {…} 是 place 里的；out: 写在哪里；again: 再来一次时添的；same: 要逐字节相同的文件。"""

    words: str
    again: str = ""
    same: tuple[str, ...] = ("**/*.npy", "**/*.json")
    out: str = "out"


SOURCE = "--source {source} --variable t2m=t2m --train 2000-01-01 2000-04-30 --val 2000-05-01 2000-05-31 --test"
SAVED = ("metrics.csv", "statistics.nc", "forecast.nc", "truth.nc")
TRAINING = "train.py --config {copy} --resume auto run.name=cut train.epochs=4 checkpoint.every_minutes=1e-9"
COMMANDS = {
    "sample": Command("dataset.py sample --root out --grid 16x32 --years 1979 --interval 24", same=("**/*",)),
    "sample anew": Command("dataset.py sample --root out --grid 16x32 --years 1979 --interval 24 --overwrite"),
    "import": Command(f"dataset.py import --root out {SOURCE} 2000-06-01 2000-06-18", "--overwrite"),
    "import into a store": Command(
        f"dataset.py import --store out {SOURCE} 2000-06-01 2000-06-18", same=("fields/*", "valid/*", "time/*")
    ),
    "pack": Command("dataset.py pack --config {config} --out out", same=("fields/*", "valid/*", "pack/*.raw")),
    "statistics": Command("dataset.py statistics --config {copy} --write --overwrite", out="tree", same=("**/*.json",)),
    "evaluate": Command(
        "evaluate.py --checkpoint {best} --out out --steps 3 --save netcdf npy", same=(*SAVED, "*.npy")
    ),
    "evaluate into zarr": Command(
        "evaluate.py --checkpoint {best} --out out --save zarr", "--overwrite", (*SAVED[:2], "*.zarr/**/*")
    ),
    "inference": Command(
        "inference.py --checkpoint {best} --out out --time 2000-02-01T00 2000-02-08T00 6", same=("**/*.npy", "*.nc")
    ),
    "suite": Command("compare.py --suite {suite} --out out", same=("*.csv",)),
    "train": Command(TRAINING, same=("last.ckpt", "best.ckpt"), out="checkpoints/cut"),
    "train on two processes": Command(
        f"{TRAINING} run.devices=2 run.strategy=ddp", same=("last.ckpt", "best.ckpt"), out="checkpoints/cut"
    ),
}


@pytest.fixture(scope="module")
def place(make_tree: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """源文件、树、配置、训练好的检查点。"""
    folder = tmp_path_factory.mktemp("place")
    tree = make_tree(folder / "tree", ("t2m", "u10"), (8, 16), "2000-01-01", "2000-02-20")
    config = write_run(folder, tree, train={"epochs": 1}, data={"workers": 0, "cache_dir": str(folder / "caches")})
    assert train_here(config, "run.name=trained") == 0
    times = np.datetime64("2000-01-01", "ns") + np.arange(4 * 170) * np.timedelta64(6, "h")
    values = np.random.default_rng(0).normal(280, 5, (times.size, 16, 32)).astype(np.float32)
    grid = {"lat": np.linspace(84.375, -84.375, 16), "lon": np.arange(32) * 11.25}
    fields = {"t2m": (("time", "lat", "lon"), values, {"units": "K"})}
    xr.Dataset(fields, {"time": times, **grid}).to_netcdf(folder / "source.nc")
    return {
        "source": str(folder / "source.nc"),
        "config": str(config),
        "best": f"{folder}/checkpoints/trained/best.ckpt",
    }


@pytest.fixture
def start(place: dict[str, str], tmp_path: Path, make_tree: Any) -> Callable[..., subprocess.Popen[str]]:
    """在一个文件夹里起一个命令的函数：各有自己的树、配置、套件。"""

    def begin(command: Command, where: str, *more: str) -> subprocess.Popen[str]:
        folder, named = tmp_path / where, dict(place)
        if not folder.exists():
            folder.mkdir()
            tree = make_tree(folder / "tree", ("t2m", "u10"), (8, 16), "2000-01-01", "2000-02-20")
            caches = {"workers": 0, "cache_dir": str(folder / "caches")}
            copy = write_run(folder, tree, train={"epochs": 0, "batch_size": 4}, data=caches)
            members = [{"config": str(copy), "name": n, "overrides": [f"model={{name: {n}}}"]} for n in BASELINES]
            (folder / "suite.yaml").write_text(yaml.safe_dump({"members": members}))
        named |= {"copy": str(folder / "run.yaml"), "suite": str(folder / "suite.yaml")}
        script, *words = command.words.format(**named).split()
        return subprocess.Popen(
            [sys.executable, str(ROOT / script), *words, *more],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


BASELINES = ("persistence", "climatology")


def contents(folder: Path, command: Command) -> dict[str, bytes]:
    """文件 → 它的字节；检查点里还有用时之类，比的是权重、优化器与进度。"""
    found = {path for pattern in command.same for path in (folder / command.out).glob(pattern) if path.is_file()}
    read = {".ckpt": trained}
    return {str(path.relative_to(folder)): read.get(path.suffix, Path.read_bytes)(path) for path in found}


def trained(path: Path) -> bytes:
    return repr(state_digests(load_checkpoint(path))).encode()


def leftovers(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if TEMPORARY.fullmatch(p.name) or p.name.endswith((LOCK, ".partial"))]


def names(folder: Path, command: Command) -> set[tuple[Path, int]]:
    """看它写了什么没有；训练的日志一起来就写，看的是检查点。"""
    pattern = "*.ckpt*" if command.out.startswith("checkpoints") else "*"
    return {(path, path.stat().st_mtime_ns) for path in list(folder.rglob(pattern)) if path.exists()}


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_again_and_again(name: str, start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    command = COMMANDS[name]
    whole = start(command, "whole")
    assert whole.communicate()[1] is not None and whole.returncode == 0
    expected = contents(tmp_path / "whole", command)
    assert expected
    killed, again = 0, ()
    for wait in WAITS:
        before = names(tmp_path / "cut", command) if (tmp_path / "cut").exists() else None
        child = start(command, "cut", *again)
        before = names(tmp_path / "cut", command) if before is None else before
        while child.poll() is None and names(tmp_path / "cut", command) == before:
            time.sleep(0.01)
        time.sleep(wait)
        killed += child.poll() is None
        child.kill()
        child.communicate()
        again = tuple(command.again.split())
    last = start(command, "cut", *again)
    _, said = last.communicate()
    assert last.returncode == 0, said
    assert killed, "never killed while at work"
    found = contents(tmp_path / "cut", command)
    assert found.keys() == expected.keys()
    assert [path for path in expected if found[path] != expected[path]] == []
    assert leftovers(tmp_path / "cut") == []


@pytest.mark.parametrize("name", COMMANDS)
def test_two_at_once(name: str, start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """同一个命令、同一个文件夹：一个走完，另一个一行（或它到的时候已经写好）；写好的与一个写的相同。"""
    command = COMMANDS[name]
    whole = start(command, "whole")
    assert whole.communicate()[1] is not None and whole.returncode == 0
    both = [start(command, "both") for _ in range(2)]
    said = [child.communicate()[1] for child in both]
    codes = [child.returncode for child in both]
    assert sorted(codes) in ([0, 0], [0, 2]), said
    for code, text in zip(codes, said, strict=True):
        if code:
            last = text.strip().splitlines()[-1]
            assert last.startswith("error: ") and ("is in use by process" in last or "exist" in last), text
            assert "Traceback" not in text
    assert contents(tmp_path / "both", command) == contents(tmp_path / "whole", command)
    assert leftovers(tmp_path / "both") == []
