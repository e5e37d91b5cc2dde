"""导入成目录树：WeatherBench 2 的 Zarr 只读要的块；旧树里多出来的层。"""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from tests.util.exchange.test_import_fields import make_dataset
from tests.util.exchange.test_import_layouts import TIMES, import_all, load


def test_weatherbench_zarr_is_read_lazily(tmp_path):
    """WeatherBench 2 的布局与变量名；不要的变量、层、裁掉的经度的块都弄坏了也不碍事，要的坏了就一行说清。"""
    rng, levels = np.random.default_rng(0), [500, 700, 850]
    grid = {"latitude": np.linspace(90, -90, 5), "longitude": np.arange(0, 360, 45.0)}
    names = ("time", "level", "latitude", "longitude")
    z = rng.standard_normal((36, 3, 5, 8)).astype(np.float32)
    t2m = rng.standard_normal((36, 5, 8)).astype(np.float32)
    dataset = xr.Dataset(
        {
            "geopotential": (names, z, {"units": "m**2 s**-2"}),
            "2m_temperature": (("time", *names[2:]), t2m, {"units": "K"}),
            "specific_humidity": (names, z),
        },
        {"time": make_dataset().time.values, "level": levels, **grid},
    )
    chunks = {name: {"chunks": (9, 1, 5, 4)} for name in ("geopotential", "specific_humidity")}
    source = tmp_path / "era5.zarr"
    dataset.to_zarr(source, zarr_format=2, encoding=chunks | {"2m_temperature": {"chunks": (9, 5, 4)}})
    for chunk in source.glob("*/[0-9]*.*"):
        place = chunk.name.split(".")
        if chunk.parent.name == "specific_humidity" or place[-1] == "1" or (len(place) == 4 and place[1] == "1"):
            chunk.write_bytes(b"broken")
    (tmp_path / "map.yaml").write_text(
        "variables:\n  z: {source: geopotential}\n  t2m: {source: 2m_temperature}\npressure_hpa: [500, 850]\n"
    )
    words = ("--map", str(tmp_path / "map.yaml"), "--cols", "0:4")
    config = import_all([source], tmp_path / "tree", *words)
    assert config.variables == {"z": "all", "t2m": "single"}
    assert config.units == {"z": "m2 s-2", "t2m": "K"}
    for i in (0, 20, 35):
        np.testing.assert_array_equal(load(tmp_path / "tree", "t2m", TIMES[i]), t2m[i, :, :4])
        np.testing.assert_array_equal(load(tmp_path / "tree", "z_level_01", TIMES[i]), z[i, 2, :, :4])
    (source / "geopotential" / "3.2.0.0").write_bytes(b"broken")
    with pytest.raises(ValueError, match="variable geopotential: unreadable in the block that starts at 2000-01-01T00"):
        import_all([source], tmp_path / "other", *words)


def test_fewer_levels_into_an_old_tree(tmp_path):
    """旧树多出来的层会被 `all` 读进去、配上别的气压：不导入。"""
    make_dataset().to_netcdf(tmp_path / "source.nc")
    import_all([tmp_path / "source.nc"], tmp_path / "tree", "--variable", "wind=u")
    (tmp_path / "map.yaml").write_text("variables: {u: {source: wind}}\npressure_hpa: [850, 500]\n")
    words = ("--map", str(tmp_path / "map.yaml"), "--overwrite")
    with pytest.raises(ValueError, match="u_npy holds level_02, which this import does not write; remove it first"):
        import_all([tmp_path / "source.nc"], tmp_path / "tree", *words)
