"""各通道的均值、标准差、最小、最大，与隔 interval_hours 的变化的标准差（dataset.py statistics）。

读目录树里训练日期内、抽样时刻的文件，逐块在双精度里算、按时间的次序合并：几个进程、用不用 dask 都一样。
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from util.cli import aligned
from util.config import DataConfig
from util.data.index import Index, join_indexes, sampled_hours, scan, split_hours, split_years, years_there
from util.data.normalize import Verdict, judge
from util.data.tree_files import (
    Fault,
    FieldError,
    Tendency,
    channel_fills,
    choose_channels,
    field_path,
    owned,
    read_field,
    read_into,
    read_mean_std,
    read_tendency,
    select_channels,
    usual_header,
    write_joined_about,
    write_mean_std,
)
from util.files.fills import Fills
from util.files.moments import Moments, check_moments, measure
from util.variables import channel_folder
from util.workers import distribute

BLOCK_BYTES = 16 * 2**20  # 一次读进内存的 float32；双精度的副本是它的两倍


class MeasureJob(NamedTuple):
    """各进程共有的。

    hours: (T,) 训练日期内的抽样小时；rows: 一块几个；ahead: 也要隔几个的变化的，0 是不要；
    trees: 各目录树；owner: (C, T) 各场取自第几棵；fills: 各树里各通道认作填充值的。
    """

    trees: list[Path]
    owner: np.ndarray
    channels: list[str]
    fills: list[dict[str, Fills]]
    hours: np.ndarray
    shape: tuple[int, int]
    rows: int
    ahead: int


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
    hours, every = sampled_hours(split_hours(config)["train"], *config.sampling), config.sampling[0]
    rows = max(1, BLOCK_BYTES // (4 * shape[0] * shape[1]))
    job = MeasureJob(*_trees(config, hours), hours, shape, rows, config.interval_hours // every * tendency)
    items = [(c, first) for c in range(len(job.channels)) for first in range(0, hours.size, rows)]
    totals = [ChannelMoments(Moments(), Counter()) for _ in job.channels]
    bar = tqdm(total=len(job.channels) * hours.size, desc="statistics", unit="file", smoothing=0)
    with bar, distribute(workers, scheduler, job, job.trees) as run:
        for (c, _), part in zip(items, run(measure_block, items), strict=True):
            totals[c] = totals[c].merge(part)
            bar.update(part.moments.total // (shape[0] * shape[1]) + part.faults.total())
    return dict(zip(job.channels, totals, strict=True))


class _Trees(NamedTuple):
    """MeasureJob 的头几项。"""

    trees: list[Path]
    owner: np.ndarray
    channels: list[str]
    fills: list[dict[str, Fills]]


def _trees(config: DataConfig, hours: np.ndarray) -> _Trees:
    """从哪几棵树里读；data.set 是一列时，哪个场从哪一棵，同训练时的（Joined）。"""
    parts, channels = config.part_configs(), channels_of(config)
    if not parts:
        fills = {channel: channel_fills(config, channel) for channel in channels}
        return _Trees([Path(config.root).absolute()], np.zeros((len(channels), hours.size), np.int8), channels, [fills])
    years, indexes = split_years(config), []
    for part in parts.values():
        held = select_channels(part)
        there = years_there(part.root, held, years)
        indexes.append(scan(part, held, there) if there else Index((), 0, np.empty((0, 0), dtype=bool)))
    joint, owner = join_indexes(channels, years, indexes)
    owner = np.maximum(owner[:, hours - joint.start], 0)  # 哪里都没有的，算在头一棵里缺
    fills = [{channel: channel_fills(part, channel) for channel in channels} for part in parts.values()]
    return _Trees([Path(part.root).absolute() for part in parts.values()], owner, channels, fills)


def channels_of(config: DataConfig) -> list[str]:
    """目录树里的通道；data.set 是一列时，几棵树的。"""
    parts = config.part_configs()
    if not parts:
        return select_channels(config)
    if stores := [name for name, part in parts.items() if part.source == "store"]:
        raise ValueError(f"data.set: {', '.join(stores)}: a store; the statistics are of the files in trees")
    union = dict.fromkeys(channel for part in parts.values() for channel in select_channels(part))
    return choose_channels(config, list(union), "any data set of data.set")


def measure_block(job: MeasureJob, item: tuple[int, int]) -> ChannelMoments:
    """item: (第几个通道, 从第几个小时起)。"""
    (c, first), header = item, usual_header(job.shape)
    hours = job.hours[first : first + job.rows + job.ahead].tolist()  # 末几刻的变化要看下一块的头几刻
    block, faults = np.empty((len(hours), *job.shape), dtype=np.float32), dict[int, Fault]()
    for i, hour in enumerate(hours):
        tree = int(job.owner[c, first + i])
        path, fills = field_path(job.trees[tree], job.channels[c], hour), job.fills[tree][job.channels[c]]
        if not read_into(str(path), header, block[i], fills):
            try:
                block[i] = read_field(path, job.shape, fills)
            except FieldError as error:
                faults[i] = error.fault
    good = np.array([i not in faults for i in range(len(hours))])
    own = Counter[Fault](fault for i, fault in faults.items() if i < job.rows)
    moments = measure(block[: job.rows][good[: job.rows]])
    if not job.ahead:
        return ChannelMoments(moments, own)
    early, late = block[: -job.ahead], block[job.ahead :]  # 抽样的小时连着，这两个恰好隔 interval_hours
    both = good[: -job.ahead] & good[job.ahead :]
    return ChannelMoments(moments, own, measure(late[both].astype(np.float64) - early[both]))


def state_of(config: DataConfig, channel: str, moments: Moments) -> tuple[tuple[float, float] | None, Verdict | None]:
    """(mean_std.json 的均值与标准差, 文件像原始的还是标准化过的)；没有 json、没有文件就不知道。"""
    if not (Path(home(config)) / channel_folder(channel) / "mean_std.json").exists():
        return None, None
    stated = read_mean_std(home(config), channel)
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
            held = read_tendency(home(config), channel) if stated else None
            rows[-1] += [
                f"{changes.std:.6g}" if changes.total else "-",
                f"{held.std:.6g} ({held.hours} h)" if held else "-",
            ]
    return "\n".join(aligned(rows))


def home(config: DataConfig) -> str:
    """统计量写在哪里：树里；几个数据集合起来的，data.statistics。"""
    return config.statistics or config.root


def owned_home(config: DataConfig, channels: Iterable[str]) -> AbstractContextManager[None]:
    """块内这些统计量只由这个进程写，同一棵树的导入也等着。"""
    if config.parts and not config.statistics:
        raise ValueError("data.set names several data sets; data.statistics=FOLDER says where theirs are to be written")
    return owned(home(config), channels)


def refuse_written(config: DataConfig, channels: Iterable[str]) -> None:
    for channel in channels:
        for name in ("mean_std.json", "min_max.json"):
            if (path := Path(home(config)) / channel_folder(channel) / name).exists():
                raise ValueError(f"{path} exists already; give --overwrite to replace it")


def write_all(config: DataConfig, results: dict[str, ChannelMoments], tendency: bool = False) -> None:
    """全部查过才写第一个。tendency: 也写变化的标准差；文件已经标准化的只添这一项，别的照旧。

    Raises:
        ValueError: 文件已经标准化（写下去物理单位的统计量就没有了）；见 check_moments。
    """
    written = {channel: _to_write(config, channel, found, tendency) for channel, found in results.items()}
    for channel, values in written.items():
        write_mean_std(home(config), channel, *values)
    if config.parts:
        write_joined_about(config)


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
    for part in config.part_configs().values():  # 合起来的 json 还没有，各自的说得出
        state = "standard" if state_of(part, channel, moments)[1] == "standard" else state
    if config.standardize == "yes" or (config.standardize == "auto" and state != "standard"):
        change = Tendency(found.changes.std, hours) if tendency else None
        return ToWrite(moments.mean, moments.std, moments.low, moments.high, change)
    if not tendency or stated is None:
        raise ValueError(
            f"{channel}: the files are standardised already (mean {moments.mean:.4g}, std {moments.std:.4g}), "
            "mean_std.json is to hold physical units; data.standardize=yes says that the files are raw"
        )
    return ToWrite(*stated, None, None, Tendency(found.changes.std * stated[1], hours))
