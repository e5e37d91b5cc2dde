"""估计写成人看的：一张表，一行日志，放得下的最大的批。"""

from __future__ import annotations

from itertools import product
from typing import get_args

from lightning_fabric import Fabric

from engine.device import check_device
from engine.imagined import imagined_spec
from engine.memory.estimate import MARGIN, Estimate, Machine, changed, estimate, megabytes, this_machine
from engine.memory.fitting import epoch_windows, largest_batch
from engine.memory.live import KINDS
from models import has_blocks, without_files
from util.cli import aligned
from util.config import RunConfig, least_batch
from util.training_config import TrainConfig


def show_estimate(config: RunConfig) -> int:
    """train.py --estimate：印出表；不读数据，不分配（预训练的权重除外，见 without_files）。

    Raises:
        ValueError: 见 estimate。
    """
    config = config.model_copy(update={"model": without_files(config.model, imagined_spec(config.data))})
    check_device(config.run.device)
    machine = this_machine(Fabric(accelerator=config.run.device, devices=1).device, config.run.devices)
    if config.train.batch_size == "auto":
        config = changed(config, batch_size=largest_batch(config, machine) or least_batch(config))
    print(memory_table(config, machine))
    return 0


def memory_line(found: Estimate, windows: int, machine: Machine) -> str:
    """日志里的一行；windows 是 train.batch_size。"""
    parts = ", ".join(f"{name} {megabytes(size)}" for name, size in found.parts.items() if size >= 500_000)
    return f"memory of a step of {windows} window(s), estimated: {found.summary} ({machine.name}): {parts}"


def memory_table(config: RunConfig, machine: Machine) -> str:
    """各种精度、丢不丢弃激活、批的大小，一行一种，MB；* 是配置自己的那一种。

    Raises:
        ValueError: 见 estimate。
    """
    ways = {name: get_args(TrainConfig.model_fields[name].annotation) for name in switches(config)}
    ways["batch_size"] = batch_sizes(config)
    found = {chosen: changed(config, **dict(zip(ways, chosen, strict=True))) for chosen in product(*ways.values())}
    estimates = {chosen: estimate(one, machine) for chosen, one in found.items()}
    first = next(iter(estimates.values()))
    names = [name for name in first.parts if name in KINDS or any(e.parts[name] for e in estimates.values())]
    rows = [["", *ways, *names, "total", "of device"]]
    for chosen, one in estimates.items():
        own = "*" if found[chosen] == config else ""
        sizes = [megabytes(one.parts[name]) for name in names]
        rows.append([own, *map(str, chosen), *sizes, megabytes(one.total), f"{one.total / one.size:.0%}"])
    title = f"{config.model['name']} on {machine.name}: {megabytes(machine.size)} MB; a step needs, in MB:"
    most, windows = largest_batch(config, machine) or "none", epoch_windows(config)
    last = f"largest train.batch_size that fits into {MARGIN:.0%} of it: {most} (an epoch has {windows} windows)"
    return "\n".join([title, *aligned(rows), last])


def switches(config: RunConfig) -> tuple[str, ...]:
    """表里逐个试的键。"""
    return ("precision", "activation_checkpointing") if has_blocks(config.model) else ("precision",)


def batch_sizes(config: RunConfig) -> tuple[int, ...]:
    """一半、原样、两倍。"""
    size, least = config.train.windows, least_batch(config)
    return tuple(sorted({max(least, size // 2 // least * least), size, 2 * size}))
