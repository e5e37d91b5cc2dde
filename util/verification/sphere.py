"""球谐变换与按总波数的功率谱；只有 NumPy，适用于从极到极的等距或高斯纬度（含不含极点都行）。

纬圈上作 FFT，经圈上对每个纬向波数 m 解一个小的面积加权最小二乘：系数 = Q_m · F_m，Q_m 就是这张网格的求积权重。
截断波数以内的场精确还原（测试与 scipy 的球谐函数相比）。
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from util.grid import latitude_weights

Array = np.ndarray
TOGETHER = 32  # 个纬向波数排成一张表：l < m 的空行少，乘法的次数也少
LIKE_ALL = 0.5  # 预报的功率低于真值的这一份，就算没有分辨出来


def is_global(latitudes: Array, closes_circle: bool) -> bool:
    """经度首尾相接，纬度从极到极（两端离极点不到一格半）。"""
    if not closes_circle or len(latitudes) < 4:
        return False
    reach = 1.5 * float(np.abs(np.diff(latitudes)).max())
    return bool(latitudes.max() > 90 - reach and latitudes.min() < reach - 90)


def truncation(latitudes: Array, width: int) -> int:
    """最大的总波数：经向放得下、纬向也放得下的。"""
    poles = int((np.abs(latitudes) > 90 - 1e-6).sum())
    return min(len(latitudes) - 1 - (poles > 0), (width - 1) // 2)


def legendre(order: int, most: int, sine: Array) -> Array:
    """归一化的连带勒让德函数 P_l^m(x)，m = order，l = m … most：(most − m + 1, N)；∫ P² dx = 2，球面上的平均是 1。

    由 P_m^m 向上递推（Holmes & Featherstone 2002，式 11），到几千阶都稳定。
    """
    cosine = np.sqrt(1 - sine**2)
    rows = [np.ones_like(sine)]
    for m in range(1, order + 1):
        rows[0] = rows[0] * cosine * np.sqrt((2 * m + 1) / (2 * m))
    if most > order:
        rows.append(np.sqrt(2 * order + 3) * sine * rows[0])
    for n in range(order + 2, most + 1):
        a = np.sqrt((4 * n**2 - 1) / (n**2 - order**2))
        b = np.sqrt(((n - 1) ** 2 - order**2) / (4 * (n - 1) ** 2 - 1))
        rows.append(a * (sine * rows[-1] - b * rows[-2]))
    return np.stack(rows[: most - order + 1])


@lru_cache(maxsize=4)
def analysis(latitudes: tuple[float, ...], width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """TOGETHER 个纬向波数一张表，由 m = a 起的是 (≤ TOGETHER, K − a + 1, H)。

    [m − a, l − a] 行乘纬圈的第 m 个傅里叶系数，得球谐系数；l < m 的行是零。K 是截断波数。以 float64 求解，
    存成要用的样子：721 × 1440、float32 时约 0.7 GiB。
    """
    degrees = np.array(latitudes)
    most, sine = truncation(degrees, width), np.sin(np.deg2rad(degrees))
    root = np.sqrt(latitude_weights(latitudes).numpy())
    tables = []
    for first in range(0, most + 1, TOGETHER):
        orders = range(first, min(first + TOGETHER, most + 1))
        table = np.zeros((len(orders), most + 1 - first, len(degrees)))
        for m in orders:
            q, r = np.linalg.qr(root[:, None] * legendre(m, most, sine).T)  # (H, K − m + 1)、方阵
            table[m - first, m - first :] = np.linalg.solve(r, q.T) * root
        tables.append(torch.from_numpy(table).to(device, dtype))
    return tables


def spherical_spectrum(fields: Tensor, latitudes: tuple[float, ...]) -> Tensor:
    """(..., H, W) → (..., K) float64：总波数 1 … K 的功率；加上波数 0（全球平均的平方）就是均方值（Parseval）。"""
    tables = analysis(latitudes, fields.shape[-1], fields.dtype, fields.device)
    orders = tables[0].shape[1]  # K + 1
    waves = torch.fft.rfft(fields, norm="forward")[..., :orders]  # (..., H, m)
    columns = waves.reshape(-1, *waves.shape[-2:]).permute(2, 1, 0)  # (m, H, N)
    parts = torch.cat([columns.real, columns.imag], -1)
    power = parts.new_zeros(orders, columns.shape[-1], dtype=torch.float64)  # (l, N)
    for i, table in enumerate(tables):
        first = i * TOGETHER
        found = (table @ parts[first : first + len(table)]).square()  # (m, l, 2N)
        found[int(i == 0) :] *= 2  # 负的 m
        half = found.shape[-1] // 2
        power[first:] += (found[..., :half] + found[..., half:]).double().sum(0)
    return power[1:].T.reshape(*fields.shape[:-2], orders - 1)


def effective_wavenumber(forecast: Array, truth: Array, floor: float = 0.0) -> int | None:
    """有效分辨率：由大尺度往小尺度，预报的功率头一次低于真值一半的波数；一直没有是 None。

    Args:
        forecast, truth: (K,)，波数 1 … K。
        floor: 真值的功率低于总量的这一份的波数不看：那里只有舍入的噪声。
    """
    real = (truth > floor * np.nansum(truth)) & np.isfinite(forecast)
    lost = np.flatnonzero(real & (forecast < LIKE_ALL * truth))
    return int(lost[0]) + 1 if lost.size else None
