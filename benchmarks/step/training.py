"""一次只走几步的训练：引擎自己的循环，量它一步的时间、各部分的时间与内存。"""

from __future__ import annotations

import ctypes
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from lightning_fabric import Fabric
from torch import Tensor

from benchmarks.step.arithmetic import LONG, wait_for
from benchmarks.step.stopwatch import ON_DEVICE, PARTS, elapsed, watching
from engine.device import kept_memory, peak_memory, reset_peak_memory
from engine.one_pass import fit_one_pass
from engine.training.loop import train_epoch
from engine.training.run import Run
from engine.training.state import State, build_state
from models.interface import OnePass
from util.cli import only_new_garbage
from util.config import RunConfig, eval_batch_size
from util.data.dataset import WeatherData
from util.logger import MetricsLog, WandbRun
from util.signals import StopFlag

LAST = LONG - 10_000  # 从这一步走起：由粗到细的模型，尺度已经全了
log = logging.getLogger("ar_pred")


@dataclass(frozen=True)
class Round:
    """几步的平均，一步的秒数：全部；主机上各部分（PARTS 与 loop）；设备上各部分（处理器上就是主机的）。

    processor: 秒，loop 用去的处理器时间；机器忙的时候，别人占去的不在内。
    memory: 字节，权重、优化器与走一步另外要的；处理器上不算进程自己的、别的模型的。
    """

    step: float
    host: Mapping[str, float]
    device: Mapping[str, float]
    processor: float
    memory: int


@contextmanager
def open_training(config: RunConfig, fabric: Fabric, data: WeatherData, steps: int, folder: Path) -> Iterator[Run]:
    """恰好 steps 步一轮的训练；folder 里写 metrics.csv。

    Raises:
        ValueError: 模型没有梯度步；不止一个设备。
    """
    if fabric.world_size > 1:
        raise ValueError(f"run.devices = {fabric.world_size}: the steps of one device are timed; set run.devices=1")
    fabric.seed_everything(config.run.seed, verbose=False)
    data = replace(data, segments={**data.segments, "train": just(data, steps * config.train.windows)})
    state = build_state(fabric, config, data.spec, total_steps=LONG)
    if state.optimizer is None:
        raise ValueError(f"{config.model['name']} takes no gradient steps, there is nothing to time")
    if isinstance(state.model, OnePass) and state.model.needs_pass:
        fit_one_pass(state.model, data, eval_batch_size(config))
    metrics, wandb = MetricsLog(folder / "metrics.csv", None), WandbRun(None, log)
    try:
        yield Run(config, "benchmark", fabric, data, state, metrics, wandb, StopFlag(), time.monotonic())
    finally:
        metrics.close()


def just(data: WeatherData, windows: int) -> list[np.ndarray]:
    """训练的段里恰好 windows 个窗口那么长的；不够的反复用。"""
    pieces: list[np.ndarray] = []
    while windows:
        for segment in data.segments["train"]:
            count = min(windows, segment.size // data.spec.window)
            pieces.append(segment[: count * data.spec.window])
            windows -= count
    return [piece for piece in pieces if piece.size]


def walk(run: Run, skip: int) -> Round:
    """走完一轮；头 skip 步（读取进程起步、热身）不计时间。"""
    state, device = run.state, run.fabric.device
    state.progress.step, state.progress.batches = LAST, 0
    trim_memory()
    reset_peak_memory(device)
    before = peak_memory(device)
    with watching(run) as watch, only_new_garbage(), kept_memory():
        train_epoch(run)
        end = watch.mark()
    wait_for(device)
    begin, *others = watch.step_begins()[skip:]
    steps = 1 + len(others)
    host = {part: watch.host_seconds(part, begin) / steps for part in PARTS}
    wall = (end.host - begin.host) / steps
    return Round(
        elapsed(begin, end) / steps if begin.event else wall,
        {**host, "loop": wall - sum(host.values())},
        {part: watch.device_seconds(part, begin) / steps for part in ON_DEVICE},
        (end.processor - begin.processor - watch.processor_seconds(begin)) / steps,
        state_bytes(state) + max(0, peak_memory(device) - before),  # 内核数驻留的页，差一两页
    )


def state_bytes(state: State) -> int:
    """权重、buffer、优化器、EMA，字节。"""
    assert state.adam is not None
    modules = [state.module] if state.ema is None else [state.module, state.ema.module]
    held = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    held += [value for values in state.adam.state.values() for value in values.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in held)


def trim_memory() -> None:
    """用过的内存还给系统（glibc），量到的峰值才是这一轮的。"""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
