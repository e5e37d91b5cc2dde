"""集合的三种评分，同写开的循环与数值积分相比。"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from tests.util.scores.test_metrics import fields, weights_of
from util.scores.metrics import pair_statistics
from util.verification.members import choose_places, energy_score, tail_crps, tail_weights, variogram_score

SHAPE = (2, 3, 4, 5)


def cases(members: int) -> tuple[torch.Tensor, torch.Tensor]:
    truth, *rest = fields(SHAPE, members + 1)
    return torch.stack(rest, 1), truth


@pytest.mark.parametrize("members", [1, 2, 7])
def test_tail_crps_is_the_integral_over_the_quantiles(members: int) -> None:
    forecast, truth = cases(members)
    found = tail_crps(forecast, truth, weights_of(SHAPE[-2]))
    weights = weights_of(SHAPE[-2]).numpy() / (SHAPE[-2] * SHAPE[-1])
    tails = {"upper": lambda a: a**2, "lower": lambda a: (1 - a) ** 2}
    for name, v in tails.items():
        expected = 0.0
        for i, j in np.ndindex(*SHAPE[2:]):
            x, y = np.sort(forecast[1, :, 2, i, j].numpy()).astype(float), float(truth[1, 2, i, j])
            for k in range(members):
                part = quad(
                    lambda a, k=k, x=x, y=y, v=v: 2 * ((y <= x[k]) - a) * (x[k] - y) * v(a),
                    k / members,
                    (k + 1) / members,
                )
                expected += weights[i] * part[0]
        assert float(found[name][1, 2]) == pytest.approx(expected, rel=1e-5)


def test_both_tails_and_the_middle_make_the_plain_crps() -> None:
    """α² + (1 − α)² + 2 α (1 − α) = 1；两尾的系数在对称的集合上相同。"""
    table = tail_weights(6)
    np.testing.assert_allclose(table["upper"], table["lower"][::-1, ::-1], rtol=1e-14)
    assert table["upper"].sum() == pytest.approx(2 / 3)  # ∫ 2 (1 − α + α) α²


@pytest.mark.parametrize("members", [1, 2, 5])
def test_energy_score_is_a_loop_over_pairs(members: int) -> None:
    forecast, truth = cases(members)
    weights = weights_of(SHAPE[-2])
    found = energy_score(forecast, truth, weights)
    area = weights.numpy()[:, None] / (SHAPE[-2] * SHAPE[-1])

    def apart(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(np.sqrt(((one.double() - other.double()).numpy() ** 2 * area).sum()))

    for b, c in np.ndindex(*SHAPE[:2]):
        skill = np.mean([apart(forecast[b, m, c], truth[b, c]) for m in range(members)])
        pairs = [apart(forecast[b, m, c], forecast[b, n, c]) for m, n in itertools.combinations(range(members), 2)]
        expected = skill - (np.mean(pairs) / 2 if pairs else 0)
        assert float(found[b, c]) == pytest.approx(expected, rel=1e-6)


def test_energy_score_of_one_member_is_the_rmse_of_each_field() -> None:
    forecast, truth = cases(1)
    weights = weights_of(SHAPE[-2])
    square = pair_statistics({"m": forecast}, truth, truth, weights, torch.zeros(3, 0))["m"]["square"]
    np.testing.assert_allclose(energy_score(forecast, truth, weights), square.sqrt(), rtol=1e-6)


def test_variogram_score_is_a_loop_over_pairs_of_places() -> None:
    forecast, truth = cases(4)
    latitudes, longitudes = np.linspace(60, -60, SHAPE[2]), np.arange(SHAPE[3]) * 72.0
    places = choose_places(latitudes, longitudes, 9)
    rows, columns = places.rows.tolist(), places.columns.tolist()
    assert len({*zip(rows, columns, strict=True)}) == len(rows) <= 9
    inverse, gaps = [], []
    for (i, k), (j, m) in itertools.combinations(zip(rows, columns, strict=True), 2):
        phi, psi = np.deg2rad(latitudes[[i, j]])
        turn = np.deg2rad(longitudes[k] - longitudes[m])
        inverse.append(1 / np.arccos(np.sin(phi) * np.sin(psi) + np.cos(phi) * np.cos(psi) * np.cos(turn)))
        real = abs(float(truth[1, 2, i, k]) - float(truth[1, 2, j, m])) ** 0.5
        made = [abs(float(x[2, i, k]) - float(x[2, j, m])) ** 0.5 for x in forecast[1]]
        gaps.append((real - np.mean(made)) ** 2)
    expected = np.dot(inverse, gaps) / np.sum(inverse)
    assert float(variogram_score(forecast, truth, places)[1, 2]) == pytest.approx(expected, rel=1e-6)


def test_places_are_spread_by_area() -> None:
    latitudes, longitudes = np.linspace(89, -89, 90), np.arange(180) * 2.0
    places = choose_places(latitudes, longitudes, 200)
    sine = np.sin(np.deg2rad(latitudes[places.rows]))
    counts, _ = np.histogram(sine, 4, (-1, 1))
    assert len(sine) > 195 and counts.min() > 45
    assert np.histogram(longitudes[places.columns], 4, (0, 360))[0].min() > 45
