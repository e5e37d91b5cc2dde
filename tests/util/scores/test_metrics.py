"""纬度权重与 cos 的解析积分相比；确定性指标与 scores 包、写开的循环、scipy 的余弦变换相比。

形状由 hypothesis 选，边长从 1 起；集合的指标在 test_metrics_ensemble.py。
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.fft
import torch
import xarray
from hypothesis import given
from hypothesis import strategies as st
from scores import continuous

from util.grid import latitude_weights
from util.scores import metrics
from util.scores.metrics import IMAGE_RANGE, area_mean, pair_statistics, zonal_spectrum


def areas(bounds: list[float]) -> list[float]:
    """相邻两条界线之间 cos φ 的积分，除以平均。"""
    sines = [math.sin(math.radians(b)) for b in bounds]
    cells = [abs(b - a) for a, b in itertools.pairwise(sines)]
    return [cell * len(cells) / sum(cells) for cell in cells]


@pytest.mark.parametrize(
    ("latitudes", "bounds"),
    [
        ([67.5, 22.5, -22.5, -67.5], [90, 45, 0, -45, -90]),  # 格点在格子中央
        ([90, 60, 30, 0, -30, -60, -90], [90, 75, 45, 15, -15, -45, -75, -90]),  # 含两极：极点是半格
        ([20, 30, 40], [15, 25, 35, 45]),  # 区域
        ([80.0, 50.0, 20.0], [90, 65, 35, 5]),  # 外推半格会越过极点
        ([10, 12, 20], [9, 11, 16, 24]),  # 不等距
        ([45.0], [40, 50]),
    ],
)
def test_latitude_weights_are_areas(latitudes: list[float], bounds: list[float]) -> None:
    weights = latitude_weights(latitudes)
    assert weights.dtype == torch.float64
    np.testing.assert_allclose(weights.numpy(), areas(bounds), rtol=1e-12)
    np.testing.assert_allclose(latitude_weights(latitudes[::-1]).numpy(), weights.numpy()[::-1], rtol=1e-12)
    assert float(weights.mean()) == pytest.approx(1)


def test_latitude_weights_approach_cos_on_a_fine_global_grid() -> None:
    latitudes = np.linspace(89.5, -89.5, 180)
    cosine = np.cos(np.deg2rad(latitudes))
    np.testing.assert_allclose(latitude_weights(latitudes.tolist()).numpy(), cosine / cosine.mean(), rtol=1e-4)


SHAPES = st.tuples(*(st.integers(1, n) for n in (3, 3, 9, 10)))  # B、C、H、W


def weights_of(height: int) -> torch.Tensor:
    """从 70° 往南每 9° 一行，两端的权重不同。"""
    return latitude_weights((70 - 9 * np.arange(height)).tolist())


def fields(shape: tuple[int, ...], count: int, seed: int = 0) -> list[torch.Tensor]:
    """几组相关的随机场 float32：共同的部分加各自的噪声与偏差。"""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(shape)
    return [torch.tensor(common + 0.1 * i + rng.standard_normal(shape), dtype=torch.float32) for i in range(count)]


def labelled(values: torch.Tensor) -> xarray.DataArray:
    """最后四维是 pair、channel、latitude、longitude；再前面的一维是 member。"""
    dims = ["member", "pair", "channel", "latitude", "longitude"][-values.ndim :]
    return xarray.DataArray(values.double().numpy(), dims=dims)


def statistics_of(forecast: torch.Tensor, truth: torch.Tensor, normal: torch.Tensor) -> dict[str, np.ndarray]:
    thresholds = torch.zeros(truth.shape[1], 0)
    (found,) = pair_statistics(
        {"model": forecast[:, None]}, truth, normal, weights_of(truth.shape[-2]), thresholds
    ).values()
    assert {v.dtype for v in found.values()} == {torch.float64}
    assert {v.shape for v in found.values()} == {truth.shape[:2]}
    return {name: v.numpy() for name, v in found.items()}


@given(SHAPES)
def test_weights_sum_to_the_number_of_latitudes_and_area_mean_is_a_loop(shape: tuple[int, ...]) -> None:
    (field,) = fields(shape, 1)
    weights = weights_of(shape[-2])
    assert float(weights.sum()) == pytest.approx(shape[-2], rel=1e-12)
    expected = np.zeros(shape[:2])
    for place in np.ndindex(*shape):
        expected[place[:2]] += float(weights[place[2]]) * float(field[place]) / (shape[2] * shape[3])
    for values in (field, field.movedim(0, -1).contiguous().movedim(-1, 0)):  # 内存里的次序不影响结果
        mean = area_mean(values, weights)
        assert mean.dtype == torch.float64
        np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_area_mean_sums_in_float64_whatever_the_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    field = torch.full((2, 3, 40, 50), 0.1)
    field[1, 2, 3, 4] = 1e6
    whole = area_mean(field, torch.ones(40, dtype=torch.float64))
    np.testing.assert_allclose(whole.numpy(), field.double().mean((-2, -1)).numpy(), rtol=1e-14)
    monkeypatch.setattr(metrics, "PIECE", 60)
    torch.testing.assert_close(area_mean(field, torch.ones(40, dtype=torch.float64)), whole, rtol=1e-14, atol=0)
    assert area_mean(field[:0], torch.ones(40, dtype=torch.float64)).shape == (0, 3)


@given(SHAPES)
def test_errors_equal_the_scores_package(shape: tuple[int, ...]) -> None:
    forecast, truth, normal = fields(shape, 3)
    found = statistics_of(forecast, truth, normal)
    weights = xarray.DataArray(weights_of(shape[-2]).numpy(), dims="latitude")
    f, t, keep = labelled(forecast), labelled(truth), ["pair", "channel"]
    expected = {
        "square": continuous.rmse(f, t, preserve_dims=keep, weights=weights) ** 2,
        "absolute": continuous.mae(f, t, preserve_dims=keep, weights=weights),
        "error": continuous.additive_bias(f, t, preserve_dims=keep, weights=weights),
        "plain_square": continuous.mse(f, t, preserve_dims=keep),
        "plain_absolute": continuous.mae(f, t, preserve_dims=keep),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


@given(SHAPES)
def test_anomalies_and_activity_equal_a_loop(shape: tuple[int, ...]) -> None:
    forecast, truth, normal = fields(shape, 3)
    found = statistics_of(forecast, truth, normal)
    w = np.repeat(weights_of(shape[-2]).numpy(), shape[-1])
    for b, c in np.ndindex(*shape[:2]):
        f, t, n = (v[b, c].double().numpy().ravel() for v in (forecast, truth, normal))
        a_f, a_t = f - n, t - n
        expected = {
            "forecast_anomaly": sum(w * a_f * a_f) / sum(w),
            "truth_anomaly": sum(w * a_t * a_t) / sum(w),
            "anomaly_product": sum(w * a_f * a_t) / sum(w),
            "forecast_activity": np.cov(a_f, aweights=w, ddof=0),
            "truth_activity": np.cov(a_t, aweights=w, ddof=0),
        }
        for name, value in expected.items():
            assert found[name][b, c] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        acc = found["anomaly_product"] / np.sqrt(found["forecast_anomaly"] * found["truth_anomaly"])
        assert np.all(np.abs(acc) <= 1 + 1e-6)


def test_activity_of_a_shifted_field_does_not_drown_in_rounding() -> None:
    """整场偏离气候态很多时，方差仍是小的那个数，而且不为负。"""
    (field,) = fields((1, 2, 6, 8), 1)
    field[0, 1] = 0
    found = statistics_of(0.001 * field + 100, field, torch.zeros_like(field))
    np.testing.assert_allclose(found["forecast_activity"][0, 0], 1e-6 * found["truth_activity"][0, 0], rtol=2e-2)
    assert found["forecast_activity"][0, 1] == found["truth_activity"][0, 1] == 0


def ssim_loop(x: np.ndarray, y: np.ndarray, sides: tuple[int, int]) -> float:
    """逐窗写开（Wang et al. 2004, 式 13），图像范围 [0, 1]。"""
    values = []
    for i, j in np.ndindex(x.shape[0] - sides[0] + 1, x.shape[1] - sides[1] + 1):
        a, b = (v[i : i + sides[0], j : j + sides[1]].ravel() for v in (x, y))
        covariance = np.cov(a, b) if a.size > 1 else np.zeros((2, 2))
        light = (2 * a.mean() * b.mean() + 1e-4) / (a.mean() ** 2 + b.mean() ** 2 + 1e-4)
        values.append(light * (2 * covariance[0, 1] + 9e-4) / (covariance[0, 0] + covariance[1, 1] + 9e-4))
    return float(np.mean(values))


@given(SHAPES)
def test_ssim_equals_a_loop_over_windows(shape: tuple[int, ...]) -> None:
    forecast, truth, normal = fields(shape, 3)
    found = statistics_of(forecast, truth, normal)["ssim"]
    odd = {1: 1, 2: 1, 3: 3, 4: 3, 5: 5, 6: 5}
    sides = odd.get(shape[-2], 7), odd.get(shape[-1], 7)
    x, y = (v.double().numpy() / IMAGE_RANGE + 0.5 for v in (forecast, truth))
    expected = [[ssim_loop(x[b, c], y[b, c], sides) for c in range(shape[1])] for b in range(shape[0])]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(statistics_of(truth, truth, normal)["ssim"], 1, rtol=1e-12)


def test_ssim_of_a_forecast_that_blew_up_stays_within_its_bounds() -> None:
    (truth,) = fields((2, 1, 9, 9), 1)
    found = statistics_of(1e4 + 0 * truth, truth, truth)["ssim"]
    assert np.all(np.abs(found) <= 1)


@given(SHAPES)
def test_periodic_spectrum_equals_numpy_and_parseval(shape: tuple[int, ...]) -> None:
    (field,) = fields(shape, 1)
    weights = weights_of(shape[-2])
    width, count = shape[-1], shape[-1] // 2
    found = zonal_spectrum(field, weights, periodic=True).numpy()
    assert found.dtype == np.float64
    assert found.shape == (*shape[:2], count)
    expected = np.zeros((*shape[:2], width))
    zero = np.zeros(shape[:2])
    for b, c, i in np.ndindex(*shape[:3]):
        power = np.abs(np.fft.fft(field[b, c, i].double().numpy()) / width) ** 2 * float(weights[i]) / shape[2]
        expected[b, c] += power
        zero[b, c] += power[0]
    for k in range(1, count + 1):  # 双边谱：波数 k 与 −k；最短波时二者是同一个
        both = expected[..., k] + (expected[..., width - k] if 2 * k < width else 0)
        np.testing.assert_allclose(found[..., k - 1], both, rtol=1e-4, atol=1e-7)
    mean_square = area_mean(field.square(), weights).numpy()
    np.testing.assert_allclose(zero + found.sum(-1), mean_square, rtol=1e-5)


@given(SHAPES)
def test_regional_spectrum_equals_scipy_dct_and_parseval(shape: tuple[int, ...]) -> None:
    (field,) = fields(shape, 1)
    weights = weights_of(shape[-2])
    found = zonal_spectrum(field, weights, periodic=False).numpy()
    cosine = np.asarray(scipy.fft.dct(field.double().numpy(), type=2, norm="ortho"))
    expected = np.einsum("bchk,h->bck", cosine**2 / shape[-1], weights.numpy() / shape[-2])
    np.testing.assert_allclose(found, expected[..., 1:], rtol=1e-4, atol=1e-7)
    mean_square = area_mean(field.square(), weights).numpy()
    np.testing.assert_allclose(expected[..., 0] + found.sum(-1), mean_square, rtol=1e-5)


def test_spectrum_of_single_waves() -> None:
    longitude = np.arange(16) * 2 * np.pi / 16
    wave = torch.tensor(np.stack([3 * np.cos(2 * longitude), np.cos(8 * longitude)]), dtype=torch.float32)
    weights = torch.ones(1, dtype=torch.float64)
    found = zonal_spectrum(wave[:, None], weights, periodic=True).numpy()  # (2, 8)
    expected = np.zeros((2, 8))
    expected[0, 1], expected[1, 7] = 9 / 2, 1  # 最短波在格点上是 ±1，均方值是 1
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_spectrum_does_not_change_its_input() -> None:
    (field,) = fields((1, 1, 4, 6), 1)
    before = field.clone()
    for periodic in (True, False):
        zonal_spectrum(field, weights_of(4), periodic)
    assert torch.equal(field, before)


@pytest.mark.parametrize("spoiled", [0, 1, 2], ids=["forecast", "truth", "normal"])
def test_nan_is_not_hidden(spoiled: int) -> None:
    data = fields((2, 2, 5, 6), 3)
    data[spoiled][1, 0, 2, 3] = torch.nan
    found = statistics_of(*data)
    reached = {name for name, v in found.items() if np.isnan(v[1, 0])}
    uses_normal = {n for n in found if "anomaly" in n or "activity" in n}
    if spoiled == 0:
        assert reached == set(found) - {"truth_anomaly", "truth_activity"}
    elif spoiled == 1:
        assert reached == set(found) - {"forecast_anomaly", "forecast_activity"}
    else:
        assert reached == uses_normal
    for values in found.values():
        assert np.isfinite(values.ravel()[[0, 1, 3]]).all()  # 别的对不受影响
    spectrum = zonal_spectrum(data[spoiled], weights_of(5), periodic=True)
    assert torch.isnan(spectrum[1, 0]).all()
    assert not torch.isnan(spectrum[0]).any()
