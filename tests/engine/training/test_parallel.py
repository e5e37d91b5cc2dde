"""几个进程与一个进程：同样的损失，各自停、各自死都不连累别的干等。两次启动，里面各走几个训练。

本文件也是那两个进程跑的程序：参数是一列训练，各是配置、续训的检查点、覆盖的键（JSON）。
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.tensor import DTensor

from engine.training import loop, snapshot
from engine.training.finish import finish
from engine.training.state import train_step
from tests.engine.runs import ROOT, checkpoint, losses, train_here, write_run
from util.checkpoint import flat, load_checkpoint
from util.cli import run_command
from util.data.origin import DataError
from util.signals import STOPS as SIGNALS
from util.signals import catch_signals

THIS = "tests.engine.training.test_parallel"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
DRAWN = {"query": "resampled"}  # 拿掉的区块、遮挡、query：损失里的随机数都有
ROLLED = "train.objective.rollout={schedule: [[0, 1], [3, 2]]}"
CNN = ("model={name: cnn, width: 8}", "train.accumulate=2", ROLLED)  # BatchNorm
STOPS = "run.name=stops"
PREFLIGHT_AND_SAVES = ("train.preflight=true", "checkpoint.every_minutes=1e-4")  # 每几步存一次：要一起存
DDP = ("run.devices=2", "run.strategy=ddp")
FSDP = ("run.devices=2", "run.strategy=fsdp")
EVERYTHING = (
    *("train.accumulate=2", "train.ema_decay=0.5", "train.clip_norm=0.05", "train.optimizer=adamw"),
    *("train.weight_decay=0.1", "train.schedule={name: constant, warmup_steps: 2}"),
    *("data.eval_stride=3", "checkpoint.sharded=true", ROLLED),
)
WINDOWS = {
    "train": ["2000-01-01", "2000-02-01"],
    "val": ["2000-02-02", "2000-02-10"],
    "test": ["2000-02-11", "2000-02-12"],
}
LEFT = 20  # 秒：一个死了，另一个至多再留这么久
Run = tuple[Path, str | None, Sequence[str]]


def start_two(runs: Sequence[Run], failure: str, launcher: Sequence[str] = ()) -> tuple[int, str, float]:
    """两个进程依次走 runs，末一个走到第三步时一号进程出事（failure）；退出码、标准错误、末一个训练用的秒数。"""
    written = json.dumps([[str(config), resume, list(overrides)] for config, resume, overrides in runs])
    began = time.time()
    done = subprocess.run(
        [sys.executable, *launcher, "-m", THIS, failure, written],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    stopping = runs[-1][0].parent / "log/stops/config.yaml"
    since = stopping.stat().st_mtime if stopping.exists() else began
    return done.returncode, done.stderr, time.time() - since


@pytest.fixture(autouse=True)
def without_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """收尾另有测试。"""
    monkeypatch.setattr(loop, "finish", lambda run: None)


@pytest.fixture(scope="module")
def config(make_tree, tmp_path_factory) -> Path:
    """一轮 32 个窗口，8 步，没有零头。"""
    folder = tmp_path_factory.mktemp("parallel")
    tree = make_tree(folder / "tree", ("t2m", "u10"), (8, 16), "2000-01-01", "2000-02-20")
    return write_run(folder, tree, model=DRAWN, data={"splits": WINDOWS}, train={"epochs": 1})


@pytest.fixture(scope="module")
def first(config) -> tuple[int, str, float]:
    """我们自己起的两个进程。"""
    runs: list[Run] = [
        (config, None, ("run.name=two", *DDP, *PREFLIGHT_AND_SAVES)),
        (config, None, ("run.name=cnn-two", *DDP, *CNN, "data.residency=device")),
        (config, None, ("run.name=cnn-fsdp", *FSDP, *CNN)),
        (config, None, ("run.name=fsdp-two", *FSDP, *EVERYTHING)),
        (config, None, ("run.name=signals-3", *DDP, "train.epochs=1000")),
        (config, None, (STOPS, *DDP)),
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
    """累积的两个小批各自统计，每一个都是两个进程合在一起的；滑动平均也相同，滚动的各步在内。数据在两个进程共用的一块内存里。"""
    assert train_here(config, "run.name=cnn-one", *CNN) == 0
    assert same(config.parent, "cnn-one", "cnn-two")
    assert same(config.parent, "cnn-one", "cnn-fsdp")  # 卷积核通道排在末尾
    one, two = (checkpoint(config.parent, name)["model"] for name in ("cnn-one", "cnn-two"))
    running = [name for name in one if "running" in name]
    assert running and all(
        two[name].numpy() == pytest.approx(one[name].numpy(), rel=1e-3, abs=1e-5) for name in running
    )


def test_shards_equal_one(config, first):
    """累积、EMA、裁剪、权重衰减、滚动都在；last 是分片的，best 是完整的一个文件。"""
    folder = config.parent / "checkpoints"
    assert train_here(config, "run.name=fsdp-one", *EVERYTHING) == 0
    assert same(config.parent, "fsdp-one", "fsdp-two")
    for name in ("last", "best"):
        one, two = (checkpoint(config.parent, run, name) for run in ("fsdp-one", "fsdp-two"))
        assert one["optimizer"]["param_groups"] == two["optimizer"]["param_groups"]
        expected, found = flat(one), flat(two)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].numpy() == pytest.approx(value.numpy(), rel=1e-3, abs=1e-5), key
    shares = [json.loads((folder / f"fsdp-two/share-{rank}.json").read_text()) for rank in (0, 1)]
    total = sum(value.numel() for key, value in expected.items() if key.endswith(".exp_avg"))
    assert sum(shares) == total and max(shares) < 0.6 * total  # 各进程真的只留着一片
    assert len(list(folder.glob("fsdp-two/*.shards"))) == 1 and not list(folder.glob("fsdp-two/best*.shards"))


def test_an_error_in_one_process_ends_all(first):
    """一号进程的错一行，说出是几号；零号只说别的进程停了。"""
    code, said, seconds = first
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code and seconds < LEFT
    assert "error: rank 1: t2m cannot be read" in lines, said
    assert "Traceback" not in said


def test_a_killed_process_ends_all(config, first):
    """两个进程存的，一个进程接着，再由 torchrun 的两个接着：与没停过的一个进程相同。末了一号在存第三片时被 kill -9。"""
    runs: list[Run] = []
    for name, strategy, more in (("two", DDP, ()), ("fsdp-two", FSDP, EVERYTHING)):
        last = str(config.parent / f"checkpoints/{name}/last.ckpt")
        assert train_here(config, f"run.name={name}", "train.epochs=2", *more, resume=last) == 0
        runs.append((config, last, (f"run.name={name}", "train.epochs=3", *strategy, *more)))
    (config.parent / "checkpoints/fsdp-two/last-deadbeef.shards").mkdir()  # 从前写到一半被杀的
    always = ("checkpoint.sharded=true", "checkpoint.every_minutes=1e-9")
    code, said, _ = start_two([*runs, (config, None, ("run.name=killed", *FSDP, *always))], "is killed", TORCHRUN)
    assert code and "Signal 9 (SIGKILL) received" in said
    for name, more in (("two", ()), ("fsdp-two", EVERYTHING)):
        assert train_here(config, f"run.name=whole-{name}", "train.epochs=3", *more) == 0
        assert same(config.parent, f"whole-{name}", name)
    assert not list(config.parent.glob("checkpoints/fsdp-two/last-deadbeef.shards"))
    last = config.parent / "checkpoints/killed/last.ckpt"
    assert load_checkpoint(last)["progress"]["step"] == 3 and len(list(last.parent.glob("*.shards"))) == 2
    (whole,) = (last.parent / load_checkpoint(last, gather=False)["shards"]).glob("*00001-model*")
    whole.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"shard-00001-model\S+: \S+ is damaged, it is not what was saved"):
        load_checkpoint(last)
    shutil.rmtree(whole.parent)
    with pytest.raises(ValueError, match="its tensors are in the folder .*, which is not beside it"):
        load_checkpoint(last)


def stopped_everywhere(folder: Path, name: str) -> list[int]:
    """各次的退出码，两个进程一样；收到信号的那个至多再走两步：那一步走完，下一步大家都知道了。"""
    (codes, over), (others, theirs) = (json.loads((folder / f"log/{name}/{rank}.json").read_text()) for rank in (0, 1))
    assert codes == others and max(over + theirs) <= 2, (codes, over, theirs)
    return codes


def test_signals_at_random_moments_stop_both(config, first):
    """一个进程收到的信号，归约时不会被别人的盖过：说了停就停，步子不重不漏。"""
    codes = stopped_everywhere(config.parent, "signals-3")
    assert len(codes) == 3 and all(code - 128 in SIGNALS for code in codes)
    steps = [step for step, _ in losses(config.parent, "signals-3")]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.soak
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["ours", "torchrun"])
def test_forty_signals_change_nothing(config, launcher):
    """随机的时刻、随机的一个进程、三种信号，四十次，与没有停过的两个进程逐位相同；收尾时来的十次也能再来。"""
    one, end, folder = f"signals-40-{len(launcher)}", f"ends-10-{len(launcher)}", config.parent
    runs: list[Run] = [(config, None, (f"run.name={name}", *DDP, "train.epochs=1000")) for name in (one, end)]
    last: Run = (config, None, (f"{STOPS}-{len(launcher)}", *DDP))
    start_two([*runs, last], "raises", launcher)
    codes = stopped_everywhere(folder, one)
    assert len(codes) == 40 and all(code - 128 in SIGNALS for code in codes)
    epochs, whole = checkpoint(folder, one)["progress"]["epoch"], f"whole-{one}"
    start_two([(config, None, (f"run.name={whole}", *DDP, f"train.epochs={epochs}")), last], "raises", launcher)
    assert losses(folder, one) == losses(folder, whole)
    assert losses(folder, one, "val", "loss") == losses(folder, whole, "val", "loss")
    codes = stopped_everywhere(folder, end)
    assert len(codes) == 20 and all(code == 0 or code - 128 in SIGNALS for code in codes) and not any(codes[1::2])
    assert len([code for code in codes[::2] if code]) > 2, codes
    assert len(list(folder.glob(f"log/{end}-*/metrics.json"))) == 10


@pytest.mark.soak
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["ours", "torchrun"])
def test_a_signal_saves_on_every_process(config, launcher):
    """存好了才一起走：先走的以 143 退出，没走的就会被杀。"""
    name = f"term-{len(launcher)}"
    command = ["train.py", "--config", str(config), f"run.name={name}", *FSDP, "train.epochs=1000"]
    job = subprocess.Popen([sys.executable, *launcher, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics, until = config.parent / f"log/{name}/metrics.csv", time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert job.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=100)
    assert "stopped by SIGTERM; resume with: python train.py" in said
    assert job.returncode in (143, 1)  # torchrun 的是 1
    assert checkpoint(config.parent, name)["progress"]["step"] > 0


ORPHAN = """
import os, signal, time
from util.signals import die_with_parent
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
    loop.finish = write_share  # 收尾另有测试
    for config, resume, overrides in runs[:-1]:
        name = overrides[0].removeprefix("run.name=")
        if name.startswith("signals-"):
            interrupted(Path(config), overrides, name)
        elif name.startswith("ends-"):
            interrupted_at_the_end(Path(config), overrides[1:], name)
        else:
            train_here(Path(config), *overrides, resume=resume)
    if failure == "raises":
        loop.train_step = third_fails(loop.train_step)
    else:
        snapshot.write_shards = third_fails(snapshot.write_shards)
    config, resume, overrides = runs[-1]
    train_here(Path(config), *overrides, resume=resume)


def write_share(run: loop.Run) -> None:
    """这个进程留着几个参数。"""
    kept = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in run.state.model.parameters())
    (run.checkpoint_dir / f"share-{run.fabric.global_rank}.json").write_text(json.dumps(kept))


class Signals:
    """每次训练里一次：随机的时刻，随机的一个进程，随机的一种；两个进程抽得一样。"""

    def __init__(self, longest: float) -> None:
        self.draw, self.longest = random.Random(7), longest  # noqa: S311
        self.steps = self.before = self.rank = 0
        self.timer: threading.Timer | None = None
        self.over: list[int] = []
        self.codes: list[int] = []
        step, fit = loop.train_step, loop.fit

        def counted(*arguments: Any) -> Any:
            self.steps += 1
            return step(*arguments)

        def signalled(run: loop.Run) -> None:
            self.rank = run.fabric.global_rank
            if self.timer is not None:
                self.timer.start()
            fit(run)

        loop.train_step, loop.fit = counted, signalled
        self.before_us = step, fit

    def train(self, config: Path, *overrides: str) -> None:
        """一次训练；收到信号之后多走了几步记进 over。"""
        rank, number, wait = self.draw.randrange(2), self.draw.choice(SIGNALS), self.draw.uniform(0, self.longest)
        self.before = -1

        def send() -> None:
            if self.rank == rank:
                self.before = self.steps
                os.kill(os.getpid(), number)

        self.timer = timer = threading.Timer(wait, send)
        with catch_signals():  # 来得太晚的
            self.codes.append(train_here(config, *overrides, resume="auto"))
            timer.cancel()
            timer.join()
        self.timer = None
        if self.before >= 0:
            self.over.append(self.steps - self.before)

    def restore(self) -> None:
        loop.train_step, loop.fit = self.before_us

    def write(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / f"{self.rank}.json").write_text(json.dumps([self.codes, self.over]))


def interrupted(config: Path, overrides: Sequence[str], name: str) -> None:
    """停那么多次，每次都接着走；末了把停下的那一轮走完。"""
    signals = Signals(longest=0.5)
    for _ in range(int(name.split("-")[1])):
        signals.train(config, *overrides)
    signals.restore()
    epoch = checkpoint(config.parent, name)["progress"]["epoch"]
    train_here(config, *overrides, f"train.epochs={epoch + 1}", resume="auto")
    signals.write(config.parent / "log" / name)


def interrupted_at_the_end(config: Path, overrides: Sequence[str], name: str) -> None:
    """一步也不走，信号来在收尾里；再来一次就走完。"""
    signals, loop.finish = Signals(longest=4), finish
    for number in range(int(name.split("-")[1])):
        here = (*overrides, f"run.name={name}-{number}", "train.epochs=0")
        signals.train(config, *here)
        signals.codes.append(train_here(config, *here, resume="auto"))
    signals.restore()
    loop.finish = write_share
    signals.write(config.parent / "log" / name)


def third_fails(action: Callable[..., Any]) -> Callable[..., Any]:
    """一号进程第三次做 action 时：走一步读不出数据；存一片时被杀。"""
    times = itertools.count(1)

    def do(*arguments: Any) -> Any:
        if next(times) == 3 and os.environ["RANK" if "RANK" in os.environ else "LOCAL_RANK"] == "1":
            if action is train_step:
                raise DataError("t2m cannot be read")
            os.kill(os.getpid(), signal.SIGKILL)
        return action(*arguments)

    return do


if __name__ == "__main__":
    run_command(train_all)
