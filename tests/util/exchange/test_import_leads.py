"""导入：预报的时刻是有效时刻；源文件没有写的东西，当作什么要说出来。"""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from tests.util.exchange.test_import_fields import DATES, make_dataset
from tests.util.exchange.test_import_layouts import TIMES, import_all, load
from util.commands.import_fields import main

LEADS = np.array([6, 12, 18])


def forecast(**coords) -> xr.Dataset:
    """make_dataset 的 air 作起报时刻，三个时效；coords 里的 lead 是时效轴的值。"""
    air = make_dataset().air
    several = xr.concat([air + 100 * i for i in range(3)], "lead").transpose("time", "lead", "lat", "lon")
    return several.assign_coords(**coords).to_dataset(name="air").assign(air=lambda d: d.air.assign_attrs(units="K"))


WAYS = {
    "hours": (forecast(lead=("lead", LEADS, {"units": "hours"})), "lead=12"),
    "days": (forecast(lead=("lead", LEADS / 24, {"units": "days"})), "lead=0.5"),
    "nanoseconds, asked for in hours": (
        forecast(lead=LEADS.astype("timedelta64[h]").astype("timedelta64[ns]")),
        "lead=12",
    ),
    "minutes, asked for in words": (forecast(lead=("lead", 60 * LEADS, {"units": "minutes"})), "lead=12h"),
    "known by its standard name": (
        forecast(lead=("lead", LEADS, {"units": "h", "standard_name": "forecast_period"})).rename(lead="tau"),
        "tau=12",
    ),
    "named init_time": (forecast(lead=("lead", LEADS, {"units": "hours"})).rename(time="init_time"), "lead=12"),
    "scalar": (forecast(lead=("lead", LEADS, {"units": "hours"})).isel(lead=1), None),
    "one entry left": (forecast(lead=("lead", LEADS, {"units": "hours"})).isel(lead=[1]), None),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["nc", "zarr"])
def test_the_time_of_a_forecast_is_its_valid_time(way, kind, tmp_path, capsys):
    dataset, select = WAYS[way]
    path = tmp_path / f"a.{kind}"
    dataset.to_netcdf(path) if kind == "nc" else dataset.to_zarr(path, zarr_format=2)
    import_all([path], tmp_path / "tree", "--variable", "air=air", *(["--select", select] if select else []))
    held = make_dataset().air.values + 100
    for i in (0, 20, 35):  # 起报后 12 小时
        np.testing.assert_array_equal(load(tmp_path / "tree", "air", TIMES[i] + 12), held[i].astype(np.float32))
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "tree", "air", TIMES[0])
    assert "lead      air: the time of a field is the valid time, the initial time + 12 h" in capsys.readouterr().out


def test_a_reference_time_says_that_time_is_valid_already(tmp_path, capsys):
    """CF：forecast_reference_time 加 forecast_period 等于 time，不再加一次。"""
    dataset = forecast(lead=("lead", LEADS, {"units": "hours"})).isel(lead=1)
    reference = dataset.time.values - np.timedelta64(12, "h")
    dataset.assign_coords(analysis=("time", reference, {"standard_name": "forecast_reference_time"})).to_netcdf(
        tmp_path / "a.nc"
    )
    import_all([tmp_path / "a.nc"], tmp_path / "tree", "--variable", "air=air")
    np.testing.assert_array_equal(load(tmp_path / "tree", "air", TIMES[0]), dataset.air.values[0].astype(np.float32))
    assert "\nlead" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (forecast(lead=LEADS).isel(lead=1), "lead: units none of a lead time.*attribute units"),
        (make_dataset()[["air"]].rename(time="init_time"), "init_time is the initial time.*no lead time.*valid_time"),
        (
            make_dataset()[["air"]].assign_coords(step=("time", np.arange(36), {"units": "hours"})),
            "step changes along time: initial or valid times.*valid_time",
        ),
    ],
)
def test_times_that_cannot_be_known_are_refused(dataset, message, tmp_path):
    dataset.to_netcdf(tmp_path / "a.nc")
    with pytest.raises(ValueError, match=message):
        main(["--source", str(tmp_path / "a.nc"), "--root", str(tmp_path / "tree"), "--variable", "air=air", *DATES])
    assert not (tmp_path / "tree").exists()


def test_what_the_file_does_not_say_is_called_assumed(tmp_path, capsys):
    """单位、气压的单位、历法：当作什么，摘要与 YAML 里都说；写明的就不说。"""
    dataset = make_dataset()
    dataset["air"].attrs, dataset["level"].attrs = {}, {}
    hours = np.arange(36) * 6
    dataset = dataset.assign_coords(time=("time", hours, {"units": "hours since 2000-01-01"}))
    dataset.to_netcdf(tmp_path / "a.nc")
    words = ("--variable", "air=t2m", "--variable", "wind=u")
    import_all([tmp_path / "a.nc"], tmp_path / "tree", *words)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("assumed")]
    assert [line.split(";")[0] for line in said] == [
        "assumed   units of t2m: K, as is usual",
        "assumed   calendar of time: standard",
        "assumed   units of level: hPa",
    ]
    assert "没有写 t2m 的单位" in (tmp_path / "tree.yaml").read_text(encoding="utf-8")
    (tmp_path / "map.yaml").write_text("variables: {t2m: {source: air, units: degC}}\n")
    import_all([tmp_path / "a.nc"], tmp_path / "other", "--map", str(tmp_path / "map.yaml"))
    assert "units of t2m" not in capsys.readouterr().out
