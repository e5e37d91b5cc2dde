"""几份统计量文件里共同的（起报时间，时效，通道）：比较只用大家都有的。"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from util.scores.statistics_file import Statistics

Array = np.ndarray
READ_BYTES = 2**25


class Contender(NamedTuple):
    """一个参加比较的模型：表上的名字、统计量所在的文件、文件里的名字。"""

    label: str
    file: Statistics
    model: str

    @property
    def members(self) -> int:
        return int(self.file.attributes["members"]) if self.model == self.file.attributes["model"] else 1


class Common(NamedTuple):
    """大家都有的部分：起报时间 (T,)、时效 (L,)、通道 (C,)，和哪些场人人有效 (T, L, C) bool。"""

    hours: Array
    leads: list[int]
    channels: list[str]
    keep: Array


def common_pairs(contenders: Sequence[Contender]) -> Common:
    """各文件的起报时间、时效、通道的交集，以及其中人人都有有效场的部分。

    Raises:
        ValueError: 网格或单位不同，或没有共同的部分。
    """
    files = list({id(s.file): s.file for s in contenders}.values())
    first = files[0]
    for other in files[1:]:
        for axis in ("latitudes", "longitudes"):
            if not np.array_equal(getattr(first, axis), getattr(other, axis)):
                one, two = (axis_text(getattr(f, axis)) for f in (first, other))
                raise ValueError(f"{first.path} has {axis} {one}, {other.path} {two}: scores do not compare")
    hours = first.hours
    leads, channels = first.leads.tolist(), first.channels
    for other in files[1:]:
        hours = np.intersect1d(hours, other.hours)
        leads = [lead for lead in leads if lead in set(other.leads.tolist())]
        channels = [c for c in channels if c in other.channels and unit_of(first, c) == unit_of(other, c)]
    for what, values in (("initial time", hours), ("lead time", leads), ("channel with the same unit", channels)):
        if not len(values):
            raise ValueError(
                f"no common {what} among {', '.join(str(f.path) for f in files)}; "
                "evaluate.py with the same --split, --steps and --stride 1 makes them comparable"
            )
    keep = np.ones((len(hours), len(leads), len(channels)), dtype=bool)
    common = Common(hours, leads, channels, keep)
    for contender in contenders:
        for place, values in read_kept(contender, "square", common):
            keep[place] &= np.isfinite(values)
    if not keep.any():
        raise ValueError(f"no field is valid in all of {', '.join(str(f.path) for f in files)}: nothing to compare")
    return common


def axis_text(values: Array) -> str:
    return f"{values[0]:g} to {values[-1]:g} ({len(values)})"


def unit_of(file: Statistics, channel: str) -> str:
    return file.units[file.channels.index(channel)]


def read_kept(contender: Contender, name: str, common: Common) -> Iterator[tuple[Array, Array]]:
    """依次给出（共同时间里的位置，(n, L, C) 的值）；每次只读一段。"""
    file = contender.file
    leads = [file.leads.tolist().index(lead) for lead in common.leads]
    channels = [file.channels.index(c) for c in common.channels]
    step = max(1, READ_BYTES // (8 * len(file.leads) * len(file.channels)))
    wanted = np.isin(file.hours, common.hours)
    for start in range(0, len(file.hours), step):
        rows = np.flatnonzero(wanted[start : start + step])
        if rows.size:
            values = file.read(name, contender.model, slice(start, start + step))[rows][:, leads][:, :, channels]
            yield np.searchsorted(common.hours, file.hours[start + rows]), values
