"""集合的指标与 scores 包（公平的 CRPS、Brier、名次直方图）相比，与正态分布的解析值相比。

最后是构造出来的、本来就校准的集合：离散度等于误差、名次直方图平坦、CRPS 与成员数无关。
"""

from __future__ import annotations

import itertools
import math
import operator
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from hypothesis import given
from hypothesis import strategies as st
from scores import continuous, probability

from tests.util.scores.test_metrics import fields, labelled, weights_of
from util.scores import metrics
from util.scores.metrics import area_mean, comparators, pair_statistics, rank_counts, sort_members, zonal_spectrum

KEEP = ["pair", "channel"]
SHAPES = st.tuples(*(st.integers(1, n) for n in (3, 3, 5, 6)))  # B、C、H、W
MEMBERS = st.integers(2, 13)


def ensemble(shape: tuple[int, ...], members: int, rounded: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """成员 (B, M, C, H, W) 与实况 (B, C, H, W)；rounded 时只取整数值，成员与实况常常相等。"""
    truth, *rest = fields(shape, members + 1)
    forecast = torch.stack(rest, 1)
    return (forecast.round(), truth.round()) if rounded else (forecast, truth)


def of_one(forecast: torch.Tensor, *others: torch.Tensor) -> dict[str, torch.Tensor]:
    """只有一个模型的 pair_statistics。"""
    return pair_statistics({"model": forecast}, *others)["model"]


def statistics_of(forecast: torch.Tensor, truth: torch.Tensor, thresholds: list[float]) -> dict[str, torch.Tensor]:
    """各通道用同样的阈值；气候态是零。"""
    table = torch.tensor(thresholds).expand(truth.shape[1], -1)
    found = of_one(forecast, truth, torch.zeros_like(truth), weights_of(truth.shape[-2]), table)
    assert {v.dtype for v in found.values()} == {torch.float64}
    assert {v.shape for v in found.values()} == {truth.shape[:2]}
    return found


def as_scores_wants(forecast: torch.Tensor, truth: torch.Tensor) -> tuple[xarray.DataArray, ...]:
    """成员、实况、纬度权重，带维名。"""
    weights = xarray.DataArray(weights_of(truth.shape[-2]).numpy(), dims="latitude")
    return labelled(forecast.movedim(1, 0)), labelled(truth), weights


@given(SHAPES, MEMBERS, st.booleans())
def test_crps_is_the_fair_one_of_the_scores_package(shape: tuple[int, ...], members: int, rounded: bool) -> None:
    forecast, truth = ensemble(shape, members, rounded)
    found = statistics_of(forecast, truth, [])["crps"]
    f, t, weights = as_scores_wants(forecast, truth)
    fair = probability.crps_for_ensemble(f, t, "member", method="fair", preserve_dims=KEEP, weights=weights)
    np.testing.assert_allclose(found.numpy(), np.asarray(fair), rtol=1e-5, atol=1e-6)


@given(SHAPES)
def test_crps_of_one_member_is_the_mean_absolute_error(shape: tuple[int, ...]) -> None:
    forecast, truth = ensemble(shape, 1)
    found = statistics_of(forecast, truth, [0.0])
    assert torch.equal(found["crps"], found["absolute"])
    assert "variance" not in found
    f, t, weights = as_scores_wants(forecast, truth)
    mae = continuous.mae(f.isel(member=0), t, preserve_dims=KEEP, weights=weights)
    np.testing.assert_allclose(found["crps"].numpy(), np.asarray(mae), rtol=1e-5)


@given(SHAPES, MEMBERS)
def test_mean_variance_and_activity_equal_numpy(shape: tuple[int, ...], members: int) -> None:
    forecast, truth = ensemble(shape, members)
    found = statistics_of(forecast, truth, [])
    f, t = forecast.double().numpy(), truth.double().numpy()
    w = weights_of(shape[2]).numpy()
    w = np.repeat(w / w.sum() / shape[3], shape[3]).reshape(shape[2:])
    square = (w * (f.mean(1) - t) ** 2).sum((-2, -1))
    variance = (w * f.var(1, ddof=1)).sum((-2, -1))
    deviation = f - (w * f).sum((-2, -1), keepdims=True)
    np.testing.assert_allclose(found["square"], square, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found["variance"], variance, rtol=1e-5)
    activity = (w * deviation**2).sum((-2, -1)).mean(1)  # 各成员的平均，不是集合平均的
    np.testing.assert_allclose(found["forecast_activity"], activity, rtol=1e-5, atol=1e-7)


@given(SHAPES, st.integers(1, 13), st.booleans())
def test_brier_score_equals_the_scores_package(shape: tuple[int, ...], members: int, rounded: bool) -> None:
    forecast, truth = ensemble(shape, members, rounded)
    thresholds: list[Any] = [-0.5, 0.0, 1.0]  # 取整的场里有恰好等于阈值的：不算超过
    found = statistics_of(forecast, truth, thresholds)
    f, t, weights = as_scores_wants(forecast, truth)
    options: dict[str, Any] = {"fair_correction": False, "event_threshold_operator": operator.gt, "weights": weights}
    expected = probability.brier_score_for_ensemble(f, t, "member", thresholds, preserve_dims=KEEP, **options)
    for k, values in enumerate(np.moveaxis(np.asarray(expected.transpose(*KEEP, "threshold")), -1, 0)):
        np.testing.assert_allclose(found[f"brier_{k}"], values, rtol=1e-6, atol=1e-7)


def test_channels_without_a_threshold_have_no_brier_score() -> None:
    forecast, truth = ensemble((2, 2, 3, 4), 3)
    thresholds = torch.tensor([[0.0, 1.0], [0.5, torch.nan]])
    found = of_one(forecast, truth, truth, weights_of(3), thresholds)
    assert torch.isfinite(found["brier_0"]).all() and torch.isfinite(found["brier_1"][:, 0]).all()
    assert torch.isnan(found["brier_1"][:, 1]).all()
    assert "brier_2" not in found
    assert torch.equal(found["brier_0"][:, 1], statistics_of(forecast, truth, [0.5])["brier_0"][:, 1])


@given(SHAPES, st.integers(1, 13), st.booleans())
def test_rank_counts_equal_the_scores_package(shape: tuple[int, ...], members: int, rounded: bool) -> None:
    forecast, truth = ensemble(shape, members, rounded)
    found = rank_counts(forecast, truth, weights_of(shape[2]))
    assert found.dtype == torch.float64 and found.shape == (*shape[:2], members + 1)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-12)
    f, t, weights = as_scores_wants(forecast, truth)
    expected = probability.rank_histogram(f, t, "member", preserve_dims=KEEP, weights=weights)
    np.testing.assert_allclose(found.numpy(), expected.transpose(*KEEP, "rank"), rtol=1e-9, atol=1e-12)


def test_rank_counts_equal_a_written_out_loop_with_ties() -> None:
    forecast, truth = ensemble((2, 2, 3, 5), 4, rounded=True)
    forecast[0, :, 0], truth[0, 0] = 0.0, 0.0  # 全都相等：五档平分
    weights = weights_of(3).numpy()
    expected = np.zeros((2, 2, 5))
    for b, c, i, j in np.ndindex(*truth.shape):
        members = forecast[b, :, c, i, j].tolist()
        value = float(truth[b, c, i, j])
        ranks = [k for k in range(5) if sum(m < value for m in members) <= k <= sum(m <= value for m in members)]
        for k in ranks:
            expected[b, c, k] += weights[i] / 15 / len(ranks)
    np.testing.assert_allclose(rank_counts(forecast, truth, weights_of(3)).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(expected[0, 0], 1 / 5)


@pytest.mark.parametrize("members", range(1, 13))
def test_sorting_network_sorts_everything(members: int) -> None:
    """只由比较交换组成的网络，排好一切 0/1 的序列就排好一切序列（Knuth, TAOCP 5.3.4, 零一原理）。"""
    values = torch.tensor(list(itertools.product([0.0, 1.0], repeat=members))).T  # (M, 2^M)
    assert torch.equal(torch.stack(sort_members(list(values))), values.sort(0).values)


@pytest.mark.parametrize("members", [16, 31, 50, 101])
def test_sorting_network_of_many_members(members: int) -> None:
    values = torch.randn(members, 300, generator=torch.Generator().manual_seed(members)).mul(3).round()
    assert torch.equal(torch.stack(sort_members(list(values))), values.sort(0).values)


@pytest.mark.parametrize("power", [1, 2, 3, 4, 5])
def test_sorting_network_has_no_needless_comparisons(power: int) -> None:
    """2^p 个数的次数见 Knuth, TAOCP 5.3.4。"""
    assert len(list(comparators(2**power))) == (power * power - power + 4) * 2**power // 4 - 1


@pytest.mark.parametrize("spoiled", ["forecast", "truth"])
def test_nan_is_not_hidden(spoiled: str) -> None:
    forecast, truth = ensemble((2, 2, 3, 4), 5)
    if spoiled == "forecast":
        forecast[1, 3, 0, 2, 1] = torch.nan
    else:
        truth[1, 0, 2, 1] = torch.nan
    found = statistics_of(forecast, truth, [0.0]) | {"ranks": rank_counts(forecast, truth, weights_of(3))}
    reached = {name for name, v in found.items() if torch.isnan(v[1, 0]).all()}
    untouched = {"truth_anomaly", "truth_activity"}
    if spoiled == "truth":
        untouched = {"forecast_anomaly", "forecast_activity", "variance"}
    assert reached == set(found) - untouched
    for values in found.values():
        assert torch.isfinite(values.flatten(0, 1)[[0, 1, 3]]).all()


@pytest.mark.parametrize("members", [1, 6])
def test_streaming_in_pieces_equals_all_at_once(members: int, monkeypatch: pytest.MonkeyPatch) -> None:
    forecast, truth = ensemble((7, 2, 5, 9), members, rounded=True)
    weights = weights_of(5)

    def everything(part: slice) -> dict[str, torch.Tensor]:
        spectrum = zonal_spectrum(forecast[part].mean(1), weights, periodic=True)
        ranks = rank_counts(forecast[part], truth[part], weights)
        return statistics_of(forecast[part], truth[part], [0.0, 1.0]) | {"spectrum": spectrum, "ranks": ranks}

    whole = everything(slice(None))
    parts = [everything(part) for part in (slice(0, 3), slice(3, 4), slice(4, 7))]
    for name, values in whole.items():
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), values, rtol=1e-12, atol=1e-15)
    for piece in (100, 50):  # 函数自己分段，一段两个通道或一个，也是同样的数
        monkeypatch.setattr(metrics, "PIECE", piece)
        small = everything(slice(None))
        for name, values in whole.items():
            torch.testing.assert_close(small[name], values, rtol=1e-12, atol=1e-15)


def test_models_beside_one_another_do_not_mix() -> None:
    """与真值有关的一半几个模型共用：各自的数与单独算的逐位相同，哪一个在前都一样。"""
    forecast, truth = ensemble((3, 2, 9, 12), 4)
    models = {"many": forecast, "one": forecast[:, :1], "blown up": forecast[:, 1:2] * 1e4}
    normal, weights, thresholds = forecast[:, 3], weights_of(9), torch.zeros(2, 1)
    together = pair_statistics(models, truth, normal, weights, thresholds)
    backwards = pair_statistics(dict(reversed(models.items())), truth, normal, weights, thresholds)
    for name, one in models.items():
        alone = of_one(one, truth, normal, weights, thresholds)
        assert list(alone) == list(together[name])
        for key, values in alone.items():
            assert torch.equal(values, together[name][key]) and torch.equal(values, backwards[name][key]), (name, key)


def calibrated(members: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """实况与成员从同一个正态分布里抽，分布的中心逐点不同；spread 不为 1 时成员的离散度不对。"""
    generator = torch.Generator().manual_seed(members)
    centre = torch.randn(10, 1, 2, 60, 60, generator=generator)
    draws = torch.randn(10, members + 1, 2, 60, 60, generator=generator)
    return centre + spread * draws[:, 1:], (centre + draws[:, :1])[:, 0]


def spread_skill(forecast: torch.Tensor, truth: torch.Tensor) -> float:
    """√((M + 1) / M)·离散度 / 均方根误差（Fortin et al. 2014），先平均后开方。"""
    found = of_one(forecast, truth, truth, torch.ones(60, dtype=torch.float64), torch.zeros(2, 0))
    members = forecast.shape[1]
    return math.sqrt((members + 1) / members * float(found["variance"].mean() / found["square"].mean()))


@pytest.mark.parametrize("members", [2, 5, 9])
def test_calibrated_ensemble(members: int) -> None:
    """72,000 个独立的点，各容差约是五倍的抽样误差。"""
    forecast, truth = calibrated(members)
    weights = torch.ones(60, dtype=torch.float64)
    assert spread_skill(forecast, truth) == pytest.approx(1, abs=0.02)
    assert spread_skill(*calibrated(members, spread=0.5)) < 0.8
    bins = rank_counts(forecast, truth, weights).mean((0, 1)) * (members + 1)
    np.testing.assert_allclose(bins, 1, atol=5 * math.sqrt(members / truth.numel()))
    crps = of_one(forecast, truth, truth, weights, torch.zeros(2, 0))["crps"].mean()
    assert float(crps) == pytest.approx(1 / math.sqrt(math.pi), rel=0.02)  # 与成员数无关：σ / √π


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("members", [1, 4])
def test_cuda_equals_cpu(members: int) -> None:
    forecast, truth = ensemble((3, 2, 9, 16), members, rounded=True)
    thresholds = torch.zeros(2, 1)
    host = (forecast, truth, weights_of(9))
    card = tuple(v.cuda() for v in host)
    pairs = [of_one(f, t, t, w, thresholds.to(w.device)) for f, t, w in (host, card)]
    for name, values in pairs[0].items():
        torch.testing.assert_close(pairs[1][name].cpu(), values, rtol=1e-5, atol=1e-6)
    for function in (rank_counts, lambda f, t, w: zonal_spectrum(t, w, False), lambda f, t, w: area_mean(t, w)):
        torch.testing.assert_close(function(*card).cpu(), function(*host), rtol=1e-5, atol=1e-6)
