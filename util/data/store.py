"""存档：一棵目录树打成的一个 Zarr 文件夹，训练时按行映射进内存；由 `python -m util.data.pack` 写。

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

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from util.arrays import as_tensor
from util.config import DataConfig
from util.data.calendar import hours_in_year, year_start, years_text
from util.data.index import Index
from util.data.tree import FieldError, field_path
from util.data.variables import channel_name, split_channel
from util.zarr_files import FILE_TYPES, chunk_name, write_json

FORMAT = 2
MARK = "store.json"
PLAN = "pack/plan.json"
LIST_DAMAGE = "python -m util.data.pack --verify --out"
MAY_GROW = ("years", "root", "commands", "standardize", "extremes")  # 再次打包时可以与从前不同的
TIMES, PRESENT = "time/0", "present.npy"
DECISIVE = (TIMES, PRESENT)  # 小，却定着每个窗口：打开时就核对
MAX_MAPS = 16384  # 同时映射的块；Linux 默认每个进程至多 65530 个映射
log = logging.getLogger("ar_pred")


@dataclass(frozen=True)
class Plan:
    """存档是什么：MAY_GROW 之外的，打包开始之后就不能再变。

    气压 hPa，单层变量为 None；extremes 是各通道 min_max.json 里的最小、最大，没有就是 None；其余见 DataSpec。
    """

    channels: list[str]
    units: list[str]
    pressures: list[float | None]
    latitudes: list[float]
    longitudes: list[float]
    mean: list[float]
    std: list[float]
    standardized: bool
    standardize: str
    utc_offset_hours: int
    interval_hours: int
    max_gap_hours: int
    dtype: str
    chunk_rows: int
    years: list[int]
    root: str
    commands: list[str]
    extremes: list[list[float] | None]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """一块的形状 (n, C, H, W)。"""
        return self.chunk_rows, len(self.channels), len(self.latitudes), len(self.longitudes)

    @property
    def chunk_bytes(self) -> int:
        return int(np.prod(self.shape)) * FILE_TYPES[self.dtype].itemsize

    @property
    def years_text(self) -> str:
        return years_text(self.years)


def torch_type(plan: Plan) -> torch.dtype:
    return getattr(torch, plan.dtype)


class Store:
    """存档作为数据的来源（util.data.reader.Origin）；通道以配置里的次序编号。"""

    standardized = True

    def __init__(self, config: DataConfig) -> None:
        assert config.store is not None
        self.config, self.path = config, Path(config.store)
        content = read_mark(self.path)
        self.plan = plan = Plan(**content["plan"])
        self.root, self.dtype = plan.root, torch_type(plan)
        _check(config, plan)
        self.channels = choose_channels(config, plan.channels)
        self.picks = [plan.channels.index(channel) for channel in self.channels]
        self.runs = [_run(list(pairs)) for _, pairs in groupby(enumerate(self.picks), lambda pair: pair[1] - pair[0])]
        self.files: dict[str, str] = content["files"]
        check_digests(self.path, self.files)
        self.hours = read_hours(self.path, plan)
        place = {pick: c for c, pick in enumerate(self.picks)}
        self.faults = {(place[c], h): (fault, detail) for c, h, fault, detail in content["faults"] if c in place}
        self.neighbours = {(place[c], h): (file, i) for c, h, file, i in content["neighbours"] if c in place}
        self.maps: dict[int, torch.Tensor] = {}
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
                "later years are appended by python -m util.data.pack with wider splits"
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

    def statistics(self) -> list[tuple[float, float]]:
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
        bad = [(i, c) for i, c in np.argwhere(here).tolist() if (c, hours[i]) in self.faults] if self.faults else []
        return [(i, c, self._error(c, hours[i])) for i, c in bad]

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
        height, width = self.plan.shape[2:]
        size = height * width
        return np.fromfile(self.path / file, "<f4", size, offset=4 * i * size).reshape(height, width)

    def stamp(self, c: int, hour: int) -> str:
        row = int(np.searchsorted(self.hours, hour))
        return self.files[f"fields/{chunk_name(row // self.plan.chunk_rows, 4)}"]

    def _chunk(self, number: int) -> torch.Tensor:
        """第 number 块 (n, C, H, W)；映射不占文件描述符，页由操作系统按需读入，各进程共用。"""
        if number not in self.maps:
            if len(self.maps) >= MAX_MAPS:
                self.maps.clear()
            path, shape = self.path / "fields" / chunk_name(number, 4), self.plan.shape
            self.maps[number] = torch.from_file(str(path), False, int(np.prod(shape)), dtype=self.dtype).view(shape)
        return self.maps[number]

    def _error(self, c: int, hour: int) -> FieldError:
        fault, detail = self.faults[c, hour]
        return FieldError(field_path(self.root, self.channels[c], hour), fault, detail)


def read_mark(path: Path) -> dict[str, Any]:
    """store.json 的内容：plan、files（相对路径 → 校验和）、faults、neighbours、gaps。

    Raises:
        ValueError: 不是存档、没有打包完、坏了。
    """
    command = "python -m util.data.pack --config CONFIG --out"
    if not (path / MARK).is_file():
        if (path / PLAN).is_file():
            raise ValueError(f"the store {path} is not complete; run {command} {path} again, it goes on from there")
        raise ValueError(f"{path} is not a store (no {MARK} in it); write one with {command} {path}")
    try:
        content = json.loads((path / MARK).read_text(encoding="utf-8"))
        digest = content.pop("digest")
    except (ValueError, KeyError, AttributeError):
        content, digest = {}, None
    if digest is None or digest != json_digest(content):
        raise ValueError(f"{path / MARK} is damaged; remove it and run {command} {path} again")
    if content["format"] != FORMAT:
        raise ValueError(f"the store {path} has format {content['format']}, this program reads {FORMAT}")
    return content


def write_mark(path: Path, content: dict[str, Any]) -> None:
    content = {"format": FORMAT, **content}
    write_json(path / MARK, {**content, "digest": json_digest(content)})


def read_plan(path: Path) -> Plan | None:
    """打包开始时写下的 plan；没有就是 None。

    Raises:
        ValueError: 坏了，或不是这一版写的。
    """
    if not (path / PLAN).is_file():
        return None
    try:
        values = json.loads((path / PLAN).read_text(encoding="utf-8"))
        names = set(values)
    except (ValueError, TypeError):
        raise ValueError(
            f"{path / PLAN}: damaged; remove it and run the same command again, the chunks already packed are kept"
        ) from None
    if names != {field.name for field in fields(Plan)}:
        raise ValueError(f"{path / PLAN}: written by another version; remove {path} and pack again")
    return Plan(**values)


def write_plan(path: Path, plan: Plan) -> None:
    write_json(path / PLAN, asdict(plan))


def read_hours(path: Path, plan: Plan) -> np.ndarray:
    """(N,) int64 各行的小时，文件名的历法（坐标 time 是 UTC）。"""
    return np.fromfile(path / TIMES, "<i8") + plan.utc_offset_hours


def choose_channels(config: DataConfig, there: list[str]) -> list[str]:
    """data.variables 展开成通道名；all 是存档里有的各层。

    Raises:
        ValueError: 存档里没有的变量或层。
    """
    channels: list[str] = []
    for variable, levels in config.variables.items():
        held = [channel for channel in there if split_channel(channel)[0] == variable]
        named = [variable] if levels == "single" else [channel_name(variable, level) for level in levels]
        wanted = [channel for channel in held if channel != variable] if levels == "all" else named
        if not wanted or not set(wanted) <= set(held):
            raise ValueError(
                f"data.variables.{variable} = {levels}: not in the store {config.store}; it holds {', '.join(there)}"
            )
        channels += wanted
    if not channels or len(set(channels)) < len(channels):
        raise ValueError(f"data.variables = {config.variables}: choose at least one channel, and none twice")
    return channels


def file_digest(path: Path) -> str:
    """文件的 blake2b，16 字节。"""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def json_digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _check(config: DataConfig, plan: Plan) -> None:
    """配置要的，存档给得了。"""
    where = f"the store {config.store}"
    if config.interval_hours % plan.interval_hours:
        raise ValueError(
            f"data.interval_hours = {config.interval_hours}: {where} holds every {plan.interval_hours} h; "
            f"multiples of {plan.interval_hours} can be read from it"
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


def check_digests(path: Path, files: Mapping[str, str]) -> None:
    """DECISIVE 各文件与 files 里的校验和相同。

    Raises:
        ValueError: 头一个不对的。
    """
    for name in DECISIVE:
        file = path / name
        if not file.is_file() or file_digest(file) != files[name]:
            found = "checksum differs" if file.is_file() else "missing"
            raise ValueError(f"{file}: {found}; {LIST_DAMAGE} {path} lists what is damaged")


def check_sizes(path: Path, plan: Plan, count: int) -> None:
    """count 块都在，大小都对。

    Raises:
        ValueError: 头一个不对的。
    """
    for number in range(count):
        chunk = path / "fields" / chunk_name(number, 4)
        size = chunk.stat().st_size if chunk.is_file() else None
        if size != plan.chunk_bytes:
            found = "missing" if size is None else f"{size} bytes, expected {plan.chunk_bytes}"
            raise ValueError(f"{chunk}: {found}; {LIST_DAMAGE} {path} lists what is damaged")


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
