"""事件的表与由它得来的评分，同 scores 包（二元、ROC、经济价值、Brier、FSS、SEEPS）与写开的循环相比。"""

from __future__ import annotations

import operator

import numpy as np
import pytest
import torch
import xarray
from scores.categorical import BasicContingencyManager, seeps
from scores.plotdata import relative_economic_value_from_rates, roc
from scores.probability import brier_score_for_ensemble
from scores.spatial import fss_2d_binary

from tests.util.scores.test_metrics import fields, labelled, weights_of
from util.verification.areas import mean_over
from util.verification.events import (
    brier_parts,
    categorical,
    economic_value,
    happens,
    joint_table,
    member_count,
    rates,
    reliability,
    roc_area,
)
from util.verification.neighbourhood import fraction_errors, fractions
from util.verification.precipitation import category, penalties
from util.verification.precipitation import seeps as our_seeps

SHAPE = (3, 2, 7, 8)  # B、C、H、W
THRESHOLD = torch.tensor(0.4)


def cases(members: int) -> tuple[torch.Tensor, torch.Tensor]:
    truth, *rest = fields(SHAPE, members + 1)
    return torch.stack(rest, 1), truth


def table_of(forecast: torch.Tensor, truth: torch.Tensor, above: bool = True) -> np.ndarray:
    count = member_count(forecast, THRESHOLD, above)
    real = happens(truth, THRESHOLD, above)
    return joint_table(count, real, forecast.shape[1], lambda field: mean_over(field, weights_of(SHAPE[-2]))).numpy()


@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.parametrize("above", [True, False])
def test_the_table_is_a_loop_over_cells(members: int, above: bool) -> None:
    forecast, truth = cases(members)
    weights = weights_of(SHAPE[-2]).numpy() / (SHAPE[-2] * SHAPE[-1])
    expected = np.zeros((*SHAPE[:2], members + 1, 2))
    for b, c, i, j in np.ndindex(*SHAPE):
        past = (lambda v: v > 0.4) if above else (lambda v: v < 0.4)
        said = sum(past(float(forecast[b, m, c, i, j])) for m in range(members))
        expected[b, c, said, int(past(float(truth[b, c, i, j])))] += weights[i]
    found = table_of(forecast, truth, above)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found.sum((-1, -2)), 1, rtol=1e-12)


def test_categorical_scores_equal_the_scores_package() -> None:
    table = table_of(*cases(1)).sum(0)  # (C, 2, 2)
    found = categorical(table)
    for c in range(SHAPE[1]):
        (quiet, missed), (false, hits) = table[c]
        counts = {"tp_count": hits, "tn_count": quiet, "fp_count": false, "fn_count": missed}
        oracle = BasicContingencyManager(
            {name: xarray.DataArray(value) for name, value in {**counts, "total_count": table[c].sum()}.items()}
        )
        assert found["csi"][c] == pytest.approx(float(oracle.critical_success_index()), rel=1e-12)
        assert found["ets"][c] == pytest.approx(float(oracle.equitable_threat_score()), rel=1e-12)
        assert found["sedi"][c] == pytest.approx(float(oracle.symmetric_extremal_dependence_index()), rel=1e-12)
        assert found["frequency_bias"][c] == pytest.approx(float(oracle.frequency_bias()), rel=1e-12)


def test_half_of_the_members_is_a_forecast_of_the_event() -> None:
    table = np.zeros((5, 2))  # 四个成员
    table[1], table[2], table[4] = [0.5, 0.1], [0.1, 0.1], [0.0, 0.2]
    found = categorical(table)
    assert found["csi"] == pytest.approx(0.3 / 0.5)
    never = categorical(np.array([[0.7, 0.3], [0.0, 0.0]]))
    assert never["csi"] == 0 and np.isnan(never["sedi"]) and never["frequency_bias"] == 0


@pytest.mark.parametrize("members", [1, 6])
def test_roc_and_its_area_equal_the_scores_package(members: int) -> None:
    forecast, truth = cases(members)
    table = table_of(forecast, truth).sum((0, 1))
    share = (labelled(forecast.movedim(1, 0)) > float(THRESHOLD)).mean("member")
    real = (labelled(truth) > float(THRESHOLD)).astype(float)
    weights = xarray.DataArray(weights_of(SHAPE[-2]).numpy(), dims="latitude")
    levels = [(k - 0.5) / members for k in range(1, members + 1)]
    oracle = roc(share, real, thresholds=[0.0, *levels], weights=weights)
    hit, false = rates(table)
    np.testing.assert_allclose(hit[1:-1], oracle["POD"].values[1:-1], rtol=1e-12)
    np.testing.assert_allclose(false[1:-1], oracle["POFD"].values[1:-1], rtol=1e-12)
    assert roc_area(table) == pytest.approx(float(oracle["AUC"]), rel=1e-12)
    assert (hit[0], false[0], hit[-1], false[-1]) == pytest.approx((1, 1, 0, 0))


def test_economic_value_is_the_best_of_the_scores_package() -> None:
    members = 4
    table = table_of(*cases(members)).sum((0, 1))
    ratios = np.array([0.1, 0.35, 0.5, 0.8])
    hit, false = rates(table)
    base = xarray.DataArray(table[:, 1].sum() / table.sum())
    every = relative_economic_value_from_rates(
        xarray.DataArray(hit[1:-1], dims="k"), xarray.DataArray(false[1:-1], dims="k"), base, ratios.tolist()
    )
    np.testing.assert_allclose(economic_value(table, ratios), every.max("k").values, rtol=1e-10)
    assert np.isnan(economic_value(np.array([[1.0, 0.0], [0.0, 0.0]]), ratios)).all()


def test_reliability_and_the_parts_of_the_brier_score() -> None:
    members = 5
    forecast, truth = cases(members)
    table = table_of(forecast, truth).sum((0, 1))
    probability, observed, share = reliability(table)
    weights = np.broadcast_to(weights_of(SHAPE[-2]).numpy()[:, None], SHAPE)
    said = (forecast > THRESHOLD).double().mean(1).numpy()
    real = (truth > THRESHOLD).numpy()
    for p, seen, part in zip(probability, observed, share, strict=True):
        here = np.isclose(said, p)
        assert part == pytest.approx(weights[here].sum() / weights.sum(), rel=1e-10)
        assert seen == pytest.approx((weights * real)[here].sum() / weights[here].sum(), rel=1e-10)
    oracle = brier_score_for_ensemble(
        labelled(forecast.movedim(1, 0)),
        labelled(truth),
        ensemble_member_dim="member",
        event_thresholds=[0.4],  # pyright: ignore[reportArgumentType]
        event_threshold_operator=operator.gt,
        fair_correction=False,
        weights=xarray.DataArray(weights_of(SHAPE[-2]).numpy(), dims="latitude"),
    )
    assert brier_parts(table)["brier"] == pytest.approx(float(oracle.squeeze()), rel=1e-6)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_fss_equals_the_scores_package(size: int) -> None:
    forecast, truth = (one[:, :1] > THRESHOLD for one in fields(SHAPE, 2))
    windows = [fractions(one, 1, size, periodic=False) for one in (forecast, truth)]
    errors = fraction_errors(windows[0], windows[1], torch.ones(SHAPE[-2]).double()).sum((0, 1)).numpy()
    made, real = (xarray.DataArray(one[:, 0].numpy(), dims=["pair", "y", "x"]) for one in (forecast, truth))
    oracle = fss_2d_binary(made, real, window_size=(size, size), spatial_dims=("y", "x"))
    assert 1 - errors[0] / errors[1] == pytest.approx(float(oracle), rel=1e-6)


def test_fss_goes_around_the_globe_weighs_by_area_and_takes_shares_of_members() -> None:
    (field,) = fields(SHAPE, 1)
    size, count = 3, (field.abs() * 2).round()  # 0、1、2……个成员
    few, many = (fractions(count, members, size, periodic=True) for members in (8, 100))  # 一个字节的加，单精度的加
    np.testing.assert_allclose(few * 8, many * 100, rtol=1e-6)
    found = many * 100
    assert found.shape == (*SHAPE[:2], SHAPE[-2] - 2, SHAPE[-1])
    for i, j in ((0, 0), (2, SHAPE[-1] - 1)):
        window = [[float(count[1, 0, i + y, (j + x) % SHAPE[-1]]) for x in range(3)] for y in range(3)]
        assert float(found[1, 0, i, j]) == pytest.approx(np.mean(window), rel=1e-6)
    weights = weights_of(SHAPE[-2])
    errors = fraction_errors(found, torch.zeros_like(found), weights)
    inside = weights[1:-1, None] / weights[1:-1].sum() / SHAPE[-1]
    np.testing.assert_allclose(errors[..., 0], (found.double().square() * inside).sum((-1, -2)), rtol=1e-6)


def test_seeps_equals_the_scores_package() -> None:
    rng = np.random.default_rng(1)
    amounts = rng.gamma(0.4, 4, (2, 5, 7, 8))  # 毫米
    dry = rng.uniform(0.05, 0.95, (7, 8))  # 有的在 [0.1, 0.85] 之外
    heavy = rng.uniform(1, 6, (7, 8))
    weights = weights_of(7)
    said, seen = (category(torch.tensor(one), torch.tensor(0.25), torch.tensor(heavy)) for one in amounts)
    found = our_seeps(said, seen, penalties(torch.tensor(dry)), weights)
    made, real = (xarray.DataArray(one, dims=["pair", "latitude", "longitude"]) for one in amounts)
    chance, limit = (xarray.DataArray(one, dims=["latitude", "longitude"]) for one in (dry, heavy))
    area = xarray.DataArray(weights.numpy(), dims="latitude")
    oracle = seeps(made, real, chance, limit, dry_light_threshold=0.25, preserve_dims="pair", weights=area)
    np.testing.assert_allclose(found, oracle.values, rtol=1e-9)


@pytest.mark.parametrize("forecast", [0, 1, 2])
def test_a_constant_forecast_scores_one_on_seeps(forecast: int) -> None:
    for p in (0.2, 0.5, 0.8):
        chances = np.array([p, 2 * (1 - p) / 3, (1 - p) / 3])
        row = penalties(torch.full((1, 1), p, dtype=torch.float64)).view(3, 3)[forecast].numpy()
        assert row @ chances == pytest.approx(1, rel=1e-12)
