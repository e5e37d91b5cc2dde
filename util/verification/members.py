"""集合的三种评分：分位数加权的 CRPS（极端），能量评分，变差函数评分；都是每一对场一个可平均的数。"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from util.scores.metrics import add_members, sort_members
from util.verification.areas import mean_over

EARTH_KM = 6371.0


def tail_weights(members: int) -> dict[str, np.ndarray]:
    """lower、upper → (M, 2)：排好序的第 i 个成员高出、低于真值的系数。

    分位数加权的 CRPS（Gneiting & Ranjan 2011，式 15，表 4）：∫ 2 (1{y ≤ x_α} − α)(x_α − y) v(α) dα，
    v 是 α²（upper）或 (1 − α)²（lower）；x_α 是经验分位数，所以在第 i 个成员上积分从 (i − 1) / M 到 i / M，积得出来。
    """
    edges = np.arange(members + 1) / members
    far, near = 2 * (edges**3 / 3 - edges**4 / 4), edges**4 / 2  # ∫ 2 (1 − α) α²，∫ 2 α α²
    upper = np.diff(np.stack([far, near], -1), axis=0)
    return {"lower": upper[::-1, ::-1].copy(), "upper": upper}


def tail_crps(forecast: Tensor, truth: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """(B, M, C, H, W)、(B, C, H, W) → lower、upper 各 (B, C) float64。"""
    members = forecast.shape[1]
    ordered = sort_members([member - truth for member in forecast.unbind(1)])
    over = torch.stack([mean_over(error.clamp(min=0), weights) for error in ordered], -1)  # (B, C, M)
    under = over - torch.stack([mean_over(error, weights) for error in ordered], -1)
    pairs = torch.stack([over, under], -1)
    table = {name: torch.tensor(values).to(pairs) for name, values in tail_weights(members).items()}
    return {name: (pairs * values).sum((-1, -2)) for name, values in table.items()}


def energy_score(forecast: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """公平的能量评分 (B, C)：一个场是一个向量，距离是面积加权的均方根（Gneiting & Raftery 2007，式 22；成员数的修正如
    Ferro 2014）；一个成员时是一个场的均方根误差。

    成员两两之间的距离由误差的 Gram 矩阵得来：M² / 2 次相减变成一次矩阵乘法。
    """
    count, scale = forecast.shape[1], weights / (weights.sum() * forecast.shape[-1])
    found = []
    for members, real in zip(forecast, truth, strict=True):  # 一个窗口一个窗口地：双精度的只有一份
        errors = (members - real).transpose(0, 1).double()  # (C, M, H, W)
        gram = (errors * scale[:, None]).flatten(2) @ errors.flatten(2).mT  # (C, M, M)
        square = gram.diagonal(dim1=1, dim2=2)  # (C, M)
        apart = (square[:, :, None] + square[:, None] - 2 * gram).clamp(min=0).sqrt().sum((1, 2))
        found.append(square.sqrt().mean(1) - apart / (2 * count * max(1, count - 1)))
    return torch.stack(found)


class Places(NamedTuple):
    """变差函数评分看的格点：rows、columns (P,)；weights (S, P)，[s, i] 是第 i 个与它后面第 s + 1 个（绕回来）那一对的，

    各对的和为 1。S = P // 2：每一对恰好一次，P 是偶数时最后一行两次，所以各算一半。
    """

    rows: Tensor
    columns: Tensor
    weights: Tensor


def choose_places(latitudes: np.ndarray, longitudes: np.ndarray, count: int) -> Places:
    """至多 count 个格点，按面积均匀地散开（正弦纬度与经度上的 R2 序列，Roberts 2018），权重与大圆距离成反比。"""
    ratio = 1.32471795724474602596  # 塑性数
    steps = (0.5 + np.arange(1, count + 1)[:, None] / np.array([ratio, ratio**2])) % 1
    low, high = np.sin(np.deg2rad([latitudes.min(), latitudes.max()]))
    lat = np.rad2deg(np.arcsin(low + (high - low) * steps[:, 0]))
    place = np.round(steps[:, 1] * len(longitudes) - 0.5).astype(int).clip(0, len(longitudes) - 1)
    rows = np.abs(latitudes[:, None] - lat).argmin(0)
    rows, columns = np.unique(np.stack([rows, place]), axis=1)
    phi, lam = np.deg2rad(latitudes[rows]), np.deg2rad(longitudes[columns])
    where = np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], -1)  # (P, 3)
    near = []
    for shift in range(1, len(rows) // 2 + 1):
        chord = np.linalg.norm(where - np.roll(where, -shift, 0), axis=-1)
        apart = np.maximum(2 * EARTH_KM * np.arcsin(np.minimum(chord / 2, 1)), 1.0)  # 极点的一行是同一处
        near.append((0.5 if 2 * shift == len(rows) else 1.0) / apart)
    weights = np.stack(near)
    return Places(*map(torch.from_numpy, (rows, columns, weights / weights.sum())))


def variogram_score(forecast: Tensor, truth: Tensor, places: Places) -> Tensor:
    """0.5 阶的变差函数评分 (B, C)（Scheuerer & Hamill 2015，式 4）：Σ w (|y_i − y_j|^p − 平均 |x_i − x_j|^p)²。"""
    count, shifts = len(places.rows), len(places.weights)

    def variogram(fields: Tensor) -> Tensor:
        values = fields[..., places.rows, places.columns]  # (B, C, P)
        later = torch.cat([values, values[..., :shifts]], -1).unfold(-1, count, 1)[..., 1:, :]  # (B, C, S, P)
        return (later - values[..., None, :]).abs().sqrt()

    mean = add_members(forecast, variogram) / forecast.shape[1]
    return ((variogram(truth) - mean).square() * places.weights).sum((-1, -2))
