"""存档：一棵目录树打成的一个 Zarr 文件夹，训练时按行映射进内存；由 `python dataset.py pack` 写。

    STORE/fields/12.0.0.0     第 12 块：连续若干个时刻的 (时刻, 通道, 纬度, 经度)，已标准化，不压缩
    STORE/{time,channel,…}    坐标与统计量；连同 fields 就是 xarray 能打开的 Zarr 第 2 版
    STORE/pack/               打包的记录：plan.json、每块一份 000012.json，和插值的邻居 000012.raw
    STORE/present.npy         哪些文件按名字存在，逐小时：段与插值由它定
    STORE/store.json          最后才写：有它就是打包完了；内有各文件的校验和

给出的窗口与目录树逐位相同，因为分段、插值、「历史里没有未来」都是同一段代码（FieldReader），这里只换了读数的地方：
有文件的场是 fields 里的一行；插值的邻居存着文件里原来的数，读的时候当场插值（预报的输入不能用初始时刻之后的文件，
而初始时刻随窗口而变，打包时算不完）。fields 里插值好的那一份是给别的工具看的。读坏的文件也记着，读到时照样报告。
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from util.batch import as_tensor
from util.calendar import hours_in_year, time_text, year_start
from util.config import DataConfig
from util.data.index import Index
from util.data.origin import DataError
from util.data.tree_files import FieldError, choose_channels, field_path
from util.files.fills import LEAST_FAR, RTOL, fills_of, find_fill, refuse_filled
from util.files.store_files import (
    FILLS_KNOWN,
    LIST_DAMAGE,
    PRESENT,
    StorePlan,
    check_digests,
    check_sizes,
    find_damage,
    read_hours,
    read_mark,
    static_array,
    torch_type,
)
from util.files.zarr_metadata import chunk_name

MAX_MAPS = 16384  # 同时映射的块；Linux 默认每个进程至多 65530 个映射
log = logging.getLogger("ar_pred")


class Store:
    """存档作为数据的来源（util.data.origin.Origin）；通道以配置里的次序编号。"""

    standardized = True

    def __init__(self, config: DataConfig) -> None:
        assert config.store is not None
        self.config, self.path = config, Path(config.store)
        content = read_mark(self.path)
        self.plan = plan = StorePlan(**content["plan"])
        self.root, self.dtype = plan.root, torch_type(plan)
        _check(config, plan)
        self.channels = choose_channels(config, plan.channels, f"the store {config.store}")
        self.picks = [plan.channels.index(channel) for channel in self.channels]
        self.runs = [_run(list(pairs)) for _, pairs in groupby(enumerate(self.picks), lambda pair: pair[1] - pair[0])]
        self.files: dict[str, str] = content["files"]
        check_digests(self.path, self.files)
        self.hours = read_hours(self.path, plan)
        place = {pick: c for c, pick in enumerate(self.picks)}
        self.faults = {(place[c], h): (fault, detail) for c, h, fault, detail in content["faults"] if c in place}
        self.neighbours = {(place[c], h): (file, i) for c, h, file, i in content["neighbours"] if c in place}
        self.maps: dict[int, torch.Tensor] = {}
        self.checked = torch.zeros(len(self.files), dtype=torch.bool).share_memory_()  # 各读取进程共用，各轮也是
        self.places = {name: i for i, name in enumerate(self.files)}
        self.knows_fills = FILLS_KNOWN in content  # 从前打包的没有认过填充值：读的时候认
        check_sizes(self.path, plan, -(-self.hours.size // plan.chunk_rows))
        log.info("store: %s, %s, %s, packed from %s", self.path, plan.dtype, plan.years_text, plan.root)

    def years(self, wanted: Sequence[int]) -> list[int]:
        return sorted(set(wanted) & set(self.plan.years))

    def index(self, years: list[int]) -> Index:
        """与扫描目录树的这些年份所得的相同。

        Raises:
            ValueError: 有的年份不在存档里。
        """
        absent = sorted(set(years) - set(self.plan.years))
        if absent:
            raise ValueError(
                f"data.splits need {', '.join(map(str, absent))}, the store {self.path} holds {self.plan.years_text}; "
                "later years are appended by python dataset.py pack with wider splits"
            )
        start = year_start(years[0])
        present = np.zeros((len(self.picks), year_start(years[-1] + 1) - start), dtype=bool)
        for year in years:
            first, count = year_start(year) - start, hours_in_year(year)
            there = year_start(year) - year_start(self.plan.years[0])
            present[:, first : first + count] = self.present[self.picks, there : there + count]
        return Index(tuple(self.channels), start, present)

    @cached_property
    def present(self) -> np.ndarray:
        """(C, hours) bool，存档的全部年份，逐小时。"""
        hours = year_start(self.plan.years[-1] + 1) - year_start(self.plan.years[0])
        return np.unpackbits(np.load(self.path / PRESENT), axis=1, count=hours).astype(bool)

    def mean_std(self) -> list[tuple[float, float]]:
        for channel, pick in zip(self.channels, self.picks, strict=True):
            refuse_filled(f"the store {self.path}, {channel}", self.plan.std[pick], "import or pack it again elsewhere")
        return [(self.plan.mean[pick], self.plan.std[pick]) for pick in self.picks]

    def decide(self, index: Index, training: np.ndarray) -> bool:
        """打包时已经定了；日志里的话与目录树的相同。"""
        if self.config.standardize == "auto":
            word = "already standardised" if self.plan.standardized else "raw, will be standardised with mean_std.json"
            declared = f"packed with data.standardize = {self.plan.standardize}"
            how = f"measured {len(index.channels)} channels" if self.plan.standardize == "auto" else declared
            log.info("standardisation: files are %s (%s)", word, how)
        return self.plan.standardized

    def load(self, hours: Sequence[int], here: np.ndarray, out: np.ndarray) -> list[tuple[int, int, FieldError]]:
        """各小时的通道抄进 out (n, C, H, W)，连着的一次抄完，只碰所选通道的字节；返回打包时读坏的。"""
        rows = np.minimum(np.searchsorted(self.hours, hours), self.hours.size - 1)
        lost = (self.hours[rows] != hours) & here.any(axis=1)  # 没有的行，一个文件也不能有：整行都要插值
        assert not lost.any(), f"hours {np.asarray(hours)[lost]} are not in the store"
        target = as_tensor(out)
        for to, number, places in _pieces(rows.tolist(), self.plan.chunk_rows):
            for channels, picks in self.runs:
                target[to, channels].copy_(self._chunk(number)[places, picks])
        if not self.knows_fills:
            self._refuse_fills(hours, here, target)
        bad = [(i, c) for i, c in np.argwhere(here).tolist() if (c, hours[i]) in self.faults] if self.faults else []
        return [(i, c, self._error(c, hours[i])) for i, c in bad]

    def file(self, c: int, hour: int) -> Path:
        return field_path(self.root, self.channels[c], hour)

    def raw(self, c: int, hour: int) -> np.ndarray:
        if (c, hour) in self.faults:
            raise self._error(c, hour)
        if (c, hour) not in self.neighbours:
            raise ValueError(
                f"the store {self.path} has no file next to the gap of {self.channels[c]} "
                f"({field_path(self.root, self.channels[c], hour).name}); "
                "data.splits leave out years in between: pack these splits into a store of their own"
            )
        file, i = self.neighbours[c, hour]
        self._verify(file)
        height, width = self.plan.shape[2:]
        size = height * width
        return np.fromfile(self.path / file, "<f4", size, offset=4 * i * size).reshape(height, width)

    def static_names(self) -> list[str]:
        return sorted(self.plan.static)

    def static(self, name: str) -> np.ndarray:
        self._verify(file := f"{static_array(name)}/{chunk_name(0, 2)}")
        return np.fromfile(self.path / file, "<f4").reshape(self.plan.shape[2:])

    def stamp(self, c: int, hour: int) -> str:
        if (c, hour) in self.neighbours:  # 不在抽样时刻上的邻居没有自己的一行
            return self.files[self.neighbours[c, hour][0]]
        row = min(int(np.searchsorted(self.hours, hour)), self.hours.size - 1)
        return self.files[_chunk_file(row // self.plan.chunk_rows)]

    def _refuse_fills(self, hours: Sequence[int], here: np.ndarray, fields: torch.Tensor) -> None:
        """here (n, C) 为真的场 (n, C, H, W) 里的填充值：打包时没有认出，邻居也没有存，补不了，只能重新打包。

        Raises:
            DataError: 头一个。
        """
        rtol = max(RTOL, torch.finfo(self.dtype).eps)
        numbers = fields.float().numpy()  # float32 的不抄
        for i, c in np.argwhere(here).tolist():
            pick, flat = self.picks[c], numbers[i, c].ravel()
            mean, std = self.plan.mean[pick], self.plan.std[pick]
            far = min(LEAST_FAR, (LEAST_FAR - abs(mean)) / std) / 2
            with np.errstate(over="ignore"):
                if flat[0] != flat[-1] and flat.dot(flat) < far**2:  # 都不远，又不是整场一个数：同 surely_data
                    continue
            fills, stored = fills_of(self.config.limits(self.channels[c])), numbers[i, c].astype(np.float64)
            physical = stored * std + mean
            either = (physical, stored) if self.plan.standardized else (physical,)  # 填充值也许没有跟着标准化
            for value, where in filter(None, (find_fill(field, fills, rtol) for field in either)):
                raise DataError(
                    f"{self.channels[c]} at {time_text(hours[i])}: {int(where.sum())} of {where.size} values are "
                    f"{value:g}, a fill value, and the store {self.path} was packed before these were looked for; "
                    "run the command that wrote it once more, it packs anew"
                )

    def _chunk(self, number: int) -> torch.Tensor:
        """第 number 块 (n, C, H, W)；映射不占文件描述符，页由操作系统按需读入，各进程共用。"""
        self._verify(_chunk_file(number))
        if number not in self.maps:
            if len(self.maps) >= MAX_MAPS:
                self.maps.clear()
            path, shape = self.path / _chunk_file(number), self.plan.shape
            self.maps[number] = torch.from_file(str(path), False, int(np.prod(shape)), dtype=self.dtype).view(shape)
        return self.maps[number]

    def _verify(self, name: str) -> None:
        """要读一个文件之前，照 data.verify 核对它的校验和。

        Raises:
            DataError: 不同，或读不出。
        """
        how, place = self.config.verify, self.places[name]
        if how == "never" or (how == "first_read" and self.checked[place]):
            return
        if fault := find_damage(self.path / name, self.files[name]):
            raise DataError(
                f"{self.path / name}: {fault}; remove it and run the command that wrote the store once more, "
                f"or take it as it is with data.verify=never; {LIST_DAMAGE} {self.path} lists all that is damaged"
            )
        self.checked[place] = True

    def _error(self, c: int, hour: int) -> FieldError:
        fault, detail = self.faults[c, hour]
        return FieldError(field_path(self.root, self.channels[c], hour), fault, detail)


def _chunk_file(number: int) -> str:
    return f"fields/{chunk_name(number, 4)}"


def _check(config: DataConfig, plan: StorePlan) -> None:
    """配置要的，存档给得了。"""
    where = f"the store {config.store}"
    every, _ = config.sampling
    if every % plan.interval_hours:
        key = "interval_hours" if config.starts_every_hours is None else "starts_every_hours"
        raise ValueError(
            f"data.{key} = {every}: {where} holds every {plan.interval_hours} h; "
            f"multiples of {plan.interval_hours} can be read from it"
        )
    if (config.first_hour - plan.first_hour) % plan.interval_hours:
        raise ValueError(
            f"data.first_hour = {config.first_hour}: {where} holds every {plan.interval_hours} h from hour "
            f"{plan.first_hour}; {plan.first_hour} and every {plan.interval_hours} h after it can be read from it"
        )
    for name, held in (("latitude", plan.latitudes), ("longitude", plan.longitudes)):
        asked = list(getattr(config, name).values())
        if asked != held:
            texts = [f"{len(v)} values from {v[0]:g} to {v[-1]:g}" for v in (asked, held)]
            raise ValueError(f"data.{name} has {texts[0]}, {where} has {texts[1]}")
    if config.utc_offset_hours != plan.utc_offset_hours:
        raise ValueError(
            f"data.utc_offset_hours = {config.utc_offset_hours}: {where} was packed with {plan.utc_offset_hours}"
        )
    if config.max_gap_hours > plan.max_gap_hours:
        raise ValueError(
            f"data.max_gap_hours = {config.max_gap_hours}: {where} holds what bridges gaps of up to "
            f"{plan.max_gap_hours} h; use at most that, or pack again with the larger value"
        )
    if config.standardize != "auto" and (config.standardize == "no") != plan.standardized:
        held = "already standardised" if plan.standardized else "raw"
        raise ValueError(f"data.standardize = {config.standardize}: {where} was packed from files that are {held}")


def _pieces(rows: list[int], size: int) -> Iterator[tuple[slice, int, slice]]:
    """一串行号 → 同一块里等距的几段：(在串里的位置, 块, 块里的行)。"""
    step, first = max(1, rows[1] - rows[0]) if len(rows) > 1 else 1, 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] - rows[i - 1] != step or rows[i] // size != rows[first] // size:
            number, place = divmod(rows[first], size)
            yield slice(first, i), number, slice(place, place + (i - first - 1) * step + 1, step)
            first = i


def _run(pairs: list[tuple[int, int]]) -> tuple[slice, slice]:
    """[(通道, 存档里的通道)]，两者都连续 → 一对切片。"""
    (first, pick), count = pairs[0], len(pairs)
    return slice(first, first + count), slice(pick, pick + count)
