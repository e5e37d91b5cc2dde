"""训练用的距离：几个成员与目标之间，每个场一个数，求得了导。

一律 (B, M, T, C, H, W) 标准化的成员、(B, T, C, H, W) 的目标 → (B, T, C)；确定性的 M = 1。
逐点的距离取各成员的平均；crps、energy 还减去成员之间的，只有一个成员时没有得减：crps 就是 mae。
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from util.scores.metrics import sort_members

# 几乎公平：α 份公平的 CRPS，余下是普通的，免得成员各走各的也不受罚（Lang et al. 2024，arXiv:2412.15832 式 4）
ALPHA = 0.95
TINY = 1e-12  # 根号下的：恰好为零的地方没有导数


class Grid(NamedTuple):
    """area: (H,) 各纬度的权重，平均为 1，None 是处处相同；circular: 经度首尾相接。"""

    area: Tensor | None = None
    circular: bool = True


def mse(made: Tensor, truth: Tensor, grid: Grid) -> Tensor:
    return _mean((made - truth[:, None]).square(), grid.area).mean(1)


def mae(made: Tensor, truth: Tensor, grid: Grid) -> Tensor:
    return _mean((made - truth[:, None]).abs(), grid.area).mean(1)


def huber(made: Tensor, truth: Tensor, grid: Grid) -> Tensor:
    """误差不到一个标准差的是半个平方，过了是线性的。"""
    return _mean(F.huber_loss(made, truth[:, None].expand_as(made), reduction="none"), grid.area).mean(1)


def gradient(made: Tensor, truth: Tensor, grid: Grid) -> Tensor:
    """误差的两个方向的差分的绝对值，各自平均再相加；只有一行、一列的方向没有差分。"""
    error = made - truth[:, None]
    found = torch.zeros_like(error[..., 0, 0])
    if error.shape[-1] > 1:
        east = error.roll(-1, -1) - error if grid.circular else error.diff(dim=-1)
        found = found + _mean(east.abs(), grid.area)
    if error.shape[-2] > 1:
        between = None if grid.area is None else (grid.area[1:] + grid.area[:-1]) / 2
        found = found + _mean(error.diff(dim=-2).abs(), between)
    return found.mean(1)


def amse(made: Tensor, truth: Tensor, grid: Grid) -> Tensor:
    """各纬向波数的振幅之差与不相干的部分（Subich et al. 2025，arXiv:2501.19374；那里是球谐的总波数）。

    Σ_k (√P_x − √P_y)² + 2 max(P_x, P_y) (1 − 相干)，P 是各纬圈的功率的平均，相干在各纬圈上合起来算。
    平方误差里，模糊可以换来较小的误差；这里振幅不足与位置不对各罚各的。
    """
    x, y = _waves(made), _waves(truth)[:, None]  # (…, H, K)
    across = _rows((x * y.conj()).real, grid.area)  # (…, K)
    x_power, y_power = _rows(x.abs().square(), grid.area), _rows(y.abs().square(), grid.area)
    x_size, y_size = (x_power + TINY).sqrt(), (y_power + TINY).sqrt()
    coherence = across / (x_size * y_size)
    return ((x_size - y_size).square() + 2 * torch.maximum(x_power, y_power) * (1 - coherence)).sum(-1).mean(1)


def crps(made: Tensor, truth: Tensor, grid: Grid) -> Tensor:
    """几乎公平的 CRPS，逐格点。排好序的第 i 个成员（从 0 数）在 Σ_{i<j} |x_i − x_j| 里的系数是 2i − M + 1。"""
    count = made.shape[1]
    errors = [member - truth for member in made.unbind(1)]
    skill = sum_of(error.abs() for error in errors) / count
    if count == 1:
        return _mean(skill, grid.area)
    ordered = sort_members(errors)
    apart = sum_of(error * (2 * i - count + 1) for i, error in enumerate(ordered))
    return _mean(skill - _spread(count) * apart, grid.area)


def energy(made: Tensor, truth: Tensor, grid: Grid) -> Tensor:
    """几乎公平的能量评分：一个场是一个向量，距离是它的均方根。"""
    members = made.unbind(1)
    skill = sum_of(_root_mean_square(member - truth, grid.area) for member in members) / len(members)
    if len(members) == 1:
        return skill
    apart = sum_of(_root_mean_square(one - other, grid.area) for one, other in combinations(members, 2))
    return skill - _spread(len(members)) * apart


Distance = Callable[[Tensor, Tensor, Grid], Tensor]
DISTANCES: Mapping[str, Distance] = {d.__name__: d for d in (mse, mae, huber, gradient, amse, crps, energy)}


def sum_of(fields: Iterable[Tensor]) -> Tensor:
    first, *others = fields
    return sum(others, start=first)


def _spread(count: int) -> float:
    """Σ_{i<j} 的系数：公平的是 1 / (M (M − 1))，普通的是 1 / M²，各取 α 与 1 − α 份。"""
    return ALPHA / (count * (count - 1)) + (1 - ALPHA) / count**2


def _mean(points: Tensor, area: Tensor | None) -> Tensor:
    """(…, H, W) → (…)。"""
    return (points if area is None else points * area[:, None]).mean((-2, -1))


def _rows(waves: Tensor, area: Tensor | None) -> Tensor:
    """(…, H, K) → (…, K)：各纬圈的平均。"""
    return (waves if area is None else waves * area[:, None]).mean(-2)


def _root_mean_square(fields: Tensor, area: Tensor | None) -> Tensor:
    return (_mean(fields.square(), area) + TINY).sqrt()


def _waves(fields: Tensor) -> Tensor:
    """(…, H, W) → (…, H, K) 复数，各波数的功率之和是均方值（Parseval）；半精度没有 FFT。"""
    waves = torch.fft.rfft(fields.to(torch.promote_types(fields.dtype, torch.float32)), norm="forward")
    twice = torch.full((waves.shape[-1],), 2.0, device=waves.device).sqrt()
    twice[0] = 1.0
    if fields.shape[-1] % 2 == 0:
        twice[-1] = 1.0  # 最短波没有共轭的另一半
    return waves * twice
