"""NetCDF：写出后由 xarray（和 netCDF4）读回，按坐标逐点核对。"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from util.batch import DataSpec
from util.files.netcdf import FieldFile, write_forecast
from util.grid import output_grid

CHANNELS = ("t2m", "z_level_00", "z_level_01", "t_level_00", "sst", "q_level_07")
UNITS = ("K", "m2 s-2", "m2 s-2", "K", "degC", "kg kg-1")
PRESSURES = (None, 850.0, 500.0, 250.0, None, None)


def make_spec(latitudes=(-45, -15, 15, 45), longitudes=(-180, -90, 0, 90)) -> DataSpec:
    lat, lon = tuple(map(float, latitudes)), tuple(map(float, longitudes))
    return DataSpec(CHANNELS, UNITS, PRESSURES, lat, lon, 7, 1, 6, (0.0,) * 6, (1.0,) * 6, False)


def make_fields(spec: DataSpec, members: int, leads: int) -> np.ndarray:
    size = (members, leads, spec.num_channels, spec.height, spec.width)
    return np.random.default_rng(0).normal(size=size).astype(np.float32)


def opened(path: Path) -> xr.Dataset:
    with xr.open_dataset(path, decode_timedelta=True) as dataset:
        return dataset.load()


def test_values_lie_at_their_coordinates(tmp_path: Path):
    spec = make_spec()
    forecast, truth = make_fields(spec, 3, 2), make_fields(spec, 1, 2)[0] + 1
    init_hour = 397920  # 2015-05-25 00 UTC
    write_forecast(tmp_path / "deep" / "f.nc", spec, forecast, init_hour, [6, 12], {"title": "test"}, truth)
    dataset = opened(tmp_path / "deep" / "f.nc")
    init = np.datetime64("1970-01-01T00", "ns") + np.timedelta64(init_hour, "h")
    assert dataset.time.values == [init]
    for m in range(3):
        for i, lead in enumerate((6, 12)):
            for c, channel in enumerate(CHANNELS):
                name = channel if PRESSURES[c] is None else channel.split("_")[0]
                place = {"time": init, "number": m, "prediction_timedelta": np.timedelta64(lead, "h")}
                if PRESSURES[c] is not None:
                    place["level"] = PRESSURES[c]
                for y, latitude in enumerate(spec.latitudes):
                    for x, longitude in enumerate(spec.longitudes):
                        point = {**place, "latitude": latitude, "longitude": longitude % 360}
                        assert dataset[name].sel(point).item() == forecast[m, i, c, y, x]
                        del point["number"]
                        assert dataset[f"{name}_truth"].sel(point).item() == truth[i, c, y, x]
    assert list(dataset.latitude) == [45, 15, -15, -45]
    assert list(dataset.longitude) == [0, 90, 180, 270]
    assert list(dataset.level) == [250, 500, 850]
    assert np.isnan(dataset.z.sel(level=250)).all()  # 并集里 z 没有的层
    assert dataset.t.sel(level=250).notnull().all()
    assert np.isnan(dataset.t.sel(level=[500, 850])).all()
    np.testing.assert_array_equal(dataset.valid_time, (init + np.array([6, 12], "timedelta64[h]"))[None])


def test_cf_attributes(tmp_path: Path):
    spec = make_spec()
    write_forecast(tmp_path / "f.nc", spec, make_fields(spec, 2, 1), 0, [6], {"title": "test", "history": "made"})
    with xr.open_dataset(tmp_path / "f.nc", decode_cf=False) as dataset:
        assert dataset.attrs == {"Conventions": "CF-1.8", "title": "test", "history": "made"}
        attributes = {str(name): variable.attrs for name, variable in dataset.variables.items()}
        for name in ("t2m", "z", "t", "sst", "q_level_07"):
            assert dataset[name].dtype == np.float32
            assert attributes[name]["coordinates"] == "valid_time"
        assert dataset.time.values == [0]
        assert dataset.prediction_timedelta.values == [6]
    assert attributes["z"]["standard_name"] == "geopotential"
    assert attributes["z"]["units"] == "m2 s-2"
    assert attributes["t2m"]["standard_name"] == "air_temperature"
    assert attributes["t2m"]["long_name"] == "2 metre temperature"
    assert attributes["sst"]["units"] == "degC"
    assert "standard_name" not in attributes["sst"]  # 表外变量没有标准名，不编
    expected = {
        "latitude": {"standard_name": "latitude", "units": "degrees_north", "axis": "Y"},
        "longitude": {"standard_name": "longitude", "units": "degrees_east", "axis": "X"},
        "level": {"standard_name": "air_pressure", "units": "hPa", "axis": "Z", "positive": "down"},
        "time": {
            "standard_name": "forecast_reference_time",
            "units": "hours since 1970-01-01",
            "calendar": "proleptic_gregorian",
            "axis": "T",
        },
        "valid_time": {"standard_name": "time", "units": "hours since 1970-01-01"},
        "prediction_timedelta": {"standard_name": "forecast_period", "units": "hours"},
        "number": {"standard_name": "realization", "units": "1"},
    }
    for name, some in expected.items():
        assert attributes[name].items() >= some.items(), name
        assert "_FillValue" not in attributes[name]  # CF：坐标不许有缺测
        assert "dtype" not in attributes[name]  # xarray 2025.6 读不了带 dtype 属性的时长


def test_single_member_and_unknown_time(tmp_path: Path):
    spec = make_spec()
    forecast = make_fields(spec, 1, 2)
    write_forecast(tmp_path / "f.nc", spec, forecast, None, [6, 12], {}, forecast[0])
    dataset = opened(tmp_path / "f.nc")
    assert dataset.t2m.dims == ("prediction_timedelta", "latitude", "longitude")
    assert dataset.z_truth.dims == ("prediction_timedelta", "level", "latitude", "longitude")
    assert not {"time", "valid_time", "number"} & set(dataset.variables)
    np.testing.assert_array_equal(dataset.t2m, dataset.t2m_truth)


def test_netcdf4_library_reads_it(tmp_path: Path):
    netcdf4 = pytest.importorskip("netCDF4")
    spec = make_spec()
    forecast = make_fields(spec, 1, 1)
    write_forecast(tmp_path / "f.nc", spec, forecast, 24, [6], {})
    with netcdf4.Dataset(tmp_path / "f.nc") as file:
        assert file.data_model == "NETCDF4"
        assert file["t2m"].dimensions == ("time", "prediction_timedelta", "latitude", "longitude")
        columns = np.argsort(np.array(spec.longitudes) % 360)
        np.testing.assert_array_equal(file["t2m"][0, 0], forecast[0, 0, 0, ::-1][:, columns])
        moment = netcdf4.num2date(file["valid_time"][0, 0], file["valid_time"].units)
        assert moment.isoformat() == "1970-01-02T06:00:00"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((-180, -90, 0, 90), (0, 90, 180, 270)),
        ((0, 90, 180, 270), (0, 90, 180, 270)),
        ((270, 180, 90, 0), (0, 90, 180, 270)),
        ((-130, -125, -120, -115), (230, 235, 240, 245)),
        ((-10, -5, 0, 5), (-10, -5, 0, 5)),  # 跨本初子午线的区域不撕开
        ((350, 355, 360, 365), (-10, -5, 0, 5)),
        ((170, 175, 180, 185), (170, 175, 180, 185)),
        ((-1e-14, 90, 180, 270), (0, 90, 180, 270)),
        ((20,), (20,)),
    ],
)
def test_longitudes_are_arranged(given, expected):
    grid = output_grid(make_spec(longitudes=given))
    np.testing.assert_allclose(grid.longitudes, expected)
    np.testing.assert_allclose((np.array(given)[grid.columns] - expected) % 360 % 359.999, 0, atol=1e-2)


def test_latitudes_are_arranged():
    for latitudes in ((-60, -20, 20, 60), (60, 20, -20, -60)):
        grid = output_grid(make_spec(latitudes=latitudes))
        assert grid.latitudes.tolist() == [60, 20, -20, -60]
        assert np.array(latitudes)[grid.rows].tolist() == [60, 20, -20, -60]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = make_spec()
    path = tmp_path / "f.nc"
    write_forecast(path, spec, make_fields(spec, 1, 1), 0, [6], {})
    before = path.read_bytes()

    def fail(self: FieldFile, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FieldFile, "put", fail)
    with pytest.raises(KeyboardInterrupt):
        write_forecast(path, spec, make_fields(spec, 1, 1) + 1, 0, [6], {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["f.nc"]
