"""初值扰动：确定性的模型由加了噪声的历史得到集合；噪声可以在空间上平滑。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from util.batch import DataSpec


def check_members(model: Any, name: str, members: int, noise: float, smooth: float) -> None:
    """成员数与扰动说得通。

    Raises:
        ValueError: 确定性模型要几个成员而没有扰动；有扰动而只有一个成员；要平滑而没有扰动。
    """
    if members > 1 and not model.probabilistic and noise == 0:
        raise ValueError(f"{name} is deterministic: --members {members} needs --perturb, e.g. --perturb 0.05")
    if members == 1 and noise > 0:
        raise ValueError(f"--perturb {noise:g} with one member changes nothing: member 0 is unperturbed; add --members")
    if smooth > 0 and noise == 0:
        raise ValueError(f"--smooth {smooth:g} shapes the noise of --perturb, which is 0")


def perturb(
    history: Tensor, std: float, members: int, generators: Sequence[Generator], spec: DataSpec, smooth: float = 0.0
) -> Tensor:
    """初值扰动：(B, T, C, H, W) → (B·M, T, C, H, W)，各成员、各帧、各通道加独立的高斯噪声，零号成员不加。

    Args:
        std: 每个格点上噪声的标准差，以标准化单位计。
        generators: B 个（在 CPU 上），每个窗口自己的；同一个窗口的噪声因此与怎样分批无关。
        smooth: 噪声在空间的相关长度 L，度，相关系数 exp(-d²/2L²)；0 为格点之间独立。
    """
    shape = (members, *history.shape[1:])
    drawn = [torch.randn(shape, generator=g, dtype=history.dtype) for g in generators]
    assert len(drawn) == len(history), f"{len(drawn)} generators for {len(history)} windows"
    noise = torch.stack(drawn)  # (B, M, T, C, H, W)
    if smooth > 0:
        noise = smooth_noise(noise, spec, smooth)
    noise = noise * std
    noise[:, 0] = 0
    return history.repeat_interleave(members, 0) + noise.flatten(0, 1).to(history.device)


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
