"""纬度权重与 cos 的解析积分相比；逐批累加的误差与一次算完、与写开的循环相比。"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from util.metrics import ErrorSums, latitude_weights


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


def example(count: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    forecast, truth = torch.randn(2, count, 2, 3, 4, 5, generator=generator)
    valid = torch.rand(count, 2, 3, generator=generator) > 0.4
    valid[:, 1, 2] = False  # 一个时效的一个通道没有一个有效场
    return forecast, truth, valid, latitude_weights([60, 30, 0, -30])


def test_error_sums_equal_a_written_out_loop() -> None:
    forecast, truth, valid, weights = example(7)
    sums = ErrorSums(2, 3)
    sums.add(forecast, truth, valid, weights)
    f, t, w, std = forecast.numpy(), truth.numpy(), weights.numpy(), [1.0, 10.0, 0.1]
    plain = []
    for lead in range(2):
        for c in range(3):
            square = []
            for b in range(7):
                if valid[b, lead, c]:
                    error = (f[b, lead, c].astype(float) - t[b, lead, c]) ** 2
                    square.append(sum(w[i] * error[i, j] for i in range(4) for j in range(5)) / 20)
                    plain.append(error.mean())
            expected = math.sqrt(sum(square) / len(square)) * std[c] if square else math.nan
            assert sums.rmse(std)[lead, c].item() == pytest.approx(expected, rel=1e-6, nan_ok=True)
            assert sums.count[lead, c] == len(square)
    assert math.isnan(sums.rmse(std)[1, 2].item())
    assert sums.mse() == pytest.approx(np.mean(plain), rel=1e-6)


def test_streaming_equals_all_at_once_and_a_sum_over_processes() -> None:
    forecast, truth, valid, weights = example(7)
    whole, parts, other = ErrorSums(2, 3), ErrorSums(2, 3), ErrorSums(2, 3)
    whole.add(forecast, truth, valid, weights)
    for piece in (slice(0, 3), slice(3, 4)):
        parts.add(forecast[piece], truth[piece], valid[piece], weights)
    other.add(forecast[4:], truth[4:], valid[4:], weights)
    for mine, theirs in zip(parts.tensors(), other.tensors(), strict=True):
        mine += theirs
    for one, two in zip(parts.tensors(), whole.tensors(), strict=True):
        torch.testing.assert_close(one, two)
    assert parts.mse() == pytest.approx(whole.mse())
