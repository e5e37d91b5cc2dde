"""滚动预报：用自己的输出接着报；成员在第一次调用之后并进批里。初值扰动由确定性模型得到集合。"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Generator, Tensor

from util.batch import DataSpec


def roll(
    model: Any,
    history: Tensor,
    time: Tensor | None,
    steps: int,
    spec: DataSpec,
    num_members: int = 1,
    generator: Generator | None = None,
    limit: int | None = None,
) -> Iterator[Tensor]:
    """(B, T_in, C, H, W) → 依次 steps 个 (B, M, C, H, W)，每个时效一个；只留着眼下的历史，不留走过的路。

    Args:
        time: (B, T_in)，历史各帧的 UTC 小时；不知道时为 None。
        num_members: 第一次调用向模型要的成员数，之后每个成员各走各的路；大于 1 时模型须是概率的。
        limit: 一次调用至多几个样本（窗口 × 成员），显存由它封顶；None 为一次全部。
    """
    assert num_members == 1 or model.probabilistic, "a deterministic model has one member; perturb() its history"
    batch = len(history)
    for step in range(0, steps, spec.frames_out):
        members = num_members if step == 0 else 1
        made = _forecast(model, history, window_time(time, spec), members, generator, limit)
        new = rearrange(made, "b m t c h w -> (b m) t c h w")
        if step == 0:
            history = history.repeat_interleave(num_members, 0)  # (B·M, T_in, C, H, W)
            time = None if time is None else time.repeat_interleave(num_members, 0)
        history = torch.cat([history[:, spec.frames_out :], new[:, -spec.frames_in :]], 1)
        time = None if time is None else time + spec.frames_out * spec.interval_hours
        for frame in new.unbind(1)[: steps - step]:
            yield rearrange(frame, "(b m) c h w -> b m c h w", b=batch)


def rollout(
    model: Any,
    history: Tensor,
    time: Tensor | None,
    steps: int,
    spec: DataSpec,
    num_members: int = 1,
    generator: Generator | None = None,
    limit: int | None = None,
) -> Tensor:
    """roll 的全部时效：(B, T_in, C, H, W) → (B, M, steps, C, H, W)。"""
    return torch.stack(list(roll(model, history, time, steps, spec, num_members, generator, limit)), 2)


def _forecast(
    model: Any, history: Tensor, time: Tensor | None, num_members: int, generator: Generator | None, limit: int | None
) -> Tensor:
    """model.forecast，切成样本数不超过 limit 的几次调用：先切窗口，一个窗口的成员还太多才切成员。

    概率的模型按窗口、成员的次序，每个成员向 generator 要一个种子；这里也照这个次序切，所以怎样切都是同样的成员。
    """
    limit = limit or len(history) * num_members
    windows, members = max(1, limit // num_members), min(limit, num_members)
    made = []
    for first in range(0, len(history), windows):
        here = slice(first, first + windows)
        when = None if time is None else time[here]
        counts = [min(members, num_members - m) for m in range(0, num_members, members)]
        made.append(torch.cat([model.forecast(history[here], when, count, generator) for count in counts], 1))
    return torch.cat(made)  # (B, M, T_out, C, H, W)


def window_time(time: Tensor | None, spec: DataSpec) -> Tensor | None:
    """历史的时刻 (B, T_in) 接上目标的时刻 → (B, T_in + T_out)。"""
    if time is None:
        return None
    ahead = torch.arange(1, spec.frames_out + 1, device=time.device) * spec.interval_hours
    return torch.cat([time, time[:, -1:] + ahead], 1)


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
