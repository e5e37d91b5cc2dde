"""目录树的索引：扫一遍文件名，记住每个通道有哪些小时；再按日期分段，段内没有补不上的空缺。"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from tokenize import TokenError
from zipfile import BadZipFile

import numpy as np
from tqdm import tqdm

from util.atomic import making, replacing
from util.calendar import hour_of, hours_in_year, moment_of, time_text, year_start
from util.config import DataConfig
from util.variables import channel_folder

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Index:
    """present[c, h]：通道 c 在 start + h 小时（文件名的历法）有没有文件；逐小时，插值要用到抽样之外的邻居。"""

    channels: tuple[str, ...]
    start: int
    present: np.ndarray  # (C, hours) bool

    @property
    def stop(self) -> int:
        return self.start + self.present.shape[1]


def date_hours(first: str, last: str) -> range:
    """起止日期（两端都含，写年份就是整年）→ 小时范围。"""
    return range(hour_of(_midnight(first, end=False)), hour_of(_midnight(last, end=True)) + 24)


def join_indexes(channels: Sequence[str], years: Sequence[int], parts: Sequence[Index]) -> tuple[Index, np.ndarray]:
    """几个数据集的索引合成一个；另给 (C, hours) int8：每个场取自第几个（有它的头一个），没有是 -1。

    Raises:
        ValueError: 某通道在某一年哪里都没有。
    """
    start, stop = year_start(years[0]), year_start(years[-1] + 1)
    owner = np.full((len(channels), stop - start), -1, dtype=np.int8)
    for number, part in reversed(list(enumerate(parts))):
        first, last = max(start, part.start), min(stop, part.stop)
        for name, present in zip(part.channels, part.present, strict=True):
            if name in channels and first < last:
                row = owner[channels.index(name), first - start : last - start]
                row[present[first - part.start : last - part.start]] = number
    for name, row in zip(channels, owner, strict=True):
        for year in years:
            if (row[year_start(year) - start : year_start(year + 1) - start] < 0).all():
                raise ValueError(f"data.splits need {year}, and no data set of data.set holds {name} in that year")
    return Index(tuple(channels), start, owner >= 0), owner


def years_there(root: str | Path, channels: Sequence[str], wanted: Sequence[int]) -> list[int]:
    """wanted 之中每个通道都有文件夹的年份。"""
    folders = [Path(root) / channel_folder(channel) for channel in channels]
    return sorted(year for year in wanted if all((folder / str(year)).is_dir() for folder in folders))


def split_hours(config: DataConfig) -> dict[str, range]:
    """三段日期 → 小时范围（含止日的最后一小时）。

    Raises:
        ValueError: 止早于起，或两段重叠。
    """
    spans: dict[str, range] = {}
    for name in SPLITS:
        first, last = getattr(config.splits, name)
        span = date_hours(first, last)
        if not span:
            raise ValueError(f"data.splits.{name} = [{first}, {last}]: the end lies before the start")
        for other, taken in spans.items():
            if span.start < taken.stop and taken.start < span.stop:
                raise ValueError(f"data.splits.{name} = [{first}, {last}] overlaps data.splits.{other}")
        spans[name] = span
    return spans


def sampled_hours(span: range, every: int, first_hour: int) -> np.ndarray:
    """范围内从 1970-01-01T00 数起的第 first_hour、first_hour + every……小时；every 整除 24 时各天的钟点相同。"""
    return np.arange(span.start + (first_hour - span.start) % every, span.stop, every, dtype=np.int64)


def make_segments(hours: np.ndarray, config: DataConfig) -> list[np.ndarray]:
    """抽样时刻（升序）→ 若干段，段内相邻的恰好隔 interval_hours；抽样更密时各钟点各成各的段，段按头一个时刻排。"""
    every, first = config.sampling
    segments = []
    for start in range(first, first + config.interval_hours, every):
        own = hours[(hours - start) % config.interval_hours == 0]
        cuts = np.flatnonzero(np.diff(own) != config.interval_hours) + 1
        segments += [piece for piece in np.split(own, cuts) if piece.size]
    return sorted(segments, key=lambda piece: int(piece[0]))


def split_years(config: DataConfig) -> list[int]:
    """三段日期涉及的年份。"""
    spans = split_hours(config).values()
    return sorted({y for s in spans for y in range(moment_of(s.start).year, moment_of(s.stop - 1).year + 1)})


def scan(config: DataConfig, channels: list[str], years: list[int], rebuild: bool = False) -> Index:
    """扫描这些年份；结果存进 cache_dir，以各年份文件夹的修改时间为键，没变就直接读回；rebuild 不看存着的。

    Raises:
        ValueError: 某通道缺某一年的文件夹。
    """
    start = year_start(years[0])
    folders = [
        (c, y, Path(config.root) / channel_folder(name) / str(y)) for c, name in enumerate(channels) for y in years
    ]
    stamps = [_stamp(folder, channels[c]) for c, _, folder in folders]
    key = hashlib.sha256(json.dumps([str(Path(config.root).resolve()), channels, years, stamps]).encode()).hexdigest()
    cache = Path(config.cache_dir) / f"index-{key[:16]}.npz"
    hours = year_start(years[-1] + 1) - start
    present = None if rebuild else _read_cache(cache, len(channels), hours)
    if present is None:
        with making(cache):  # 几个进程一起起步：一个去列，别的等着读
            present = None if rebuild else _read_cache(cache, len(channels), hours)
            if present is None:
                present = _list_files(folders, np.zeros((len(channels), hours), dtype=bool), start)
                _write_cache(cache, present)
    return Index(tuple(channels), start, present)


def _list_files(folders: Sequence[tuple[int, int, Path]], present: np.ndarray, start: int) -> np.ndarray:
    """列出各 (通道, 年, 文件夹)，在 present (C, hours) 里填上有文件的。"""
    with ThreadPoolExecutor(8) as pool:  # 网络盘上列目录的时间是等待，不是计算
        numbers = pool.map(lambda item: _file_numbers(item[2], item[1]), folders)
        for (c, year, _), found in zip(folders, tqdm(numbers, "index", len(folders), leave=False), strict=True):
            present[c, year_start(year) - start + found] = True
    return present


def tree_hours(root: str | Path, channel: str) -> np.ndarray:
    """(n,) 树里这个通道有文件的全部小时，文件名的历法，升序；一个也没有就是空的。"""
    folder = Path(root) / channel_folder(channel)
    years = sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir())
    found = [year_start(year) + np.sort(_file_numbers(folder / str(year), year)) for year in years]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def planned_index(config: DataConfig, channels: list[str], hours: np.ndarray) -> Index:
    """写下 hours 之后 scan 会得到的：树里已有的，加上各通道的 hours；不进缓存。

    Raises:
        ValueError: 某通道在某一年仍没有文件夹，那时 scan 也不肯。
    """
    years = split_years(config)
    start = year_start(years[0])
    present = np.zeros((len(channels), year_start(years[-1] + 1) - start), dtype=bool)
    present[:, hours[(hours >= start) & (hours < start + present.shape[1])] - start] = True
    for c, name in enumerate(channels):
        for year in years:
            folder = Path(config.root) / channel_folder(name) / str(year)
            first = year_start(year) - start
            if folder.is_dir():
                present[c, first + _file_numbers(folder, year)] = True
            elif not present[c, first : first + hours_in_year(year)].any():
                raise ValueError(f"data.splits need {year}, and there is no field of {name} in that year")
    return Index(tuple(channels), start, present)


def bridgeable(present: np.ndarray, max_gap: int) -> np.ndarray:
    """(hours,) bool：这一小时有文件，或两侧最近的文件相距不超过 max_gap（序列两端只有一侧时看到它的距离）。"""
    hours = np.arange(present.size)
    before = np.maximum.accumulate(np.where(present, hours, -1))
    after = np.minimum.accumulate(np.where(present, hours, present.size)[::-1])[::-1]
    gap = np.where(before < 0, after - hours, np.where(after >= present.size, hours - before, after - before))
    neither = (before < 0) & (after >= present.size)
    return (gap <= max_gap) & ~neither


def neighbours(present: np.ndarray, position: int) -> list[int]:
    """position 两侧最近的有文件处，由先到后；序列两端只有一侧。"""
    before, after = np.flatnonzero(present[:position])[-1:], np.flatnonzero(present[position + 1 :])[:1]
    return [*before.tolist(), *(after + position + 1).tolist()]


def find_segments(index: Index, config: DataConfig) -> dict[str, list[np.ndarray]]:
    """每个划分 → 若干段（make_segments）；段内每个通道或有文件、或补得上。"""
    usable = np.ones(index.present.shape[1], dtype=bool)
    for row in index.present:
        usable &= bridgeable(row, config.max_gap_hours)
    result: dict[str, list[np.ndarray]] = {}
    for name, span in split_hours(config).items():
        hours = sampled_hours(span, *config.sampling)
        result[name] = make_segments(hours[usable[hours - index.start]], config)
    return result


def check_splits(config: DataConfig, index: Index) -> dict[str, list[np.ndarray]]:
    """find_segments 的结果，每个划分都有样本；导入之前、训练之前都查。

    Raises:
        ValueError: 哪个划分是空的。
    """
    segments = find_segments(index, config)
    for name in SPLITS:
        if not segments[name]:
            dates = getattr(config.splits, name)
            raise ValueError(f"data.splits.{name} = {dates}: empty, no samples there (root {config.root})")
    return segments


def check_windows(config: DataConfig, segments: dict[str, list[np.ndarray]]) -> None:
    """每个划分至少放得下一个窗口。

    Raises:
        ValueError: 哪个划分，最长的一段有几个样本。
    """
    window = config.frames_in + config.frames_out
    for name in SPLITS:
        longest = max(piece.size for piece in segments[name])
        if longest < window:
            raise ValueError(
                f"data.splits.{name} = {getattr(config.splits, name)}: the longest run without a gap has {longest} "
                f"samples, a window needs data.frames_in + data.frames_out = {window}"
            )


def too_many_missing(config: DataConfig, gone: int, total: int) -> str | None:
    """一个通道 total 个样本缺 gone 个超过了 max_missing，说成半行；没有超过是 None。"""
    if gone <= config.max_missing * max(1, total):
        return None
    return (
        f"{gone} of {total} files are missing or unreadable ({100 * gone / total:.1f} %), above "
        f"data.max_missing = {config.max_missing:g}"
    )


def describe_gaps(index: Index, config: DataConfig, segments: dict[str, list[np.ndarray]]) -> list[str]:
    """各划分里没有被任何段覆盖的时间，一处一行：起止时刻，以及缺了哪些通道。"""
    lines = []
    for name, span in split_hours(config).items():
        hours = sampled_hours(span, *config.sampling)
        lost = np.setdiff1d(hours, np.concatenate(segments[name]) if segments[name] else [])
        for gap in np.split(lost, np.flatnonzero(np.diff(lost) != config.sampling[0]) + 1):
            if gap.size:
                absent = ~index.present[:, gap[0] - index.start]
                names = [c for c, gone in zip(index.channels, absent, strict=True) if gone]
                shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                lines.append(
                    f"{name}: {time_text(gap[0])} to {time_text(gap[-1])} ({gap.size} samples), no file of {shown}"
                )
    return lines


def _midnight(text: str, end: bool) -> datetime:
    day = date(int(text), 12 if end else 1, 31 if end else 1) if len(text) == 4 else date.fromisoformat(text)
    return datetime(day.year, day.month, day.day)


def _read_cache(path: Path, channels: int, hours: int) -> np.ndarray | None:
    """存着的 (C, hours) bool；没有、坏了、形状不对都是 None：索引随时可以重新扫描。"""
    if not path.is_file():
        return None
    try:
        packed = np.load(io.BytesIO(path.read_bytes()))["present"]  # zip 里有 CRC，数错了也读不出
    except (EOFError, ValueError, LookupError, RuntimeError, SyntaxError, MemoryError, BadZipFile, TokenError):
        return None
    if packed.dtype != np.uint8 or packed.shape != (channels, -(-hours // 8)):
        return None
    return np.unpackbits(packed, axis=1, count=hours).astype(bool)


def _write_cache(path: Path, present: np.ndarray) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, present=np.packbits(present, axis=1))
        file.flush()
        os.fsync(file.fileno())  # 落盘才改名：断电之后不留下空的


def _stamp(folder: Path, channel: str) -> int:
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        beside = sorted(p.name for p in folder.parent.glob("[0-9]*") if p.is_dir())
        there = f"{beside[0]} to {beside[-1]} ({len(beside)} years)" if beside else "none"
        raise ValueError(
            f"channel {channel}: no year {folder.name} (looked for {folder}); years there: {there}"
        ) from None


def _file_numbers(folder: Path, year: int) -> np.ndarray:
    """文件夹里 `YYYY-NNNN.npy` 的 NNNN；别的名字不理会。"""
    prefix, limit = f"{year}-", hours_in_year(year)
    names = (n for n in os.listdir(folder) if len(n) == 13 and n.startswith(prefix) and n.endswith(".npy"))
    numbers = np.array([int(n[5:9]) for n in names if n[5:9].isdecimal()], dtype=np.int64)
    return numbers[numbers < limit]
