"""一个个例看什么：哪些（起报时间，时效）、哪些格点、通道、时刻；开始之前就定好，内存因此有界。"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.cases.settings import Case
from util.batch import DataSpec
from util.calendar import time_text
from util.strict import nearest

log = logging.getLogger("ar_pred")
CHANNELS, LEADS, MEMBERS = 9, 4, 30  # 没有写 channels、leads 时至多几个；地图与面条图至多几个成员
SOME_MEMBERS = 4  # 没有写 channels 时，宁可少看几个通道，也画得下这么多成员
FIELD_VALUES = 2**26  # 一次评测里各个例的场一共留多少个数：256 MiB
LINE_VALUES = 2**24  # 一个个例的羽状图一共多少个数：128 MiB
BESIDE = 3  # 与成员的场一起留的：真值、集合平均、气候态


@dataclass(frozen=True)
class Plan:
    """spec: 框里、这些通道的，经度由西向东连着；channels、rows、columns: 在整个网格里的序号。

    weights: (h,)，格点的面积，整个网格上平均为一；inside: (N, L) bool，有效时刻在 dates 里的；
    shots: 有效时刻（UTC 小时）→ 要画的（窗口的序号，时效的序号），由近到远；members: 画几个成员；
    point: 在框里的行与列，None 是框的面积平均。
    """

    case: Case
    spec: DataSpec
    channels: list[int]
    rows: list[int]
    columns: list[int]
    weights: np.ndarray
    inside: np.ndarray
    shots: dict[int, list[tuple[int, int]]]
    members: int
    point: tuple[int, int] | None

    @property
    def wanted(self) -> set[tuple[int, int]]:
        return {pair for pairs in self.shots.values() for pair in pairs}


def plan_cases(
    cases: Sequence[Case], spec: DataSpec, inits: np.ndarray, steps: int, members: int, weights: np.ndarray
) -> tuple[Plan, ...]:
    """inits: (N,) 各窗口的起报时间，UTC 小时，升序；weights: (H,) 各纬度的面积。

    Raises:
        ValueError: 没有一个窗口在个例的日期里；没有这个通道；框里没有格点；太大。一行。
    """
    return tuple(plan_case(case, spec, inits, steps, members, weights, FIELD_VALUES // len(cases)) for case in cases)


def plan_case(
    case: Case, spec: DataSpec, inits: np.ndarray, steps: int, members: int, weights: np.ndarray, room: int
) -> Plan:
    """room: 留得下多少个数的场；其余见 plan_cases。"""
    valid = inits[:, None] + np.array(spec.leads(steps))  # (N, L)
    inside = (valid >= case.dates[0]) & (valid <= case.dates[1])
    if not inside.any():
        first, last, *ends = map(time_text, (*case.dates, int(valid.min()), int(valid.max())))
        raise ValueError(
            f"case {case.name}: no forecast here is valid from {first} to {last} UTC; those of this split and stride "
            f"are valid from {ends[0]} to {ends[1]}"
        )
    rows, columns, longitudes = find_box(case, spec)
    shots = {hour: choose_leads(case, spec, valid, hour) for hour in choose_moments(case, valid, inside)}
    one = sum(map(len, shots.values())) * len(rows) * len(columns)  # 一个通道、一个成员的场
    channels = choose_channels(case, spec, room // (one * (BESIDE + min(members, SOME_MEMBERS))))
    drawn = min(members, MEMBERS, room // (one * len(channels)) - BESIDE)
    if drawn < 1:
        raise ValueError(
            f"case {case.name}: its maps need {(BESIDE + 1) * one * len(channels) / 2**28:.1f} GiB, at most "
            f"{room / 2**28:.1f} are held; a smaller box, fewer channels, moments or leads will do"
        )
    if drawn < members:
        log.info(
            "case %s: its maps show the first %d of %d members; scores and plumes use all", case.name, drawn, members
        )
    lines = int(inside.sum()) * len(channels) * (members + BESIDE)
    if lines > LINE_VALUES:
        raise ValueError(
            f"case {case.name}: {int(inside.sum())} forecasts are valid within its dates, {lines:,} values with "
            f"{len(channels)} channels and {members} members, at most {LINE_VALUES:,} are held; shorter dates, fewer "
            "channels or a larger --stride will do"
        )
    part = box_spec(spec, channels, rows, longitudes)
    point = None if case.point is None else find_point(case, part)
    return Plan(case, part, channels, rows, columns, weights[rows], inside, shots, drawn, point)


def find_box(case: Case, spec: DataSpec) -> tuple[list[int], list[int], list[float]]:
    """框里的行、由西向东的列，与各列连着的经度。

    Raises:
        ValueError: 不到两行两列：画不成图。
    """
    latitudes, longitudes = np.array(spec.latitudes), np.array(spec.longitudes)
    rows, columns = np.flatnonzero(case.rows(latitudes)), np.flatnonzero(case.columns(longitudes))
    if min(len(rows), len(columns)) < 2:
        ends = [f"{v.min():g} to {v.max():g}" for v in (latitudes, longitudes)]
        raise ValueError(
            f"case {case.name}: {len(rows)} x {len(columns)} grid points lie in its box, 2 x 2 at least are needed; "
            f"the grid has latitudes {ends[0]}, longitudes {ends[1]}"
        )
    east = longitudes[columns]
    if case.longitude is not None:
        west = (case.longitude[0] + 180) % 360 - 180
        east = west + (east - west + 1e-6) % 360 - 1e-6  # 恰在西界上的不因舍入挪到东边去
        order = np.argsort(east, kind="stable")
        east, columns = east[order].round(9) + 0.0, columns[order]  # 没有 -0.0
    return rows.tolist(), columns.tolist(), east.tolist()


def choose_moments(case: Case, valid: np.ndarray, inside: np.ndarray) -> list[int]:
    """画哪些有效时刻：要的各取最近的有预报的；没有说时，能看到的时效最多的里面离正中最近的一个。"""
    hours, counts = np.unique(valid[inside], return_counts=True)
    if case.moments is None:
        best = hours[counts == counts.max()]
        return [int(best[np.abs(2 * best - sum(case.dates)).argmin()])]
    found = {asked: int(hours[np.abs(hours - asked).argmin()]) for asked in case.moments}
    for asked, hour in found.items():
        if asked != hour:
            log.info(
                "case %s: no forecast is valid at %s UTC, %s instead", case.name, time_text(asked), time_text(hour)
            )
    return sorted(set(found.values()))


def choose_leads(case: Case, spec: DataSpec, valid: np.ndarray, hour: int) -> list[tuple[int, int]]:
    """在这一刻有效的（窗口，时效），由近到远：要的时效各取最近的，没有说时均匀地取几个。"""
    rows, leads = np.nonzero(valid == hour)
    order = np.argsort(leads)
    rows, leads = rows[order], leads[order]
    places = range(len(leads))
    if case.leads is None:
        chosen = np.linspace(0, len(places) - 1, min(len(places), LEADS)).round().astype(int)
        return [(int(rows[i]), int(leads[i])) for i in sorted(set(chosen.tolist()))]
    have = spec.lead(leads)
    found = {asked: int(np.abs(have - asked).argmin()) for asked in case.leads}
    for asked, i in found.items():
        if have[i] != asked:
            said = (case.name, asked, time_text(hour), have[i])
            log.info("case %s: no forecast at +%d h is valid at %s UTC, +%d h instead", *said)
    return [(int(rows[i]), int(leads[i])) for i in sorted(set(found.values()))]


def choose_channels(case: Case, spec: DataSpec, room: int) -> list[int]:
    """room: 场放得下几个；没有写 channels 时均匀地取。

    Raises:
        ValueError: 没有这个通道。
    """
    for name in (*(case.channels or ()), *case.contours):
        if name not in spec.channels:
            raise ValueError(f"case {case.name}: no channel {name!r}; {nearest(name, spec.channels, 'channels')}")
    if case.channels is not None:
        return [spec.channels.index(name) for name in dict.fromkeys(case.channels)]
    count = min(spec.num_channels, max(1, min(CHANNELS, room)))
    if count < spec.num_channels:
        log.info("case %s: %d of %d channels; name them under channels", case.name, count, spec.num_channels)
    named = [spec.channels.index(name) for name in case.contours]
    return sorted({*named, *np.linspace(0, spec.num_channels - 1, count).round().astype(int).tolist()})


def box_spec(spec: DataSpec, channels: list[int], rows: list[int], longitudes: list[float]) -> DataSpec:
    """只有这些通道、框里的格点；画图、换回物理单位用。"""

    def pick(values: Sequence) -> tuple:
        return tuple(values[c] for c in channels)

    return replace(
        spec.bare,
        channels=pick(spec.channels),
        units=pick(spec.units),
        pressures=pick(spec.pressures),
        mean=pick(spec.mean),
        std=pick(spec.std),
        latitudes=tuple(spec.latitudes[i] for i in rows),
        longitudes=tuple(longitudes),
    )


def find_point(case: Case, spec: DataSpec) -> tuple[int, int]:
    """最近的格点，在框里的行与列。

    Raises:
        ValueError: 在框外。
    """
    assert case.point is not None
    latitudes, longitudes = np.array(spec.latitudes), np.array(spec.longitudes)
    north = np.abs(latitudes - case.point[0])
    east = np.abs((longitudes - case.point[1] + 180) % 360 - 180)
    steps = [np.abs(np.diff(values)).max() for values in (latitudes, longitudes)]
    if north.min() > steps[0] / 2 + 1e-6 or east.min() > steps[1] / 2 + 1e-6:
        raise ValueError(
            f"case {case.name}: its point {list(case.point)} lies outside the box, latitudes "
            f"{latitudes.min():g} to {latitudes.max():g}, longitudes {longitudes.min():g} to {longitudes.max():g}"
        )
    return int(north.argmin()), int(east.argmin())
