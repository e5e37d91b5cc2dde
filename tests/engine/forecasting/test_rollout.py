"""滚动预报与写开的循环相比：历史、时刻、成员各自的噪声、多帧输出、分块；初值扰动的大小、相关、独立。"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from engine.forecasting.perturbation import perturb, smooth_noise
from engine.forecasting.rollout import roll
from models.layers.members import Generators, sample_generators
from tests.models.small import rollout, small_batch, small_spec
from util.batch import Batch, DataSpec, window_time


class Toy(nn.Module):
    """下一帧 = 历史的加权和 + 时刻的函数 + 成员噪声；记下每次收到什么。"""

    probabilistic = can_forecast = True

    def __init__(self, frames_in: int, frames_out: int) -> None:
        super().__init__()
        self.weights = torch.linspace(0.2, 0.5, frames_in)
        self.frames_out = frames_out
        self.calls: list[tuple[int, torch.Size, Tensor | None]] = []

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        raise AssertionError("rolling on needs no loss")

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generators | None = None
    ) -> Tensor:
        self.calls.append((num_members, history.shape, time))
        base = (history * self.weights[:, None, None, None]).sum(1)  # (B, C, H, W)
        frames = torch.stack([base * (lead + 1) for lead in range(self.frames_out)], 1)
        if time is not None:
            frames = frames + (time[:, -self.frames_out :] % 100).float()[:, :, None, None, None] / 100
        made = frames[:, None].repeat_interleave(num_members, 1)  # (B, M, T_out, C, H, W)
        if generator is not None:
            generators = sample_generators(len(history) * num_members, generator)
            made += torch.stack([torch.randn(frames.shape[1:], generator=g) for g in generators]).view_as(made)
        return made


def written_out(
    toy: Toy, history: Tensor, time: list[int] | None, steps: int, interval: int, seed: int | None = None
) -> Tensor:
    """一个窗口 (T_in, C, H, W) 的一个成员，一帧一帧地接；噪声一路取自同一个发生器，seed 为 None 时没有。"""
    generator = Generator().manual_seed(seed or 0)
    frames, made = list(history), []
    last = time[-1] if time else 0
    while len(made) < steps:
        base = torch.zeros_like(history[0])
        for weight, frame in zip(toy.weights, frames[-len(toy.weights) :], strict=True):
            base = base + weight * frame
        noise = torch.randn(toy.frames_out, *base.shape, generator=generator) * (seed is not None)
        for lead in range(toy.frames_out):
            last += interval
            new = base * (lead + 1) + ((last % 100) / 100 if time else 0.0) + noise[lead]
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
    """每个成员从自己的第一帧接着走，噪声接着取自自己的发生器；成员与窗口不串。"""
    spec = small_spec(channels=2, grid=(2, 4))
    batch, toy = small_batch(spec), Toy(3, 1)
    time = batch.time[:, :3]
    found = rollout(toy, batch.history, time, 4, spec, seeded(*range(15)))
    assert found.shape == (3, 5, 4, 2, 2, 4)
    assert [call[:2] for call in toy.calls] == [(5, (3, 3, 2, 2, 4)), *[(1, (15, 3, 2, 2, 4))] * 3]
    for b in range(3):
        for m in range(5):
            alone = written_out(toy, batch.history[b], time[b].tolist(), 4, 6, seed=5 * b + m)
            torch.testing.assert_close(found[b, m], alone)


def test_window_time_appends_the_target_hours() -> None:
    spec = small_spec(frames_in=2, frames_out=3, interval=6)
    time = torch.tensor([[0, 6], [100, 106]])
    made = window_time(time, spec)
    assert made is not None
    assert made.tolist() == [[0, 6, 12, 18, 24], [100, 106, 112, 118, 124]] and made.dtype == torch.int64
    assert window_time(None, spec) is None


@pytest.mark.parametrize(("frames_in", "frames_out"), [(3, 1), (2, 3)])
@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_limit_caps_every_call_and_changes_nothing(limit: int, frames_in: int, frames_out: int) -> None:
    spec = small_spec(channels=2, grid=(2, 4), frames_in=frames_in, frames_out=frames_out)
    batch, toy = small_batch(spec), Toy(frames_in, frames_out)
    time = batch.time[:, :frames_in]
    found = rollout(toy, batch.history, time, 5, spec, limit=limit)
    torch.testing.assert_close(found, rollout(Toy(frames_in, frames_out), batch.history, time, 5, spec))
    assert all(shape[0] * members <= limit for members, shape, _ in toy.calls)
    assert len(toy.calls) == -(-5 // frames_out) * -(-3 // min(limit, 3))


@pytest.mark.parametrize(
    ("limit", "first", "later"),
    [
        (4, [(4, 1), (1, 1)] * 3, [4, 4, 4, 3]),  # 一个窗口的成员就放不下：成员也切
        (5, [(5, 1)] * 3, [5, 5, 5]),
        (11, [(5, 2), (5, 1)], [11, 4]),
        (15, [(5, 3)], [15]),
    ],
)
def test_members_are_asked_for_in_chunks(limit: int, first: list[tuple[int, int]], later: list[int]) -> None:
    spec = small_spec(channels=2, grid=(2, 4))
    batch, toy = small_batch(spec), Toy(3, 1)
    found = rollout(toy, batch.history, None, 3, spec, seeded(*range(15)), limit)
    made = [(members, shape[0]) for members, shape, _ in toy.calls]
    assert made == first + [(1, count) for count in later] * 2
    for b in range(3):
        for m in range(5):
            torch.testing.assert_close(found[b, m], written_out(toy, batch.history[b], None, 3, 6, seed=5 * b + m))


def test_roll_goes_lead_by_lead_and_keeps_only_the_history() -> None:
    spec = small_spec(channels=2, grid=(2, 4), frames_in=3, frames_out=2)
    batch, toy = small_batch(spec), Toy(3, 2)
    frames = roll(toy, batch.history, None, 5, spec)
    made = []
    for calls in (1, 1, 2, 2, 3):  # 要到哪一帧才算到哪一帧
        made.append(next(frames))
        assert len(toy.calls) == calls and made[-1].shape == (3, 1, 2, 2, 4)
    assert next(frames, None) is None and len(toy.calls) == 3
    torch.testing.assert_close(torch.stack(made, 2), rollout(Toy(3, 2), batch.history, None, 5, spec))

    held: list[int] = []

    class Watching(Toy):
        def forecast(self, history: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            held.append(history.untyped_storage().nbytes())
            return super().forecast(history, *args, **kwargs)

    rollout(Watching(3, 2), batch.history, None, 20, spec)
    assert set(held[1:]) == {3 * 3 * 2 * 2 * 4 * 4}  # 恰好 (B, T_in, C, H, W) 个单精度数，没有拖着走过的路


def test_a_deterministic_model_gives_no_members() -> None:
    spec = small_spec(channels=2, grid=(2, 4))
    toy = Toy(3, 1)
    toy.probabilistic = False
    with pytest.raises(AssertionError, match="deterministic"):
        next(roll(toy, small_batch(spec).history, None, 1, spec, seeded(*range(6)), limit=1))


def seeded(*seeds: int) -> list[Generator]:
    return [Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("smooth", [0.0, 25.0])
def test_perturb_adds_independent_noise_and_leaves_member_zero(smooth: float) -> None:
    spec = small_spec(channels=2, grid=(16, 16))
    history = torch.randn(2, 3, 2, 16, 16, generator=Generator().manual_seed(0))
    made = perturb(history, 0.1, seeded(*range(8)), spec, smooth).unflatten(0, (2, 4))
    noise = made - history[:, None]
    assert torch.equal(noise[:, 0], torch.zeros_like(noise[:, 0]))
    assert noise[:, 1:].std().item() == pytest.approx(0.1, rel=0.05 if smooth == 0 else 0.15)
    again = perturb(history, 0.1, seeded(*range(8)), spec, smooth).unflatten(0, (2, 4))
    assert torch.equal(made, again)
    if smooth == 0:
        correlation = torch.corrcoef(noise[:, 1:].flatten(0, 1).flatten(1))
        assert (correlation - torch.eye(6)).abs().max() < 0.13  # 1536 个值，5 个标准差


def test_perturb_without_smoothing_is_plain_noise() -> None:
    spec = small_spec(channels=2, grid=(4, 8))
    history = small_batch(spec, count=1).history
    made = perturb(history, 0.1, seeded(4, 5, 6, 7), spec)
    noise = torch.stack([torch.randn(3, 2, 4, 8, generator=g) for g in seeded(4, 5, 6, 7)]) * 0.1
    noise[0] = 0
    assert torch.equal(made, history.repeat_interleave(4, 0) + noise)


@pytest.mark.parametrize("smooth", [0.0, 25.0])
def test_noise_belongs_to_the_member_and_not_to_the_batch(smooth: float) -> None:
    spec = small_spec(channels=2, grid=(8, 16))
    history = small_batch(spec, count=3).history
    together = perturb(history, 0.3, seeded(*range(12)), spec, smooth).unflatten(0, (3, 4))
    for b in range(3):
        alone = perturb(history[b : b + 1], 0.3, seeded(4 * b, 4 * b + 1), spec, smooth)  # 头两个成员
        torch.testing.assert_close(together[b, :2], alone, rtol=0, atol=1e-6)
    with pytest.raises(AssertionError, match="2 generators for 3 windows"):
        perturb(history, 0.3, seeded(5, 6), spec)


def grid_spec(latitudes: list[float], longitudes: list[float]) -> DataSpec:
    return replace(small_spec(channels=1), latitudes=tuple(latitudes), longitudes=tuple(longitudes))


def spaced(first: float, step: float, count: int) -> list[float]:
    return [first + step * i for i in range(count)]


GRIDS = {
    "global": grid_spec(spaced(84.375, -11.25, 16), spaced(0, 11.25, 32)),
    "poles, odd width": grid_spec(spaced(-90, 15, 13), spaced(-180, 8, 45)),
    "region": grid_spec(spaced(15, 2.5, 17), spaced(70, 2.5, 21)),
    "uneven latitudes": grid_spec([60, 52, 40, 31, 30, 8], spaced(0, 30, 12)),
    "one column": grid_spec(spaced(-20, 10, 5), [100]),
}


def responses(spec: DataSpec, length: float) -> Tensor:
    """每个格点上放一个单位脉冲：(H·W 个脉冲, H, W)；噪声的协方差就是它们的内积，不靠抽样。"""
    impulses = torch.eye(spec.height * spec.width, dtype=torch.float64)
    return smooth_noise(impulses.unflatten(1, (spec.height, spec.width)), spec, length)


@pytest.mark.parametrize("length", [0.5, 10, 40, 500])
@pytest.mark.parametrize("name", GRIDS)
def test_smooth_noise_has_unit_variance_at_every_point(name: str, length: float) -> None:
    variance = responses(GRIDS[name], length).square().sum(0)  # (H, W)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "row", "length"), [("global", 8, 20.0), ("region", 8, 6.0)])
def test_smooth_noise_is_correlated_over_the_length(name: str, row: int, length: float) -> None:
    """从一点出发，沿经圈、沿纬圈的相关都是 exp(-d²/2L²)；区域网格取在中间，边上的核是截断的。"""
    spec = GRIDS[name]
    found = responses(spec, length)
    column = spec.width // 2
    correlation = torch.einsum("nhw,n->hw", found, found[:, row, column])
    near = [abs(value - spec.latitudes[row]) < 2 * length for value in spec.latitudes]
    for h in range(spec.height):
        away = spec.latitudes[h] - spec.latitudes[row]
        if near[h]:
            assert correlation[h, column].item() == pytest.approx(math.exp(-((away / length) ** 2) / 2), abs=0.03)
    shrink = math.cos(math.radians(spec.latitudes[row]))
    for w in range(spec.width):
        away = (spec.longitudes[w] - spec.longitudes[column]) * shrink
        if abs(away) < 2 * length:
            assert correlation[row, w].item() == pytest.approx(math.exp(-((away / length) ** 2) / 2), abs=0.03)


def test_zonal_correlation_widens_towards_the_pole() -> None:
    spec = GRIDS["poles, odd width"]
    found = responses(spec, 20.0)
    neighbour = (found[:, :, 0] * found[:, :, 1]).sum(0)  # (H,) 同一纬圈相邻两点
    opposite = (found[:, :, 0] * found[:, :, 22]).sum(0)
    assert (neighbour[:6].diff() < 0).all() and (neighbour[7:].diff() > 0).all()  # 赤道最小
    torch.testing.assert_close(neighbour, neighbour.flip(0))
    assert opposite[0] > 0.9 and abs(opposite[6]) < 0.01  # 极点上一圈几乎是同一个值


def test_noise_has_no_seam_around_the_globe() -> None:
    for name in ("global", "poles, odd width"):
        spec = GRIDS[name]
        assert spec.closes_circle
        found = responses(spec, 20.0)
        pairs = (found * found.roll(-1, 2)).sum(0)  # 与东边一格的协方差，末列的东边是首列
        torch.testing.assert_close(pairs, pairs[:, :1].expand_as(pairs))
    region = GRIDS["region"]
    assert not region.closes_circle and not GRIDS["one column"].closes_circle
    found = responses(region, 6.0)
    assert (found[:, 8, 0] * found[:, 8, -1]).sum().abs() < 1e-6


def test_smooth_noise_in_samples() -> None:
    """抽样核对：每个纬度的标准差、相邻点的相关、成员之间无关。"""
    spec = GRIDS["global"]
    history = torch.zeros(1, 4, 5, spec.height, spec.width)
    noise = perturb(history, 0.2, seeded(*range(52)), spec, 20.0)[1:]  # (51, 4, 5, H, W)
    flat = noise.flatten(0, 2)  # (1020, H, W) 个独立的场
    torch.testing.assert_close(flat.square().mean((0, 2)).sqrt(), torch.full((spec.height,), 0.2), rtol=0.12, atol=0)
    for away in (1, 2, 3):
        pairs = (flat[:, 8:, :] * flat[:, 8:, :].roll(away, 2)).mean((0, 2)) / 0.04
        expected = math.exp(-((11.25 * away * math.cos(math.radians(5.625)) / 20) ** 2) / 2)
        assert pairs[0].item() == pytest.approx(expected, abs=0.05)
    products = (flat.flatten(1) @ flat.flatten(1).T).double() / 0.04  # 成员、帧、通道两两的内积
    products = products[~torch.eye(len(flat), dtype=torch.bool)]
    found = responses(spec, 20.0).flatten(1)
    assert products.square().mean().sqrt().item() == pytest.approx((found.T @ found).norm().item(), rel=0.1)
    assert abs(products.mean()) < 0.01 * (found.T @ found).norm()  # 两帧若是同一个噪声，均值就是 0.015 倍
