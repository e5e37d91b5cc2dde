"""导入：写出的场、统计量、YAML 与 xarray 和 NumPy 直接算的一致；坏输入一行说清。"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from util.calendar import moment_of
from util.commands.import_fields import main
from util.config import DataConfig, load_config, read_mapping
from util.data.index import find_segments, scan, split_years
from util.data.tree_files import field_path, read_field, read_mean_std
from util.exchange import plan as importing
from util.exchange.into_tree import write_fields
from util.exchange.plan import ImportPlan, blocks_of, plan_import, read_blocks
from util.exchange.summary import summarize
from util.files.moments import Moments, measure
from util.source.axes import read_axis
from util.source.collection import Source
from util.source.opening import open_source
from util.source.request import Request
from util.source.wanted import Held
from util.strict import validate

SPLITS = {
    "train": ["2000-01-01", "2000-01-05"],
    "val": ["2000-01-06", "2000-01-07"],
    "test": ["2000-01-08", "2000-01-09"],
}
DATES = [word for name, dates in SPLITS.items() for word in (f"--{name}", *dates)]
CONFIGS = Path(__file__).parents[3] / "config" / "data"
PRESSURES = [1000.0, 500.0, 850.0]


def make_dataset(hours=None, latitudes=None, longitudes=None) -> xr.Dataset:
    """九天 6 小时、3 层、5 x 8；纬度由南向北。wind 各维的次序故意打乱，还带一个长度为 1 的成员维。"""
    hours = np.arange(0, 9 * 24, 6) if hours is None else np.asarray(hours)
    times = np.datetime64("2000-01-01", "ns") + hours.astype("timedelta64[h]")
    latitudes = np.linspace(-20, 20, 5) if latitudes is None else latitudes
    longitudes = np.linspace(0, 70, 8, dtype=np.float32) if longitudes is None else longitudes
    rng = np.random.default_rng(0)
    shape = {"time": len(times), "level": 3, "lat": len(latitudes), "lon": len(longitudes)}
    air = 280 + 10 * rng.standard_normal((shape["time"], shape["lat"], shape["lon"]))
    wind = rng.standard_normal((shape["lon"], shape["level"], 1, shape["time"], shape["lat"])).astype(np.float32)
    return xr.Dataset(
        {
            "air": (("time", "lat", "lon"), air, {"units": "degK"}),
            "wind": (("lon", "level", "number", "time", "lat"), wind, {"units": "m s**-1"}),
            "mask": (("lat", "lon"), air[0]),
        },
        {
            "time": times,
            "level": ("level", PRESSURES, {"units": "hPa"}),
            "number": [0],
            "lat": latitudes,
            "lon": longitudes,
        },
    )


def expected(dataset: xr.Dataset, variable: str, hour: int, **where) -> np.ndarray:
    """xarray 自己按标签取的场。"""
    field = dataset[variable].sel(time=np.datetime64(moment_of(hour)), **where).squeeze(drop=True)
    return field.transpose("lat", "lon").values.astype(np.float32)


def plan_of(dataset: xr.Dataset, root: Path | str, names: dict[str, str], splits=SPLITS, **options) -> ImportPlan:
    """names: 源变量 → 目录树里的名字。"""
    request = Request.model_validate({"variables": {name: {"source": source} for source, name in names.items()}})
    held = {name: [Held(Source("a.nc", "a.nc"), dataset)] for name in request.variables}
    return plan_import(held, root, request, splits, **options)


def hours_of(dataset: xr.Dataset) -> list[int]:
    return dataset.time.values.astype("datetime64[h]").astype(int).tolist()


@pytest.fixture(params=["nc", "zarr", "zarr-unconsolidated"])
def source(request, tmp_path) -> tuple[xr.Dataset, Path]:
    """同一个数据集写成 NetCDF、合并与未合并元数据的 Zarr（第 2 版格式）。"""
    dataset = make_dataset()
    if request.param == "nc":
        path = tmp_path / "source.nc"
        dataset.to_netcdf(path)
    else:
        path = tmp_path / "source.zarr"
        dataset.to_zarr(path, zarr_format=2, consolidated=request.param == "zarr")
        assert (path / ".zmetadata").exists() == (request.param == "zarr")
    return dataset, path


def test_fields_statistics_and_yaml(source, tmp_path, monkeypatch, capsys):
    """转置、多层、纬度升序、长度为 1 的维；块很小，跨块合并也要对。"""
    dataset, path = source
    monkeypatch.setattr(importing, "BLOCK_BYTES", 7 * 5 * 8 * 8)  # 每块 7 个时刻
    root, out = tmp_path / "tree", tmp_path / "set.yaml"
    variables = ["--variable", "air=air", "--variable", "wind=u"]
    main(["--source", str(path), "--root", str(root), *variables, *DATES, "--yaml", str(out)])

    hours = hours_of(dataset)
    for hour in (hours[0], hours[13], hours[-1]):
        np.testing.assert_array_equal(read_field(field_path(root, "air", hour), (5, 8)), expected(dataset, "air", hour))
        for i, pressure in enumerate(sorted(PRESSURES)):  # level_00 气压最低
            got = read_field(field_path(root, f"u_level_{i:02d}", hour), (5, 8))
            np.testing.assert_array_equal(got, expected(dataset, "wind", hour, level=pressure))
    assert len(list(root.rglob("*.npy"))) == 4 * len(hours)

    train = dataset.sel(time=slice("2000-01-01", "2000-01-05"))
    assert train.sizes["time"] == 20
    for channel, array in (("air", train.air), ("u_level_01", train.wind.sel(level=850.0))):
        values = array.values.astype(np.float32).astype(np.float64)
        np.testing.assert_allclose(read_mean_std(root, channel), (values.mean(), values.std()), rtol=1e-12, atol=1e-14)
        limits = json.loads((field_path(root, channel, hours[0]).parents[1] / "min_max.json").read_text())
        assert limits == {"min": [values.min()], "max": [values.max()]}

    config = validate(DataConfig, read_mapping(out) | {"frames_in": 3}, "set")
    assert config.variables == {"air": "single", "u": "all"}
    assert config.units == {"air": "K", "u": "m s-1"}
    assert config.pressure_hpa == [500.0, 850.0, 1000.0]
    assert (config.latitude.values(), config.longitude.values()) == (
        tuple(dataset.lat.values),
        tuple(dataset.lon.values),
    )
    assert config.interval_hours == 6
    summary = capsys.readouterr().out
    assert "times     36, 2000-01-01T00 to 2000-01-09T18, every 6 h" in summary
    assert "level_00 = 500 hPa, level_01 = 850 hPa, level_02 = 1000 hPa" in summary


def test_crop():
    """中央裁剪与指定行列；坐标轴跟着走。"""
    dataset = make_dataset()
    cases = [
        ({"crop": "4x6"}, dataset.isel(lat=slice(0, 4), lon=slice(1, 7))),
        ({"rows": "1:5", "cols": "2:"}, dataset.isel(lat=slice(1, 5), lon=slice(2, 8))),
    ]
    for options, cut in cases:
        plan = plan_of(dataset, "tree", {"air": "air"}, SPLITS, **options)
        block, _ = next(read_blocks(plan, blocks_of(plan)))
        np.testing.assert_array_equal(block[:, 0], cut.air.values.astype(np.float32))
        assert plan.config.latitude.values() == tuple(cut.lat.values)
        assert plan.config.longitude.values() == tuple(cut.lon.values)


def test_non_finite_fields_are_left_out(tmp_path):
    """含 NaN 的场不写、不进统计；覆盖时连旧的一起去掉。"""
    dataset = make_dataset()
    write_fields(plan_of(dataset, tmp_path, {"air": "air"}, SPLITS))
    dataset.air[3, 1, 1], dataset.air[30, 0, 0] = np.nan, np.inf
    plan = plan_of(dataset, tmp_path, {"air": "air"}, SPLITS)
    found = write_fields(plan, overwrite=True)
    holes = found.holes
    hours = hours_of(dataset)
    assert holes == [("air", hours[3]), ("air", hours[30])]
    assert not any(field_path(tmp_path, "air", hour).exists() for _, hour in holes)
    assert len(list(tmp_path.rglob("*.npy"))) == len(hours) - 2
    kept = np.delete(dataset.air.values[:20], 3, axis=0).astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(read_mean_std(tmp_path, "air"), (kept.mean(), kept.std()), rtol=1e-12)
    assert any("air 2000-01-01T18" in line for line in summarize(plan, found))


def test_moments_keep_precision():
    """均值远大于起伏时，逐块合并仍与整体一次算的相同。"""
    fields = (5e5 + np.random.default_rng(0).standard_normal((50, 4, 4))).astype(np.float32)
    moments = reduce(Moments.merge, map(measure, np.split(fields, [1, 1, 20])), Moments())
    exact = fields.astype(np.float64)
    np.testing.assert_allclose((moments.mean, moments.std), (exact.mean(), exact.std()), rtol=1e-9)
    assert (moments.total, moments.low, moments.high) == (fields.size, exact.min(), exact.max())


def test_unsorted_times_and_gaps(tmp_path):
    """时刻乱序：每个场仍进自己时刻的文件；空缺按排好序的时刻算。"""
    hours = np.r_[np.arange(108, 216, 6), np.arange(0, 96, 6)]  # 后半在前，中间空 18 小时
    dataset = make_dataset(hours)
    plan = plan_of(dataset, tmp_path, {"air": "air"}, SPLITS)
    found = write_fields(plan)
    for hour in (hours_of(dataset)[0], hours_of(dataset)[-1]):
        np.testing.assert_array_equal(np.load(field_path(tmp_path, "air", hour)), expected(dataset, "air", hour))
    start = min(hours_of(dataset))
    assert plan.gaps == [(start + 90, start + 108)]
    summary = "\n".join(summarize(plan, found))
    assert "gaps      1 longer than 6 h" in summary
    assert "2000-01-04T18 to 2000-01-05T12, 18 h" in summary
    assert "not sorted" in summary


def test_existing_files_are_kept(tmp_path):
    plan = plan_of(make_dataset(), tmp_path, {"air": "air"}, SPLITS)
    write_fields(plan)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    with pytest.raises(ValueError, match=r"air_npy: \d+ of the \d+ files .*, first 2000-0000.npy, .*give --overwrite"):
        write_fields(plan)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    write_fields(plan, overwrite=True)


def test_valid_time_and_pascal(tmp_path):
    """新的 Climate Data Store 布局：时间维叫 valid_time，expver 是随时间的文字坐标；气压单位为 Pa。"""
    dataset = make_dataset().rename(time="valid_time", level="pressure_level", lat="latitude", lon="longitude")
    dataset = dataset.assign_coords(
        expver=("valid_time", ["0001"] * dataset.sizes["valid_time"]),
        pressure_level=("pressure_level", [p * 100 for p in PRESSURES], {"units": "Pa"}),
    )
    dataset.to_netcdf(tmp_path / "new.nc")
    with open_source(tmp_path / "new.nc") as opened:
        plan = plan_of(opened, tmp_path, {"wind": "u"}, SPLITS)
    assert plan.names == ["u_level_00", "u_level_01", "u_level_02"]
    assert plan.config.pressure_hpa == [500.0, 850.0, 1000.0]


def test_other_calendars_are_refused(tmp_path):
    make_dataset().convert_calendar("noleap").to_netcdf(tmp_path / "noleap.nc")
    message = r"time: calendar 'noleap'.*only standard-calendar dates"
    with open_source(tmp_path / "noleap.nc") as opened, pytest.raises(ValueError, match=message):
        plan_of(opened, tmp_path, {"air": "air"}, SPLITS)


def test_float32_axis_is_written_short():
    """float32 存的 0.1 度，写进 YAML 仍是 0.1。"""
    longitudes = np.arange(3600, dtype=np.float32) * np.float32(0.1)
    axis = read_axis(xr.Dataset(coords={"lon": longitudes}), "lon", slice(10, 20))
    assert (axis.first, axis.step, axis.count) == (1.0, 0.1, 10)


GAUSSIAN = np.degrees(np.arcsin(np.polynomial.legendre.leggauss(32)[0]))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (make_dataset(latitudes=GAUSSIAN), "lat: not evenly spaced .* Gaussian grid.*regrid"),
        (make_dataset([0, 6, 12, 12, 18]), "time: 1 times occur more than once, first 2000-01-01T12"),
        (make_dataset([3, 9, 15, 24]), "2000-01-02T00 .1 such times.*smallest step is 6 h.*not on a step"),
        (make_dataset([0, 5, 10]), "data.splits.val = .*empty"),
        (make_dataset([0]), "only one time"),
        (make_dataset(np.arange(0, 72, 6)), "splits.val = .*2000-01-07.*: empty.*2000-01-01T00 to 2000-01-03T18"),
        (make_dataset().isel(time=slice(24, None)), "data.splits.train = .*: empty, no samples there.*give --train"),
        (make_dataset().assign_coords(time=make_dataset().time + np.timedelta64(30, "m")), "T00:30.* not a full hour"),
        (make_dataset().rename(time="step"), "no time axis.*valid_time or time"),
        (make_dataset().rename(lat="y"), "no axis named latitude or lat; dimensions there: .*y"),
        (make_dataset().isel(number=[0, 0]), r"variable wind: dimension number \(2\) cannot be imported"),
        (
            make_dataset().assign_coords(level=("level", [1, 2, 3], {"units": "1"})),
            "level: units '1' are not a pressure",
        ),
        (make_dataset().assign(wind=make_dataset().air.mean("time")), "variable wind: no dimension time; .* lat, lon"),
    ],
)
def test_bad_sources(dataset, message):
    with pytest.raises(ValueError, match=message):
        plan_of(dataset, "tree", {"wind": "u"}, SPLITS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "6x8"}, "--crop 6x8: does not fit into the grid 5x8"),
        ({"crop": "4,8"}, "--crop 4,8: write it like 24x48"),
        ({"crop": "4x8", "rows": "0:4"}, "exclude each other"),
        ({"rows": "2:9"}, "--rows 2:9: the file has 5"),
        ({"cols": "3:3"}, "--cols 3:3: the file has 8"),
    ],
)
def test_bad_crop(options, message):
    with pytest.raises(ValueError, match=message):
        plan_of(make_dataset(), "tree", {"air": "air"}, SPLITS, **options)


def test_bad_statistics(tmp_path):
    dataset = make_dataset()
    dataset["air"] = dataset.air * 0 + 5
    with pytest.raises(ValueError, match="air: 5 everywhere in the training dates"):
        write_fields(plan_of(dataset, tmp_path, {"air": "air"}, SPLITS))
    dataset["air"] = dataset.air * np.nan
    with pytest.raises(ValueError, match="air: no finite field in the training dates 2000-01-01 to 2000-01-05"):
        write_fields(plan_of(dataset, tmp_path, {"air": "air"}, SPLITS), overwrite=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no --variable; choose at least one of air, wind, mask"),
        (["aire=air"], "no variable 'aire' in the file (nearest: air); there: air, wind, mask"),
        (["air"], "write SOURCE=NAME"),
        (["air=a/b"], "write SOURCE=NAME"),
        (["air=x", "wind=x"], "'wind' or 'x' is given twice"),
        (["air=x", "air=y"], "'air' or 'y' is given twice"),
    ],
)
def test_bad_variables(words, message, tmp_path):
    make_dataset().to_netcdf(tmp_path / "source.nc")
    variables = [part for word in words for part in ("--variable", word)]
    with pytest.raises(ValueError, match="variable") as error:
        main(["--source", str(tmp_path / "source.nc"), "--root", str(tmp_path / "tree"), *variables, *DATES])
    assert message in str(error.value)


def test_bad_files(tmp_path):
    """打不开的来源都是 ValueError；命令行一行、退出码 2、没有 traceback。"""
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("not data")
    make_dataset().to_netcdf(tmp_path / "whole.nc")
    (tmp_path / "cut.nc").write_bytes((tmp_path / "whole.nc").read_bytes()[:3000])
    for name, message in (
        ("absent.nc", "no such file"),
        ("empty", "not a Zarr store"),
        ("notes.txt", "not a NetCDF file"),
        ("cut.nc", "cannot be opened"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / name)
    command = [sys.executable, "dataset.py", "import", "--root", str(tmp_path / "tree"), *DATES]
    done = subprocess.run([*command, "--source", "absent.nc"], capture_output=True, text=True, cwd=CONFIGS.parents[1])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: absent.nc: no such file or folder\n"


@pytest.mark.parametrize("name", ["ncep_air", "gfs_wind"])
def test_data_set_configs_load(name, tmp_path):
    """两份数据集 YAML 能被运行 YAML 引用。"""
    run = tmp_path / "run.yaml"
    lines = [
        f"data: {{set: '{CONFIGS / name}.yaml', frames_in: 3}}",
        "model: {name: none}",
        "train: {epochs: 1, batch_size: 1}",
    ]
    run.write_text("\n".join(lines))
    config = load_config(run)
    assert (config.data.frames_in, config.data.interval_hours, config.data.standardize) == (3, 6, "yes")
    assert config.data.latitude.count % 8 == 0 == config.data.longitude.count % 8


@pytest.mark.parametrize(
    ("name", "source", "variables", "crop", "count", "segments"),
    [
        (
            "ncep_air",
            "ncep_air_namerica_6h/air_temperature_6h_2013_2014.zarr",
            {"air": "air"},
            {"rows": "0:24", "cols": "0:48"},
            2920,
            {"train": [1940], "val": [244], "test": [736]},
        ),
        (
            "gfs_wind",
            "gfs_wind10m_6h/gfs_analysis_wind10m_5.625deg_6h_2026.nc",
            {"u10": "u10", "v10": "v10"},
            {},
            361,
            {"train": [60, 114, 1, 10, 90], "val": [22, 5], "test": [60]},  # 最后一个时刻是端点保持
        ),
    ],
)
def test_real_data(name, source, variables, crop, count, segments, real_data, tmp_path):
    """真实文件：场与 xarray 一致；YAML 与仓库里的相同；长空缺断开窗口。"""
    written = read_mapping(CONFIGS / f"{name}.yaml")
    splits = {key: [str(day) for day in days] for key, days in written["splits"].items()}
    with open_source(real_data / source) as dataset:
        plan = plan_of(dataset, tmp_path / "tree", variables, splits, **crop)
        assert write_fields(plan).holes == []
        cut = dataset.isel(lat=plan.region[0], lon=plan.region[1])
        shape = cut.sizes["lat"], cut.sizes["lon"]
        for channel in variables:
            assert len(list((tmp_path / "tree" / f"{channel}_npy").rglob("*.npy"))) == count == len(hours_of(dataset))
            got = [read_field(field_path(tmp_path / "tree", channel, hour), shape) for hour in hours_of(dataset)]
            np.testing.assert_array_equal(got, cut[channel].transpose("time", "lat", "lon").values.astype(np.float32))
            train = cut[channel].sel(time=slice(*splits["train"])).values.astype(np.float32).astype(np.float64)
            np.testing.assert_allclose(
                read_mean_std(tmp_path / "tree", channel), (train.mean(), train.std()), rtol=1e-9, atol=1e-12
            )
    own = validate(DataConfig, written | {"frames_in": 3, "root": str(tmp_path / "tree")}, name)
    assert own.model_dump(exclude={"frames_in", "max_gap_hours"}) == plan.config.model_dump(
        exclude={"frames_in", "max_gap_hours"}
    )
    own = own.model_copy(update={"cache_dir": str(tmp_path / "cache")})
    found = find_segments(scan(own, list(variables), split_years(own)), own)
    assert {key: [piece.size for piece in pieces] for key, pieces in found.items()} == segments


def test_real_importer_samples(real_data, tmp_path):
    """新旧两种 ERA5 文件：多层的 5 层按气压排好；高斯纬度被拒绝。"""
    splits = {
        "train": ["2020-07-01", "2020-07-01"],
        "val": ["2020-07-02", "2020-07-02"],
        "test": ["2020-07-03", "2020-07-03"],
    }
    with open_source(real_data / "importer/era5_newcds_6h_5lev_europe.nc") as dataset:
        plan = plan_of(dataset, tmp_path, {name: name for name in "tquv"}, splits, crop="20x30")
        write_fields(plan)
        assert plan.config.pressure_hpa == [500.0, 700.0, 850.0, 925.0, 1000.0]
        for channel in plan.names:
            name, level = channel.split("_level_")
            got = [np.load(field_path(tmp_path, channel, hour)) for hour in plan.hours.tolist()]
            cut = dataset[name].sel(pressure_level=plan.config.pressure_hpa[int(level)])[:, :20, :30]
            np.testing.assert_array_equal(got, cut.values)
    with open_source(real_data / "importer/era5_tl31_19590102T00.nc") as dataset:
        with pytest.raises(ValueError, match="only one time.*--source takes several files"):
            plan_of(dataset, tmp_path, {"temperature": "t"}, splits)
        with pytest.raises(ValueError, match=r"latitude: not evenly spaced.*--regrid"):
            read_axis(dataset, "latitude", slice(0, 32))
