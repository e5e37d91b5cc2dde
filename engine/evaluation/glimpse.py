"""报告里看得见的一小部分场：几个通道、时效、连续的起报时间的地图，和几个地点的时间序列。

先按网格与窗口数定好取哪些，之后只留这些：内存与划分的长度无关，页面也不超过 10 MB。
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from util.batch import DataSpec
from util.grid import output_grid
from util.scores.metrics import area_mean

MAP_VALUES = 400_000  # 每个场的像素总数：三个场各一字节，base64 后约 1.6 MB
MAP_TIMES, FEWEST_TIMES, MAP_LEADS, MAP_CHANNELS = 12, 4, 4, 9
ROLL_VALUES, ROLL_LEADS = 160_000, 40  # 其中给长的滚动的一组：一个起报时间，时效一个接一个地播放
SERIES_VALUES = 100_000  # 真值与预报合计，写成文字约 0.7 MB
SERIES_TIMES = 1500  # 6 小时一个起报时间，约一年
CITIES = {
    "Beijing": (39.9, 116.4),
    "London": (51.5, -0.1),
    "New York": (40.7, -74.0),
    "Singapore": (1.4, 103.8),
    "Nairobi": (-1.3, 36.8),
    "Sydney": (-33.9, 151.2),
}
CITIES_SHOWN = 4


class Point(NamedTuple):
    """一个地点和离它最近的格点。"""

    name: str
    latitude: float
    longitude: float
    row: int
    column: int


class Reel(NamedTuple):
    """播放的一组地图：哪些通道、时效、起报时间，都是序号；每 factor × factor 格平均成一格。"""

    channels: list[int]
    leads: list[int]
    rows: range
    factor: int


@dataclass(frozen=True)
class Glimpse:
    """取哪些：channels、leads 是序列、谱与事件的，series_rows 是序列的起报时间，都是序号。

    reels: maps 是几个时效上一个个起报时间，roll（滚得长的才有）是一次预报的一个个时效。
    """

    spec: DataSpec
    channels: list[int]
    leads: list[int]
    reels: dict[str, Reel]
    series_rows: range
    points: list[Point]

    def picture(self, fields: Tensor, reel: Reel) -> Tensor:
        """(C, H, W) 标准化 → (C', h, w) float32 物理单位，由北向南。"""
        grid = output_grid(self.spec)
        physical = self.spec.to_physical(fields)[reel.channels][:, grid.rows.copy()][:, :, grid.columns.copy()]
        return _coarse(physical, reel.factor)

    def axes(self, reel: Reel) -> tuple[np.ndarray, np.ndarray]:
        """picture 的纬度与经度。"""
        grid = output_grid(self.spec)
        return tuple(_coarse_axis(values, reel.factor) for values in (grid.latitudes, grid.longitudes))  # type: ignore[return-value]

    def series(self, fields: Tensor, weights: Tensor) -> Tensor:
        """(B, C, H, W) 标准化 → (B, C', 1 + P) 物理单位：面积平均在前，各地点在后；weights: (H,)。"""
        physical = self.spec.to_physical(fields)[:, self.channels]
        values = [area_mean(physical, weights).float()]
        values += [physical[:, :, point.row, point.column] for point in self.points]
        return torch.stack(values, -1)


def choose_glimpse(spec: DataSpec, windows: int, steps: int, points: list[Point]) -> Glimpse:
    """定下取哪些；放不下时先少取起报时间，再不够就把格子合并。"""
    channels, leads = evenly(spec.num_channels, MAP_CHANNELS), evenly(steps, MAP_LEADS)
    room = MAP_VALUES - ROLL_VALUES if steps > MAP_LEADS else MAP_VALUES
    pixels = len(channels) * len(leads) * spec.height * spec.width  # 一个起报时间的
    times = min(windows, MAP_TIMES, max(FEWEST_TIMES, room // pixels))
    reels = {"maps": Reel(channels, leads, _middle(windows, times), _factor(times * pixels, room))}
    if steps > MAP_LEADS:
        reels["roll"] = _roll(spec, windows, steps)
    length = SERIES_VALUES // (2 * len(channels) * len(leads) * (1 + len(points)))
    kept = min(windows, SERIES_TIMES, max(1, length))
    return Glimpse(spec, channels, leads, reels, _middle(windows, kept), points)


def _roll(spec: DataSpec, windows: int, steps: int) -> Reel:
    """正中的一个起报时间的全部时效；放不下时先少取通道，再把格子合并。"""
    leads = evenly(steps, ROLL_LEADS)
    one = len(leads) * spec.height * spec.width
    channels = evenly(spec.num_channels, max(1, min(MAP_CHANNELS, ROLL_VALUES // one)))
    return Reel(channels, leads, _middle(windows, 1), _factor(len(channels) * one, ROLL_VALUES))


def _factor(pixels: int, most: int) -> int:
    """每几格平均成一格，像素才不超过 most。"""
    return math.ceil(math.sqrt(max(1.0, pixels / most)))


def evenly(count: int, most: int) -> list[int]:
    """首尾在内、均匀的至多 most 个序号。"""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most)).tolist()})


def _middle(count: int, length: int) -> range:
    """正中间连续的 length 个。"""
    first = (count - length) // 2
    return range(first, first + length)


def _coarse(fields: Tensor, factor: int) -> Tensor:
    """(C, H, W) 每 factor × factor 格平均；边上不足一格的照样平均。"""
    if factor == 1:
        return fields
    return torch.nn.functional.avg_pool2d(fields, factor, ceil_mode=True)


def _coarse_axis(values: np.ndarray, factor: int) -> np.ndarray:
    return np.array([values[i : i + factor].mean() for i in range(0, len(values), factor)])


def parse_points(texts: list[str], spec: DataSpec) -> list[Point]:
    """`39.9N,116.4E` 这样的地点 → 最近的格点；没有给时取区域内的几个城市，都不在区域内就取正中。

    Raises:
        ValueError: 写法不对，或在区域之外。
    """
    if texts:
        return [_nearest(text, *_parse(text), spec) for text in texts]
    inside = [_nearest(name, *place, spec) for name, place in CITIES.items() if _inside(*place, spec)]
    if inside:
        return inside[:CITIES_SHOWN]
    middle = (spec.latitudes[spec.height // 2], spec.longitudes[spec.width // 2])
    return [_nearest("centre", *middle, spec)]


def _parse(text: str) -> tuple[float, float]:
    number = r"(\d+(?:\.\d+)?)"
    found = re.fullmatch(rf"{number}([NS]),{number}([EW])", text.strip().upper())
    if found is None:
        raise ValueError(f"--points {text}: write latitude,longitude like 39.9N,116.4E or 33.9S,151.2E")
    latitude, south, longitude, west = found.groups()
    return float(latitude) * (-1 if south == "S" else 1), float(longitude) * (-1 if west == "W" else 1)


def _distances(latitude: float, longitude: float, spec: DataSpec) -> tuple[np.ndarray, np.ndarray]:
    """到各行、各列的度数；经度取短的一边。"""
    east = (np.array(spec.longitudes) - longitude + 180) % 360 - 180
    return np.abs(np.array(spec.latitudes) - latitude), np.abs(east)


def _inside(latitude: float, longitude: float, spec: DataSpec) -> bool:
    rows, columns = _distances(latitude, longitude, spec)
    steps = [np.abs(np.diff(v)).max(initial=0.0) for v in (spec.latitudes, spec.longitudes)]
    return bool(rows.min() <= steps[0] / 2 + 1e-9 and columns.min() <= steps[1] / 2 + 1e-9)


def _nearest(name: str, latitude: float, longitude: float, spec: DataSpec) -> Point:
    if not (math.isfinite(latitude + longitude) and _inside(latitude, longitude, spec)):
        edges = [f"{min(v):g} to {max(v):g}" for v in (spec.latitudes, spec.longitudes)]
        raise ValueError(f"--points {name}: outside the grid, latitude {edges[0]}, longitude {edges[1]}")
    rows, columns = _distances(latitude, longitude, spec)
    row, column = int(rows.argmin()), int(columns.argmin())
    return Point(name, spec.latitudes[row], spec.longitudes[column], row, column)
