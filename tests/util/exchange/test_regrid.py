"""换网格：与写开的循环、xarray 的 interp 比；守恒、常数、线性场、周期、方向、缺测。"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import xarray as xr

from util.config import Axis
from util.exchange.regrid import Target, make_regridder

GAUSSIAN = np.degrees(np.arcsin(np.polynomial.legendre.leggauss(16)[0]))
GLOBE = (np.linspace(90, -90, 19), np.arange(36) * 10.0)  # 两极各一行
TARGET = Axis(first=-78.75, step=22.5, count=8), Axis(first=11.25, step=22.5, count=16)


def edges_of(centres: list[float]) -> list[float]:
    """正中为边，两端外推，越过极点的截断；只用于纬度。"""
    middle = [(a + b) / 2 for a, b in itertools.pairwise(centres)]
    first, last = 2 * centres[0] - middle[0], 2 * centres[-1] - middle[-1]
    return [max(-90.0, min(90.0, edge)) for edge in (first, *middle, last)]


def overlap_of_longitudes(a: tuple[float, float], b: tuple[float, float]) -> float:
    """两段经度（各不足一圈）重叠的度数，绕圈。"""
    return sum(max(0.0, min(a[1], b[1] + 360 * k) - max(a[0], b[0] + 360 * k)) for k in range(-3, 4))


def conservative_loop(field: np.ndarray, lat: np.ndarray, lon: np.ndarray, target: Target) -> np.ndarray:
    """逐个目标格子、逐个源格子累加重叠的面积。"""
    edges, width = edges_of(lat.tolist()), abs(lon[1] - lon[0])
    result = np.zeros((target.latitude.count, target.longitude.count))
    for i, south in enumerate(np.array(target.latitude.values()) - abs(target.latitude.step) / 2):
        for j, west in enumerate(np.array(target.longitude.values()) - abs(target.longitude.step) / 2):
            total = area = 0.0
            box = (max(south, -90.0), min(south + abs(target.latitude.step), 90.0))
            for m in range(lat.size):
                low, high = sorted(edges[m : m + 2])
                low, high = max(low, box[0]), min(high, box[1])
                if high <= low:
                    continue
                tall = math.sin(math.radians(high)) - math.sin(math.radians(low))
                for n in range(lon.size):
                    cell = (lon[n] - width / 2, lon[n] + width / 2)
                    wide = overlap_of_longitudes((west, west + abs(target.longitude.step)), cell)
                    area += tall * wide
                    total += tall * wide * field[m, n]
            result[i, j] = total / area
    return result


def areas(latitudes: np.ndarray) -> np.ndarray:
    """各行的面积。"""
    edges = np.array(edges_of(latitudes.tolist()))
    return np.abs(np.diff(np.sin(np.deg2rad(edges))))


@pytest.mark.parametrize("flip", [False, True])
def test_conservative_against_a_loop(flip):
    """两个方向，目标不与源的格线对齐，一格跨过本初子午线。"""
    lat, lon = GLOBE
    field = np.random.default_rng(0).standard_normal((lat.size, lon.size))
    target = Target("conservative", Axis(first=-84, step=12, count=15), Axis(first=-3, step=14.4, count=25))
    expected = conservative_loop(field, lat, lon, target)
    if flip:
        lat, lon, field = lat[::-1], lon[::-1], field[::-1, ::-1]
    np.testing.assert_allclose(make_regridder(lat, lon, target)(field), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("grid", [GLOBE, (np.linspace(-88, 88, 45), np.arange(90) * 4.0 - 180)])
def test_conservative_keeps_the_area_mean(grid):
    """疏变密、密变疏都守恒。"""
    lat, lon = grid
    field = 5e5 + np.random.default_rng(1).standard_normal((3, lat.size, lon.size)).cumsum(axis=-1)
    mean = np.average(field.mean(axis=-1), weights=areas(lat), axis=-1)
    for height, width in ((4, 9), (90, 131)):
        to = np.linspace(-90, 90, height + 1)
        step = 360 / width
        axis = Axis(first=(to[0] + to[1]) / 2, step=180 / height, count=height)
        target = Target("conservative", axis, Axis(first=-100.0, step=step, count=width))
        result = make_regridder(lat, lon, target)(field)
        assert result.shape == (3, height, width)
        new = np.average(result.mean(axis=-1), weights=areas(np.array(axis.values())), axis=-1)
        np.testing.assert_allclose(new, mean, rtol=1e-13)


@pytest.mark.parametrize("method", ["bilinear", "conservative"])
@pytest.mark.parametrize("grid", [GLOBE, (GAUSSIAN, np.arange(32, dtype=np.float32) * np.float32(11.25))])
def test_constant_fields(method, grid):
    result = make_regridder(grid[0], grid[1], Target(method, *TARGET))(np.full((2, grid[0].size, grid[1].size), 273.15))
    np.testing.assert_allclose(result, 273.15, rtol=4e-16)


def test_bilinear_against_xarray():
    """区域与不等距的纬度；目标由北向南，经度写法不同（差一圈）。"""
    rng = np.random.default_rng(2)
    lat, lon = GAUSSIAN[4:], 350 + 2.5 * np.arange(12)  # 350 … 377.5
    field = rng.standard_normal((4, lat.size, lon.size))
    target = Target("bilinear", Axis(first=60, step=-5.5, count=12), Axis(first=-9, step=1.7, count=15))
    result = make_regridder(lat, np.mod(lon, 360), target)(field)
    array = xr.DataArray(field, {"lat": lat, "lon": lon - 360}, ("n", "lat", "lon"))
    at = {"lat": list(target.latitude.values()), "lon": list(target.longitude.values())}
    np.testing.assert_allclose(result, array.interp(at).values, rtol=1e-12, atol=1e-13)


def test_bilinear_is_periodic_and_exact_on_linear_fields():
    lat, lon = np.linspace(-60, 60, 13), np.arange(24) * 15.0
    target = Target("bilinear", Axis(first=50, step=-7, count=15), Axis(first=-14, step=4, count=90))
    to_lat, to_lon = (np.array(axis.values()) for axis in (target.latitude, target.longitude))
    regrid = make_regridder(lat, lon, target)
    field = np.broadcast_to(3 + 0.5 * lat[:, None], (13, 24))
    np.testing.assert_allclose(
        regrid(field), np.broadcast_to((3 + 0.5 * to_lat)[:, None], (15, 90)), rtol=1e-14, atol=1e-14
    )
    wrapped = np.append(lon, 360.0)
    field = np.cos(np.deg2rad(lon))[None] * lat[:, None] ** 2
    closed = np.append(field, field[:, :1], axis=1)
    rows = np.array([np.interp(np.mod(to_lon, 360), wrapped, row) for row in closed])
    expected = np.array([np.interp(to_lat, lat, column) for column in rows.T]).T
    np.testing.assert_allclose(regrid(field), expected, rtol=1e-12, atol=1e-10)
    region = (np.arange(10.0, 21), np.arange(100.0, 131, 2))
    inside = Target("bilinear", Axis(first=20, step=-0.3, count=34), Axis(first=100, step=0.7, count=43))
    plane = 1 + 2 * region[0][:, None] - 3 * region[1] + 0.1 * region[0][:, None] * region[1]
    to_lat, to_lon = np.array(inside.latitude.values())[:, None], np.array(inside.longitude.values())
    expected = 1 + 2 * to_lat - 3 * to_lon + 0.1 * to_lat * to_lon
    np.testing.assert_allclose(make_regridder(region[0], region[1], inside)(plane), expected, rtol=1e-12)


def test_rows_beyond_the_last_latitude_take_the_last():
    """高斯网格最外一行与极点之间：双线性沿用最外一行。"""
    field = np.random.default_rng(3).standard_normal((16, 32))
    target = Target("bilinear", Axis(first=90, step=-1, count=181), Axis(first=0, step=11.25, count=32))
    result = make_regridder(GAUSSIAN, np.arange(32) * 11.25, target)(field)
    np.testing.assert_array_equal(result[[0, 3, -1]], field[[-1, -1, 0]])


@pytest.mark.parametrize("method", ["bilinear", "conservative"])
def test_missing_values_are_not_filled(method):
    """一个缺测点：恰是权重非零的格子缺测，其余与没有缺测时相同。"""
    lat, lon = GLOBE
    field = np.random.default_rng(4).standard_normal((2, lat.size, lon.size))
    regrid = make_regridder(lat, lon, Target(method, *TARGET))
    whole = regrid(field)
    field[0, 5, 7] = np.nan
    result = regrid(field)
    touched = np.outer(regrid.rows.toarray()[:, 5], regrid.cols.toarray()[:, 7]) > 0
    assert 0 < touched.sum() < touched.size / 4
    np.testing.assert_array_equal(np.isnan(result[0]), touched)
    np.testing.assert_array_equal(result[0][~touched], whole[0][~touched])
    np.testing.assert_array_equal(result[1], whole[1])


REGION = (np.arange(30.0, 51), np.arange(-10.0, 21))
CELL = Axis(first=40, step=1, count=2)


@pytest.mark.parametrize(
    ("grid", "target", "message"),
    [
        (REGION, Target("bilinear", Axis(first=49, step=1, count=3), CELL), r"--latitude: 51 \(1 of 3\) .* 30 to 50"),
        (
            REGION,
            Target("conservative", CELL, Axis(first=19, step=2, count=2)),
            r"--longitude: 21 \(1 of 2\) .*-10 to 20",
        ),
        ((np.arange(60.0, 90), REGION[1]), Target("bilinear", Axis(first=90, step=-1, count=2), CELL), "90 .1 of 2"),
        (REGION, Target("bilinear", Axis(first=89, step=1, count=3), CELL), "89 to 91 goes past a pole"),
        (REGION, Target("bilinear", CELL, Axis(first=0, step=10, count=37)), "37 steps of 10 are more than a circle"),
        (REGION, Target("bilinear", Axis(first=0, step=0, count=1), CELL), "STEP must not be 0"),
        ((REGION[0][:1], REGION[1]), Target("bilinear", CELL, CELL), "latitude: .* 1 values from 30 to 30"),
        ((GLOBE[0], np.linspace(0, 360, 37)), Target("bilinear", CELL, CELL), "repeats the first meridian"),
    ],
)
def test_bad_targets(grid, target, message):
    with pytest.raises(ValueError, match=message):
        make_regridder(grid[0], grid[1], target)
