"""流匹配：数据与噪声之间的直线、训练时的时间分布、按维数的时间平移、Euler 采样。

x_t = (1 − t)·数据 + t·噪声，t = 0 是数据、t = 1 是噪声；网络学的是速度 v = 噪声 − 数据（Lipman et al. 2023；
Liu et al. 2023）。时间平移按要生成的数的个数：维数越高，同样的 t 上信息剩得越多，所以把时间推向噪声一侧
（Esser et al. 2024 §5.3.2；基准 4096 与 √(维数 / 4096) 取自 Zheng et al. 2025，RAE）。
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

BASE_DIM = 4096  # 时间不平移的维数；更小的也不平移
LAST = 0.999  # 训练的 t 截断在这里；采样的格点（未平移）从 1 到 1 − LAST，再一步到 0


def time_shift(dim: int) -> float:
    """s = √(dim / 4096)，至少 1；dim 是一次生成的数的个数。"""
    return max(1.0, (dim / BASE_DIM) ** 0.5)


def shifted(t: Tensor, s: float) -> Tensor:
    """t' = s·t / (1 + (s − 1)·t)：0、1 不动，(1 − t') / t' = (1 − t) / (s·t)，即信噪比的平方根除以 s。"""
    return s * t / (1 + (s - 1) * t)


def times_at(uniform: Tensor, s: float) -> Tensor:
    """[0, 1) 上均匀的数 → 训练用的时间：logit(t) ~ N(0, 1)，截断在 [0, 0.999]，再平移。

    按累积分布的逆：截断是重新归一，不是削平。
    """
    most = NormalDist().cdf(math.log(LAST / (1 - LAST)))
    return shifted(torch.special.ndtri(uniform * most).sigmoid(), s)  # 抽到 0 时逆是 −∞，sigmoid 之后正是 t = 0


def between(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """直线上的点：t (B,)，其余 (B, …)。"""
    t = t.view(-1, *[1] * (data.dim() - 1))
    return (1 - t) * data + t * noise


def sampling_times(steps: int, s: float) -> list[float]:
    """steps + 1 个时间：1 − linspace(0, 0.999, steps) 平移之后，末了是 0。

    原版停在 0.001（平移之后 0.001·s 的噪声留在结果里）；这里多走一步到 0，网络恰好算 steps 次。
    """
    grid = 1 - torch.linspace(0, LAST, steps, dtype=torch.float64)
    return [*shifted(grid, s).tolist(), 0.0]


def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, times: list[float]) -> Tensor:
    """dx/dt = v(x, t) 从噪声积分到数据；velocity 收 x (B, …) 与 t (B,)，给出 (B, …)。"""
    x = noise
    for now, then in pairwise(times):
        x = x + (then - now) * velocity(x, torch.full((len(x),), now, device=x.device))
    return x
