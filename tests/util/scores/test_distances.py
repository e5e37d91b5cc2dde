"""训练用的距离：与逐点写开的循环、NumPy、torch 的相同；求得了导，成员重合时也是。"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scores.probability import crps_for_ensemble
from torch import Tensor
from xarray import DataArray

from util.grid import latitude_weights
from util.scores.distances import ALPHA, DISTANCES, Grid
from util.training_config import DISTANCES as NAMES

H, W = 5, 8
AREA = latitude_weights([75.0, 45.0, 15.0, -15.0, -45.0]).float()
GRIDS = {"plain": Grid(), "area": Grid(AREA), "regional": Grid(AREA, circular=False)}


def fields(members: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(B, M, T, C, H, W) 与 (B, T, C, H, W)，双精度。"""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(2, *shape, 2, 3, H, W, generator=generator, dtype=torch.float64) for shape in ((members,), ())]
    return draw[0], draw[1]


def weights(grid: Grid) -> np.ndarray:
    """(H,)，和为 1。"""
    return np.full(H, 1 / H) if grid.area is None else grid.area.double().numpy() / H


def written_out(name: str, made: np.ndarray, truth: np.ndarray, grid: Grid) -> float:
    """一个成员 (H, W) 的距离，一个点一个点地算。"""
    rows, total = weights(grid), 0.0
    if name == "amse":
        return amse(made, truth, rows)
    for i in range(H):
        for j in range(W):
            error = abs(made[i, j] - truth[i, j])
            share = rows[i] / W
            if name == "mse":
                total += share * error**2
            elif name == "mae":
                total += share * error
            elif name == "huber":
                total += share * (error**2 / 2 if error < 1 else error - 0.5)
            else:
                signed = made - truth
                if grid.circular or j < W - 1:
                    columns = W if grid.circular else W - 1
                    total += rows[i] / columns * abs(signed[i, (j + 1) % W] - signed[i, j])
                if i < H - 1:
                    total += (rows[i] + rows[i + 1]) / 2 * H / (H - 1) / W * abs(signed[i + 1, j] - signed[i, j])
    return total


def amse(made: np.ndarray, truth: np.ndarray, rows: np.ndarray) -> float:
    """各波数的功率与互谱由两边的 FFT 得来，不用 rfft。"""
    x, y = np.fft.fft(made, axis=-1) / W, np.fft.fft(truth, axis=-1) / W  # (H, W)
    total = 0.0
    for k in range(W // 2 + 1):
        both = [k] if k in (0, W // 2) else [k, W - k]
        power = [sum((rows * np.abs(f[:, m]) ** 2).sum() for m in both) for f in (x, y)]
        cross = sum((rows * (x[:, m] * y[:, m].conj()).real).sum() for m in both)
        coherence = cross / np.sqrt(power[0] * power[1])
        total += (np.sqrt(power[0]) - np.sqrt(power[1])) ** 2 + 2 * max(power) * (1 - coherence)
    return total


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("name", ["mse", "mae", "huber", "gradient", "amse"])
def test_a_distance_is_the_written_out_one(name: str, grid: Grid) -> None:
    made, truth = fields(members=2)
    found = DISTANCES[name](made, truth, grid)
    for b, t, c in np.ndindex(*found.shape):
        each = [written_out(name, made[b, m, t, c].numpy(), truth[b, t, c].numpy(), grid) for m in range(2)]
        assert found[b, t, c].item() == pytest.approx(np.mean(each), rel=1e-5)


def test_amse_is_the_squared_error_where_only_the_phase_is_wrong_and_more_where_it_is_smooth() -> None:
    """一样强而移开的波：平方误差；缩成一半、相位全对的：振幅之差的平方。"""
    _, truth = fields(1)
    moved = truth.roll(2, -1)[:, None]
    torch.testing.assert_close(DISTANCES["amse"](moved, truth, Grid()), DISTANCES["mse"](moved, truth, Grid()))
    assert DISTANCES["amse"](truth[:, None], truth, Grid()).abs().max() < 1e-5
    half = DISTANCES["amse"](truth[:, None] / 2, truth, Grid())
    torch.testing.assert_close(half, truth.square().mean((-2, -1)) / 4, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("members", [2, 3, 5])
def test_crps_mixes_the_fair_and_the_plain_one(members: int) -> None:
    made, truth = fields(members)
    names = ("b", "m", "t", "c", "h", "w")
    ensemble, observed = DataArray(made.numpy(), dims=names), DataArray(truth.numpy(), dims=(names[0], *names[2:]))
    kept = {
        kind: crps_for_ensemble(ensemble, observed, "m", method=kind, preserve_dims="all") for kind in ("fair", "ecdf")
    }
    points = (ALPHA * kept["fair"] + (1 - ALPHA) * kept["ecdf"]).transpose("b", "t", "c", "h", "w").to_numpy()
    for grid in (Grid(), Grid(AREA)):
        expected = (points * weights(grid)[:, None] / W).sum((-2, -1))
        np.testing.assert_allclose(DISTANCES["crps"](made, truth, grid).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("grid", [Grid(), Grid(AREA)])
def test_energy_is_the_written_out_one(grid: Grid) -> None:
    made, truth = fields(3)
    found, rows = DISTANCES["energy"](made, truth, grid), weights(grid)

    def apart(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.sqrt((rows[:, None] / W * (one - other) ** 2).sum()))

    for b, t, c in np.ndindex(*found.shape):
        drawn, seen = made[b, :, t, c].numpy(), truth[b, t, c].numpy()
        skill = np.mean([apart(member, seen) for member in drawn])
        pairs = sum(apart(one, other) for one in drawn for other in drawn)
        spread = ALPHA * pairs / (2 * 3 * 2) + (1 - ALPHA) * pairs / (2 * 9)
        assert found[b, t, c].item() == pytest.approx(skill - spread, rel=1e-5)


def test_one_member_has_no_spread() -> None:
    made, truth = fields(1)
    assert torch.equal(DISTANCES["crps"](made, truth, Grid(AREA)), DISTANCES["mae"](made, truth, Grid(AREA)))
    torch.testing.assert_close(DISTANCES["energy"](made, truth, Grid()), DISTANCES["mse"](made, truth, Grid()).sqrt())


@pytest.mark.parametrize("name", DISTANCES)
def test_gradients_are_finite_where_members_meet(name: str) -> None:
    _, truth = fields(1)
    made = truth[:, None].repeat(1, 2, 1, 1, 1, 1).requires_grad_()  # 两个成员与目标都重合
    DISTANCES[name](made, truth, Grid(AREA)).sum().backward()
    assert made.grad is not None and made.grad.isfinite().all()


@pytest.mark.parametrize("name", DISTANCES)
def test_derivatives_are_those_of_finite_differences(name: str) -> None:
    made, truth = fields(2)
    made = made[:1, :, :1, :1].requires_grad_()
    assert torch.autograd.gradcheck(lambda m: DISTANCES[name](m, truth[:1, :1, :1], Grid(AREA)), made, atol=1e-4)


def test_the_config_knows_every_distance() -> None:
    assert set(NAMES) == set(DISTANCES)
