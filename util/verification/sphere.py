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
def analysis(latitudes: tuple[float, ...], width: int) -> Tensor:
    """(K + 1, K + 1, H) float64：[m, l] 行乘纬圈的第 m 个傅里叶系数，得球谐系数；l < m 的行是零。K 是截断波数。"""
    degrees = np.array(latitudes)
    most, sine = truncation(degrees, width), np.sin(np.deg2rad(degrees))
    root = np.sqrt(latitude_weights(latitudes).numpy())
    table = np.zeros((most + 1, most + 1, len(degrees)))
    for m in range(most + 1):
        basis = legendre(m, most, sine).T  # (H, K − m + 1)
        table[m, m:] = np.linalg.pinv(root[:, None] * basis) * root
    return torch.from_numpy(table)


def spherical_spectrum(fields: Tensor, latitudes: tuple[float, ...]) -> Tensor:
    """(..., H, W) → (..., K) float64：总波数 1 … K 的功率；加上波数 0（全球平均的平方）就是均方值（Parseval）。"""
    table = analysis(latitudes, fields.shape[-1]).to(fields)
    orders = len(table)
    waves = torch.fft.rfft(fields, norm="forward")[..., :orders]  # (..., H, m)
    columns = waves.reshape(-1, *waves.shape[-2:]).permute(2, 1, 0)  # (m, H, N)
    parts = torch.cat([columns.real, columns.imag], -1)
    found = (table @ parts).square()  # (m, l, 2N)
    found[1:] *= 2  # 负的 m
    half = found.shape[-1] // 2
    power = (found[..., :half] + found[..., half:]).double().sum(0)[1:]  # (K, N)
    return power.T.reshape(*fields.shape[:-2], orders - 1)


def effective_wavenumber(forecast: Array, truth: Array, floor: float = 0.0) -> int | None:
    """有效分辨率：由大尺度往小尺度，预报的功率头一次低于真值一半的波数；一直没有是 None。

    Args:
        forecast, truth: (K,)，波数 1 … K。
        floor: 真值的功率低于总量的这一份的波数不看：那里只有舍入的噪声。
    """
    real = (truth > floor * np.nansum(truth)) & np.isfinite(forecast)
    lost = np.flatnonzero(real & (forecast < LIKE_ALL * truth))
    return int(lost[0]) + 1 if lost.size else None
