"""滚动预报：用自己的输出接着报；成员在第一次调用之后并进批里。初值扰动由确定性模型得到集合。"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Generator, Tensor

from util.batch import DataSpec, window_time


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
