"""初值扰动：确定性的模型由加了噪声的历史得到集合；噪声可以在空间上平滑。"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from util.batch import DataSpec


def perturb(
    history: Tensor, std: float, generators: Sequence[Generator], spec: DataSpec, smooth: float = 0.0
) -> Tensor:
    """初值扰动：(B, T, C, H, W) → (B·M, T, C, H, W)，各成员、各帧、各通道加独立的高斯噪声，零号成员不加。

    Args:
        std: 每个格点上噪声的标准差，以标准化单位计。
        generators: B·M 个（在 CPU 上），窗口在前、成员在后，每个成员的噪声取自自己的那一个。
        smooth: 噪声在空间的相关长度 L，度，相关系数 exp(-d²/2L²)；0 为格点之间独立。
    """
    members = len(generators) // len(history)
    assert members * len(history) == len(generators), f"{len(generators)} generators for {len(history)} windows"
    drawn = [torch.randn(history.shape[1:], generator=g, dtype=history.dtype) for g in generators]
    noise = torch.stack(drawn)  # (B·M, T, C, H, W)
    if smooth > 0:
        noise = smooth_noise(noise, spec, smooth)
    noise = noise * std
    noise[::members] = 0
    return history.repeat_interleave(members, 0) + noise.to(history.device)


def smooth_noise(noise: Tensor, spec: DataSpec, length: float) -> Tensor:
    """独立的单位噪声 (..., H, W) → 相关系数为 exp(-d²/2L²) 的噪声，d 为度；每个格点的方差仍恰好是一。

    独立噪声经核 k 之后的相关是 k 与自己的卷积，所以核是 exp(-d²/L²)。先沿经圈滤波；再逐纬圈滤波，经度上的长度按
    1/cos(纬度) 加宽、至多半圈（极点上一圈是同一个值）。两步都把核的平方和归为一，方差因此不靠抽样就处处准确。
    """
    latitudes, longitudes = (torch.tensor(v, dtype=torch.float64) for v in (spec.latitudes, spec.longitudes))
    widths = (length / latitudes.deg2rad().cos()).clamp(max=180.0)  # (H,)
    noise = _kernel(latitudes, length).to(noise) @ noise
    if spec.closes_circle:
        waves = torch.arange(spec.width // 2 + 1)
        response = torch.exp(-((waves * widths.deg2rad()[:, None]) ** 2) / 4)  # 核的傅里叶变换，(H, W//2 + 1)
        response /= torch.fft.irfft(response, spec.width).norm(dim=1, keepdim=True)
        return torch.fft.irfft(torch.fft.rfft(noise) * response.to(noise), spec.width)
    rows = zip(noise.unbind(-2), widths, strict=True)  # 逐行：(H, W, W) 的核放不下
    return torch.stack([row @ _kernel(longitudes, width).T.to(noise) for row, width in rows], -2)


def _kernel(points: Tensor, length: float | Tensor) -> Tensor:
    """(n,) 度 → (n, n)：高斯核，每行的平方和为一。"""
    kernel = torch.exp(-(((points[:, None] - points) / length) ** 2))
    return kernel / kernel.norm(dim=1, keepdim=True)
