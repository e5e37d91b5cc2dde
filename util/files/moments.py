"""逐场、逐块合并的统计量（双精度）：由谁算都可以，按同样的次序合并就是同样的数。"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """个数、均值、离差平方和、最小、最大。"""

    total: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = np.inf
    high: float = -np.inf

    @property
    def std(self) -> float:
        """总体标准差（除以个数）。"""
        return float(np.sqrt(self.squares / self.total))

    def merge(self, other: Moments) -> Moments:
        """两部分合起来（Chan, Golub & LeVeque 1983, The American Statistician 37(3)，式 2.1）。"""
        if not other.total or not self.total:
            return self if self.total else other
        total, shift = self.total + other.total, other.mean - self.mean
        squares = self.squares + other.squares + shift**2 * self.total * other.total / total
        mean = self.mean + shift * other.total / total
        return Moments(total, mean, squares, min(self.low, other.low), max(self.high, other.high))


def measure(fields: Iterable[np.ndarray]) -> Moments:
    """几个场 (H, W)，逐个合并：一个场的双精度副本放得进处理器的缓存，一块的放不进。

    先减一个场的均值再平方，均值远大于起伏的量（位势）也不丢精度。
    """
    found = Moments()
    for field in fields:
        values = field.astype(np.float64)
        values -= (mean := float(values.mean()))
        squares = float(np.square(values, out=values).sum())
        found = found.merge(Moments(field.size, mean, squares, float(field.min()), float(field.max())))
    return found


def check_moments(name: str, moments: Moments, dates: str) -> None:
    """能用来标准化。

    Raises:
        ValueError: 没有一个场，或全是同一个数。
    """
    if not moments.total:
        raise ValueError(f"{name}: no finite field in the training dates {dates}, so no statistics")
    if moments.std == 0:
        raise ValueError(f"{name}: {moments.mean:g} everywhere in the training dates {dates}; std 0 cannot standardise")
