"""长时间滚动：全球平均、方差、动能随时效漂到哪里去；几个时效之后不比气候态好。"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from util.variables import split_channel
from util.verification.areas import mean_over

Array = np.ndarray
USEFUL_ACC = 0.6  # 低于它的环流形势已没有用处（Hollingsworth et al. 1980 以来的惯例）


def moments(fields: Tensor, weights: Tensor) -> Tensor:
    """(B, M, C, H, W) → (B, C, 3) float64：面积平均、平方的面积平均、场内方差，各成员的平均；标准化单位。"""
    found = []
    for one in fields.unbind(1):
        mean, square = mean_over(one, weights), mean_over(one.square(), weights)
        found.append(torch.stack([mean, square, square - mean.square()], -1))
    return torch.stack(found).mean(0)


def physical_moments(means: Array, mean: float, std: float) -> dict[str, Array]:
    """(L, 3) 标准化 → 物理单位的平均、平方的平均、方差，各 (L,)。"""
    average, square, variance = np.moveaxis(means, -1, 0)
    return {
        "mean": average * std + mean,
        "square": square * std**2 + 2 * mean * std * average + mean**2,
        "variance": variance * std**2,
    }


def wind_pairs(channels: Sequence[str]) -> list[tuple[str, str]]:
    """能算动能的：同一层的东西风与南北风。"""
    pairs = []
    for channel in channels:
        name, _ = split_channel(channel)
        if name.startswith("u"):
            other = "v" + channel[1:]
            pairs += [(channel, other)] if other in channels else []
    return pairs


def lost_skill(lead_hours: Sequence[int], errors: Sequence[float | None], limits: Sequence[float | None]) -> int | None:
    """头一个 errors ≥ limits 的时效，小时；有一个没有数的时效不看；一直没有是 None。"""
    pairs = zip(lead_hours, errors, limits, strict=True)
    return next((lead for lead, one, two in pairs if one is not None and two is not None and one >= two), None)
