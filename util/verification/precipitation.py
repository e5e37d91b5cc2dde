"""SEEPS：降水分成干、小、大三档，档由当地的气候定（Rodwell, Richardson, Hewson & Haiden 2010，QJRMS 136，式 15）。

要的气候：每个格点的干的份额 p1，与湿的里头小雨、大雨的分界（湿的 2/3 分位数，小雨的机会是大雨的两倍）。
p1 不在 [0.1, 0.85] 里的格点不计：总是干的沙漠，一次就是几十分（同一篇，第 4 节）。
"""

from __future__ import annotations

import torch
from torch import Tensor

from util.verification.areas import mean_over

DRIEST, WETTEST = 0.85, 0.1
LIGHT = 2 / 3  # 湿的里头，小雨的份额


def penalties(dry: Tensor) -> Tensor:
    """(H, W) 干的份额 → (9, H, W)：第 3 × 预报的档 + 真值的档 行；不计的格点是 0。"""
    p, zero = dry.double(), torch.zeros_like(dry, dtype=torch.float64)
    rows = (
        (zero, 1 / (1 - p), 4 / (1 - p)),
        (1 / p, zero, 3 / (1 - p)),
        (1 / p + 3 / (2 + p), 3 / (2 + p), zero),
    )
    table = torch.stack([one for row in rows for one in row]) / 2
    return torch.where(eligible(dry), table, zero)


def eligible(dry: Tensor) -> Tensor:
    return (dry >= WETTEST) & (dry <= DRIEST)


def category(fields: Tensor, wet: Tensor, heavy: Tensor) -> Tensor:
    """0 干（不超过 wet），1 小雨（不超过 heavy），2 大雨；都是同一个单位，int64。"""
    return (fields > wet).long() + (fields > torch.maximum(heavy, wet)).long()


def seeps(forecast: Tensor, truth: Tensor, table: Tensor, weights: Tensor) -> Tensor:
    """(B, H, W) 预报与真值的档 → (B,)：计的格点上的加权平均；0 是完美，1 是不动脑筋的预报。

    table: penalties；weights: (H,)。一个计的格点也没有时是 NaN。
    """
    found = torch.gather(table.flatten(1), 0, (3 * forecast + truth).flatten(1)).view(forecast.shape)
    counted = (table != 0).any(0).double()
    return mean_over(found, weights) / mean_over(counted, weights)
