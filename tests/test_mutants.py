"""改坏的配置、改坏的命令行：走得通，或是一行 `error: …`、退出码 2；没有一个是 traceback。

套件里几十份配置，久测里一万份、两千条命令行（另有一百条真的起进程）；怎样改见 mutants.py。
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from engine.cases.plan import plan_cases
from engine.cases.settings import read_cases
from engine.commands import (
    compare_command,
    compare_parser,
    evaluate_command,
    evaluate_parser,
    inference_command,
    inference_parser,
    train_command,
    train_parser,
)
from engine.comparison.suite import Suite
from engine.imagined import imagined_spec
from engine.memory.estimate import estimate, this_machine
from models import build_config, build_model
from tests.engine.runs import write_run
from tests.mutants import ROOT, YAMLS, Mutant, changed_words, is_safe, options_of, yaml_mutants
from util.calendar import year_start
from util.cli import report_error
from util.commands.dataset import WORDS, dataset_command
from util.config import RunConfig, load_config, read_mapping
from util.data.index import split_hours
from util.scores.regions import read_regions
from util.source.request import read_request
from util.strict import _all_keys, validate

pytestmark = pytest.mark.usefixtures("unrendered")
CONFIGS, LINES, PROCESSES = {"suite": 40, "soak": 10_000}, {"suite": 25, "soak": 250}, {"suite": 2, "soak": 100}
PARTS = 8  # 一次走完要一个多小时
PROFILE = settings.get_current_profile_name()
PATIENCE = 2.0  # 秒：一条命令走了这么久，就是走得通
MOST_MEMORY = 12 * 2**30  # 字节，地址空间


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """在这个文件夹里，警告不算。"""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(folder)
        yield


def written_here(error: BaseException) -> bool:
    """这句话是我们写的：抛它的在仓库里，不是别的库碰巧也抛 ValueError。"""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(ROOT)


def look(mutant: Mutant, path: Path) -> None:
    """改过的 YAML 照它的用处读，走到造好模型（只有形状）；deep: 走到假的一步。"""
    path.write_bytes(mutant.text)
    kind = Path(mutant.of).parent.name
    if mutant.of == "config/regions.yaml":
        read_regions(path, imagined_spec(load_config("config/quickstart.yaml").data))
    elif mutant.of == "config/cases.yaml":
        spec = imagined_spec(load_config("config/quickstart.yaml").data)
        inits = np.arange(year_start(1981), year_start(1982), 6)
        plan_cases(read_cases(path), spec, inits, 4, 2, np.ones(spec.height))
    elif kind == "maps":
        read_request(str(path), [])
    elif kind == "suites":
        suite = validate(Suite, read_mapping(path), str(path))
        for member in suite.members[:2]:
            changes = [*suite.overrides, *member.overrides, f"run.name={member.run or member.label}"]
            see(load_config(member.config, changes, mutant.smoke), mutant)
    elif kind == "data":
        see(load_config("config/quickstart.yaml", [f"data.set={path}"], mutant.smoke), mutant)
    else:
        see(load_config(path, [], mutant.smoke), mutant)


def see(config: RunConfig, mutant: Mutant) -> None:
    build_config(config.model, mutant.of)
    split_hours(config.data)
    if mutant.deep and mutant.smoke:
        estimate(config, this_machine(torch.device("cpu")))
    elif mutant.smoke:
        only_shapes = contextlib.suppress(DataDependentOutputException)  # 造的时候要问数的（DiT），走到那里就够了
        with only_shapes, FakeTensorMode(allow_non_fake_inputs=True):
            build_model(config.model, imagined_spec(config.data))


@pytest.mark.parametrize("name", YAMLS)
def test_as_shipped_they_are_fine(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    look(Mutant(name, (ROOT / name).read_bytes(), smoke="suites" not in name, deep=False), tmp_path / "x.yaml")


@settings(max_examples=CONFIGS[PROFILE])
@given(mutant=yaml_mutants())
def test_mutated_configs(mutant: Mutant) -> None:
    note(f"{mutant.of}, smoke={mutant.smoke}, deep={mutant.deep}:\n{mutant.text.decode(errors='replace')}")
    with inside(ROOT), TemporaryDirectory() as folder:
        try:
            look(mutant, Path(folder) / "mutant.yaml")
        except ValueError as error:
            if not written_here(error):
                raise


# ---- 命令行

TRAINING, CHECKPOINT = ("--config", "run.yaml"), ("--checkpoint", "best.ckpt")
SPLITS = "--train 2000-01-01 2000-01-20 --val 2000-01-21 2000-01-25 --test 2000-01-26 2000-01-31"
SOURCE = f"--source source.nc --variable t2m=t2m {SPLITS}"
SCRIPTS: dict[str, tuple[Callable[..., int], list[str]]] = {
    "train.py": (
        train_command,
        [
            "--config run.yaml train.epochs=1 run.name=again",
            "--config run.yaml --resume auto run.name=trained",
            "--resume best.ckpt --no-verify --config run.yaml run.name=trained",
            "--config run.yaml --smoke",
            "--config run.yaml --estimate train.batch_size=2",
            "--explain train.lr",
        ],
    ),
    "train_ar_pred_video_vanilla.py": (
        partial(train_command, default_config="run.yaml"),
        ["train.epochs=0", "--explain model.depth"],
    ),
    "inference.py": (
        inference_command,
        [
            "--checkpoint best.ckpt --time 2000-02-01T00 --out out --steps 2",
            "--checkpoint best.ckpt --time 2000-02-01T00 2000-02-03T00 24 --save zarr --overwrite --out out",
            "--checkpoint best.ckpt --inputs frames.npy --out out --members 2 --perturb 0.1 --smooth 5",
            "--checkpoint best.ckpt --card",
            "--checkpoint best.ckpt --time 2000-02-01T00 --out out data.root=tree data.workers=0",
        ],
    ),
    "inference_ar_pred_video_vanilla.py": (
        inference_command,
        ["--checkpoint best.ckpt --time 2000-02-01T00 --out out"],
    ),
    "evaluate.py": (
        evaluate_command,
        [
            "--checkpoint best.ckpt --out out --save none",
            "--checkpoint best.ckpt --split val --steps 2 --stride 3 --save npy zarr --overwrite --out out",
            "--checkpoint best.ckpt --thresholds t2m=273.15,280 --points 39.9N,116.4E --out out --stride 2",
            "--checkpoint best.ckpt --out out data.root=tree data.workers=0",
        ],
    ),
    "compare.py": (compare_command, ["--runs log/trained --out out", "--runs log/trained"]),
    "dataset.py": (
        dataset_command,
        [
            "sample --root new --grid 8x16 --years 1979 --interval 24 --levels level_00,level_07 --drop 0.01",
            f"import --root new {SOURCE} --yaml new.yaml",
            f"import --store new {SOURCE} --dtype float16 --rows 0:4 --cols 0:8",
            "import --root new --source source.nc --map map.yaml --dates 2000-01-01 2000-01-31 " + SPLITS,
            "check --config run.yaml --out check.json --workers 1",
            "scan --config run.yaml --rebuild",
            "statistics --config run.yaml --write --overwrite --tendency --workers 1",
            "pack --config run.yaml --out new --dtype float16 --workers 1",
            "verify --out store --workers 1",
            "export --store store --root new --netcdf new.nc --overwrite",
        ],
    ),
}
PARSERS = {"train": train_parser, "inference": inference_parser, "evaluate": evaluate_parser, "compare": compare_parser}
MODEL = ("name", "token_size", "dim", "depth", "heads", "decoder_width", "grouping", "mask_ratio", "act", "predict")
KEYS = [*_all_keys(RunConfig, ""), *(f"model.{key}" for key in MODEL), "data.set", "data.variables.t2m", "x", ""]


def flags_of(script: str, words: Sequence[str]) -> list[str]:
    """这个命令的选项。"""
    if script == "dataset.py":
        return options_of(import_module(WORDS[words[0]].module).make_parser())
    return options_of(PARSERS[script.removesuffix(".py").removesuffix("_ar_pred_video_vanilla")]())


class Line(NamedTuple):
    script: str
    words: list[str]


@st.composite
def lines(draw: Any, alone: bool = False) -> Line:
    script = draw(st.sampled_from([*SCRIPTS, *["dataset.py"] * 4, "inference.py", "evaluate.py"]))
    words = draw(st.sampled_from(SCRIPTS[script][1])).split()
    flags = flags_of(script, words)
    for _ in range(draw(st.integers(1, 3))):
        words = changed_words(draw, words, flags, KEYS)
    assume(is_safe(words, alone))
    return Line(script, words)


@pytest.fixture(scope="module")
def place(make_tree: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """命令行提到的一切：树、配置、检查点、存档、源文件；各命令原样走得通。"""
    folder = tmp_path_factory.mktemp("place")
    tree = make_tree(folder / "tree", ("t2m", "u10"), (8, 16), "2000-01-01", "2000-02-20", 24)
    here = {"root": "tree", "cache_dir": "tmp"}
    write_run(folder, tree, train={"epochs": 1}, data=here, checkpoint={"dir": "checkpoints"}, log={"dir": "log"})
    with inside(folder):
        for script, words in (
            ("train.py", "run.name=trained --config run.yaml"),
            ("dataset.py", "pack --config run.yaml --out store"),
        ):
            assert run_here(Line(script, words.split()), patience=300)[0] == 0
    content = (folder / "checkpoints/trained/best.ckpt").read_bytes()
    (folder / "best.ckpt").write_bytes(content)
    (folder / "broken.ckpt").write_bytes(content[:999] + b"broken" + content[1005:])
    np.save(folder / "frames.npy", np.zeros((3, 8, 16, 2), np.float32))
    (folder / "map.yaml").write_text("variables: {t2m: {source: t2m, units: K}}", encoding="utf-8")
    (folder / "empty").mkdir()
    (folder / "file").touch()
    times = np.datetime64("2000-01-01", "ns") + np.arange(31) * np.timedelta64(24, "h")
    values = np.random.default_rng(0).normal(280, 5, (31, 8, 16)).astype(np.float32)
    fields = {"t2m": (("time", "lat", "lon"), values, {"units": "K"})}
    grid = {"lat": np.linspace(78.75, -78.75, 8), "lon": np.arange(16) * 22.5}
    xr.Dataset(fields, {"time": times, **grid}).to_netcdf(folder / "source.nc")
    return folder


def run_here(line: Line, patience: float = PATIENCE) -> tuple[int, str]:
    """退出码、标准错误；走够久的杀了，算 0。在 fork 出来的进程里走：不必各等 torch，半途打断也弄不坏测试自己的进程。"""
    with TemporaryFile() as said:
        child = os.fork()
        if not child:
            os.setsid()
            status = 70
            try:
                status = _run(line, said.fileno())
            finally:
                os._exit(status)
        until, ended, status = time.monotonic() + patience, 0, 0
        while not ended and time.monotonic() < until:
            time.sleep(0.005)
            ended, status = os.waitpid(child, os.WNOHANG)
        with contextlib.suppress(ProcessLookupError):  # 它起的读取进程也在内
            os.killpg(child, signal.SIGKILL)
        if not ended:
            os.waitpid(child, 0)
            return 0, ""
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read().decode(errors="replace")


def _run(line: Line, said: int) -> int:
    """fork 出来的进程里的。"""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sys.stderr, sys.stdout = (os.fdopen(one, "w", buffering=1, errors="replace") for one in (said, nowhere))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    try:
        return SCRIPTS[line.script][0](line.words) or 0
    except SystemExit as stop:
        return int(stop.code or 0)
    except Exception as error:  # noqa: BLE001  run_command 也这样
        return report_error(error)
    finally:
        sys.stderr.flush()


def judge(status: int, said: str) -> None:
    """走通，或末一行是错误、退出码 2；dataset.py check、verify 查出毛病的是 1，没有错误。"""
    assert "Traceback" not in said, said
    last = (said.strip().splitlines() or [""])[-1]
    assert status == 0 or (status == 1 and "error: " not in last) or (status == 2 and "error: " in last), (status, said)


@pytest.mark.soak
@pytest.mark.parametrize("script", SCRIPTS)
def test_lines_as_they_are(script: str, place: Path, tmp_path: Path) -> None:
    lines = [words for words in SCRIPTS[script][1] if not words.startswith("sample")]  # 造一年要一分钟，别处有
    for number, words in enumerate(lines):
        shutil.copytree(place, tmp_path / str(number))
        with inside(tmp_path / str(number)):
            assert run_here(Line(script, words.split()), patience=300)[0] == 0, words


@pytest.mark.soak
@pytest.mark.parametrize("part", range(PARTS))
@settings(max_examples=LINES[PROFILE], suppress_health_check=[HealthCheck.filter_too_much])
@given(line=lines())
def test_mutated_command_lines(place: Path, part: int, line: Line) -> None:
    note(f"{line.script} {line.words}")
    with TemporaryDirectory() as folder, inside(Path(shutil.copytree(place, f"{folder}/here"))):
        judge(*run_here(line))


@pytest.mark.soak
@settings(max_examples=PROCESSES[PROFILE], suppress_health_check=[HealthCheck.filter_too_much])
@given(line=lines(alone=True))
def test_mutated_command_lines_as_processes(place: Path, line: Line) -> None:
    note(f"{line.script} {line.words}")
    with TemporaryDirectory() as folder:
        here = shutil.copytree(place, f"{folder}/here")
        command = [sys.executable, str(ROOT / line.script), *line.words]
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, cwd=here, capture_output=True, text=True, errors="replace", timeout=60)
            judge(done.returncode, done.stderr)
