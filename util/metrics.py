"""指标：可平均的统计量加最后一步的函数；均方根只在全部误差平均之后开方。"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def latitude_weights(latitudes: Sequence[float]) -> Tensor:
    """(H,) float64，格点面积之比，平均为 1：相邻纬度的中线为界，两端外推半格并截在两极。"""
    lat = torch.tensor(latitudes, dtype=torch.float64)
    if lat.numel() == 1:
        return torch.ones(1, dtype=torch.float64)
    middle = (lat[1:] + lat[:-1]) / 2
    ends = lat[[0, -1]] + (lat[[0, -1]] - middle[[0, -1]])
    bounds = torch.cat([ends[:1], middle, ends[1:]]).clamp(-90, 90)
    area = (bounds.deg2rad().sin().diff()).abs()
    return area / area.mean()


class ErrorSums:
    """逐批累加的误差：每个时效、每个通道的加权平方误差之和与场数，内存与样本数无关。"""

    def __init__(self, leads: int, channels: int) -> None:
        self.square = torch.zeros(leads, channels, dtype=torch.float64)  # 纬度加权
        self.plain = torch.zeros(leads, channels, dtype=torch.float64)  # 不加权
        self.count = torch.zeros(leads, channels, dtype=torch.float64)

    def add(self, forecast: Tensor, truth: Tensor, valid: Tensor, weights: Tensor) -> None:
        """forecast、truth: (B, L, C, H, W) 标准化；valid: (B, L, C)，为假的场不计；weights: (H,)。"""
        error = (forecast - truth).double().square()
        keep = valid.double()
        self.square += ((error * weights[:, None]).mean((-2, -1)) * keep).sum(0).cpu()
        self.plain += (error.mean((-2, -1)) * keep).sum(0).cpu()
        self.count += keep.sum(0).cpu()

    def tensors(self) -> list[Tensor]:
        """跨进程求和用。"""
        return [self.square, self.plain, self.count]

    def rmse(self, std: Sequence[float]) -> Tensor:
        """(L, C) 纬度加权均方根误差，物理单位；没有一个有效场的为 NaN。"""
        return (self.square / self.count).sqrt() * torch.tensor(std, dtype=torch.float64)

    def mse(self) -> float:
        """标准化空间、不加权的均方误差：与训练损失同一把尺。"""
        return float(self.plain.sum() / self.count.sum())  # 张量相除，没有有效场时为 NaN
