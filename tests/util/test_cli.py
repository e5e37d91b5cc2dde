"""命令怎样退出：别人的异常一行，程序的毛病有 traceback；两个进程一起跑的不 abort，一个出了错，哪个也不等。"""

from __future__ import annotations

import gc
import logging
import re
import signal
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import netCDF4
import numcodecs
import numpy as np
import pytest
import torch
from pydantic import BaseModel
from tqdm import tqdm

from tests.engine.runs import ROOT
from util.cli import Parser, only_new_garbage, report_error, run_command
from util.logger import setup_logging

PAIR = """
import os, sys
import torch
import torch.distributed as dist
from util.cli import Parser, only_new_garbage, report_error, run_command

fails = sys.argv[2] == "fails"
children = []
for rank in (0, 1):
    child = os.fork()
    if not child:
        break
    children.append(child)

def main():
    dist.init_process_group("gloo", f"file://{sys.argv[1]}", rank=rank, world_size=2)
    if not (fails and rank):  # 出错的那个等得到自己，等不到别的
        for _ in range(400):
            dist.all_reduce(torch.ones(200_000), async_op=True)
    if fails:
        if rank == 0:
            raise ValueError("it is wrong")
        dist.recv(torch.ones(1), 0)

if child:
    for one in children:
        print(os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]))
else:
    run_command(main)
"""


def exits(folder: Path, how: str) -> tuple[list[str], str]:
    """零号、一号进程的退出码，和它们说的话。"""
    command = [sys.executable, "-c", PAIR, str(folder / how), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.stdout.split(), done.stderr


def test_two_processes_end_before_their_threads(tmp_path: Path) -> None:
    assert exits(tmp_path, "works") == (["0", "0"], "")


def test_an_error_in_one_process_waits_for_nobody(tmp_path: Path) -> None:
    codes, said = exits(tmp_path, "fails")
    assert codes[0] == "2" and codes[1] not in ("0", "-6") and "error: rank 0: it is wrong" in said


def test_a_reader_that_leaves_is_no_error() -> None:
    code = "from util.cli import run_command\nrun_command(lambda: [print(n, flush=True) for n in range(10**6)] and 0)"
    piped = f"{sys.executable} -c '{code}' | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", piped], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("0\n141\n", "")


# ---- 别人的异常


def fails(error: Exception) -> Callable[[], Any]:
    def main() -> None:
        raise error

    return main


def run(main: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """退出码与标准错误。"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    return stopped.value.code, capsys.readouterr().err


class Small(BaseModel):
    lr: float


def bad_hdf5(folder: Path) -> None:
    with netCDF4.Dataset(folder / "a.nc", "w") as file:
        file.createDimension("x", 1000)
        file.createVariable("t", "f4", ("x",), zlib=True)[:] = np.random.default_rng(0).random(1000)
    data = bytearray((folder / "a.nc").read_bytes())
    middle = len(data) - 2000
    data[middle : middle + 500] = bytes(500)
    (folder / "a.nc").write_bytes(bytes(data))
    with netCDF4.Dataset(folder / "a.nc") as file:
        file["t"][:]


FOREIGN: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "zlib": (lambda _: zlib.decompress(b"nonsense"), 1, "error: error: Error -3 while decompressing data"),
    "numcodecs": (lambda _: numcodecs.Blosc().decode(b"x" * 40), 1, "error: RuntimeError: error during blosc"),
    "zip": (lambda folder: zipfile.ZipFile(made(folder / "a.zip")), 1, "error: BadZipFile: File is not a zip file"),
    "netCDF": (bad_hdf5, 1, "error: RuntimeError: NetCDF: "),
    "pydantic": (lambda _: Small.model_validate({"lr": "x"}), 2, "error: 1 validation error for Small lr Input"),
    "permission": (lambda folder: (folder / "none" / "a").write_text("x"), 1, "error: [Errno 2] No such file"),
    "numpy memory": (lambda _: np.ones(2**60, np.uint8), 1, "error: MemoryError: Unable to allocate 1.00 EiB"),
    "torch memory": (lambda _: torch.empty(2**60), 1, "error: RuntimeError: [enforce fail at alloc_cpu.cpp"),
}


def made(path: Path) -> Path:
    path.write_bytes(b"not a zip")
    return path


@pytest.mark.parametrize("kind", FOREIGN)
def test_errors_of_libraries_are_one_line(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    action, status, said = FOREIGN[kind]
    code, err = run(lambda: action(tmp_path), capsys)
    assert (code, err.count("\n")) == (status, 1), err
    assert err.startswith(said), err


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "lower train.batch_size"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "the device failed"),
        (RuntimeError("CUDA error: no kernel image is available"), "the device failed"),
        (RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:1"), "another process of this run"),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), "another process of this run"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space"), "--shm-size"),
        (MemoryError(), "lower train.batch_size"),
        (
            RuntimeError("put_ does not have a deterministic implementation, but you set 'torch.use_deterministic_…"),
            "leave out --deterministic",
        ),
    ],
)
def test_the_machine_says_what_to_do(error: Exception, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = run(fails(error), capsys)
    assert code == 1 and err.count("\n") == 1 and err.startswith(f"error: {type(error).__name__}: ") and remedy in err


@pytest.mark.parametrize(
    "main",
    [
        *map(fails, (AssertionError("ours"), KeyError("t2m"), TypeError("a"), AttributeError("b"), RuntimeError("c"))),
        lambda: torch.ones(2) @ torch.ones(3),
    ],
)
def test_our_own_mistakes_show_where(main: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, err = run(main, capsys)
    assert code == 1 and "Traceback (most recent call last):" in err and "error: " not in err.splitlines()[0]


def test_the_traceback_of_one_line_is_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        setup_logging(tmp_path / "train.log")
        raise ValueError("train.lr = 0")

    assert run(main, capsys) == (2, "error: train.lr = 0\n")
    log = (tmp_path / "train.log").read_text()
    assert "DEBUG stopped:" in log and 'raise ValueError("train.lr = 0")' in log


def test_the_error_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """进度条还画着；错误那一行不接在它后面。"""
    monkeypatch.setattr(logging.getLogger("ar_pred"), "disabled", True)  # pytest 收着日志，连同 traceback 里的进度条

    def main() -> None:
        bar = tqdm(total=3, leave=False)
        assert bar.n == 0
        raise ValueError("wrong")

    _, err = run(main, capsys)
    assert "0/3" in err and err.endswith("\rerror: wrong\n")


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyError("ours"), KeyboardInterrupt()])
def test_a_bar_that_somebody_holds_is_taken_away(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    """上文里的异常、别处还拿着进度条的，也一样。"""
    bar = tqdm(total=3, desc="wait=15%")

    def main() -> None:
        raise error

    _, err = run(main, capsys)
    assert bar.disable and "wait=15%" in err
    assert not any("wait" in line and ("rror" in line or "interrupted" in line) for line in err.splitlines()), err


def test_only_the_last_words_of_a_reading_process(capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        "  File \"a.py\", line 1, in f\nOSError: [Errno 5] Input/output error: 'a.npy'\n"
    )
    assert run(fails(OSError(text)), capsys) == (1, "error: [Errno 5] Input/output error: 'a.npy'\n")


def test_a_second_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: signal.raise_signal(signal.SIGINT), capsys) == (130, "interrupted\n")


def test_garbage_of_before_is_not_looked_at() -> None:
    old = [[] for _ in range(1000)]
    with only_new_garbage():
        new: list[object] = []
        looked_at = {id(one) for one in gc.get_objects()}  # 冻住的不在里面
        assert id(new) in looked_at and id(old[0]) not in looked_at
    assert id(old[0]) in {id(one) for one in gc.get_objects()}


def test_an_unknown_argument_is_told_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="x.py")
    parser.add_argument("--config")
    for words in (["--conf", "a"], ["a=- 1\n- 2"]):
        with pytest.raises(SystemExit) as caught:
            parser.parse_args(words)
        assert caught.value.code == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said == f"x.py: error: unrecognized arguments: {' '.join(' '.join(words).split())}"


def test_a_name_too_long_for_a_file_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match="too long") as caught:
        Path("x" * 300).read_bytes()
    assert report_error(caught.value) == 2
    assert re.fullmatch(r"error: .*File name too long.*\n", capsys.readouterr().err)
