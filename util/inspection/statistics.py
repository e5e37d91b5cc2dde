"""各通道的均值、标准差、最小、最大（dataset.py statistics）。

读目录树里训练日期内、每 interval_hours 小时的文件，逐块在双精度里算、按时间的次序合并：几个进程、用不用 dask 都一样。
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from util.cli import aligned
from util.config import DataConfig
from util.data.index import sampled_hours, split_hours
from util.data.normalize import Verdict, judge
from util.data.tree_files import (
    Fault,
    FieldError,
    channel_fills,
    field_path,
    read_field,
    read_into,
    read_mean_std,
    select_channels,
    usual_header,
    write_moments,
)
from util.files.fills import Fills
from util.moments import Moments, check_moments, measure
from util.variables import channel_folder
from util.workers import distribute

BLOCK_BYTES = 16 * 2**20  # 一次读进内存的 float32；双精度的副本是它的两倍


class MeasureJob(NamedTuple):
    """各进程共有的。hours: (T,) 训练日期内的抽样小时；rows: 一块几个；fills: 各通道认作填充值的。"""

    root: Path
    channels: list[str]
    hours: np.ndarray
    shape: tuple[int, int]
    rows: int
    fills: list[Fills]


class ChannelMoments(NamedTuple):
    """一个通道（或它的一块）：统计量，用不了的文件各有几个。"""

    moments: Moments
    faults: Counter[Fault]


def channel_statistics(config: DataConfig, workers: int = 1, scheduler: str | None = None) -> dict[str, ChannelMoments]:
    """训练日期内各通道的统计量；缺的、坏的文件略去，只计个数。workers、scheduler 见 workers.distribute。

    Raises:
        ValueError: 根目录、变量、层、划分写错；没有目录树。
    """
    if config.source != "tree":
        raise ValueError("data.source = store: the statistics are of the files in a tree; give data.source=tree")
    shape = (config.latitude.count, config.longitude.count)
    hours = sampled_hours(split_hours(config)["train"], config.interval_hours, config.first_hour)
    rows = max(1, BLOCK_BYTES // (4 * shape[0] * shape[1]))
    channels = select_channels(config)
    fills = [channel_fills(config, channel) for channel in channels]
    job = MeasureJob(Path(config.root).absolute(), channels, hours, shape, rows, fills)
    items = [(c, first) for c in range(len(job.channels)) for first in range(0, hours.size, rows)]
    totals = [ChannelMoments(Moments(), Counter()) for _ in job.channels]
    bar = tqdm(total=len(job.channels) * hours.size, desc="statistics", unit="file", smoothing=0)
    with bar, distribute(workers, scheduler, job, [job.root]) as run:
        for (c, _), part in zip(items, run(measure_block, items), strict=True):
            totals[c] = ChannelMoments(totals[c].moments.merge(part.moments), totals[c].faults + part.faults)
            bar.update(part.moments.total // (shape[0] * shape[1]) + part.faults.total())
    return dict(zip(job.channels, totals, strict=True))


def measure_block(job: MeasureJob, item: tuple[int, int]) -> ChannelMoments:
    """item: (第几个通道, 从第几个小时起)。"""
    channel, hours = job.channels[item[0]], job.hours[item[1] : item[1] + job.rows].tolist()
    fills = job.fills[item[0]]
    header, faults, count = usual_header(job.shape), Counter[Fault](), 0
    block = np.empty((len(hours), *job.shape), dtype=np.float32)
    for hour in hours:
        path = field_path(job.root, channel, hour)
        if not read_into(str(path), header, block[count], fills):
            try:
                block[count] = read_field(path, job.shape, fills)
            except FieldError as error:
                faults[error.fault] += 1
                continue
        count += 1
    return ChannelMoments(measure(block[:count]), faults)


def state_of(config: DataConfig, channel: str, moments: Moments) -> tuple[tuple[float, float] | None, Verdict | None]:
    """(mean_std.json 的均值与标准差, 文件像原始的还是标准化过的)；没有 json、没有文件就不知道。"""
    if not (Path(config.root) / channel_folder(channel) / "mean_std.json").exists():
        return None, None
    stated = read_mean_std(config.root, channel)
    return stated, judge(moments.mean, moments.std, *stated) if moments.total else None


def table(config: DataConfig, results: dict[str, ChannelMoments]) -> str:
    """每个通道一行。"""
    rows = [["channel", "files", "missing", "bad", "mean", "json", "std", "json", "min", "max", "files are"]]
    size = config.latitude.count * config.longitude.count
    for channel, (moments, faults) in results.items():
        stated, state = state_of(config, channel, moments)
        missing = faults["missing"]
        counts = [moments.total // size, missing, faults.total() - missing]
        m = (moments.mean, moments.std, moments.low, moments.high) if moments.total else (None,) * 4
        j = stated or (None, None)
        numbers = ["-" if value is None else f"{value:.6g}" for value in (m[0], j[0], m[1], j[1], m[2], m[3])]
        rows.append([channel, *map(str, counts), *numbers, state or "-"])
    return "\n".join(aligned(rows))


def refuse_written(config: DataConfig) -> None:
    for channel in select_channels(config):
        for name in ("mean_std.json", "min_max.json"):
            if (path := Path(config.root) / channel_folder(channel) / name).exists():
                raise ValueError(f"{path} exists already; give --overwrite to replace it")


def write_all(config: DataConfig, results: dict[str, ChannelMoments]) -> None:
    """全部查过才写第一个。

    Raises:
        ValueError: 文件已经标准化（写下去物理单位的统计量就没有了）；见 check_moments。
    """
    dates = " to ".join(config.splits.train)
    for channel, (moments, _) in results.items():
        check_moments(channel, moments, dates)
        if config.standardize == "no" or (
            config.standardize == "auto" and state_of(config, channel, moments)[1] == "standard"
        ):
            raise ValueError(
                f"{channel}: the files are standardised already (mean {moments.mean:.4g}, std {moments.std:.4g}), "
                "mean_std.json is to hold physical units; data.standardize=yes says that the files are raw"
            )
    for channel, (moments, _) in results.items():
        write_moments(config.root, channel, moments, dates)
