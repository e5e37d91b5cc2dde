"""几个数据集作为一个来源（data.set 是一列）：在时间上接起来，或把通道并起来；每个场取自有它的头一个数据集。

几个都有的场须逐点相同，打开时核对，核对过的记在 cache_dir。统计量：一个通道只在一个数据集里，就用那里的；在几个里，
或者各处写的本来相同，或者由 dataset.py statistics 在 data.statistics 里写下合起来的：不取头一个的充数。
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from util.atomic import replacing
from util.calendar import time_text
from util.config import DataConfig
from util.data.index import Index, join_indexes, sampled_hours
from util.data.origin import DataSet
from util.data.tree_files import FieldError, choose_channels, read_joined_statistics
from util.files.fills import refuse_filled

THREADS = 8
log = logging.getLogger("ar_pred")


class Part(NamedTuple):
    """一个数据集。mine: 合起来的通道序号；own: 它自己的，与 mine 对应。"""

    name: str
    origin: DataSet
    mine: np.ndarray
    own: np.ndarray


class Joined:
    """几个目录树，或几个存档。"""

    def __init__(self, config: DataConfig, origins: Mapping[str, DataSet]) -> None:
        """
        Raises:
            ValueError: 既有目录树又有存档；要的通道哪里都没有。
        """
        kinds = {origin.standardized for origin in origins.values()}
        if len(kinds) > 1:
            raise ValueError(
                f"data.set: {', '.join(origins)} are trees and stores; read as one, all must be of one kind"
            )
        union = list(dict.fromkeys(channel for origin in origins.values() for channel in origin.channels))
        self.config, self.root, self.standardized = config, config.root, kinds.pop()
        self.channels = choose_channels(config, union, "any data set of data.set")
        types = {origin.dtype for origin in origins.values()}
        self.dtype = types.pop() if len(types) == 1 else torch.float32
        self.parts = []
        for name, origin in origins.items():
            pairs = [(self.channels.index(c), i) for i, c in enumerate(origin.channels) if c in self.channels]
            mine, own = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
            self.parts.append(Part(name, origin, mine, own))
        self.indexes: list[Index] = []
        self.start, self.owner = 0, np.empty((len(self.channels), 0), dtype=np.int8)  # 有了 index 才有

    def years(self, wanted: Sequence[int]) -> list[int]:
        held = [set(part.origin.years(wanted)) for part in self.parts]
        holders = [[p for p, part in enumerate(self.parts) if c in part.mine] for c in range(len(self.channels))]
        return sorted(y for y in wanted if all(any(y in held[p] for p in several) for several in holders))

    def index(self, years: list[int]) -> Index:
        """
        Raises:
            ValueError: 某通道在某一年哪里都没有；几个数据集都有的场不同。
        """
        self.parts = [part for part in self.parts if part.origin.years(years)]
        self.indexes = [part.origin.index(part.origin.years(years)) for part in self.parts]
        joint, self.owner = join_indexes(self.channels, years, self.indexes)
        self.start = joint.start
        for number, part in enumerate(self.parts):
            held = (self.owner == number).any(axis=0)
            places = np.flatnonzero(held) + self.start
            span = f"{time_text(places[0])} to {time_text(places[-1])}" if places.size else "nothing"
            names = ", ".join(self.channels[c] for c in part.mine.tolist())
            log.info("data set %s: %s from %s; %s", part.name, span, part.origin.root, names)
        self._compare_overlaps()
        return joint

    def shares(self, hours: np.ndarray) -> dict[str, int]:
        """hours（各抽样时刻）里，各数据集给出几个场。"""
        owners = self.owner[:, hours - self.start]
        return {part.name: int((owners == number).sum()) for number, part in enumerate(self.parts)}

    def mean_std(self) -> list[tuple[float, float]]:
        """
        Raises:
            ValueError: 几个数据集写的不同而没有 data.statistics；那里的是别的日期、别的数据集的。
        """
        if self.config.statistics:
            found = read_joined_statistics(self.config, self.channels)
            for channel, (_, std) in zip(self.channels, found, strict=True):
                refuse_filled(
                    f"{self.config.statistics}, {channel}", std, "python dataset.py statistics computes it again"
                )
            return found
        held = [part.origin.mean_std() for part in self.parts]
        result = []
        for c, channel in enumerate(self.channels):
            stated = {
                part.name: values[part.own[part.mine == c].item()]
                for part, values in zip(self.parts, held, strict=True)
                if c in part.mine
            }
            (first, wanted), *others = stated.items()
            for name, value in others:
                if value != wanted:
                    raise ValueError(
                        f"{channel}: mean, std are {wanted} in {first}, {value} in {name}; they are read as one: "
                        "set data.statistics to a folder, and python dataset.py statistics --config CONFIG --write "
                        "measures the training dates of all into it (stores: pack the trees as one store)"
                    )
            result.append(wanted)
        return result

    def decide(self, index: Index, training: np.ndarray) -> bool:
        """
        Raises:
            ValueError: 有的已经标准化、有的没有；已经标准化的，用的不是合起来的统计量。
        """
        states = {}
        for part, held in zip(self.parts, self.indexes, strict=True):
            hours = training[(training >= held.start) & (training < held.stop)]
            if not held.present[:, hours - held.start].any(axis=1).all():  # 训练日期里没有它：看它的别的日期
                hours = sampled_hours(range(held.start, held.stop), *self.config.sampling)
            states[part.name] = part.origin.decide(held, hours)
        if len(set(states.values())) > 1:
            texts = [f"{name} {'standardised already' if state else 'raw'}" for name, state in states.items()]
            raise ValueError(f"data.set: the files are {', '.join(texts)}; read as one, all must be the same")
        joint = self.mean_std()
        for part in self.parts if any(states.values()) or self.standardized else []:
            own = part.origin.mean_std()
            for c, i in zip(part.mine.tolist(), part.own.tolist(), strict=True):
                if own[i] != joint[c]:
                    raise ValueError(
                        f"{self.channels[c]}: {part.name} is standardised with mean, std {own[i]}, together they are "
                        f"{joint[c]}; join the raw trees (a store of them: python dataset.py pack)"
                    )
        return any(states.values())

    def load(self, hours: Sequence[int], here: np.ndarray, out: np.ndarray) -> list[tuple[int, int, FieldError]]:
        """各数据集的场读进 out (n, C, H, W)；整块都是一个数据集的直接读进去，否则经一块临时的。"""
        owners = self.owner[:, np.asarray(hours) - self.start].T  # (n, C)
        bad = []
        for number, part in enumerate(self.parts):
            mine = (here & (owners == number))[:, part.mine]  # (n, 它的通道)
            rows = np.flatnonzero(mine.any(axis=1))
            if not rows.size:
                continue
            place, wanted = self._place(part, rows, mine), np.zeros((rows.size, len(part.origin.channels)), dtype=bool)
            wanted[:, part.own] = mine[rows]
            target = np.empty((*wanted.shape, *out.shape[2:]), out.dtype) if place is None else out[place]
            found = part.origin.load([hours[i] for i in rows.tolist()], wanted, target)
            column = dict(zip(part.own.tolist(), part.mine.tolist(), strict=True))
            bad += [(int(rows[i]), column[c], error) for i, c, error in found]
            if place is None:
                for i, c in np.argwhere(wanted).tolist():
                    out[rows[i], column[c]] = target[i, c]
        return bad

    def _place(self, part: Part, rows: np.ndarray, mine: np.ndarray) -> tuple[slice, slice] | None:
        """可以直接读进去的那一块：时刻、通道都连着，次序相同，个个都要；不是这样是 None。"""
        first, column = int(rows[0]), int(part.mine[0])
        straight = np.array_equal(part.own, np.arange(len(part.origin.channels)))
        joined = np.array_equal(part.mine, np.arange(column, column + part.mine.size))
        if straight and joined and int(rows[-1]) - first + 1 == rows.size and mine[rows].all():
            return slice(first, first + rows.size), slice(column, column + part.mine.size)
        return None

    def file(self, c: int, hour: int) -> Path:
        part, own = self._holder(c, hour)
        return part.origin.file(own, hour)

    def raw(self, c: int, hour: int) -> np.ndarray:
        part, own = self._holder(c, hour)
        return part.origin.raw(own, hour)

    def static_names(self) -> list[str]:
        return sorted({name for part in self.parts for name in part.origin.static_names()})

    def static(self, name: str) -> np.ndarray:
        """
        Raises:
            ValueError: 几个数据集都有，而不相同。
        """
        first, *others = (part.origin.static(name) for part in self.parts if name in part.origin.static_names())
        if any(not np.array_equal(first, other) for other in others):
            raise ValueError(f"data.forcings: static/{name} differs between the data sets; remove one of them")
        return first

    def stamp(self, c: int, hour: int) -> str:
        part, own = self._holder(c, hour)
        return part.origin.stamp(own, hour)

    def _holder(self, c: int, hour: int) -> tuple[Part, int]:
        """这个场取自哪个数据集，那里的通道序号；哪里都没有的，算在有这个通道、有那一年的头一个。"""
        number = int(self.owner[c, hour - self.start])
        if number < 0:
            there = [p for p, part in enumerate(self.parts) if c in part.mine]
            near = [p for p in there if self.indexes[p].start <= hour < self.indexes[p].stop]
            number = (near or there)[0]
        part = self.parts[number]
        return part, int(part.own[part.mine == c].item())

    def _compare_overlaps(self) -> None:
        """几个数据集都有的场逐点相同；文件没有换过的，核对过一次就够了。"""
        pairs = self._overlaps()
        if not pairs:
            return
        self.mean_std()  # 标准化得不同的，先说这个：存档里的数因此不同
        digest = hashlib.sha256()
        for number, c, hour in pairs:
            other = self.parts[number]
            there = other.origin.stamp(int(other.own[other.mine == c].item()), hour)
            digest.update(f"{other.name} {other.origin.root} {c} {hour} {self.stamp(c, hour)} {there}\n".encode())
        seen = Path(self.config.cache_dir) / f"overlap-{digest.hexdigest()[:16]}"
        if not seen.is_file():
            with ThreadPoolExecutor(THREADS) as pool:
                bar = tqdm(pool.map(self._difference, pairs), "overlap", len(pairs), unit="field", leave=False)
                different = [pair for pair, differs in zip(pairs, bar, strict=True) if differs]
            if different:
                number, c, hour = different[0]
                raise ValueError(
                    f"data.set: {len(different)} of {len(pairs)} fields that are in several data sets differ, first "
                    f"{self.channels[c]} at {time_text(hour)} in {self._holder(c, hour)[0].name} and "
                    f"{self.parts[number].name}; remove it from one of them"
                )
            with replacing(seen) as temporary:
                temporary.touch()
        log.info("%d fields are in several data sets, with equal values; the first is read", len(pairs))

    def _overlaps(self) -> list[tuple[int, int, int]]:
        """(第几个数据集, 通道, 小时)：更前面的也有它；只看抽样时刻。"""
        hours = sampled_hours(range(self.start, self.start + self.owner.shape[1]), *self.config.sampling)
        found = []
        for number, (part, held) in enumerate(zip(self.parts, self.indexes, strict=True)):
            inside = hours[(hours >= held.start) & (hours < held.stop)]
            for c, i in zip(part.mine.tolist(), part.own.tolist(), strict=True):
                both = held.present[i, inside - held.start] & (self.owner[c, inside - self.start] != number)
                found += [(number, c, hour) for hour in inside[both].tolist()]
        return found

    def _difference(self, pair: tuple[int, int, int]) -> bool:
        """这个场与前面的不同。有一处读不出的不算：取的那一个坏了，读到时自会说。"""
        number, c, hour = pair
        first, own = self._holder(c, hour)
        other = self.parts[number]
        fields = [_read(first.origin, own, hour), _read(other.origin, int(other.own[other.mine == c].item()), hour)]
        if fields[0] is None or fields[1] is None:
            return False
        coarse = max(torch.finfo(part.origin.dtype).eps for part in (first, other))
        rounding = 4 * coarse if self.standardized else 0.0  # 目录树里是同样的数，存档里舍入过
        return not np.allclose(fields[0], fields[1], rtol=rounding, atol=rounding)

    @cached_property
    def homes(self) -> list[str]:
        """各通道的统计量（mean_std.json）所在的根目录。"""
        firsts = [next(part for part in self.parts if c in part.mine) for c in range(len(self.channels))]
        return [self.config.statistics or part.origin.root for part in firsts]


def _read(origin: DataSet, c: int, hour: int) -> np.ndarray | None:
    """一个场 (H, W)；读不出是 None。"""
    size = (1, len(origin.channels), origin.config.latitude.count, origin.config.longitude.count)
    here, out = np.zeros(size[:2], dtype=bool), np.empty(size, dtype=np.float32)
    here[0, c] = True
    return None if origin.load([hour], here, out) else out[0, c]
