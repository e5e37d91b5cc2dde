"""数据的入口：从配置到 spec、各划分的段和读取器。"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from util.batch import DataSpec
from util.config import DataConfig
from util.data.batches import Segments
from util.data.index import SPLITS, check_splits, check_windows, describe_gaps, split_years
from util.data.joined_origin import Joined
from util.data.origin import DataSet
from util.data.reader import LINES_SHOWN, REPORT_HEADER, FieldReader
from util.data.resident import OncePerMachine, Resident, alone, keep_in_memory, keep_on_device
from util.data.store_origin import Store
from util.data.tree_origin import Tree
from util.data.windows import WindowDataset
from util.strict import nearest
from util.variables import STATIC, split_channel, variable_info

log = logging.getLogger("ar_pred")


@dataclass(frozen=True)
class WeatherData:
    """打开了的数据：说明、三个划分的段、以起点取窗口的数据集；resident 是留在设备上的那一份。"""

    config: DataConfig
    spec: DataSpec
    segments: dict[str, Segments]
    windows: WindowDataset
    resident: Resident | None = None

    def samples(self, split: str) -> int:
        return sum(s.size for s in self.segments[split])


def open_origin(config: DataConfig) -> DataSet:
    """data.source 所指的目录树或存档；data.set 是一列时，几个合成的一个。

    Raises:
        ValueError: 树里没有所选的变量；存档不在、没有打包完、坏了，或缺配置所要的东西。
    """
    if parts := config.part_configs():
        return Joined(config, {name: open_origin(part) for name, part in parts.items()})
    return Store(config) if config.source == "store" else Tree(config)


def open_data(
    config: DataConfig,
    report: Path | None = None,
    announce: bool = True,
    device: torch.device | None = None,
    once: OncePerMachine = alone,
) -> WeatherData:
    """检查并打开目录树或存档，两者给出同样的窗口；每一处缺失都进日志和 report（missing.csv）。

    Args:
        announce: 由这个进程报告按名字缺失的文件；多进程训练里只有零号进程报告，读坏的则谁读到谁记。
        device: 训练所在的设备，训练与验证按 data.residency 留在那里或内存里；只读一遍的用途（评测）不给，从盘上读。
        once: 几个进程一起训练时，一台机器上只做一次的（读进内存）由谁做。

    Raises:
        ValueError: 路径、变量、层、年份、统计量、划分、窗口长度等任何一处不对。
    """
    origin = open_origin(config)
    index = origin.index(split_years(config))
    segments = check_splits(config, index)
    check_windows(config, segments)
    for number, line in enumerate(gaps := describe_gaps(index, config, segments)):
        if number < LINES_SHOWN:
            log.warning("gap not bridged, %s", line)
    if len(gaps) > LINES_SHOWN:
        log.warning("... and %d more gaps not bridged", len(gaps) - LINES_SHOWN)
    mean, std = zip(*origin.mean_std(), strict=True)
    standardized = origin.decide(index, np.concatenate(segments["train"]))
    spec = make_spec(config, origin.channels, mean, std, standardized)
    spec = replace(spec, static={name: read_static_forcing(origin, name) for name in spec.forcings if STATIC in name})
    if report is not None and announce:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(REPORT_HEADER, encoding="utf-8")
    used = np.concatenate([np.concatenate(segments[split]) for split in SPLITS])
    reader = FieldReader(origin, spec, index, used, report, announce)
    resident, again = None, np.concatenate([*segments["train"], *segments["val"]])  # again：每一轮都要再读的
    if config.residency == "device" and device is not None:
        resident = keep_on_device(reader, again, device, once)
    if config.residency == "memory" and device is not None:
        assert isinstance(origin, Store)
        once(partial(keep_in_memory, origin, again))
    data = WeatherData(config, spec, segments, WindowDataset(reader), resident)
    counts = ", ".join(f"{split} {data.samples(split)} in {len(segments[split])} segment(s)" for split in SPLITS)
    sizes = (spec.num_channels, spec.height, spec.width)
    if isinstance(origin, Joined):
        for split in SPLITS:
            log.info("%s: fields from %s", split, origin.shares(np.concatenate(segments[split])))
    log.info("data: %s; %d channels, %d x %d; samples: %s", origin.root, *sizes, counts)
    return data


def make_spec(
    config: DataConfig, channels: list[str], mean: tuple[float, ...], std: tuple[float, ...], standardized: bool
) -> DataSpec:
    """配置里的坐标、单位、气压与统计量合成 DataSpec。

    Raises:
        ValueError: 层没有对应的气压，变量没有单位；roles 里没有的变量，或一个喂回来的通道也没有。
    """
    latitudes, longitudes = config.latitude.values(), config.longitude.values()
    return DataSpec(
        channels=tuple(channels),
        units=tuple(_units(config, c) for c in channels),
        pressures=tuple(_pressure(config, c) for c in channels),
        latitudes=latitudes,
        longitudes=longitudes,
        frames_in=config.frames_in,
        frames_out=config.frames_out,
        interval_hours=config.interval_hours,
        mean=tuple(mean),
        std=tuple(std),
        standardized=standardized,
        forcings=tuple(config.forcings),
        diagnostic=_diagnostic(config, channels),
        starts_every_hours=config.starts_every_hours,
        lead_hours=tuple(config.lead_hours) or None,
    )


def read_static_forcing(origin: DataSet, name: str) -> torch.Tensor:
    """static/NAME → (H, W)，按自己的均值与标准差标准化。

    Raises:
        ValueError: 没有这个场，坏了，网格不同；处处相同。
    """
    field = name.removeprefix(STATIC)
    there = [STATIC + held for held in origin.static_names()]
    if name not in there:
        raise ValueError(
            f"data.forcings = {name}: not in {origin.root}; {nearest(name, there, 'there')} "
            "(python dataset.py import --static adds one)"
        )
    values = torch.from_numpy(origin.static(field)).double()
    if values.min() == values.max():
        raise ValueError(f"data.forcings = {name}: {values.min():g} everywhere in {origin.root}; leave it out")
    return ((values - values.mean()) / values.std(correction=0)).float()


def _diagnostic(config: DataConfig, channels: list[str]) -> tuple[str, ...]:
    """data.roles 里 diagnostic 的通道；通道名的先于变量名的。"""
    known = dict.fromkeys([*channels, *(split_channel(channel)[0] for channel in channels)])
    for name in config.roles:
        if name not in known:
            raise ValueError(f"data.roles has {name!r}, which is no channel here; {nearest(name, known, 'channels')}")
    roles = {c: config.roles.get(c, config.roles.get(split_channel(c)[0], "prognostic")) for c in channels}
    found = tuple(channel for channel, role in roles.items() if role == "diagnostic")
    if len(found) == len(channels):
        raise ValueError(f"data.roles: {', '.join(channels)} are all diagnostic, none is left to forecast from")
    return found


def _units(config: DataConfig, channel: str) -> str:
    variable, _ = split_channel(channel)
    units = config.units.get(variable) or variable_info(channel).units
    if not units:
        raise ValueError(f"data.units has no entry for {variable!r}; add e.g. {variable}: K")
    return units


def _pressure(config: DataConfig, channel: str) -> float | None:
    _, level = split_channel(channel)
    if level is None:
        return None
    number = int(level.removeprefix("level_"))
    if number >= len(config.pressure_hpa):
        raise ValueError(
            f"data.pressure_hpa has {len(config.pressure_hpa)} entries, but {channel} needs entry {number}: "
            "list the pressure of every level_NN in order, in hPa"
        )
    return config.pressure_hpa[number]
