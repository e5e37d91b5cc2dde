"""报告里由场画出的几节：真值、预报与误差的地图，几个地点的序列，海岸线；取哪些由 glimpse 定。"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.evaluation.glimpse import Reel
from engine.evaluation.results import Seen
from engine.evaluation.task import Task
from util.calendar import moment_of
from util.plot.coast import coastlines
from util.plot.style import color_limits, plotly_scale
from util.report.bilingual import Bilingual
from util.scores.statistics_file import Statistics
from util.scores.table import Numbers
from util.variables import variable_info

Coast = list[list[list[float]]]  # 折线，各点是经度、纬度


@dataclass(frozen=True)
class Place:
    """一个地点；面积平均没有经纬度。"""

    name: str
    latitude: float | None
    longitude: float | None


@dataclass(frozen=True)
class Series:
    """序列，物理单位：通道 → 时效 → 地点 → T 个数；valid_times 是 [时效][T]。"""

    points: list[Place]
    lead_hours: list[int]
    valid_times: list[list[str]]
    truth: dict[str, list[list[Numbers]]]
    models: dict[str, dict[str, list[list[Numbers]]]]


@dataclass(frozen=True)
class Picture:
    """一张地图：H·W 个 uint8（北在上）的 base64，值 = low + byte / 255 · (high − low)。"""

    data: str
    low: float
    high: float


@dataclass(frozen=True)
class Panels:
    """一个起报时间的三张；插值得来的真值没有图，误差也就没有。"""

    truth: Picture | None
    forecast: Picture | None
    error: Picture | None


@dataclass(frozen=True)
class ColorBar:
    """色标：plotly 的写法，与它的两端。"""

    scale: list[list[float | str]]
    low: float
    high: float


@dataclass(frozen=True)
class Colors:
    """field 是真值与预报共用的。"""

    field: ColorBar
    error: ColorBar


@dataclass(frozen=True)
class MapScore:
    """一张地图自己的成绩，物理单位。"""

    rmse: float
    bias: float


@dataclass(frozen=True)
class Maps:
    """fields、scores: 通道 → [时效][起报时间]；note: 少放了什么。"""

    latitudes: list[float]
    longitudes: list[float]
    times: list[str]
    lead_hours: list[int]
    channels: list[str]
    note: list[str]
    fields: dict[str, list[list[Panels]]]
    colors: dict[str, Colors]
    scores: dict[str, list[list[MapScore | None]]]


def make_series(task: Task, seen: Seen) -> Series:
    """各地点与面积平均的序列；通道、时效只有 glimpse 里的。"""
    glimpse = task.glimpse
    truth, forecast = (np.concatenate(parts) for parts in zip(*seen.series, strict=True))  # (T, L', C', P)
    inits = task.init_hours[glimpse.series_rows.start : glimpse.series_rows.stop]
    leads = lead_hours(task, glimpse.leads)
    points = [Place("area mean", None, None)]
    points += [Place(p.name, p.latitude, p.longitude) for p in glimpse.points]

    def nested(values: np.ndarray) -> dict[str, list[list[Numbers]]]:
        return {
            task.spec.channels[c]: [
                [numbers(values[:, i, j, p], 5) for p in range(len(points))] for i in range(len(leads))
            ]
            for j, c in enumerate(glimpse.channels)
        }

    times = [[_iso(int(h) + lead) for h in inits] for lead in leads]
    return Series(points, leads, times, nested(truth), {task.judged: nested(forecast)})


def lead_hours(task: Task, leads: Sequence[int]) -> list[int]:
    """序号 → 小时。"""
    return [task.spec.lead(i) for i in leads]


def numbers(values: np.ndarray, digits: int) -> Numbers:
    """只留画得出来的几位有效数字，页面小得多。"""
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in values.tolist()]


def _iso(hour: int) -> str:
    return moment_of(hour).strftime("%Y-%m-%dT%H:%M")


def make_maps(task: Task, seen: Seen, statistics: Statistics, which: str = "maps") -> Maps | None:
    """一组真值、预报、误差的地图，每个像素一字节；which 是 Glimpse.reels 的哪一组，没有就是 None。"""
    glimpse, spec = task.glimpse, task.spec
    reel = glimpse.reels.get(which)
    if reel is None:
        return None
    latitudes, longitudes = glimpse.axes(reel)
    truth, forecast = (np.stack(p) for p in zip(*(seen.pictures[which, row] for row in reel.rows), strict=True))
    fields: dict[str, list[list[Panels]]] = {}
    colors: dict[str, Colors] = {}
    for j, c in enumerate(reel.channels):  # truth、forecast 是 (T, L', C', h, w)
        name = spec.channels[c]
        three = (truth[:, :, j], forecast[:, :, j], forecast[:, :, j] - truth[:, :, j])  # 各 (T, L', h, w)
        fields[name] = [
            [Panels(*(_picture(stack[t, i]) for stack in three)) for t in range(len(truth))]
            for i in range(len(reel.leads))
        ]
        kind = variable_info(name).kind
        colors[name] = Colors(_color_bar(np.stack(three[:2]), kind), _color_bar(three[2], "difference"))
    return Maps(
        latitudes=latitudes.round(4).tolist(),
        longitudes=longitudes.round(4).tolist(),
        times=[_iso(int(task.init_hours[row])) for row in reel.rows],
        lead_hours=lead_hours(task, reel.leads),
        channels=list(fields),
        note=_notes(task, reel),
        fields=fields,
        colors=colors,
        scores=map_scores(task, reel, statistics),
    )


def map_scores(task: Task, reel: Reel, statistics: Statistics) -> dict[str, list[list[MapScore | None]]]:
    """每张地图自己的 RMSE 与偏差，取自全部格点的统计量，不由合并过的像素算。"""
    spec, rows = task.spec, slice(reel.rows.start, reel.rows.stop)
    square, error = (statistics.read(name, task.judged, rows) for name in ("square", "error"))  # (T, L, C)

    def one(row: int, lead: int, c: int) -> MapScore | None:
        if not math.isfinite(square[row, lead, c]):
            return None
        return MapScore(math.sqrt(square[row, lead, c]) * spec.std[c], float(error[row, lead, c] * spec.std[c]))

    return {
        spec.channels[c]: [[one(row, lead, c) for row in range(len(square))] for lead in reel.leads]
        for c in reel.channels
    }


def _picture(field: np.ndarray) -> Picture | None:
    """插值得来的真值（NaN）没有图。"""
    if not np.isfinite(field).all():
        return None
    low, high = float(field.min()), float(field.max())
    scale = 255 / (high - low) if high > low else 0.0
    data = np.rint((field.astype(np.float64) - low) * scale).astype(np.uint8)
    return Picture(base64.b64encode(data.tobytes()).decode("ascii"), low, high)


def _color_bar(values: np.ndarray, kind: str) -> ColorBar:
    return ColorBar(plotly_scale(kind), *color_limits(values, kind))


def _notes(task: Task, reel: Reel) -> list[str]:
    """页面里少放了什么，说明白。"""
    size = f"{reel.factor} × {reel.factor}"
    pooled = Bilingual(f"maps are means over {size} grid points", f"地图为每 {size} 个格点的平均")
    kept = (
        ("channels", "通道", len(reel.channels), task.spec.num_channels),
        ("lead times", "时效", len(reel.leads), task.steps),
    )
    fewer: list[str] = [
        Bilingual(f"{shown} of {whole} {english}", f"{whole} 个{chinese}中的 {shown} 个")
        for english, chinese, shown, whole in kept
        if shown < whole
    ]
    return [pooled, *fewer] if reel.factor > 1 else fewer


def make_coast(task: Task) -> Coast:
    """海岸线，已在地图的经度约定里。"""
    latitudes, longitudes = task.glimpse.axes(task.glimpse.reels["maps"])
    half = [np.abs(np.diff(v)).max(initial=1.0) / 2 for v in (latitudes, longitudes)]
    lines = coastlines(
        longitudes.min() - half[1], longitudes.max() + half[1],
        max(latitudes.min() - half[0], -90), min(latitudes.max() + half[0], 90),
    )  # fmt: skip
    return [line.round(2).tolist() for line in lines]
