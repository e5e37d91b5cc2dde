"""训练的一步要多少内存：假的一步里的张量，加上张量之外的；算的时候不分配。"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch

from engine.device import device_name, memory_size
from engine.imagined import imagined_spec
from engine.memory.step import Peak, step_peak
from util.batch import DataSpec
from util.config import DataConfig, RunConfig, check_batch_size, eval_batch_size
from util.data.dataset import open_origin
from util.data.feed import AHEAD
from util.data.index import sampled_hours, split_hours
from util.training_config import TrainConfig

FIRST_STEP = 40_000_000  # 字节；头一步才载入的核的代码、它们的工作区（CPU 上量到 33–37 MB）
# 来来去去的张量之间的空隙占它们的几成。CPU（glibc，只有小块留下空隙）量到 0.2–0.6：docs/benchmarks.md；显卡没有量过
FRAGMENTATION = {"cpu": 0.35, "cuda": 0.1}
SHARDED = ("parameters", "gradients", "optimizer", "average")  # 分片（fsdp）时各进程只有自己的一片
MARGIN = 0.9  # 估计到设备的这么多为止算放得下：估计不是量出来的


class Machine(NamedTuple):
    """训练所在的设备；size、held 是字节，一共的与模型造好之前就占着的（CPU 上是这个进程，显卡上是 CUDA 与别人）。"""

    device: torch.device
    name: str
    size: int
    held: int


class Estimate(NamedTuple):
    """各部分，字节；size 是设备的。"""

    parts: Mapping[str, int]
    size: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def summary(self) -> str:
        return f"{megabytes(self.total)} of {megabytes(self.size)} MB"

    @property
    def fits(self) -> bool:
        return self.total <= MARGIN * self.size


def this_machine(device: torch.device, processes: int = 1) -> Machine:
    """眼下的设备；一台机器上有几个进程在 CPU 上训练时，各得一份。"""
    size, held = memory_size(device)
    if device.type == "cpu":
        size = (size - held) // processes + held
    return Machine(device, device_name(device), size, held)


def estimate(config: RunConfig, machine: Machine) -> Estimate:
    """一个进程的一步。

    Raises:
        ValueError: 模型的选项、批的大小不对，或只有形状走不下去（step_peak）；要留住的数据不在。
    """
    check_batch_size(config)
    train, spec, cuda = config.train, imagined_spec(config.data), machine.device.type == "cuda"
    peak = _peak(json.dumps(config.model), spec, train.model_dump_json(), eval_batch_size(config))
    parts: dict[str, int] = {**peak.sizes}
    processes = config.run.devices * config.run.num_nodes
    sharded = config.run.strategy == "fsdp"
    for name in SHARDED if sharded else ():
        parts[name] //= processes
    parts["waiting"] = parts["batch"] * (1 if cuda else config.data.workers * AHEAD)  # 早到的；显卡的其余在主机上
    parts["batch"] *= train.accumulate
    sharers = 1 if cuda else config.run.devices  # 处理器上同机的进程共用一份
    parts["data"] = resident_bytes(config.data, spec, cuda) // sharers
    parts["preflight"] = parts["parameters"] + parts["average"] if train.preflight else 0  # 它另造一个模型
    parts["buckets"] = peak.trainable if processes > 1 and not sharded else 0  # DDP 归约用的；分片的收齐的一块没有算
    parts["framework"] = machine.held + FIRST_STEP
    passing = parts["gradients"] + parts["activations"] + parts["temporary"] if cuda else peak.scattered
    parts["fragmentation"] = int(FRAGMENTATION[machine.device.type] * passing)
    return Estimate(parts, machine.size)


@lru_cache(maxsize=64)
def _peak(options: str, spec: DataSpec, train: str, size: int) -> Peak:
    """同样的一步只走一遍：找放得下的批、开头的一行、用尽时的表问的常是同一个。"""
    return step_peak(json.loads(options), spec, TrainConfig.model_validate_json(train), size)


def resident_bytes(config: DataConfig, spec: DataSpec, cuda: bool) -> int:
    """data.residency 留在这个设备上的训练与验证的数据。"""
    if config.residency == "disk" or (cuda and config.residency == "memory"):
        return 0
    spans = split_hours(config)
    kept = [sampled_hours(spans[split], *config.sampling) for split in ("train", "val")]
    frame = spec.num_channels * spec.height * spec.width * open_origin(config).dtype.itemsize
    return sum(hours.size for hours in kept) * frame


def changed(config: RunConfig, **train: object) -> RunConfig:
    """train 段改几个键。"""
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def megabytes(size: int) -> str:
    """字节 → 写给人看的 MB，不带单位。"""
    return f"{size / 1e6:,.0f}"
