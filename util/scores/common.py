"""几份统计量文件里共同的（起报时间，通道），与每个时效上有它的那几份共同的场。"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from util.scores.statistics_file import Statistics

Array = np.ndarray
READ_BYTES = 2**25


class Contender(NamedTuple):
    """一个参加比较的模型：表上的名字、统计量所在的文件、文件里的名字。

    more: 同一个模型的别的文件，补上 file 没有的时效。
    """

    label: str
    file: Statistics
    model: str
    more: tuple[Statistics, ...] = ()

    @property
    def members(self) -> int:
        return int(self.file.attributes["members"]) if self.model == self.file.attributes["model"] else 1

    def held(self, leads: Sequence[int]) -> Array:
        """(L,) bool：有没有这个时效。"""
        return np.isin(leads, np.concatenate([file.leads for file in (self.file, *self.more)]))


class Common(NamedTuple):
    """大家都有的起报时间 (T,)、通道 (C,)；有人有的时效 (L,)；哪些场在有这个时效的人那里都有效 (T, L, C) bool。"""

    hours: Array
    leads: list[int]
    channels: list[str]
    keep: Array


def common_pairs(contenders: Sequence[Contender]) -> Common:
    """各文件的起报时间、通道的交集，时效的并集，以及每个时效上有它的人都有有效场的部分。

    缺了一个时效的，在那里留空，不缩短别人的表；同一时效的各行总在同样的场上。

    Raises:
        ValueError: 网格或单位不同，或没有共同的部分；一份的时效别人一个也没有。
    """
    files = list({id(s.file): s.file for s in contenders}.values())
    first = files[0]
    for other in files[1:]:
        for axis in ("latitudes", "longitudes"):
            if not np.array_equal(getattr(first, axis), getattr(other, axis)):
                one, two = (axis_text(getattr(f, axis)) for f in (first, other))
                raise ValueError(f"{first.path} has {axis} {one}, {other.path} {two}: scores do not compare")
    hours = first.hours
    leads = sorted({lead for file in files for lead in file.leads.tolist()})
    channels = first.channels
    for other in files[1:]:
        hours = np.intersect1d(hours, other.hours)
        channels = [c for c in channels if c in other.channels and unit_of(first, c) == unit_of(other, c)]
    shared = [lead for lead in leads if sum(lead in f.leads for f in files) > 1] if len(files) > 1 else leads
    alone = any(not np.isin(f.leads, shared).any() for f in files)
    found = (("initial time", hours), ("lead time", [] if alone else leads), ("channel with the same unit", channels))
    for what, values in found:
        if not len(values):
            raise ValueError(
                f"no common {what} among {', '.join(str(f.path) for f in files)}; "
                "evaluate.py with the same --split, --steps and --stride 1 makes them comparable"
            )
    keep = np.ones((len(hours), len(leads), len(channels)), dtype=bool)
    common = Common(hours, leads, channels, keep)
    for contender in contenders:
        for place, held, values in read_kept(contender, "square", common):
            keep[place] &= np.isfinite(values) | ~held[:, None]
    if not keep.any():
        raise ValueError(f"no field is valid in all of {', '.join(str(f.path) for f in files)}: nothing to compare")
    return common


def axis_text(values: Array) -> str:
    return f"{values[0]:g} to {values[-1]:g} ({len(values)})"


def unit_of(file: Statistics, channel: str) -> str:
    return file.units[file.channels.index(channel)]


def read_kept(
    contender: Contender, name: str, common: Common, region: str | None = None
) -> Iterator[tuple[Array, Array, Array]]:
    """依次给出（共同时间里的位置 (n,)，这里有哪些时效 (L,) bool，(n, L, C) 的值，别的时效是 NaN）；每次只读一段。

    补时效的文件里没有这一项（只有集合、--events 才有的）时，那里是 NaN。

    region: 同 Statistics.read。
    """
    missing = np.ones(len(common.leads), dtype=bool)
    for file in (contender.file, *contender.more):
        held = np.isin(common.leads, file.leads) & missing
        missing &= ~held
        if held.any():
            for place, values in _read_file(file, name, contender.model, common, held, region):
                yield place, held, values


def _read_file(
    file: Statistics, name: str, model: str, common: Common, held: Array, region: str | None
) -> Iterator[tuple[Array, Array]]:
    leads = [file.leads.tolist().index(lead) for lead in np.array(common.leads)[held]]
    channels = [file.channels.index(c) for c in common.channels]
    step = max(1, READ_BYTES // (8 * len(file.leads) * len(file.channels)))
    wanted = np.isin(file.hours, common.hours)
    for start in range(0, len(file.hours), step):
        rows = np.flatnonzero(wanted[start : start + step])
        if rows.size:
            values = np.full((len(rows), len(held), len(channels)), np.nan)
            if name in (file.regional_names if region else file.names):
                found = file.read(name, model, slice(start, start + step), region)[rows]
                values[:, held] = found[:, leads][:, :, channels]
            yield np.searchsorted(common.hours, file.hours[start + rows]), values
