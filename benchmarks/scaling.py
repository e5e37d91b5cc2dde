"""一步多少秒，由字节、浮点运算与各自的速率算：`python -m benchmarks.scaling [--predict] [key=value ...]`。

逐小时 69 个通道（4 个单层、5 个变量各 13 层，128 × 256）。起两个进程（处理器，各一个线程），轮流地：零号自己走几步（一
个进程的训练），两个一起走几步（DDP），零号单量各样的速率（归约两个一起）；各取各轮里最快的，与算的相比。速率在半批上量，单量的
都不是要预报的那一步。墙上的时间与处理器时间各比一遍：机器忙的时候前者不作数。数据是随机的目录树，量完删掉。
--predict 不量：速率是 ASSUMED 里写着的显卡的。
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.strategies.single_device import SingleDeviceStrategy
from torch.nn.utils import get_total_norm

from benchmarks.random_tree import write_tree
from benchmarks.step.arithmetic import training_flops
from engine.device import kept_memory
from engine.imagined import imagined_spec
from engine.objective import objective_loss
from engine.training.run import epoch_batches, make_fabric
from engine.training.state import State, build_state, train_step, update
from models import build_model
from util.batch import Batch, DataSpec
from util.calendar import parse_time
from util.cli import aligned, run_command
from util.config import RunConfig, load_config
from util.data.batches import share_batches
from util.data.dataset import WeatherData, open_data
from util.data.feed import feed

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
CONFIG = "config/ar_pred_video_vanilla.yaml"
HOURLY = (
    "data.variables={t2m: single, tp: single, u10: single, v10: single, r: all, t: all, u: all, v: all, z: all}",
    "data.interval_hours=1",
)
SPLITS = {"train": ("2000-01-01", "2000-01-02"), "val": ("2000-01-03",) * 2, "test": ("2000-01-04",) * 2}  # 两端都含
SINGLE = 4  # float32 的字节
CLOCKS = {"wall": time.perf_counter, "CPU": time.process_time}


class Work(NamedTuple):
    """一个窗口：读的字节、前向加反向的浮点运算；学得动的参数的个数。"""

    bytes: float
    flops: float
    parameters: int


class Rates(NamedTuple):
    """一个进程每秒：读几个字节，几次浮点运算，归约（收与发各）几个字节，更新几个参数。

    ahead: 读在别的进程里早一批做；overlap: 归约有几成的计算可以藏在它后面（反向占计算的三分之二）。
    """

    read: float
    compute: float
    reduce: float
    update: float
    ahead: bool = False
    overlap: float = 0.0


# 没有显卡可量：H100（SXM）一类的机器，八张一台；bf16 的峰值 989 TFLOP/s 取 35 %，台内归约 200 GB/s，台间每张 40 GB/s，
# 八张分一台的 16 GB/s 读盘，更新一个参数动 28 字节、3.35 TB/s 的六成
COMPUTE, UPDATE, DISK = 0.35 * 989e12, 0.6 * 3.35e12 / 28, 16e9
ASSUMED: Mapping[int, Rates] = {
    1: Rates(DISK, COMPUTE, float("inf"), UPDATE, True, 2 / 3),
    8: Rates(DISK / 8, COMPUTE, 200e9, UPDATE, True, 2 / 3),
    64: Rates(DISK / 8, COMPUTE, 40e9, UPDATE, True, 2 / 3),
}


def reduced_bytes(parameters: int, processes: int, sharded: bool = False) -> float:
    """一步里一个进程收（与发）的字节：环形归约是 2(N−1)/N 份梯度；分片是收两遍参数、归约一遍梯度，3(N−1)/N。"""
    return (3 if sharded else 2) * (processes - 1) / processes * SINGLE * parameters


def step_seconds(work: Work, windows: int, processes: int, rates: Rates, sharded: bool = False) -> float:
    """全局批 windows 个窗口的一步。"""
    mine = windows / processes
    reading, computing = mine * work.bytes / rates.read, mine * work.flops / rates.compute
    reducing = reduced_bytes(work.parameters, processes, sharded) / rates.reduce
    updating = work.parameters / (processes if sharded else 1) / rates.update
    rest = computing + max(0.0, reducing - rates.overlap * computing) + updating
    return max(reading, rest) if rates.ahead else reading + rest


def work_of(config: RunConfig, spec: DataSpec) -> Work:
    with torch.device("meta"):
        model = build_model(config.model, spec)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    values = spec.window * spec.num_channels * spec.height * spec.width
    return Work(SINGLE * values, training_flops(config.model, spec), count)


# ---- 量


class Walks:
    """各样走法，各走 steps 遍；没有一样跨轮留着状态。"""

    def __init__(self, config: RunConfig, fabric: Fabric, data: WeatherData, steps: int) -> None:
        self.config, self.data, self.steps = config, data, steps
        self.two, self.single = fabric, Fabric(accelerator="cpu", strategy=SingleDeviceStrategy(torch.device("cpu")))
        self.both, self.alone = (
            build_state(each, config, data.spec, total_steps=1_000_000) for each in (self.two, self.single)
        )
        self.half: Batch = next(self.batches(self.two))
        self.learning = [p for p in self.alone.model.parameters() if p.requires_grad]

    def batches(self, fabric: Fabric) -> Iterator[Batch]:
        whole = epoch_batches(self.config, self.data, fabric, 0)[: self.steps]
        return feed(self.data, list(share_batches(whole, fabric.global_rank, fabric.world_size)), fabric.device)

    def train(self, fabric: Fabric, state: State) -> None:
        """真的训练的几步。"""
        for batch in self.batches(fabric):
            train_step(fabric, state, self.config, [batch]).terms()

    def read(self) -> None:
        """只读，一半的批。"""
        for batch in self.batches(self.two):
            self.half = batch

    def compute(self) -> None:
        """只前向、反向，一半的批。"""
        for _ in range(self.steps):
            objective_loss(self.alone.model, self.half, self.alone.objective)["loss"].backward()
            for parameter in self.learning:
                parameter.grad = None

    def reduce(self) -> None:
        """只归约，与全部梯度一样多。"""
        gradients = torch.zeros(sum(p.numel() for p in self.learning))
        for _ in range(self.steps):
            dist.all_reduce(gradients)

    def update(self) -> None:
        """只有梯度的范数与更新，梯度是零。"""
        gradients = [torch.zeros_like(p) for p in self.learning]
        before = [self.alone.module.get_buffer(name) for name in self.alone.buffers]
        for _ in range(self.steps):
            for parameter, gradient in zip(self.learning, gradients, strict=True):
                parameter.grad = gradient
            update(self.alone, self.config, get_total_norm(gradients), None, before, torch.tensor(False))


def measure(config: RunConfig, steps: int, rounds: int) -> tuple[Work, dict[str, dict[str, float]]] | None:
    """两个进程里轮流量；零号的是各种钟上一遍的秒数，各轮里最快的。"""
    fabric = make_fabric(config)
    data = open_data(config.data)
    walks = Walks(config, fabric, data, steps)
    together: dict[str, Callable[[], None]] = {
        "two": lambda: walks.train(fabric, walks.both), "reduce": walks.reduce,
    }  # fmt: skip
    first_only: dict[str, Callable[[], None]] = {
        "one": lambda: walks.train(walks.single, walks.alone), "read": walks.read, "compute": walks.compute,
        "update": walks.update,
    }  # fmt: skip
    found: dict[str, list[list[float]]] = {name: [] for name in {**first_only, **together}}
    for number in range(rounds + 1):
        for name in found:
            fabric.barrier()
            if fabric.is_global_zero or name in together:
                begin = [clock() for clock in CLOCKS.values()]
                {**together, **first_only}[name]()
                spent = [(clock() - start) / steps for clock, start in zip(CLOCKS.values(), begin, strict=True)]
                if number:  # 头一轮热身
                    found[name].append(spent)
    if not fabric.is_global_zero:
        return None
    best = {name: np.min(spent, axis=0).tolist() for name, spent in found.items()}
    return work_of(config, data.spec), {
        clock: {name: spent[i] for name, spent in best.items()} for i, clock in enumerate(CLOCKS)
    }


def measured_rates(work: Work, windows: int, seconds: Mapping[str, float]) -> Rates:
    """read、compute 是半批的秒数，reduce、update 是一步的。"""
    half = windows // 2
    return Rates(
        read=half * work.bytes / seconds["read"],
        compute=half * work.flops / seconds["compute"],
        reduce=reduced_bytes(work.parameters, 2) / seconds["reduce"],
        update=work.parameters / seconds["update"],
    )


def make_data(config: RunConfig, folder: str) -> tuple[str, ...]:
    """folder 里四天的随机场；返回指向它的改动。"""
    spec, first, last = imagined_spec(config.data), SPLITS["train"][0], SPLITS["test"][1]
    write_tree(folder, spec.channels, (spec.height, spec.width), range(parse_time(first), parse_time(last) + 24))
    splits = ", ".join(f"{name}: ['{begin}', '{end}']" for name, (begin, end) in SPLITS.items())
    return f"data.root={folder}", f"data.cache_dir={folder}/cache", f"data.splits={{{splits}}}"


# ---- 印


def show_work(work: Work) -> None:
    millions = work.parameters / 1e6
    print(f"{work.bytes / 1e6:.1f} MB and {work.flops / 1e9:.1f} GFLOP a window, {millions:.1f} M parameters")


def show_measured(work: Work, found: Mapping[str, Mapping[str, float]], windows: int) -> None:
    rows = [["clock", "processes", "predicted, windows/s", "measured, windows/s", "predicted / measured"]]
    for clock, seconds in found.items():
        rates = measured_rates(work, windows, seconds)
        print(
            f"{clock} time, one process: read {rates.read / 1e9:.2f} GB/s, compute {rates.compute / 1e9:.1f} GFLOP/s, "
            f"reduce {rates.reduce / 1e9:.3f} GB/s, update {rates.update / 1e6:.0f} M parameters/s"
        )
        for processes, name in enumerate(("one", "two"), 1):
            predicted, measured = windows / step_seconds(work, windows, processes, rates), windows / seconds[name]
            rows.append([clock, str(processes), f"{predicted:.3f}", f"{measured:.3f}", f"{predicted / measured:.3f}"])
    print(*aligned(rows), sep="\n")


def show_predicted(work: Work, windows: int) -> None:
    """windows: 每张卡的窗口数。"""
    rows = [["GPUs", "strategy", "step, ms", "windows/s", "read, ms", "compute, ms", "reduce, ms"]]
    for processes, rates in ASSUMED.items():
        for sharded in (False, True)[: 1 + (processes > 1)]:
            step = step_seconds(work, windows * processes, processes, rates, sharded)
            alone = (
                windows * work.bytes / rates.read,
                windows * work.flops / rates.compute,
                reduced_bytes(work.parameters, processes, sharded) / rates.reduce,
            )
            what = "auto" if processes == 1 else "fsdp" if sharded else "ddp"
            parts = [f"{1e3 * value:.1f}" for value in alone]
            rows.append([str(processes), what, f"{1e3 * step:.1f}", f"{windows * processes / step:.0f}", *parts])
    print(*aligned(rows), sep="\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description="How long a step takes.")
    parser.add_argument("--config", default=CONFIG, help="run YAML; its data are made up (%(default)s)")
    parser.add_argument("--predict", action="store_true", help="only count, with the assumed rates of GPUs")
    parser.add_argument("--steps", type=int, default=2, help="steps in each round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, the fastest counts (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the config")
    args = parser.parse_intermixed_args()
    logging.getLogger("ar_pred").setLevel(logging.WARNING)
    config = load_config(args.config, [*HOURLY, *args.overrides])
    if args.predict:
        work = work_of(config, imagined_spec(config.data))
        show_work(work)
        show_predicted(work, config.train.windows)
        return 0
    if not dist.is_torchelastic_launched():
        with TemporaryDirectory() as folder:
            own = make_data(config, folder)
            return subprocess.run(
                [sys.executable, *TORCHRUN, "-m", "benchmarks.scaling", *sys.argv[1:], *own]
            ).returncode
    torch.set_num_threads(1)
    where = ("run.device=cpu", "run.devices=2", "run.strategy=ddp", "data.workers=0")
    config = load_config(args.config, [*HOURLY, *args.overrides, *where])
    with kept_memory():
        found = measure(config, args.steps, args.rounds)
    if found is not None:
        show_work(found[0])
        show_measured(*found, config.train.windows)
    return 0


if __name__ == "__main__":
    run_command(main)
