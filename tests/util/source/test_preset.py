"""导入：--preset 的名字与单位；--levels、--dates 只取要的；存档里没有的说出来。"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from tests.util.exchange.test_import_fields import make_dataset
from tests.util.exchange.test_import_layouts import TIMES, dates_of, import_all, load
from tests.util.files.test_netcdf import make_spec
from util.commands.import_fields import main
from util.data.tree_files import field_path
from util.files.zarr_fields import ZarrFields, appending, truth_header
from util.source.request import MAPS, Wanted, read_request
from util.variables import RANGES, VARIABLES

LEVELS = np.array([50, 500, 850, 1000])
PRESET = ("--preset", "weatherbench2")


def archive(path: Path, leads: bool = False) -> xr.Dataset:
    """WeatherBench2 的布局：time、level（没有写单位）、longitude、由南向北的 latitude；海陆分布不随时间变。"""
    times, rng = make_dataset().time.values, np.random.default_rng(0)
    axes = {"time": times, "level": LEVELS, "longitude": np.arange(0, 360, 45.0), "latitude": np.linspace(-60, 60, 5)}

    def field(units: str, *dims: str, mean: float = 0.0, std: float = 1.0) -> tuple:
        values = mean + std * rng.standard_normal([axes[dim].size for dim in dims])
        return dims, values.astype(np.float32), {"units": units} if units else {}

    surface, upper = ("time", "longitude", "latitude"), ("time", "level", "longitude", "latitude")
    dataset = xr.Dataset(
        {
            "2m_temperature": field("K", *surface, mean=280),
            "total_precipitation_6hr": field("m", *surface, std=1e-4),
            "10m_wind_speed": field("", *surface),
            "land_sea_mask": field("(0 - 1)", "longitude", "latitude"),
            "temperature": field("K", *upper, mean=250),
            "geopotential": field("m**2 s**-2", *upper, mean=5e4),
            "relative_humidity": field("", *upper, mean=0.5, std=0.1),
        },
        axes,
    )
    if leads:
        steps = np.array([6, 12], dtype="timedelta64[h]").astype("timedelta64[ns]")
        dataset = dataset.drop_vars("land_sea_mask").expand_dims(prediction_timedelta=steps)
    dataset.to_zarr(path, consolidated=True)
    return dataset


def row(dataset: xr.Dataset, name: str, i: int, **where) -> np.ndarray:
    return dataset[name].isel(time=i).sel(**where).transpose("latitude", "longitude").values


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part:UserWarning")
def test_preset(tmp_path, capsys):
    """存档里有的都导入，换了单位；没有的说出名字。"""
    dataset = archive(tmp_path / "a.zarr")
    config = import_all([tmp_path / "a.zarr"], tmp_path / "tree", *PRESET)
    assert config.variables == {"t2m": "single", "tp": "single", "r": "all", "t": "all", "z": "all"}
    assert config.units == {"t2m": "K", "tp": "m", "r": "%", "t": "K", "z": "m2 s-2"}
    assert config.pressure_hpa == LEVELS.tolist()
    said = capsys.readouterr().out
    assert "lacking   not in the source: 10m_u_component_of_wind (u10), 10m_v_component_of_wind (v10), " in said
    assert "total_precipitation_6hr (tp)" not in said.split("lacking")[1].splitlines()[0]
    for i in (0, 17, 35):
        np.testing.assert_array_equal(load(tmp_path / "tree", "t2m", TIMES[i]), row(dataset, "2m_temperature", i))
        np.testing.assert_array_equal(
            load(tmp_path / "tree", "z_level_01", TIMES[i]), row(dataset, "geopotential", i, level=500)
        )
        humidity = (100 * row(dataset, "relative_humidity", i, level=850).astype(np.float64)).astype(np.float32)
        np.testing.assert_array_equal(load(tmp_path / "tree", "r_level_02", TIMES[i]), humidity)


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part:UserWarning")
def test_there_and_back(tmp_path):
    """按 preset 导入、写成 truth.zarr：名字、单位、数就是存档里的；再按 preset 导入又是这里的。"""
    dataset = archive(tmp_path / "a.zarr")
    words = (*PRESET, "--variable", "r", "--variable", "t2m")
    config = import_all([tmp_path / "a.zarr"], tmp_path / "tree", *words, "--levels", "850")
    channels = ("r_level_00", "t2m")
    spec = replace(
        make_spec(config.latitude.values(), config.longitude.values()),
        channels=channels, units=tuple(config.units[c.split("_")[0]] for c in channels),
        pressures=(850.0, None), mean=(0.0,) * 2, std=(1.0,) * 2,
    )  # fmt: skip
    fields = np.stack([[load(tmp_path / "tree", c, t) for c in channels] for t in TIMES])  # (T, C, H, W)
    hours = np.array([int(t) for t in dataset.time.values.astype("datetime64[h]").astype(int)])
    with appending(tmp_path / "truth.zarr", truth_header(spec, {}), hours):
        ZarrFields(tmp_path / "truth.zarr", spec).write_truth(hours, fields, np.ones(fields.shape[:2], bool))
    with xr.open_zarr(tmp_path / "truth.zarr", chunks=None) as written:
        humidity, warmth = written["relative_humidity"], written["2m_temperature"]
        assert humidity.attrs["units"] == "1"
        for found, name in ((humidity, "relative_humidity"), (warmth, "2m_temperature")):
            pair = xr.align(found, dataset[name], join="inner")
            assert pair[0].size == found.size
            np.testing.assert_allclose(*(p.transpose(*found.dims).values for p in pair), rtol=1e-6)
    again = import_all([tmp_path / "truth.zarr"], tmp_path / "again", *words)
    assert again.units == {"r": "%", "t2m": "K"}
    for c, channel in enumerate(channels):
        there = load(tmp_path / "again", channel, TIMES[3])
        np.testing.assert_allclose(
            there, fields[3, c] if config.latitude == again.latitude else fields[3, c, ::-1], rtol=1e-6
        )


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part:UserWarning")
def test_narrowed(tmp_path):
    """--variable 只要几个（也可以要 preset 之外的），--levels 只要几层，--dates 只要几天。"""
    dataset = archive(tmp_path / "a.zarr")
    words = (*PRESET, "--variable", "t", "--variable", "10m_wind_speed=ws", "--levels", "1000", "500")
    days = dates_of("2000-01-03", "2000-01-04", "2000-01-05")
    dates = [*days, "--dates", "2000-01-03", "2000-01-05"]
    config = import_all([tmp_path / "a.zarr"], tmp_path / "tree", *words, dates=dates)
    assert config.variables == {"t": "all", "ws": "single"}
    assert config.pressure_hpa == [1000.0, 500.0]
    assert [i for i, t in enumerate(TIMES) if field_path(tmp_path / "tree", "ws", t).is_file()] == [*range(8, 20)]
    for i in (8, 19):
        for name, level in (("t_level_00", 1000), ("t_level_01", 500)):
            wanted = row(dataset, "temperature", i, level=level)
            np.testing.assert_array_equal(load(tmp_path / "tree", name, TIMES[i]), wanted)
    with pytest.raises(ValueError, match="t: no time within --dates 1990 1991"):
        import_all([tmp_path / "a.zarr"], tmp_path / "none", *words, dates=[*days, "--dates", "1990", "1991"])
    with pytest.raises(ValueError, match="no variable '10m_u_component_of_wind' in the file"):
        import_all([tmp_path / "a.zarr"], tmp_path / "none", *PRESET, "--variable", "u10")
    with pytest.raises(ValueError, match=r"--variable t2n: not in the preset weatherbench2 \(nearest: t2m\)"):
        import_all([tmp_path / "a.zarr"], tmp_path / "none", *PRESET, "--variable", "t2n")


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part:UserWarning")
def test_a_forecast(tmp_path):
    dataset = archive(tmp_path / "a.zarr", leads=True)
    words = (*PRESET, "--variable", "t2m")
    with pytest.raises(ValueError, match=r"dimension prediction_timedelta \(2\) cannot be imported; --select"):
        import_all([tmp_path / "a.zarr"], tmp_path / "none", *words)
    import_all([tmp_path / "a.zarr"], tmp_path / "tree", *words, "--select", "prediction_timedelta=12h")
    wanted = row(dataset.isel(prediction_timedelta=1), "2m_temperature", 3)
    np.testing.assert_array_equal(load(tmp_path / "tree", "t2m", TIMES[3] + 12), wanted)


def test_dates_of_several_files(tmp_path):
    """一个要的时刻也没有的文件略去。"""
    dataset = make_dataset()[["air"]]
    for i, part in enumerate((slice(0, 12), slice(12, 36))):
        dataset.isel(time=part).to_netcdf(tmp_path / f"{i}.nc")
    days = dates_of("2000-01-05", "2000-01-06", "2000-01-07")
    dates = [*days, "--dates", "2000-01-05", "2000-01-07"]
    import_all([tmp_path / "0.nc", tmp_path / "1.nc"], tmp_path / "tree", "--variable", "air=air", dates=dates)
    assert [i for i, t in enumerate(TIMES) if field_path(tmp_path / "tree", "air", t).is_file()] == [*range(16, 28)]


def test_more_dates_into_a_store(tmp_path):
    """先导入几天，再去掉 --dates 接着做：与一次导入的相同。"""
    make_dataset()[["air"]].to_netcdf(tmp_path / "a.nc")
    words = ["--source", str(tmp_path / "a.nc"), "--variable", "air=air"]
    days = dates_of("2000-01-03", "2000-01-04", "2000-01-05")
    main([*words, *days, "--store", str(tmp_path / "grown"), "--dates", "2000-01-03", "2000-01-05"])
    for store in ("grown", "once"):
        main([*words, *days, "--store", str(tmp_path / store)])
    grown, once = (sorted(p for p in (tmp_path / s / "fields").rglob("*") if p.is_file()) for s in ("grown", "once"))
    assert [p.name for p in grown] == [p.name for p in once]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(grown, once, strict=True))


def test_the_file_has_the_units_already(tmp_path):
    dataset = make_dataset()[["air"]].rename(air="relative_humidity").rename(lat="latitude", lon="longitude")
    dataset.relative_humidity.attrs["units"] = "%"
    dataset.to_netcdf(tmp_path / "a.nc")
    with pytest.raises(ValueError, match="r: the file has '%' already, and scale 100 would convert it again"):
        import_all([tmp_path / "a.nc"], tmp_path / "tree", *PRESET)


def test_presets_are_maps():
    """每一份读得进来；单位与变量表、合理范围的相同。"""
    for path in MAPS.glob("*.yaml"):
        request = read_request(None, (), preset=path.stem)
        assert request.variables
        for name, wanted in request.variables.items():
            assert isinstance(wanted, Wanted)
            known = {VARIABLES[name].units} if name in VARIABLES else set()
            known |= {RANGES[name].units} if name in RANGES else set()
            assert not known or known == {wanted.units}, name
    with pytest.raises(ValueError, match="--preset weatherbench: nearest: weatherbench2"):
        read_request(None, (), preset="weatherbench")
    with pytest.raises(ValueError, match="--map and --preset exclude each other"):
        read_request("a.yaml", (), preset="weatherbench2")


@pytest.mark.parametrize(
    ("days", "message"),
    [
        (["2000-13-01", "2001"], r"^command line: --dates\[0\] = '2000-13-01': not a date"),
        (
            ["2001-02-20", "2001-01-01"],
            "^command line: --dates = .*: the START 2001-02-20 is after the END 2001-01-01$",
        ),
        (["2001", "2000"], "the START 2001 is after the END 2000$"),
        (["2001-01-01", "2000"], "the START 2001-01-01 is after the END 2000$"),
        (["2001", "2000-12-31"], "the START 2001 is after the END 2000-12-31$"),
    ],
)
def test_wrong_dates(days, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_request(None, ["a=b"], dates=days)
    (tmp_path / "map.yaml").write_text(f"variables: {{a: {{}}}}\ndates: {days}\n")
    with pytest.raises(ValueError, match=r"map.yaml: dates(\[0\])? = "):
        read_request(str(tmp_path / "map.yaml"), ())


@pytest.mark.parametrize("days", [["2001", "2001"], ["2001-12-31", "2001"], ["2001", "2001-01-01"], ["2001-01-01"] * 2])
def test_dates_both_included(days):
    assert read_request(None, ["a=b"], dates=days).dates == days
