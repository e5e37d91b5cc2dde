"""球谐谱：同 scipy 的球谐函数相比，Parseval；漂移的几个数同写开的相比。"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import torch

from tests.util.scores.test_metrics import fields, weights_of
from util.grid import latitude_weights
from util.verification.drift import lost_skill, moments, physical_moments, wind_pairs
from util.verification.sphere import analysis, effective_wavenumber, is_global, legendre, spherical_spectrum, truncation

GRIDS = {
    "cells": np.linspace(87.1875, -87.1875, 32),
    "both poles": np.linspace(90, -90, 33),
    "one pole": np.linspace(90, -90, 33)[:-1],
    "south to north": np.linspace(-87.1875, 87.1875, 32),
    "gaussian": np.rad2deg(np.arcsin(scipy.special.roots_legendre(24)[0])),
}


def harmonic(degree: int, order: int, latitudes: np.ndarray, longitudes: np.ndarray) -> np.ndarray:
    """scipy 的球谐函数（复数，∮ |Y|² dΩ = 1）。"""
    colatitude, azimuth = np.deg2rad(90 - latitudes)[:, None], np.deg2rad(longitudes)[None]
    return np.asarray(scipy.special.sph_harm_y(degree, order, colatitude, azimuth))


@pytest.mark.parametrize("name", GRIDS)
def test_band_limited_fields_give_back_the_power_of_each_degree(name: str) -> None:
    latitudes = GRIDS[name]
    longitudes = np.arange(64) * 5.625
    most, rng = truncation(latitudes, 64), np.random.default_rng(0)
    field, expected = np.full((len(latitudes), 64), 3.0), np.zeros(most)
    for degree in range(1, most + 1):
        for order in range(degree + 1):
            amplitude = (rng.standard_normal() + 1j * rng.standard_normal() * (order > 0)) / degree
            wave = amplitude * harmonic(degree, order, latitudes, longitudes)
            field += wave.real * (2 if order else 1)
            expected[degree - 1] += abs(amplitude) ** 2 * (2 if order else 1) / (4 * np.pi)
    found = spherical_spectrum(torch.tensor(field), tuple(latitudes))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_the_powers_sum_to_the_mean_square_of_a_smooth_field() -> None:
    latitudes = tuple(GRIDS["cells"])
    field = torch.tensor(np.sum([harmonic(n, n // 2, GRIDS["cells"], np.arange(64) * 5.625) for n in range(9)], 0).real)
    mean_square = float((field.square().mean(-1) * latitude_weights(latitudes)).mean())
    powers = spherical_spectrum(field.float(), latitudes)
    level = float(field.mean(-1) @ latitude_weights(latitudes)) / 32
    assert powers.dtype == torch.float64
    assert float(powers.sum()) + level**2 == pytest.approx(mean_square, rel=2e-3)  # 格子的面积是近似的求积


def test_legendre_functions_are_orthonormal_to_high_degree() -> None:
    sine, weights = scipy.special.roots_legendre(400)
    for order in (0, 7, 150):
        rows = legendre(order, 350, sine)
        np.testing.assert_allclose((rows * weights) @ rows.T, 2 * np.eye(len(rows)), atol=1e-9)


def test_only_a_whole_globe_has_a_spherical_spectrum() -> None:
    assert all(is_global(latitudes, True) for latitudes in GRIDS.values())
    assert not is_global(GRIDS["cells"], False)
    assert not is_global(np.linspace(70, 20, 30), True)


def test_effective_wavenumber_is_the_first_below_half() -> None:
    truth = np.array([8.0, 4.0, 2.0, 1.0, 1e-12])
    assert effective_wavenumber(truth * [1, 0.6, 0.49, 0.9, 0], truth) == 3
    assert effective_wavenumber(truth * 0.5, truth) is None
    assert effective_wavenumber(truth * [1, 1, 1, 1, 0], truth, floor=1e-8) is None


def test_moments_are_physical_means_variances_and_energy() -> None:
    shape, mean, std = (2, 3, 5, 6), 270.0, 12.0
    members = torch.stack(fields(shape, 3), 1)
    weights = weights_of(5)
    found = physical_moments(moments(members, weights)[:, 1].numpy(), mean, std)
    area = weights.numpy()[:, None] / 30
    values = members[:, :, 1].double().numpy() * std + mean
    average = (values * area).sum((-1, -2), keepdims=True)
    np.testing.assert_allclose(found["mean"], average.mean((1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(found["square"], (values**2 * area).sum((-1, -2)).mean(1), rtol=1e-6)
    np.testing.assert_allclose(found["variance"], ((values - average) ** 2 * area).sum((-1, -2)).mean(1), rtol=1e-5)


def test_winds_are_paired_and_skill_is_lost_at_the_first_lead() -> None:
    channels = ["u10", "v10", "t2m", "u_level_00", "u_level_01", "v_level_01"]
    assert wind_pairs(channels) == [("u10", "v10"), ("u_level_01", "v_level_01")]
    assert lost_skill([6, 12, 18, 24], [1, None, 3, 2], [2, 0, 3, 9]) == 18
    assert lost_skill([6], [1.0], [2.0]) is None


def test_orders_beyond_one_table_and_no_second_copy() -> None:
    """总波数 70 以内，纬向波数跨几张表；存的不过全部的六成多，同样的场再来时不再造。"""
    latitudes = np.linspace(90, -90, 91)
    most, longitudes = truncation(latitudes, 180), np.arange(180) * 2.0
    field, expected = np.zeros((91, 180)), np.zeros(most)
    for degree, order in ((1, 1), (31, 31), (40, 32), (70, 0), (70, 33), (70, 64), (88, 65), (89, 89)):
        field += (1 + (order > 0)) * np.real(harmonic(degree, order, latitudes, longitudes))
        expected[degree - 1] += (1 + (order > 0)) / (4 * np.pi)
    np.testing.assert_allclose(spherical_spectrum(torch.tensor(field), tuple(latitudes)), expected, atol=1e-9)
    tables = analysis(tuple(latitudes), 180, torch.float64, torch.device("cpu"))
    assert tables is analysis(tuple(latitudes), 180, torch.float64, torch.device("cpu"))
    assert sum(table.numel() for table in tables) < 0.7 * (most + 1) ** 2 * 91
