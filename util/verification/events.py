"""事件：真值、预报各过不过一个阈值。一张联合的表（几个成员说有 × 真的有没有）累加起来，其余都由它得来。

表里是面积加权的份额，一对场合起来是 1：(…, M + 1, 2)，第 k 行是恰有 k 个成员说有，第 1 列是真的有。
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
LOSS_RATIOS = np.linspace(0.02, 0.98, 49)  # 经济价值的横轴：花费 / 损失


def happens(fields: Tensor, threshold: Tensor, above: bool) -> Tensor:
    """(..., H, W) bool：严格地高于（低于）阈值；阈值是 NaN 的地方总是假。"""
    return fields > threshold if above else fields < threshold


def member_count(forecast: Tensor, threshold: Tensor, above: bool) -> Tensor:
    """(B, M, C, H, W) → (B, C, H, W)：几个成员说有。"""
    kind = torch.uint8 if forecast.shape[1] < 256 else torch.int32
    total = torch.zeros_like(forecast[:, 0], dtype=kind)
    for member in forecast.unbind(1):
        total += happens(member, threshold, above)
    return total


def joint_table(count: Tensor, event: Tensor, members: int, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, C, H, W) 几个成员说有、真的有没有 → (B, C, M + 1, 2) float64，见本文件的头。

    先数「至少 k 个」，相邻的相减：一个成员时只数三次。

    Args:
        mean: (B, C, H, W) bool → (B, C)，面积平均；给出各区域的 (B, C, R) 时，表是 (B, C, M + 1, 2, R)。
    """
    both, either = [mean(event)], []
    either.append(torch.ones_like(both[0]))
    for k in range(1, members + 1):
        said = count >= k
        either.append(mean(said))
        both.append(mean(said & event))
    hits, all_ = (torch.stack([*rows, torch.zeros_like(rows[0])], 2) for rows in (both, either))  # (B, C, M + 2[, R])
    yes, whole = (rows[:, :, :-1] - rows[:, :, 1:] for rows in (hits, all_))
    return torch.stack([whole - yes, yes], 3)


def reliability(table: Array) -> tuple[Array, Array, Array]:
    """可靠性图（Wilks 2019，第 9 章）：预报的概率 k / M，那时真的发生的频率，那一档的份额，各 (..., M + 1)。"""
    members = table.shape[-2] - 1
    share = table.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        observed = np.where(share > 0, table[..., 1] / share, np.nan)
        return np.arange(members + 1) / members, observed, share / share.sum(-1, keepdims=True)


def rates(table: Array) -> tuple[Array, Array]:
    """命中率 H 与空报率 F (..., M + 2)：判据是「至少 k 个成员说有」，k = 0 … M + 1，即从总说有到总说没有。"""
    down = np.cumsum(table[..., ::-1, :], -2)[..., ::-1, :]  # 至少 k 个
    down = np.concatenate([down, np.zeros_like(down[..., :1, :])], -2)
    total = table.sum(-2)[..., None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(total > 0, down / total, np.nan)
    return found[..., 1], found[..., 0]


def roc_area(table: Array) -> Array:
    """ROC 曲线下的面积（梯形）；0.5 是没有分辨力。真值里没有、或处处是这个事件时没有定义。"""
    hit, false = rates(table)
    return ((false[..., :-1] - false[..., 1:]) * (hit[..., :-1] + hit[..., 1:]) / 2).sum(-1)


def economic_value(table: Array, ratios: Array = LOSS_RATIOS) -> Array:
    """相对经济价值 (..., K)：每个花费损失比取最好的判据（Richardson 2000，式 7、8）；1 是完美，0 是只知道气候。

    判据至少要一个成员说有：「总是防」与「从不防」是气候也会的，不算在预报的账上。
    """
    hit, false = (one[..., 1:-1, None] for one in rates(table))  # (..., M, 1)
    base = (table[..., 1].sum(-1) / table.sum((-1, -2)))[..., None]  # (..., 1)
    climate = np.minimum(ratios, base)
    expense = false * ratios * (1 - base[..., None]) - hit * base[..., None] * (1 - ratios) + base[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        value = (climate - expense.min(-2)) / (climate - base * ratios)
    return np.where((base > 0) & (base < 1), value, np.nan)


def two_by_two(table: Array) -> tuple[Array, Array, Array, Array]:
    """命中、空报、漏报、正确否定的份额：至少一半的成员说有就算报了。"""
    members = table.shape[-2] - 1
    said = table[..., (members + 1) // 2 :, :].sum(-2)
    silent = table.sum(-2) - said
    return said[..., 1], said[..., 0], silent[..., 1], silent[..., 0]


def categorical(table: Array) -> dict[str, Array]:
    """CSI、ETS、SEDI（Ferro & Stephenson 2011，式 2）、频数偏差；没有定义的是 NaN。"""
    hits, false, missed, quiet = two_by_two(table)
    total = hits + false + missed + quiet
    with np.errstate(divide="ignore", invalid="ignore"):
        chance = (hits + false) * (hits + missed) / total
        h, f = hits / (hits + missed), false / (false + quiet)
        lf, lh, rf, rh = np.log(f), np.log(h), np.log(1 - f), np.log(1 - h)
        found = {
            "csi": hits / (hits + false + missed),
            "ets": (hits - chance) / (hits + false + missed - chance),
            "sedi": (lf - lh - rf + rh) / (lf + lh + rf + rh),
            "frequency_bias": (hits + false) / (hits + missed),
        }
    return {name: np.where(np.isfinite(values), values, np.nan) for name, values in found.items()}


def brier_parts(table: Array) -> dict[str, Array]:
    """Brier 评分与它的三部分（Murphy 1973）：可靠性 − 分辨力 + 不确定性。"""
    forecast, observed, share = reliability(table)
    with np.errstate(divide="ignore", invalid="ignore"):
        base = (table[..., 1].sum(-1) / table.sum((-1, -2)))[..., None]
    seen = np.where(share > 0, observed, 0.0)
    loose = (share * (forecast - seen) ** 2).sum(-1)
    sharp = (share * (seen - base) ** 2 * (share > 0)).sum(-1)
    unsure = base[..., 0] * (1 - base[..., 0])
    parts = {"brier": loose - sharp + unsure, "reliability": loose, "resolution": sharp, "uncertainty": unsure}
    return {"base_rate": base[..., 0], **parts}
