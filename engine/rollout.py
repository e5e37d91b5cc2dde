"""滚动预报：用自己的输出接着报；成员在第一次调用之后并进批里。"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Generator, Tensor

from util.batch import DataSpec


def rollout(
    model: Any,
    history: Tensor,
    time: Tensor | None,
    steps: int,
    spec: DataSpec,
    num_members: int = 1,
    generator: Generator | None = None,
) -> Tensor:
    """(B, T_in, C, H, W) → (B, M, steps, C, H, W)；time (B, T_in) 为历史各帧的 UTC 小时，不知道时为 None。"""
    batch, frames = history.shape[0], []
    while sum(f.shape[1] for f in frames) < steps:
        first = not frames
        made = model.forecast(history, window_time(time, spec), num_members if first else 1, generator)
        new = rearrange(made, "b m t c h w -> (b m) t c h w")
        if first:  # 之后每个成员各走各的路
            history = history.repeat_interleave(num_members, 0)
            time = None if time is None else time.repeat_interleave(num_members, 0)
        frames.append(new)
        history = torch.cat([history, new], 1)[:, -spec.frames_in :]
        time = None if time is None else time + spec.frames_out * spec.interval_hours
    return rearrange(torch.cat(frames, 1)[:, :steps], "(b m) t c h w -> b m t c h w", b=batch)


def window_time(time: Tensor | None, spec: DataSpec) -> Tensor | None:
    """历史的时刻 (B, T_in) 接上目标的时刻 → (B, T_in + T_out)。"""
    if time is None:
        return None
    ahead = torch.arange(1, spec.frames_out + 1, device=time.device) * spec.interval_hours
    return torch.cat([time, time[:, -1:] + ahead], 1)


def perturb(history: Tensor, std: float, members: int, generator: Generator) -> Tensor:
    """初值扰动：(B, T, C, H, W) → (B·M, T, C, H, W)，各成员加独立的高斯噪声（标准差以标准化单位计），零号成员不加。"""
    copies = history.repeat_interleave(members, 0)
    noise = torch.randn(copies.shape, generator=generator, dtype=copies.dtype) * std
    noise[::members] = 0
    return copies + noise.to(copies.device)
