"""打包与统计交给 dask：与本机的逐字节相同；工人死了、主进程 kill -9 之后接着做；连不上的一行说清。"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.runs import ROOT
from tests.trees import DAYS, config_of, damage
from tests.util.packing.stores import contents, pack_small
from tests.util.packing.test_pack import CHANNELS, T0, write_config
from util import workers as workers_module
from util.commands.pack import main
from util.config import load_config
from util.inspection.statistics import channel_statistics
from util.packing import pack as pack_module
from util.workers import check_worker_options, distribute, recorded_command

HOOK = """
import os, time
from pathlib import Path
from util.packing import chunks
real = chunks.write_bytes
def hooked(path, data, real=real):
    {hook}
    return real(path, data)
if real.__name__ == "write_bytes":  # 这个文件不止被引入一次
    chunks.write_bytes = hooked
"""


@pytest.fixture
def tree(make_tree, tmp_path: Path):
    tree = make_tree(tmp_path / "tree", CHANNELS, **DAYS)
    for hour, how in ((30, "removed"), (54, "text"), (60, "not a number")):
        damage(tree, "t2m", T0 + hour, how)
    return tree


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """一个真的调度器和两个工人，各有两个线程共用一份 Job。"""
    from distributed import LocalCluster

    cluster: Any = LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0")
    with cluster:
        cluster.scale(2)
        yield cluster.scheduler_address


def preload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    """工人起来时先跑的几行；工人是新起的进程，monkeypatch 到不了。设置由起工人的进程给：这个进程，或它的子进程。"""
    import dask.config
    import distributed  # noqa: F401  它的设置

    (tmp_path / "hook.py").write_text(HOOK.format(hook=hook))
    monkeypatch.setitem(dask.config.config["distributed"]["worker"], "preload", [str(tmp_path / "hook.py")])
    monkeypatch.setenv("DASK_DISTRIBUTED__WORKER__PRELOAD", str(tmp_path / "hook.py"))


# ---- 同样的结果


def test_same_bytes_and_same_numbers(tree, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch):
    """坏文件、空缺都在；每件事里发现的坏文件不影响同一个进程的别的线程。相对路径也行。"""
    config = config_of(tree)
    pack_small(config, tmp_path / "here")
    monkeypatch.setattr(pack_module, "CHUNK_BYTES", 5 * len(CHANNELS) * 4 * 8 * 4)
    monkeypatch.chdir(tmp_path)
    relative = config.model_copy(update={"root": "tree"})
    pack_module.pack(relative, Path("there"), "float32", 1, "python dataset.py pack ...", address)
    mine, other = contents(tmp_path / "here"), contents(tmp_path / "there")
    about_root = {"store.json", "pack/plan.json", ".zattrs", ".zmetadata"}  # 里面写着 root
    assert {name for name in mine if mine[name] != other[name]} <= about_root
    assert mine.keys() == other.keys()
    assert channel_statistics(config, 1) == channel_statistics(config, 1, address)
    with (
        pytest.raises(ValueError, match="nowhere is not there for the dask worker on"),
        distribute(1, address, None, [tmp_path / "nowhere"]) as run,
    ):
        list(run(work, [1]))


def test_the_recorded_command_leaves_out_who_did_the_work(
    tree, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
):
    """本机的、dask 的、换了进程数接着做的，整个文件夹逐字节相同。"""
    words = ["--config", str(write_config(tmp_path, tree)), "data.workers=0", "--out", "store"]
    monkeypatch.setattr(pack_module, "CHUNK_BYTES", 5 * len(CHANNELS) * 4 * 8 * 4)
    ways = {"local": ["--workers", "2"], "dask": ["--workers=1", "--scheduler", address], "again": []}
    for name, options in ways.items():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert main([*words, *options]) == 0
    for name in ("store.json", "fields/3.0.0.0", "pack/plan.json"):
        (Path("store") / name).unlink()
    assert main(["--workers=1", *words]) == 0
    found = [contents(tmp_path / name / "store") for name in ways]
    assert found[0] == found[1] == found[2]
    assert json.loads(Path("store/.zattrs").read_text())["history"] == shlex.join(
        ["python", "dataset.py", "pack", *words]
    )


@pytest.mark.parametrize(
    "options",
    [["--workers", "4"], ["--workers=4"], ["--scheduler"], ["--scheduler", "tcp://n:1"], ["--scheduler=tcp://n:1"]],
    ids=" ".join,
)
@pytest.mark.parametrize("place", [0, 3, 5, 7])  # 不在 key=value 前：会被当成地址，命令行不收
def test_recorded_command(options: list[str], place: int):
    words = ["--config", "my run.yaml", "data.workers=0", "--out", "store", "--latitude", "-89.5"]
    given = [*words[:place], *options, *words[place:]]
    expected = "python dataset.py import --config 'my run.yaml' data.workers=0 --out store --latitude -89.5"
    assert recorded_command("import", given) == expected


def work(shared: int, item: int) -> int:
    if item < 0:
        raise OSError(28, "full")
    return shared * item


@pytest.mark.parametrize("kind", ["in place", "pool", "dask"])
def test_spread(kind: str, address: str):
    """结果按原来的次序；work 的异常照原样。"""
    workers, scheduler = {"in place": (1, None), "pool": (2, None), "dask": (1, address)}[kind]
    with distribute(workers, scheduler, 7) as run:
        assert list(run(work, range(20))) == [7 * i for i in range(20)]
    with pytest.raises(OSError, match="full") as caught, distribute(workers, scheduler, 7) as run:
        list(run(work, [1, -1]))
    assert caught.value.errno == 28


# ---- 死了的


def test_a_worker_dies(tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """第一个写第 3 块的工人当场退出（拿着 Job 的也是它）：别的重做，结果不变。"""
    config = config_of(tree)
    pack_small(config, tmp_path / "here")
    marker = tmp_path / "died"
    there = f"Path({str(marker)!r})"
    die = f"path.name == '3.0.0.0' and not {there}.exists() and ({there}.touch(), os._exit(1))"
    preload(tmp_path, monkeypatch, die)
    monkeypatch.setattr(pack_module, "CHUNK_BYTES", 5 * len(CHANNELS) * 4 * 8 * 4)
    pack_module.pack(config, tmp_path / "there", "float32", 1, "python dataset.py pack ...", workers_module.LOCAL)
    assert marker.exists()
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


def test_workers_keep_dying(tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import dask.config

    preload(tmp_path, monkeypatch, "os._exit(1)")
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        pytest.raises(ValueError, match=r"dask workers kept dying at the same task, .*run the same command again"),
    ):
        pack_module.pack(config_of(tree), tmp_path / "store", "float32", 1, "c", workers_module.LOCAL)
    assert not (tmp_path / "store" / "store.json").exists()


def test_killed_and_run_again(tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str):
    """主进程打到一半 kill -9，它的工人也都退；由另一个调度器接着做，与一气呵成的相同。"""
    config, store = write_config(tmp_path, tree), tmp_path / "store"
    options = ["--config", str(config), "--out", str(store)]
    size = 5 * len(CHANNELS) * 4 * 8 * 4
    preload(tmp_path, monkeypatch, "time.sleep(0.2)")
    code = (
        "from util.commands.dataset import dataset_command\nfrom util.packing import pack\n"
        f"pack.CHUNK_BYTES = {size}\ndataset_command()"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", code, "pack", *options, "--workers", "1", "--scheduler"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while len(done := list(store.glob("pack/0*.json"))) < 3:
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)
    killed.kill()
    killed.communicate()  # 工人也都退了，不然管道不会关
    assert 3 <= len(done) < 10
    assert not (store / "store.json").exists()
    stamps = {path: path.stat().st_mtime_ns for path in done}
    monkeypatch.setattr(pack_module, "CHUNK_BYTES", size)
    command = recorded_command("pack", options)
    data = load_config(str(config), []).data
    pack_module.pack(data, store, "float32", 1, command, address)
    assert stamps == {path: path.stat().st_mtime_ns for path in done}
    pack_module.pack(data, tmp_path / "whole", "float32", 1, command)
    assert contents(store) == contents(tmp_path / "whole")


# ---- 连不上


def test_no_scheduler_there(tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """没有人应答，应答的不是 dask，写法不对：什么也没有动。"""
    monkeypatch.setattr(workers_module, "CONNECT_SECONDS", 0.5)
    options = ["--config", str(write_config(tmp_path, tree)), "--out", str(tmp_path / "store"), "--scheduler"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"--scheduler {silent}: no dask scheduler answers there"):
            main([*options, silent])
    with pytest.raises(
        ValueError, match=re.escape("--scheduler nonsense: no dask scheduler answers there (missing port")
    ):
        main([*options, "nonsense"])
    with pytest.raises(ValueError, match="data.workers=0: not an address; write key=value before --scheduler"):
        main([*options, "data.workers=0"])
    with pytest.raises(ValueError, match="--workers 0: must be at least 1"):
        check_worker_options(0, None)
    assert not (tmp_path / "store" / "pack" / "plan.json").exists()


def test_workers_without_the_repository(tmp_path: Path):
    """调度器与工人在别的文件夹里起、没有 PYTHONPATH：任务一到工人就会退出，所以先查。"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = (
        "from distributed import LocalCluster\nimport sys, time\nif __name__ == '__main__':\n"
        " cluster = LocalCluster(n_workers=1, dashboard_address='127.0.0.1:0')\n"
        " print(cluster.scheduler_address, flush=True)\n sys.stdin.read()\n cluster.close()\n"
    )
    (tmp_path / "cluster.py").write_text(code)
    other = subprocess.Popen(
        [sys.executable, "cluster.py"], cwd=tmp_path, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert other.stdout
    there = other.stdout.readline().strip()
    with (
        pytest.raises(ValueError, match=r"lacks something \(No module named 'util'\)"),
        distribute(1, there, 7) as run,
    ):
        list(run(work, [1]))
    other.communicate("")
    assert other.returncode == 0
