"""滚动预报：用自己的输出接着报；成员在第一次调用之后并进批里。一次走得了几种时效的，每个时效取调用最少的一条路。"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from models.interface import Forecaster, LeadConditioned
from util.batch import DataSpec, next_history, window_time


def roll(
    model: Forecaster,
    history: Tensor,
    time: Tensor | None,
    steps: int,
    spec: DataSpec,
    generators: Sequence[Generator] | None = None,
    limit: int | None = None,
) -> Iterator[Tensor]:
    """(B, T_in, C, H, W) → 依次 steps 个 (B, M, C, H, W)，每个时效一个；只留着眼下的历史，不留走过的路。

    Args:
        time: (B, T_in)，历史各帧的 UTC 小时；不知道时为 None。
        generators: B·M 个，窗口在前、成员在后，M > 1 时模型须是概率的；每个成员各走各的路，随机数一路取自自己的那一个。
            None 为一个成员，随机数取自全局。
        limit: 一次调用至多几个样本（窗口 × 成员），显存由它封顶；None 为一次全部。
    """
    batch = len(history)
    members = len(generators) // batch if generators else 1
    assert members == 1 or model.probabilistic, "a deterministic model has one member; perturb() its history"
    if spec.jumps and isinstance(model, LeadConditioned):
        yield from leap(model, history, time, steps, spec, generators, limit)
        return
    for step in range(0, steps, spec.frames_out):
        made = _forecast(model, history, window_time(time, spec), generators, limit)
        new = made.flatten(0, 1)  # (B·M, T_out, C, H, W)
        if step == 0:
            history = history.repeat_interleave(members, 0)  # (B·M, T_in, C, H, W)
            time = None if time is None else time.repeat_interleave(members, 0)
        history = next_history(history, new)
        time = None if time is None else time + spec.frames_out * spec.interval_hours
        for frame in new.unbind(1)[: steps - step]:
            yield frame.unflatten(0, (batch, members))


def leap(
    model: Forecaster,
    history: Tensor,
    time: Tensor | None,
    steps: int,
    spec: DataSpec,
    generators: Sequence[Generator] | None,
    limit: int | None,
) -> Iterator[Tensor]:
    """同 roll：一个时效一次调用，从 last_jumps 所说的那一帧起；那一帧和它之前的历史都是已经交出去的时效。

    一个成员从同一帧起的几次调用用同样的随机数：它的几个时效是同一条路上的，不是各抽各的（Andrae et al. 2025, ICLR）。

    Raises:
        ValueError: 不知道时刻。
    """
    if time is None:
        raise ValueError("data.lead_hours needs the time of the forecast: give --time beside --inputs")
    members = len(generators) // len(history) if generators else 1
    time = time.repeat_interleave(members, 0)  # (B·M, T_in)
    path = [*history.repeat_interleave(members, 0).unbind(1)]  # 末一个是眼下这一步之前的一帧 (B·M, C, H, W)
    seeds: dict[int, list[int]] = {}  # 从第几帧起 → 各成员的
    for step, jump in enumerate(last_jumps(steps, spec.jumps), 1):
        start, end = step - jump, len(path) - jump + 1
        if generators and start not in seeds:
            seeds[start] = [int(torch.randint(2**62, (), generator=g)) for g in generators]
        own = [Generator().manual_seed(seed) for seed in seeds[start]] if generators else None
        when = torch.cat([time + start * spec.interval_hours, time[:, -1:] + step * spec.interval_hours], 1)
        past = torch.stack(path[end - spec.frames_in : end], 1)  # (B·M, T_in, C, H, W)
        made = _forecast(model, past, when, own, limit)[:, 0, 0]
        path = [*path, made][1 - spec.frames_in - spec.jumps[-1] :]
        yield made.unflatten(0, (-1, members))


def last_jumps(steps: int, jumps: Sequence[int]) -> list[int]:
    """到第 1 … steps 帧，调用最少的一条路的末一跳几帧；一样少的取远的在先：1、2、4 到 7 是 4、2、1。"""
    calls, last = [0], []
    for step in range(1, steps + 1):
        jump = min((jump for jump in jumps if jump <= step), key=lambda jump: calls[step - jump])
        calls.append(calls[step - jump] + 1)
        last.append(jump)
    return last


def _forecast(
    model: Forecaster,
    history: Tensor,
    time: Tensor | None,
    generators: Sequence[Generator] | None,
    limit: int | None,
) -> Tensor:
    """model.forecast → (B, M, T_out, C, H, W)，切成样本数不超过 limit 的几次调用。

    先切窗口，一个窗口的成员还太多才切成员；每个成员带着自己的发生器，所以怎样切都是同样的成员。
    """
    members = len(generators) // len(history) if generators else 1
    limit = limit or len(history) * members
    windows, most = max(1, limit // members), min(limit, members)  # 一次几个窗口，每个至多几个成员
    made = []
    for first in range(0, len(history), windows):
        some = history[first : first + windows]
        when = None if time is None else time[first : first + windows]
        parts = []
        for member in range(0, members, most):
            count, start = min(most, members - member), first * members + member
            own = generators[start : start + len(some) * count] if generators else None
            parts.append(model.forecast(some, when, count, own))
        made.append(torch.cat(parts, 1))
    return torch.cat(made)
