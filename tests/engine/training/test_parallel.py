"""几个进程与一个进程：同样的损失，各自停、各自死都不连累别的干等。两次启动，里面各走几个训练。

本文件也是那两个进程跑的程序：参数是一列训练，各是配置、续训的检查点、覆盖的键（JSON）。
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.training import loop
from engine.training.state import train_step
from tests.engine.runs import ROOT, checkpoint, losses, train_here, write_run
from util.cli import run_command
from util.data.origin import DataError

THIS = "tests.engine.training.test_parallel"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
DRAWN = {"query": "resampled"}  # 拿掉的区块、遮挡、query：损失里的随机数都有
CNN = "model={name: cnn, width: 8}"  # BatchNorm
STOPS = "run.name=stops"
PREFLIGHT_AND_SAVES = ("train.preflight=true", "checkpoint.every_minutes=1e-4")  # 每几步存一次：要一起存
WINDOWS = {"train": ["2000-01-01", "2000-02-01"], "val": ["2000-02-02", "2000-02-10"], "test": ["2000-02-11"] * 2}
LEFT = 20  # 秒：一个死了，另一个至多再留这么久
Run = tuple[Path, str | None, Sequence[str]]


def start_two(runs: Sequence[Run], failure: str, launcher: Sequence[str] = ()) -> tuple[int, str, float]:
    """两个进程依次走 runs，末一个走到第三步时一号进程出事（failure）；退出码、标准错误、末一个训练用的秒数。"""
    written = json.dumps([[str(config), resume, list(overrides)] for config, resume, overrides in runs])
    began = time.time()
    done = subprocess.run(
        [sys.executable, *launcher, "-m", THIS, failure, written], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    stopping = runs[-1][0].parent / "log/stops/config.yaml"
    since = stopping.stat().st_mtime if stopping.exists() else began
    return done.returncode, done.stderr, time.time() - since


@pytest.fixture(scope="module")
def config(make_tree, tmp_path_factory) -> Path:
    """一轮 32 个窗口，8 步，没有零头。"""
    folder = tmp_path_factory.mktemp("parallel")
    tree = make_tree(folder / "tree", ("t2m", "u10"), (8, 16), "2000-01-01", "2000-02-20")
    return write_run(folder, tree, model=DRAWN, data={"splits": WINDOWS}, train={"epochs": 1})


@pytest.fixture(scope="module")
def first(config) -> tuple[int, str, float]:
    """我们自己起的两个进程。"""
    ddp = ("run.devices=2", "run.strategy=ddp")
    runs: list[Run] = [
        (config, None, ("run.name=two", *ddp, *PREFLIGHT_AND_SAVES)),
        (config, None, ("run.name=cnn-two", *ddp, CNN, "train.accumulate=2", "data.residency=device")),
        (config, None, (STOPS, *ddp)),
    ]
    return start_two(runs, "raises")


def same(folder: Path, one: str, two: str, rel: float = 1e-4) -> bool:
    """每一步、每一轮的损失。"""
    for split, name in (("train", "loss"), ("val", "loss")):
        expected, found = losses(folder, one, split, name), losses(folder, two, split, name)
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=rel)
    return True


def test_two_processes_equal_one(config, first):
    assert train_here(config, "run.name=one") == 0
    assert same(config.parent, "one", "two")


def test_batch_norm_sees_the_batch_of_all_processes(config, first):
    """累积的两个小批各自统计，每一个都是两个进程合在一起的；滑动平均也相同。数据在两个进程共用的一块内存里。"""
    assert train_here(config, "run.name=cnn-one", CNN, "train.accumulate=2") == 0
    assert same(config.parent, "cnn-one", "cnn-two")
    one, two = (checkpoint(config.parent, name)["model"] for name in ("cnn-one", "cnn-two"))
    running = [name for name in one if "running" in name]
    assert running and all(
        two[name].numpy() == pytest.approx(one[name].numpy(), rel=1e-3, abs=1e-5) for name in running
    )


def test_an_error_in_one_process_ends_all(first):
    """一号进程的错一行，说出是几号；零号只说别的进程停了。"""
    code, said, seconds = first
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code and seconds < LEFT
    assert "error: rank 1: t2m cannot be read" in lines, said
    assert "Traceback" not in said


def test_a_killed_process_ends_all(config, first):
    """两个进程存的，一个进程接着，再由 torchrun 的两个接着：与没停过的一个进程相同；末了一号被 kill -9。"""
    assert train_here(config, "run.name=whole", "train.epochs=3") == 0
    last = str(config.parent / "checkpoints/two/last.ckpt")
    assert train_here(config, "run.name=two", "train.epochs=2", resume=last) == 0
    ddp = ("run.devices=2", "run.strategy=ddp")
    runs: list[Run] = [
        (config, last, ("run.name=two", "train.epochs=3", *ddp)),
        (config, None, ("run.name=stops-2", *ddp)),
    ]
    code, said, _ = start_two(runs, "is killed", TORCHRUN)
    assert code and "Signal 9 (SIGKILL) received" in said
    assert same(config.parent, "whole", "two")


ORPHAN = """
import os, signal, time
from engine.parallel import die_with_parent
reading, writing = os.pipe()
if os.fork():
    os.read(reading, 1)
    os.kill(os.getpid(), signal.SIGKILL)
die_with_parent()
print("started", flush=True)
os.write(writing, b"x")
time.sleep(600)
"""


def test_processes_started_by_the_main_one_die_with_it():
    """零号被杀，它起的还卡在归约里、听不见信号，也一起走：管道关上了，输出才读得完。"""
    done = subprocess.run([sys.executable, "-c", ORPHAN], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL and done.stdout == "started\n"


# ---- 在那两个进程里


def train_all() -> None:
    failure, runs = sys.argv[1], json.loads(sys.argv[2])
    loop.finish = lambda run: None  # 收尾另有测试
    for config, resume, overrides in runs[:-1]:
        train_here(Path(config), *overrides, resume=resume)
    loop.train_step = failing(failure)
    config, resume, overrides = runs[-1]
    train_here(Path(config), *overrides, resume=resume)


def failing(how: str):
    """一号进程走到第三步时。"""

    def step(fabric, state, config, batches):
        if fabric.global_rank == 1 and state.progress.step == 2:
            if how == "raises":
                raise DataError("t2m cannot be read")
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(fabric, state, config, batches)

    return step


if __name__ == "__main__":
    run_command(train_all)
