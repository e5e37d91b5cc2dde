"""邻域：分数技巧评分（Roberts & Lean 2008）——差半格的暴雨不该既算空报又算漏报。"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from util.scores.metrics import window_sum
from util.verification.areas import mean_over


def fractions(count: Tensor, members: int, size: int, periodic: bool) -> Tensor:
    """(..., H, W) 几个成员说有 → (..., H − size + 1, w) float32：每个 size × size 的窗里的份额；只取整个落在图内的窗。

    periodic: 经度首尾相接，每一列都有一个窗，w = W；否则 w = W − size + 1。
    和都是整数：放得下时用一个字节的加，放不下时用单精度的，也没有舍入。
    """
    fields = count.to(torch.uint8 if members * size**2 < 256 else torch.float32)
    if periodic:
        fields = torch.cat([fields, fields[..., : size - 1]], -1)
    *some, height, width = fields.shape
    sums = window_sum(window_sum(fields.flatten(), size, width), size, 1)  # 摊成一行来加，见 window_mean
    shape = (math.prod(some), height - size + 1, width - size + 1)
    return sums.as_strided(shape, (height * width, width, 1)).view(*some, *shape[1:]) / (members * size**2)


def fraction_errors(forecast: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """两批窗里的份额 (B, C, h, w) → (B, C, 2)：差的平方，与两个平方之和，面积加权的平均；weights: (H,)。

    FSS = 1 − Σ 前者 / Σ 后者，和是对全部场的，最后才除。
    """
    edge = (len(weights) - forecast.shape[-2]) // 2
    inside = weights[edge : len(weights) - edge]
    pair = [(forecast - truth).square(), forecast.square() + truth.square()]
    return torch.stack([mean_over(one, inside) for one in pair], -1)
