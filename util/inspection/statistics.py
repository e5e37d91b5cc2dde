"""各通道的均值、标准差、最小、最大，与隔 interval_hours 的变化的标准差（dataset.py statistics）。

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
    Tendency,
    channel_fills,
    field_path,
    read_field,
    read_into,
    read_mean_std,
    read_tendency,
    select_channels,
    usual_header,
    write_mean_std,
)
from util.files.fills import Fills
from util.moments import Moments, check_moments, measure
from util.variables import channel_folder
from util.workers import distribute

BLOCK_BYTES = 16 * 2**20  # 一次读进内存的 float32；双精度的副本是它的两倍


class MeasureJob(NamedTuple):
    """各进程共有的。

    hours: (T,) 训练日期内的抽样小时；rows: 一块几个；fills: 各通道认作填充值的；tendency: 也要变化的。
    """

    root: Path
    channels: list[str]
    hours: np.ndarray
    shape: tuple[int, int]
    rows: int
    fills: list[Fills]
    tendency: bool


class ChannelMoments(NamedTuple):
    """一个通道（或它的一块）：统计量；用不了的文件各有几个；相邻两刻之差的统计量，没有要就是空的。"""

    moments: Moments
    faults: Counter[Fault]
    changes: Moments = Moments()

    def merge(self, other: ChannelMoments) -> ChannelMoments:
        moments, changes = self.moments.merge(other.moments), self.changes.merge(other.changes)
        return ChannelMoments(moments, self.faults + other.faults, changes)


def channel_statistics(
    config: DataConfig, workers: int = 1, scheduler: str | None = None, tendency: bool = False
) -> dict[str, ChannelMoments]:
    """训练日期内各通道的统计量；缺的、坏的文件略去，只计个数。workers、scheduler 见 workers.distribute。

    tendency: 也要隔 interval_hours 的变化的，前后两刻的文件都好的才算。

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
    job = MeasureJob(Path(config.root).absolute(), channels, hours, shape, rows, fills, tendency)
    items = [(c, first) for c in range(len(job.channels)) for first in range(0, hours.size, rows)]
    totals = [ChannelMoments(Moments(), Counter()) for _ in job.channels]
    bar = tqdm(total=len(job.channels) * hours.size, desc="statistics", unit="file", smoothing=0)
    with bar, distribute(workers, scheduler, job, [job.root]) as run:
        for (c, _), part in zip(items, run(measure_block, items), strict=True):
            totals[c] = totals[c].merge(part)
            bar.update(part.moments.total // (shape[0] * shape[1]) + part.faults.total())
    return dict(zip(job.channels, totals, strict=True))


def measure_block(job: MeasureJob, item: tuple[int, int]) -> ChannelMoments:
    """item: (第几个通道, 从第几个小时起)。"""
    (c, first), header = item, usual_header(job.shape)
    hours = job.hours[first : first + job.rows + job.tendency].tolist()  # 末一刻的变化要看下一块的头一刻
    block, faults = np.empty((len(hours), *job.shape), dtype=np.float32), dict[int, Fault]()
    for i, hour in enumerate(hours):
        path = field_path(job.root, job.channels[c], hour)
        if not read_into(str(path), header, block[i], job.fills[c]):
            try:
                block[i] = read_field(path, job.shape, job.fills[c])
            except FieldError as error:
                faults[i] = error.fault
    good = np.array([i not in faults for i in range(len(hours))])
    own = Counter[Fault](fault for i, fault in faults.items() if i < job.rows)
    moments = measure(block[: job.rows][good[: job.rows]])
    if not job.tendency:
        return ChannelMoments(moments, own)
    both = good[1:] & good[:-1]  # 抽样的小时连着，相邻的恰好隔 interval_hours
    return ChannelMoments(moments, own, measure(block[1:][both].astype(np.float64) - block[:-1][both]))


def state_of(config: DataConfig, channel: str, moments: Moments) -> tuple[tuple[float, float] | None, Verdict | None]:
    """(mean_std.json 的均值与标准差, 文件像原始的还是标准化过的)；没有 json、没有文件就不知道。"""
    if not (Path(config.root) / channel_folder(channel) / "mean_std.json").exists():
        return None, None
    stated = read_mean_std(config.root, channel)
    return stated, judge(moments.mean, moments.std, *stated) if moments.total else None


def table(config: DataConfig, results: dict[str, ChannelMoments]) -> str:
    """每个通道一行；算了变化的，末了多两列。"""
    rows = [["channel", "files", "missing", "bad", "mean", "json", "std", "json", "min", "max", "files are"]]
    changed = any(found.changes.total for found in results.values())
    rows[0] += [f"std of {config.interval_hours} h change", "json"] if changed else []
    size = config.latitude.count * config.longitude.count
    for channel, (moments, faults, changes) in results.items():
        stated, state = state_of(config, channel, moments)
        missing = faults["missing"]
        counts = [moments.total // size, missing, faults.total() - missing]
        m = (moments.mean, moments.std, moments.low, moments.high) if moments.total else (None,) * 4
        j = stated or (None, None)
        numbers = ["-" if value is None else f"{value:.6g}" for value in (m[0], j[0], m[1], j[1], m[2], m[3])]
        rows.append([channel, *map(str, counts), *numbers, state or "-"])
        if changed:
            held = read_tendency(config.root, channel) if stated else None
            rows[-1] += [
                f"{changes.std:.6g}" if changes.total else "-",
                f"{held.std:.6g} ({held.hours} h)" if held else "-",
            ]
    return "\n".join(aligned(rows))


def refuse_written(config: DataConfig) -> None:
    for channel in select_channels(config):
        for name in ("mean_std.json", "min_max.json"):
            if (path := Path(config.root) / channel_folder(channel) / name).exists():
                raise ValueError(f"{path} exists already; give --overwrite to replace it")


def write_all(config: DataConfig, results: dict[str, ChannelMoments], tendency: bool = False) -> None:
    """全部查过才写第一个。tendency: 也写变化的标准差；文件已经标准化的只添这一项，别的照旧。

    Raises:
        ValueError: 文件已经标准化（写下去物理单位的统计量就没有了）；见 check_moments。
    """
    written = {channel: _to_write(config, channel, found, tendency) for channel, found in results.items()}
    for channel, values in written.items():
        write_mean_std(config.root, channel, *values)


class ToWrite(NamedTuple):
    """写进 mean_std.json、min_max.json 的，物理单位；不知道极值就不写它。"""

    mean: float
    std: float
    low: float | None
    high: float | None
    tendency: Tendency | None


def _to_write(config: DataConfig, channel: str, found: ChannelMoments, tendency: bool) -> ToWrite:
    moments, dates, hours = found.moments, " to ".join(config.splits.train), config.interval_hours
    check_moments(channel, moments, dates)
    if tendency:
        check_moments(f"{channel}, change over {hours} h", found.changes, dates)
    stated, state = state_of(config, channel, moments)
    if config.standardize == "yes" or (config.standardize == "auto" and state != "standard"):
        change = Tendency(found.changes.std, hours) if tendency else None
        return ToWrite(moments.mean, moments.std, moments.low, moments.high, change)
    if not tendency or stated is None:
        raise ValueError(
            f"{channel}: the files are standardised already (mean {moments.mean:.4g}, std {moments.std:.4g}), "
            "mean_std.json is to hold physical units; data.standardize=yes says that the files are raw"
        )
    return ToWrite(*stated, None, None, Tendency(found.changes.std * stated[1], hours))
