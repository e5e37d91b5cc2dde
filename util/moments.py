"""逐块合并的统计量（双精度）：块有多大、由谁算都可以，按同样的次序合并就是同样的数。"""

from __future__ import annotations

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


def measure(fields: np.ndarray) -> Moments:
    """任意形状的一块；先减块内均值再平方，均值远大于起伏的量（位势）也不丢精度。"""
    if not fields.size:
        return Moments()
    block = fields.astype(np.float64)
    low, high, mean = float(block.min()), float(block.max()), float(block.mean())
    block -= mean
    return Moments(block.size, mean, float(np.square(block, out=block).sum()), low, high)


def check_moments(name: str, moments: Moments, dates: str) -> None:
    """能用来标准化。

    Raises:
        ValueError: 没有一个场，或全是同一个数。
    """
    if not moments.total:
        raise ValueError(f"{name}: no finite field in the training dates {dates}, so no statistics")
    if moments.std == 0:
        raise ValueError(f"{name}: {moments.mean:g} everywhere in the training dates {dates}; std 0 cannot standardise")
