"""导入：经度跨过本初子午线、各种写法、换方向；几个文件的坐标只在舍入、整圈上不同的算相同。"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from tests.util.exchange.test_import_fields import make_dataset
from tests.util.exchange.test_import_layouts import TIMES, import_all, load
from util.source.axes import read_axis

AIR = ("--variable", "air=air")


def saved(path: Path, dataset: xr.Dataset) -> Path:
    dataset.to_netcdf(path)
    return path


@pytest.mark.parametrize(
    ("given", "first", "step"),
    [
        ([350, 355, 0, 5, 10, 15, 20, 25], -10, 5),  # 跨本初子午线的区域
        ([25, 20, 15, 10, 5, 0, 355, 350], 25, -5),
        ([165, 170, 175, 180, -175, -170, -165, -160], 165, 5),  # 跨日界线
        ([-160, -165, -170, -175, 180, 175, 170, 165], 200, -5),
        ([180, 225, 270, 315, 0, 45, 90, 135], -180, 45),  # 全球，从日界线起
        ([-180, -135, -90, -45, 0, 45, 90, 135], -180, 45),
        ([315, 270, 225, 180, 135, 90, 45, 0], 315, -45),
        ([20, 65, 110, 155, 200, 245, 290, 335], 20, 45),  # 不必展开的不动
        ([100, 145, 190, 235, 280, 325, 10, 55], 100, 45),  # 起点已在 [-180, 180)
        ([350, 35, 80, 125, 170, 215, 260, 305], -10, 45),
    ],
)
@pytest.mark.parametrize("dtype", ["float64", "float32", "int16"])
def test_longitudes_are_unwrapped(given, first, step, dtype, tmp_path):
    dataset = make_dataset(longitudes=np.array(given, dtype))
    config = import_all([saved(tmp_path / "a.nc", dataset)], tmp_path / "tree", *AIR)
    longitude = config.longitude
    assert (longitude.first, longitude.step, longitude.count) == (first, step, 8)
    np.testing.assert_array_equal(load(tmp_path / "tree", "air", TIMES[3]), dataset.air.values[3].astype(np.float32))


def test_crop_after_unwrapping(tmp_path):
    dataset = make_dataset(longitudes=np.array([345, 350, 355, 0, 5, 10, 15, 20.0]))
    source = saved(tmp_path / "a.nc", dataset)
    config = import_all([source], tmp_path / "tree", *AIR, "--cols", "3:6", "--rows", "1:4")
    assert config.longitude.values() == (0, 5, 10)
    cut = dataset.air.values[7, 1:4, 3:6].astype(np.float32)
    np.testing.assert_array_equal(load(tmp_path / "tree", "air", TIMES[7]), cut)


def test_fine_float32_longitudes_across_greenwich():
    """0.1 度、单精度：舍入误差不写进 YAML。"""
    given = (np.arange(3550, 3650) % 3600).astype(np.float32) * np.float32(0.1)
    axis = read_axis(xr.Dataset(coords={"lon": given}), "lon", slice(0, 100))
    assert (axis.first, axis.step, axis.count) == (-5.0, 0.1, 100)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 5, 10, 20, 25, 30, 35, 40], "lon: not evenly spaced.*2.857 degrees off.*regrid"),
        ([350, 355, 5, 10, 15, 20, 25, 30], "lon: not evenly spaced.*--longitude FIRST STEP COUNT"),
        ([350, 355, 0, 5, np.nan, 15, 20, 25], "lon: 1 of 8 coordinates are missing"),
    ],
)
def test_uneven_longitudes_are_not_called_gaussian(values, message, tmp_path):
    source = saved(tmp_path / "a.nc", make_dataset(longitudes=np.array(values, float)))
    with pytest.raises(ValueError, match=message) as error:
        import_all([source], tmp_path / "tree", *AIR)
    assert "Gaussian" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"lon": np.array([-10, -5, 0, 5, 10, 15, 20, 25], np.float32)},
        {"lon": np.array([350, 355, 0, 5, 10, 15, 20, 25]) * (1 + 1e-9)},
        {"lat": make_dataset().lat.values.astype(np.float32) * np.float32(1 + 1e-7)},
    ],
)
def test_coordinates_of_files_are_compared_to_rounding(change, tmp_path):
    """后一个文件写成单精度、另一种经度，仍是同一个网格。"""
    dataset = make_dataset(longitudes=np.array([350, 355, 0, 5, 10, 15, 20, 25.0]))
    early = saved(tmp_path / "a.nc", dataset.isel(time=slice(0, 20)))
    late = saved(tmp_path / "b.nc", dataset.isel(time=slice(20, None)).assign_coords(**change))
    config = import_all([early, late], tmp_path / "tree", *AIR)
    assert config.longitude.values() == (-10, -5, 0, 5, 10, 15, 20, 25)
    np.testing.assert_array_equal(load(tmp_path / "tree", "air", TIMES[30]), dataset.air.values[30].astype(np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lon": np.arange(8) * 5.0 + 0.01}, "its lon .*0.01 to 35.01.*0 to 35"),
        ({"lon": np.roll(np.arange(8) * 5.0, 1)}, "its lon "),
        ({"lat": np.linspace(20, -20, 5)}, "its lat .*20 to -20.*-20 to 20"),
    ],
)
def test_other_grids_are_named(change, message, tmp_path):
    dataset = make_dataset(longitudes=np.arange(8) * 5.0)
    early = saved(tmp_path / "a.nc", dataset.isel(time=slice(0, 20)))
    late = saved(tmp_path / "b.nc", dataset.isel(time=slice(20, None)).assign_coords(**change))
    with pytest.raises(ValueError, match=message):
        import_all([early, late], tmp_path / "tree", *AIR)
