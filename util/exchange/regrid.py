"""换到规则的经纬网：双线性，或一阶守恒（球面面积加权）。

两种都把权重分成纬、经两个小矩阵，输出 = R F Cᵀ：规则网格上一个格子的面积是 Δ(sin 纬度)·Δ(经度)，
重叠的面积也就是两个方向重叠的乘积（Jones 1999, Mon. Wea. Rev. 127, 2204，一阶、直线网格的情形）。
源网格只须单调（高斯网格也行），经度首尾相接的按周期处理，方向不限。
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from util.config import Axis
from util.source.axes import span

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Method = Literal["bilinear", "conservative"]
ROUNDING = 1e-4  # 容许源坐标有这么大的误差，以格距计：float32 存的经度
POLE, CIRCLE = 90.0, 360.0


class Target(NamedTuple):
    """要换到的网格与做法。"""

    method: Method
    latitude: Axis
    longitude: Axis


class Regridder(NamedTuple):
    """rows (H', H)、cols (W', W)，稀疏；每行之和为 1，所以常数场不变。"""

    method: Method
    rows: csr_array
    cols: csr_array
    shape: tuple[int, int]  # (H', W')

    def __call__(self, fields: np.ndarray) -> np.ndarray:
        """(..., H, W) → (..., H', W') float64。缺测值不补：有它的权重的格子一律缺测，权重为零的不受影响。"""
        *lead, height, width = fields.shape
        flat = fields.reshape(-1, width).astype(np.float64)
        across = (self.cols @ flat.T).reshape(self.shape[1], -1, height)  # (W', n, H)
        turned = np.ascontiguousarray(across.transpose(2, 1, 0)).reshape(height, -1)  # (H, n W')
        result = (self.rows @ turned).reshape(self.shape[0], -1, self.shape[1])  # (H', n, W')
        return np.ascontiguousarray(result.swapaxes(0, 1)).reshape(*lead, *self.shape)


def make_regridder(latitudes: np.ndarray, longitudes: np.ndarray, target: Target) -> Regridder:
    """源网格 (H,)、(W,) 度 → 目标网格的权重。

    双线性：目标点在相邻两行、两列之间按度数线性；最外一行与极点之间没有数据，沿用最外一行。
    守恒：格子的边在相邻两个中心的正中，到极点为止；面积平均不变（目标与源盖住同一块区域时）。

    Raises:
        ValueError: 源坐标不单调或不足两个，目标不合法，或目标有一部分在源网格之外。
    """
    latitudes, longitudes = np.asarray(latitudes, np.float64), np.asarray(longitudes, np.float64)
    longitudes = np.unwrap(longitudes, period=CIRCLE)  # 跨过本初子午线的区域：350, 355, 0, 5
    for name, values in (("latitude", latitudes), ("longitude", longitudes)):
        steps = np.diff(values)
        if not (steps.size and ((steps > 0).all() or (steps < 0).all())):
            raise ValueError(f"{name}: regridding needs at least two values in order, the file has {span(values)}")
    if abs(longitudes[-1] - longitudes[0]) > CIRCLE * (1 - 1e-9):
        raise ValueError(f"longitude: {span(longitudes)} repeats the first meridian; leave the last out with --cols")
    _check_target(target)
    weigh = _linear if target.method == "bilinear" else _overlaps
    rows, cols = weigh(latitudes, target.latitude, False), weigh(longitudes, target.longitude, True)
    return Regridder(target.method, _sparse(rows), _sparse(cols), (len(rows), len(cols)))


def _linear(source: np.ndarray, axis: Axis, circular: bool) -> np.ndarray:
    """(n', n) 线性插值的权重。"""
    order = np.argsort(source)
    nodes, step = source[order], np.abs(np.diff(source)).max()
    points = np.array(axis.values())
    low, high = nodes[0], nodes[-1]
    if circular:
        if closes_circle(nodes):
            nodes, order, high = np.append(nodes, low + CIRCLE), np.append(order, order[0]), low + CIRCLE
        points = low + np.mod(points - low, CIRCLE)
        points = np.where(points > high + ROUNDING * step, points - CIRCLE, points)  # 比 low 小一点点的，取模绕了一圈
    else:
        bottom, top = _edges(nodes)[[0, -1]]
        low, high = -POLE if bottom == -POLE else low, POLE if top == POLE else high
    outside = (points < low - ROUNDING * step) | (points > high + ROUNDING * step)
    _refuse_outside(source, axis, outside, circular)
    points = np.clip(points, nodes[0], nodes[-1])
    left = np.clip(np.searchsorted(nodes, points, side="right") - 1, 0, nodes.size - 2)
    share = (points - nodes[left]) / (nodes[left + 1] - nodes[left])
    weights = np.zeros((points.size, source.size))
    np.add.at(weights, (np.arange(points.size), order[left]), 1 - share)
    np.add.at(weights, (np.arange(points.size), order[left + 1]), share)
    return weights


def _overlaps(source: np.ndarray, axis: Axis, circular: bool) -> np.ndarray:
    """(n', n) 各源格子占目标格子的份额；纬度以正弦计，经度以度计并绕圈。"""
    half = abs(axis.step) / 2
    centres = np.array(axis.values())
    if circular:
        low, high = _cells(_circle_edges(source))
        to_low, to_high = centres - half, centres + half
        turns = np.arange(
            np.floor((to_low.min() - high.max()) / CIRCLE), np.ceil((to_high.max() - low.min()) / CIRCLE) + 1
        )
    else:
        low, high = (np.sin(np.deg2rad(edge)) for edge in _cells(_edges(source)))
        to_low, to_high = (np.sin(np.deg2rad(np.clip(centres + d, -POLE, POLE))) for d in (-half, half))
        turns = np.zeros(1)
    weights = np.zeros((centres.size, source.size))
    for turn in turns * CIRCLE:
        begin = np.maximum(to_low[:, None], low + turn)
        weights += np.maximum(np.minimum(to_high[:, None], high + turn) - begin, 0)
    weights /= (to_high - to_low)[:, None]
    covered = weights.sum(axis=1)
    _refuse_outside(source, axis, covered < 1 - ROUNDING, circular)
    return weights / covered[:, None]


def closes_circle(longitudes: np.ndarray) -> bool:
    """经度首尾相接。"""
    step = np.abs(longitudes[-1] - longitudes[0]) / (longitudes.size - 1)
    return bool(abs(step * longitudes.size - CIRCLE) < step / 2)


def _edges(latitudes: np.ndarray) -> np.ndarray:
    """(n + 1,) 格子的边；再往外一行就越过极点的（高斯网格、以格子中心计的网格），最外的格子到极点为止。"""
    middle = (latitudes[:-1] + latitudes[1:]) / 2
    ends = []
    for last, inner in ((latitudes[0], latitudes[1]), (latitudes[-1], latitudes[-2])):
        step = last - inner
        past = abs(last + step) > POLE + ROUNDING * abs(step)
        ends.append(np.copysign(POLE, step) if past else np.clip(last + step / 2, -POLE, POLE))
    return np.concatenate([ends[:1], middle, ends[1:]])


def _circle_edges(longitudes: np.ndarray) -> np.ndarray:
    """(n + 1,) 格子的边；首尾相接时恰好一圈。"""
    middle = (longitudes[:-1] + longitudes[1:]) / 2
    turn = np.copysign(CIRCLE, longitudes[-1] - longitudes[0])
    if closes_circle(longitudes):
        first = (longitudes[-1] - turn + longitudes[0]) / 2
        return np.concatenate([[first], middle, [first + turn]])
    ends = longitudes[[0, -1]] + np.array([longitudes[0] - longitudes[1], longitudes[-1] - longitudes[-2]]) / 2
    return np.concatenate([ends[:1], middle, ends[1:]])


def _cells(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """各格子的 (低边, 高边)，不论坐标的方向。"""
    return np.minimum(edges[:-1], edges[1:]), np.maximum(edges[:-1], edges[1:])


def _check_target(target: Target) -> None:
    latitude, longitude = target.latitude, target.longitude
    if latitude.step == 0 or longitude.step == 0:
        raise ValueError("--latitude, --longitude: STEP must not be 0")
    ends = np.abs(np.array(latitude.values())[[0, -1]])
    if (ends > POLE).any():
        raise ValueError(f"--latitude: {span(np.array(latitude.values()))} goes past a pole")
    if abs(longitude.step) * longitude.count > CIRCLE * (1 + 1e-6):
        raise ValueError(f"--longitude: {longitude.count} steps of {longitude.step:g} are more than a circle")


def _refuse_outside(source: np.ndarray, axis: Axis, outside: np.ndarray, circular: bool) -> None:
    if outside.any():
        name = "longitude" if circular else "latitude"
        value = np.array(axis.values())[outside][0]
        raise ValueError(
            f"--{name}: {value:g} ({int(outside.sum())} of {axis.count}) reaches outside the file's {span(source)}"
        )


def _sparse(weights: np.ndarray) -> csr_array:
    from scipy.sparse import csr_array

    return csr_array(weights)  # 零不存，缺测值才不会经由零权重传开
