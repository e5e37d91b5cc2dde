"""导入：--map 的换算与选层、几个文件、换网格；GRIB（没有装 cfgrib 就跳过）与各种真实的布局。"""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from tests.util.exchange.test_import_fields import DATES, make_dataset
from util.calendar import moment_of
from util.commands.import_fields import main, read_target
from util.config import Axis, DataConfig, read_mapping
from util.data.tree_files import field_path, read_mean_std
from util.exchange.into_tree import write_fields
from util.exchange.plan import plan_import
from util.exchange.regrid import Target, make_regridder
from util.source.collection import find_sources
from util.source.opening import open_source
from util.source.request import read_request
from util.source.wanted import open_wanted
from util.strict import validate

NEEDS_GRIB = pytest.mark.skipif(importlib.util.find_spec("cfgrib") is None, reason="cfgrib is not installed")
TIMES = [int(t) for t in make_dataset().time.values.astype("datetime64[h]").astype(int)]
FEW_AND_ALL = (("few", "500, 1000"), ("all", "500, 850, 1000"))


def import_all(sources: list[Path], root: Path, *words: str, dates: list[str] = DATES) -> DataConfig:
    """跑一遍命令；返回写出的 YAML，检查过的。"""
    out = root.with_suffix(".yaml")
    main(["--source", *map(str, sources), "--root", str(root), *dates, "--yaml", str(out), *words])
    return validate(DataConfig, read_mapping(out) | {"frames_in": 1}, "set")


def dates_of(*days: str) -> list[str]:
    """三个日子各为一个划分。"""
    return [w for name, day in zip(("train", "val", "test"), days, strict=True) for w in (f"--{name}", day, day)]


def load(root: Path, channel: str, hour: int) -> np.ndarray:
    return np.load(field_path(root, channel, hour))


def hour_of(value: xr.DataArray | np.datetime64) -> int:
    return int(np.asarray(value).astype("datetime64[h]").astype(int))


def test_map(tmp_path):
    """换单位、改层的次序与取舍、取一个成员；统计量是换算之后的。"""
    dataset = make_dataset()
    members = xr.concat(
        [dataset.wind.squeeze("number", drop=True), 2 * dataset.wind.squeeze("number", drop=True)], "member"
    )
    dataset = dataset.drop_vars("wind").assign(wind=members.assign_coords(member=[3, 7]))
    dataset.to_netcdf(tmp_path / "source.nc")
    (tmp_path / "map.yaml").write_text(
        "variables:\n"
        "  celsius: {source: air, offset: -273.15, units: degC}\n"
        "  u: {source: wind}\n"
        "  w: {source: wind, scale: 3.6, units: km h-1}\n"
        "pressure_hpa: [1000, 500]\n"
        "select: {member: 3}\n"
    )
    words = ("--map", str(tmp_path / "map.yaml"), "--select", "member=7")
    config = import_all([tmp_path / "source.nc"], tmp_path / "tree", *words)
    assert config.units == {"celsius": "degC", "u": "m s-1", "w": "km h-1"}
    assert config.variables == {"celsius": "single", "u": "all", "w": "all"}
    assert config.pressure_hpa == [1000.0, 500.0]
    wind = dataset.wind.isel(member=1).transpose("time", "level", "lat", "lon").values  # level: 1000, 500, 850
    air = (dataset.air.values - 273.15).astype(np.float32)
    for i in (0, 17, 35):
        np.testing.assert_array_equal(load(tmp_path / "tree", "celsius", TIMES[i]), air[i])
        for place, channel in enumerate(("level_00", "level_01")):
            np.testing.assert_array_equal(load(tmp_path / "tree", f"u_{channel}", TIMES[i]), wind[i, place])
            converted = (wind[i, place].astype(np.float64) * 3.6).astype(np.float32)
            np.testing.assert_array_equal(load(tmp_path / "tree", f"w_{channel}", TIMES[i]), converted)
    train = air[:20].astype(np.float64)
    np.testing.assert_allclose(read_mean_std(tmp_path / "tree", "celsius"), (train.mean(), train.std()), rtol=1e-9)


def test_several_files_make_the_same_tree(tmp_path):
    """切成几个文件，其中一个的时刻是标量：与一个文件逐字节相同。"""
    dataset = make_dataset()
    parts = [dataset.isel(time=slice(0, 20)), dataset.isel(time=20), dataset.isel(time=slice(21, None))]
    paths = [tmp_path / f"{i}.nc" for i in range(3)]
    for part, path in zip(parts, paths, strict=True):
        part.to_netcdf(path)
    dataset.to_netcdf(tmp_path / "whole.nc")
    words = ("--variable", "air=air", "--variable", "wind=u")
    one, many = (
        import_all(files, tmp_path / root, *words) for files, root in (([tmp_path / "whole.nc"], "a"), (paths, "b"))
    )
    assert one.model_dump(exclude={"root"}) == many.model_dump(exclude={"root"})
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.npy"))
    assert len(files) == 4 * 36
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


@pytest.mark.parametrize("method", ["bilinear", "conservative"])
def test_regrid_while_importing(method, tmp_path):
    """场、统计量、坐标轴都是换网格之后的；缺测照样略去一个场。"""
    dataset = make_dataset(longitudes=np.arange(8) * 45.0)
    dataset.air[30, 2, 2] = np.nan
    dataset.to_netcdf(tmp_path / "source.nc")
    grid = ["--latitude", "15", "-10", "4", "--longitude", "0", "30", "12"]
    config = import_all([tmp_path / "source.nc"], tmp_path / "tree", "--variable", "air=air", "--regrid", method, *grid)
    assert config.latitude.values() == (15, 5, -5, -15)
    assert config.longitude.values() == tuple(range(0, 360, 30))
    target = Target(method, config.latitude, config.longitude)
    expected = make_regridder(dataset.lat.values, dataset.lon.values, target)(dataset.air.values).astype(np.float32)
    np.testing.assert_array_equal(load(tmp_path / "tree", "air", TIMES[11]), expected[11])
    assert not field_path(tmp_path / "tree", "air", TIMES[30]).exists()
    train = expected[:20].astype(np.float64)
    np.testing.assert_allclose(read_mean_std(tmp_path / "tree", "air"), (train.mean(), train.std()), rtol=1e-9)
    limits = json.loads((tmp_path / "tree/air_npy/min_max.json").read_text())
    assert limits == {"min": [train.min()], "max": [train.max()]}
    assert method in (tmp_path / "tree.yaml").read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variables: {t: {sourse: air}}", "sourse.*source"),
        ("variables: {}", "variables is empty"),
        ("variables: {t: {scale: 2}}", "scale and offset need units"),
        ("variables: {t: {scale: 0, units: K}}", "scale must not be 0"),
        ("variables: {t: {scale: two, units: K}}", "variables.t.scale"),
        ("variables: {t_level_00: {}}", "'t_level_00' is not a name"),
        ("variables: {t: {}}\npressure_hpa: [500, 500]", "holds a level twice"),
        ("variables: {t: {source: air, units: degC}}", "units 'degC' wanted, the file has 'K'; write the scale"),
        ("variables: {t: {source: wind}}\npressure_hpa: [850, 700]", "no level 700.* hPa; there: 500.0, 850.0, 1000.0"),
        ("variables: {t: {source: wind}}\nselect: {number: 4}", "select number=4: 0 such entries; there: 0"),
        ("variables: {t: {source: wind}}\nselect: {step: 4}", "select step: no such axis"),
        ("variables: {t: {source: wind}}\nselect: {lat: 0, mask: 1}", "select mask: no such axis"),
        ("variables: {t: {source: wind}}\nselect: [4]", "select"),
        ("variables: {t: {source: air, filter: {shortName: t}}}", "filter shortName is for GRIB messages"),
    ],
)
def test_bad_maps(text, message, tmp_path):
    make_dataset().to_netcdf(tmp_path / "source.nc")
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        import_all([tmp_path / "source.nc"], tmp_path / "tree", "--map", str(tmp_path / "map.yaml"))
    assert not (tmp_path / "tree").exists()


def test_bad_options(tmp_path):
    with pytest.raises(ValueError, match="--map and --variable exclude each other"):
        read_request("map.yaml", ["air=air"])
    with pytest.raises(ValueError, match="--filter level: write KEY=VALUE"):
        read_request(None, ["air=air"], filters=["level"])
    request = read_request(None, ["t=t"], ["number=3"], ["shortName=t"])
    given = {"select": {"number": 3}, "filter": {"shortName": "t"}}
    assert request.model_dump(exclude={"variables"}, exclude_defaults=True) == given
    with pytest.raises(ValueError, match="--regrid METHOD, --latitude .* go together"):
        read_target("bilinear", [0, 1, 2], None)
    with pytest.raises(ValueError, match="--longitude 0 1 2.5: COUNT must be a whole number"):
        read_target("bilinear", [0, 1, 2], [0, 1, 2.5])
    assert read_target("bilinear", [80, -1, 2], [0, 1, 2]) == Target(
        "bilinear", Axis(first=80, step=-1, count=2), Axis(first=0, step=1, count=2)
    )


def test_files_must_agree(tmp_path):
    dataset = make_dataset()
    later = dataset.isel(time=slice(20, None))
    later_in_celsius = later.assign(air=(later.air - 273.15).assign_attrs(units="degC"))
    bad = {
        "twice": (
            dataset.isel(time=slice(0, 20)),
            r"20 times occur more than once, first 2000-01-01T00 \(air in .*first.nc and .*twice.nc\)",
        ),
        "grid": (
            later.assign_coords(lat=2 * later.lat),
            r"grid.nc: .*its lat .*differs from that of .*first.nc",
        ),
        "units": (later_in_celsius, r"air: units 'K' in .*first.nc, 'degC' in .*units.nc"),
        "levels": (
            later.assign(air=later.air.expand_dims(level=3, axis=1)),
            r"levels in .*levels.nc, none in .*first.nc",
        ),
    }
    dataset.isel(time=slice(0, 20)).to_netcdf(tmp_path / "first.nc")
    for name, (second, message) in bad.items():
        second.to_netcdf(tmp_path / f"{name}.nc")
        with pytest.raises(ValueError, match=message):
            import_all([tmp_path / "first.nc", tmp_path / f"{name}.nc"], tmp_path / "tree", "--variable", "air=air")


def test_levels_must_agree_unless_stated(tmp_path):
    """哪个文件在前都一样：不悄悄地少一层；写明了就取那些。"""
    dataset = make_dataset()[["wind"]].sortby("level")
    dataset.isel(time=slice(0, 20), level=[0, 2]).to_netcdf(tmp_path / "few.nc")
    dataset.isel(time=slice(20, None)).to_netcdf(tmp_path / "all.nc")
    few, every = (rf"u in \S*{name}.nc has {levels} hPa" for name, levels in FEW_AND_ALL)
    for first, second, message in (("few", "all", f"{few}, {every}"), ("all", "few", f"{every}, {few}")):
        files = [tmp_path / f"{first}.nc", tmp_path / f"{second}.nc"]
        with pytest.raises(ValueError, match=f"the levels differ: {message}; say with --levels"):
            import_all(files, tmp_path / "tree", "--variable", "wind=u")
    config = import_all(files, tmp_path / "tree", "--variable", "wind=u", "--levels", "1000", "500")
    assert config.pressure_hpa == [1000, 500]
    np.testing.assert_array_equal(
        load(tmp_path / "tree", "u_level_00", TIMES[30]),
        dataset.wind.isel(time=30, number=0).sel(level=1000).transpose("lat", "lon").values,
    )


@pytest.mark.parametrize("together", [1, 3])
def test_levels_with_others_between(together, tmp_path):
    """要的两层之间隔着不要的（文件里的次序是 1000、500、850）：一层一块，或几层在一块里。"""
    dataset = make_dataset()[["wind"]].transpose("time", "level", "number", "lat", "lon")
    dataset.to_netcdf(tmp_path / "a.nc", encoding={"wind": {"chunksizes": (4, together, 1, 5, 8), "zlib": True}})
    words = ("--variable", "wind=u", "--levels", "850", "1000")
    import_all([tmp_path / "a.nc"], tmp_path / "tree", *words)
    for level, pressure in enumerate((850, 1000)):
        got = [load(tmp_path / "tree", f"u_level_{level:02d}", hour) for hour in TIMES]
        np.testing.assert_array_equal(got, dataset.wind.sel(level=pressure, number=0).values)


def test_levels_of_variables_without_levels(tmp_path):
    make_dataset().to_netcdf(tmp_path / "a.nc")
    words = ("--levels", "500", "850")
    with pytest.raises(ValueError, match=r"--levels .* 500, 850 hPa: none of air has levels; leave it out"):
        import_all([tmp_path / "a.nc"], tmp_path / "tree", "--variable", "air=air", *words)
    with pytest.raises(ValueError, match="--levels is for the variables"):
        main(["--source", str(tmp_path / "a.nc"), "--root", str(tmp_path / "tree"), "--static", "mask=mask", *words])


def test_grib_without_the_library(tmp_path, monkeypatch):
    (tmp_path / "a.grib").write_bytes(b"GRIB" + bytes(100))
    monkeypatch.setitem(sys.modules, "cfgrib", None)
    with pytest.raises(ValueError, match=r"needs cfgrib and eccodes.*pip install -r requirements-grib.txt"):
        open_source(tmp_path / "a.grib")


def messages(path: Path, **keys: Any) -> list[tuple[dict[str, Any], np.ndarray]]:
    """用 eccodes 直接逐条读：(日期、时刻、步、层, 值 (H, W))，不经 cfgrib、xarray。"""
    import eccodes  # pyright: ignore[reportMissingImports]

    found = []
    with path.open("rb") as file:
        while (handle := eccodes.codes_grib_new_from_file(file)) is not None:
            names = ("dataDate", "dataTime", "step", "level", "Nj", "Ni", *keys)
            about = {name: eccodes.codes_get(handle, name) for name in names}
            if all(about[key] == value for key, value in keys.items()):
                values = eccodes.codes_get_values(handle).reshape(about["Nj"], about["Ni"])
                found.append((about, values.astype(np.float32)))
            eccodes.codes_release(handle)
    return found


def copy_grib(path: Path, out: Path, names: tuple[str, ...], count: int = 10**6, days: int = 0, **changes: Any) -> Path:
    """抄前 count 条短名在 names 里的消息，日期推后 days 天，另改几个键。"""
    import eccodes  # pyright: ignore[reportMissingImports]

    with path.open("rb") as file, out.open("wb") as copy:
        while count and (handle := eccodes.codes_grib_new_from_file(file)) is not None:
            if eccodes.codes_get(handle, "shortName") in names:
                day = moment_of(24 * (valid_day(eccodes.codes_get(handle, "dataDate")) + days))
                for key, value in {"dataDate": int(day.strftime("%Y%m%d")), **changes}.items():
                    eccodes.codes_set(handle, key, value)
                eccodes.codes_write(handle, copy)
                count -= 1
            eccodes.codes_release(handle)
    return out


def valid_day(date: int) -> int:
    """20190301 → 1970 年以来的日子。"""
    text = str(date)
    return int(np.datetime64(f"{text[:4]}-{text[4:6]}-{text[6:]}", "D").astype(int))


def valid_hour(about: dict[str, Any]) -> int:
    return 24 * valid_day(about["dataDate"]) + about["dataTime"] // 100 + about["step"]


@NEEDS_GRIB
def test_grib_single_level(real_data, tmp_path):
    path = copy_grib(real_data / "importer/era5-2mt-2019-03-uk.grib", tmp_path / "t.grib", ("2t",), count=72)
    dates = dates_of("2019-03-01", "2019-03-02", "2019-03-03")
    config = import_all([path], tmp_path / "tree", "--variable", "t2m=t2m", "--crop", "8x16", dates=dates)
    assert (config.interval_hours, config.units) == (1, {"t2m": "K"})
    found = messages(path)
    assert len(found) == len(list((tmp_path / "tree").rglob("*.npy"))) == 72
    for about, values in found[::23]:
        np.testing.assert_array_equal(load(tmp_path / "tree", "t2m", valid_hour(about)), values[12:20, 16:32])


@NEEDS_GRIB
def test_grib_member(real_data, tmp_path):
    """十个成员里取一个：用 select 与用 filter 相同；不取，一行说清。两个文件接起来。"""
    path = real_data / "importer/era5-levels-members.grib"
    sources = [path, copy_grib(path, tmp_path / "later.grib", ("z", "t"), days=2)]
    dates = dates_of("2017-01-01", "2017-01-02", "2017-01-03")
    words = ("--variable", "z=z", "--variable", "t=t")
    with pytest.raises(ValueError, match=r"number \(10\) cannot be imported; --select"):
        import_all(sources, tmp_path / "none", *words, dates=dates)
    found = messages(path, shortName="z", number=3)
    assert len(found) == 8
    for root, how in (("a", ("--select", "number=3")), ("b", ("--filter", "number=3"))):
        config = import_all(sources, tmp_path / root, *words, *how, dates=dates)
        assert config.pressure_hpa == [500.0, 850.0]
        for about, values in found:
            channel = f"z_level_{[500, 850].index(about['level']):02d}"
            for hour in (valid_hour(about), valid_hour(about) + 48):
                np.testing.assert_array_equal(load(tmp_path / root, channel, hour), values)


@NEEDS_GRIB
def test_grib_steps_and_map(real_data, tmp_path):
    """两个预报步里取一步，六层里取两层，换单位；有效时刻 = 起报 + 步。"""
    path = real_data / "importer/pl_regular_ll.grib"
    sources = [path, copy_grib(path, tmp_path / "later.grib", ("t", "r"), days=2)]
    found = messages(path, shortName="t", step=0)
    first = min(valid_hour(about) for about, _ in found)
    dates = dates_of(*(str(moment_of(first + 24 * i).date()) for i in range(3)))
    (tmp_path / "map.yaml").write_text(
        "variables:\n  t: {offset: -273.15, units: degC}\n  r: {}\npressure_hpa: [850, 500]\n"
    )
    words = ("--map", str(tmp_path / "map.yaml"), "--select", "step=0")
    config = import_all(sources, tmp_path / "tree", *words, dates=dates)
    assert config.units == {"t": "degC", "r": "%"}
    compared = 0
    for about, values in found:
        if about["level"] in (850, 500):
            channel = f"t_level_{[850, 500].index(about['level']):02d}"
            celsius = (values.astype(np.float64) - 273.15).astype(np.float32)
            np.testing.assert_array_equal(load(tmp_path / "tree", channel, valid_hour(about)), celsius)
            compared += 1
    assert compared == 8
    words = ("--map", str(tmp_path / "map.yaml"), "--select", "step=6")
    assert import_all(sources, tmp_path / "other", *words, dates=dates).first_hour == 6  # 起报 00、12，有效 06、18


@NEEDS_GRIB
def test_grib_of_many_kinds(real_data, tmp_path):
    """GFS 一个文件里有许多种层：不挑就说清，按变量各自挑；只有一个时刻（12 时），改两份成其后的 0 时。"""
    names = ("2t", "gh", "10u")
    path = copy_grib(real_data / "importer/gfs.t12z.pgrbf120.2p5deg.grib2", tmp_path / "0.grib2", names)
    with pytest.raises(ValueError, match=r"cannot be opened \(.*typeOfLevel.*--filter KEY=VALUE"):
        open_source(path)
    with pytest.raises(ValueError, match="no variable 't2m' in the file.*no message with shortName=nothing"):
        import_all([path], tmp_path / "none", "--variable", "t2m=t2m", "--filter", "shortName=nothing")
    ((about, t2m),) = messages(path, shortName="2t")
    first = valid_hour(about)
    hours = [first, first + 12, first + 36]
    sources = [path, *(copy_grib(path, tmp_path / f"{i}.grib2", names, days=i, dataTime=0) for i in (1, 2))]
    (tmp_path / "map.yaml").write_text(
        "variables:\n"
        "  t2m: {filter: {shortName: 2t}}\n"
        "  z: {source: gh, scale: 9.80665, units: m2 s-2, filter: {shortName: gh, typeOfLevel: isobaricInhPa}}\n"
        "pressure_hpa: [500, 850]\n"
    )
    dates = dates_of(*(str(moment_of(hour).date()) for hour in hours))
    import_all(sources, tmp_path / "tree", "--map", str(tmp_path / "map.yaml"), dates=dates)
    ((_, height),) = messages(path, shortName="gh", typeOfLevel="isobaricInhPa", level=500)
    z = (height.astype(np.float64) * 9.80665).astype(np.float32)
    for hour in hours:
        np.testing.assert_array_equal(load(tmp_path / "tree", "t2m", hour), t2m)
        np.testing.assert_array_equal(load(tmp_path / "tree", "z_level_00", hour), z)


@NEEDS_GRIB
def test_cut_grib(real_data, tmp_path):
    """打开时就截断的；打开之后才截断的。"""
    path = tmp_path / "cut.grib"
    whole = (real_data / "importer/era5-2mt-2019-03-uk.grib").read_bytes()
    path.write_bytes(whole[: len(whole) // 10])
    with pytest.raises(ValueError, match="cut.grib: cannot be opened"):
        open_source(path)
    path.write_bytes(whole)
    request = read_request(None, ["t2m=t2m"])
    splits = {
        "train": ["2019-03-01", "2019-03-10"],
        "val": ["2019-03-11", "2019-03-12"],
        "test": ["2019-03-13", "2019-03-14"],
    }
    with ExitStack() as stack:
        held, _ = open_wanted(find_sources([str(path)], stack), request, stack)
        plan = plan_import(held, tmp_path / "tree", request, splits)
        path.write_bytes(whole[:1000])
        with pytest.raises(ValueError, match="variable t2m: unreadable in the block that starts at 2019-03-01T00"):
            write_fields(plan)


def test_real_model_layout(real_data, tmp_path):
    """(level, longitude, latitude)、纬度升序、高斯网格、标量时刻：三个文件换到规则网格，面积平均不变。"""
    with open_source(real_data / "importer/era5_tl31_19590102T00.nc") as opened:
        dataset = opened[["temperature", "geopotential"]].load()
    sources = [tmp_path / f"{i}.nc" for i in range(3)]
    for i, path in enumerate(sources):
        dataset.assign_coords(time=dataset.time + np.timedelta64(i, "D")).to_netcdf(path)
    (tmp_path / "map.yaml").write_text(
        "variables:\n  t: {source: temperature}\n  z: {source: geopotential}\npressure_hpa: [500, 850]\n"
    )
    grid = ("--regrid", "conservative", "--latitude", "78.75", "-22.5", "8", "--longitude", "0", "22.5", "16")
    dates = dates_of("1959-01-02", "1959-01-03", "1959-01-04")
    config = import_all(sources, tmp_path / "tree", "--map", str(tmp_path / "map.yaml"), *grid, dates=dates)
    assert config.units == {"t": "K", "z": "m2 s-2"}
    target = Target("conservative", config.latitude, config.longitude)
    field = dataset.temperature.sel(level=850).transpose("latitude", "longitude").values.astype(np.float64)
    result = load(tmp_path / "tree", "t_level_01", hour_of(dataset.time.values) + 24)
    regrid = make_regridder(dataset.latitude.values, dataset.longitude.values, target)
    np.testing.assert_array_equal(result, regrid(field).astype(np.float32))
    edges = np.r_[-90, (dataset.latitude.values[1:] + dataset.latitude.values[:-1]) / 2, 90]
    mean = np.average(field.mean(axis=1), weights=np.diff(np.sin(np.deg2rad(edges))))
    area = np.cos(np.deg2rad(np.array(config.latitude.values())))  # 等距的格子：sin 之差与 cos 中心成正比
    np.testing.assert_allclose(np.average(result.mean(axis=1, dtype=np.float64), weights=area), mean, rtol=1e-7)
