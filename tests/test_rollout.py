"""滚动预报与写开的循环相比：历史、时刻、成员、多帧输出、初值扰动。"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.rollout import perturb, rollout, window_time
from tests.small import small_batch, small_spec


class Toy:
    """下一帧 = 历史的加权和 + 时刻的函数 + 成员噪声；记下每次收到什么。"""

    def __init__(self, frames_in: int, frames_out: int) -> None:
        self.weights = torch.linspace(0.2, 0.5, frames_in)
        self.frames_out = frames_out
        self.calls: list[tuple[int, torch.Size, Tensor | None]] = []

    def forecast(self, history: Tensor, time: Tensor | None, num_members: int, generator: torch.Generator) -> Tensor:
        self.calls.append((num_members, history.shape, time))
        base = (history * self.weights[:, None, None, None]).sum(1)  # (B, C, H, W)
        frames = torch.stack([base * (lead + 1) for lead in range(self.frames_out)], 1)
        if time is not None:
            frames = frames + (time[:, -self.frames_out :] % 100).float()[:, :, None, None, None] / 100
        shape = (num_members, *frames.shape)
        noise = torch.randn(shape, generator=generator) if num_members > 1 else torch.zeros(shape)
        return (frames + noise).transpose(0, 1)  # (B, M, T_out, C, H, W)


def written_out(toy: Toy, history: Tensor, time: list[int] | None, steps: int, interval: int) -> Tensor:
    """一个窗口 (T_in, C, H, W) 一帧一帧地接：第一次调用之后没有成员噪声。"""
    frames, made = list(history), []
    last = time[-1] if time else 0
    while len(made) < steps:
        base = torch.zeros_like(history[0])
        for weight, frame in zip(toy.weights, frames[-len(toy.weights) :], strict=True):
            base = base + weight * frame
        for lead in range(toy.frames_out):
            last += interval
            new = base * (lead + 1) + ((last % 100) / 100 if time else 0.0)
            frames.append(new)
            made.append(new)
    return torch.stack(made[:steps])


@pytest.mark.parametrize("with_time", [True, False])
@pytest.mark.parametrize(("frames_in", "frames_out"), [(3, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_rollout_equals_a_loop(steps: int, frames_in: int, frames_out: int, with_time: bool) -> None:
    spec = small_spec(channels=2, grid=(2, 4), frames_in=frames_in, frames_out=frames_out, interval=3)
    batch, toy = small_batch(spec), Toy(frames_in, frames_out)
    time = batch.time[:, :frames_in] if with_time else None
    found = rollout(toy, batch.history, time, steps, spec)
    assert found.shape == (3, 1, steps, 2, 2, 4)
    for b in range(3):
        start = batch.time[b, :frames_in].tolist() if with_time else None
        torch.testing.assert_close(found[b, 0], written_out(toy, batch.history[b], start, steps, 3))
    assert len(toy.calls) == -(-steps // frames_out)
    for i, (members, shape, given) in enumerate(toy.calls):
        assert members == 1 and shape == (3, frames_in, 2, 2, 4)
        if with_time:
            assert given is not None and torch.equal(given, batch.time + 3 * frames_out * i)
        else:
            assert given is None


def test_members_fold_into_the_batch_after_the_first_call() -> None:
    """每个成员从自己的第一帧接着走；成员与窗口不串。"""
    spec = small_spec(channels=2, grid=(2, 4))
    batch, toy = small_batch(spec), Toy(3, 1)
    time = batch.time[:, :3]
    found = rollout(toy, batch.history, time, 4, spec, 5, torch.Generator().manual_seed(0))
    assert found.shape == (3, 5, 4, 2, 2, 4)
    assert [call[:2] for call in toy.calls] == [(5, (3, 3, 2, 2, 4)), *[(1, (15, 3, 2, 2, 4))] * 3]
    first = toy.forecast(batch.history, batch.time, 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found[:, :, :1], first)
    for b in range(3):
        for m in range(5):
            history = torch.cat([batch.history[b, 1:], found[b, m, :1]])
            later = written_out(toy, history, (time[b] + 6).tolist(), 3, 6)
            torch.testing.assert_close(found[b, m, 1:], later)


def test_window_time_appends_the_target_hours() -> None:
    spec = small_spec(frames_in=2, frames_out=3, interval=6)
    time = torch.tensor([[0, 6], [100, 106]])
    made = window_time(time, spec)
    assert made is not None
    assert made.tolist() == [[0, 6, 12, 18, 24], [100, 106, 112, 118, 124]] and made.dtype == torch.int64
    assert window_time(None, spec) is None


def test_perturb_adds_independent_noise_and_leaves_member_zero() -> None:
    history = torch.randn(2, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    made = perturb(history, 0.1, 4, torch.Generator().manual_seed(1)).unflatten(0, (2, 4))
    noise = made - history[:, None]
    assert torch.equal(noise[:, 0], torch.zeros_like(noise[:, 0]))
    assert noise[:, 1:].std().item() == pytest.approx(0.1, rel=0.05)
    correlation = torch.corrcoef(noise[:, 1:].flatten(0, 1).flatten(1))
    assert (correlation - torch.eye(6)).abs().max() < 0.13  # 1536 个值，5 个标准差
    again = perturb(history, 0.1, 4, torch.Generator().manual_seed(1)).unflatten(0, (2, 4))
    assert torch.equal(made, again)
