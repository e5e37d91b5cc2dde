"""导入：随便写的、合法的文件，树里的与 xarray 读出来的逐位相同。

随机的是：格式（NetCDF3、4，Zarr 两版）、各维的次序与名字、纬度的方向、经度的写法、打包与精度、填充值、历法、
时间的单位与起点、分块、一个文件还是许多个。套件里 60 例，久测里 500 例。
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from util.commands.import_fields import main
from util.config import DataConfig, read_mapping
from util.data.tree_files import field_path
from util.strict import validate

EXAMPLES = {"suite": 60, "soak": 500}
DAY = np.datetime64("2000-02-28", "ns")  # 三天，跨闰日
NAMES = {"single": "2m_temperature", "layered": "wind"}
LONGITUDES = {  # 首个经度、绕回处：values = (首个 + 步长 · i)，在绕回处减 360
    "0 to 360": (0.0, 360.0),
    "-180 to 180": (-180.0, 180.0),
    "from the date line": (180.0, 360.0),
    "across Greenwich": (340.0, 360.0),
    "across the date line": (160.0, 180.0),
}
FORMATS = ["NETCDF3_CLASSIC", "NETCDF3_64BIT", "NETCDF4", "NETCDF4_CLASSIC", "zarr 2", "zarr 3"]

storage = st.one_of(  # 一个变量怎样存
    st.fixed_dictionaries(
        {"dtype": st.sampled_from(["float32", "float64"]), "_FillValue": st.sampled_from([None, np.nan, -9999.0, 1e20])}
    ),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["int16", "int32"]),
            "scale_factor": st.sampled_from([0.01, 0.0078125]),
            "add_offset": st.sampled_from([250.0, 273.15]),
            "_FillValue": st.sampled_from([-32768, -32767, 32767]),
        }
    ),
    st.fixed_dictionaries({"dtype": st.sampled_from(["int16", "int32"]), "_FillValue": st.sampled_from([None, -999])}),
)
cases = st.fixed_dictionaries(
    {
        "format": st.sampled_from(FORMATS),
        "seed": st.integers(0, 2**32 - 1),
        "order": st.permutations(["time", "level", "lat", "lon"]),
        "names": st.fixed_dictionaries(
            {
                "time": st.sampled_from(["time", "valid_time"]),
                "level": st.sampled_from(["level", "pressure_level", "plev", "isobaricInhPa"]),
                "lat": st.sampled_from(["lat", "latitude"]),
                "lon": st.sampled_from(["lon", "longitude"]),
            }
        ),
        "axes": st.sampled_from(["float32", "float64"]),
        "south_first": st.booleans(),
        "height": st.integers(2, 4),
        "width": st.integers(2, 6),
        "longitudes": st.sampled_from(list(LONGITUDES)),
        "globe": st.booleans(),
        "west_first": st.booleans(),
        "pressures": st.permutations([850.0, 500.0]),
        "pressure_units": st.sampled_from(["hPa", "Pa", "mbar"]),
        "storage": storage,
        "hole": st.booleans(),
        "member": st.booleans(),
        "bounds": st.booleans(),
        "missing_value": st.booleans(),
        "level_dtype": st.sampled_from(["float64", "float32", "int32"]),
        "calendar": st.sampled_from(["standard", "gregorian", "proleptic_gregorian"]),
        "time_units": st.sampled_from(
            [
                "hours since 1900-01-01",
                "hours since 1800-01-01 00:00:0.0",
                "days since 1950-01-01 00:00:00",
                "minutes since 2000-01-01T06:00:00",
                "seconds since 1970-01-01",
                "hours since 2000-02-28 12:00:00",
            ]
        ),
        "time_dtype": st.sampled_from(["int32", "float64"]),
        "step": st.sampled_from([6, 12, 24]),
        "phase": st.integers(0, 23),
        "pieces": st.integers(1, 3),
        "compressed": st.booleans(),
        "unlimited": st.booleans(),
        "cuts": st.lists(st.integers(1, 11), max_size=2, unique=True),
        "apart": st.booleans(),
        "backwards": st.booleans(),
    }
)


def make(case: dict[str, Any]) -> xr.Dataset:
    """整个数据集，写之前；坐标与维都是 case 里的名字。"""
    rng = np.random.default_rng(case["seed"])
    hours = np.arange(case["phase"] % case["step"], 72, case["step"])
    first, turn = LONGITUDES[case["longitudes"]]
    step = 360 / case["width"] if case["globe"] else 5.0
    lon = first + step * np.arange(case["width"])
    lon = np.where(lon >= turn, lon - 360, lon)[:: 1 if case["west_first"] else -1]
    lat = np.linspace(-40, 50, case["height"])[:: 1 if case["south_first"] else -1]
    sizes = {"time": hours.size, "level": 2, "lat": lat.size, "lon": lon.size}
    levels = np.array(case["pressures"]) * (100 if case["pressure_units"] == "Pa" else 1)
    coords = {
        "time": DAY + hours.astype("timedelta64[h]"),
        "level": ("level", levels.astype(case["level_dtype"]), {"units": case["pressure_units"]}),
        "lat": ("lat", lat.astype(case["axes"]), {"units": "degrees_north"}),
        "lon": ("lon", lon.astype(case["axes"]), {"units": "degrees_east"}),
    }
    variables = {}
    for name, dims in (("single", [d for d in case["order"] if d != "level"]), ("layered", case["order"])):
        values = rng.normal(280, 10, [sizes[d] for d in dims])
        if case["hole"] and case["storage"]["_FillValue"] is not None:  # 不在第一个时刻：一天一个时，训练要有一个场
            where = tuple(slice(1, 2) if d == "time" else slice(0, 1) for d in dims)
            values[where] = np.nan
        whole_numbers = case["storage"]["dtype"].startswith("int") and case["storage"]["_FillValue"] is None
        variables[NAMES[name]] = (dims, values.astype("int16") if whole_numbers else values, {"units": "K"})
    dataset = xr.Dataset(variables, coords)
    if case["bounds"]:
        bounds = np.stack([coords["time"], coords["time"] + np.timedelta64(case["step"], "h")], axis=1)
        dataset = dataset.assign(time_bnds=(("time", "bnds"), bounds))
        if case["format"] != "zarr 3":  # 第 3 版的规范里还没有文字
            dataset = dataset.assign_coords(expver=("time", ["0001"] * hours.size))
        dataset["time"].attrs = {"bounds": "time_bnds"}
    dataset = dataset.expand_dims(number=[0], axis=0) if case["member"] else dataset
    return dataset.rename(case["names"])


def write(case: dict[str, Any], dataset: xr.Dataset, folder: Path) -> list[Path]:
    """切成几个文件写下；每个文件的编码都照 case。"""
    time = case["names"]["time"]
    cuts = sorted(cut for cut in case["cuts"] if cut < dataset.sizes[time])
    parts = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
    groups = [[name] for name in NAMES.values()] if case["apart"] else [list(NAMES.values())]
    paths = []
    for part in parts[:: -1 if case["backwards"] else 1]:
        for names in groups:
            piece = dataset[[*names, *({"time_bnds"} & set(dataset))]].isel({time: part})
            path = folder / f"{len(paths)}{'.zarr' if case['format'].startswith('zarr') else '.nc'}"
            paths.append(path)
            write_one(case, piece, path)
    return paths


def write_one(case: dict[str, Any], piece: xr.Dataset, path: Path) -> None:
    """写一个文件；两种格式分块的写法不同。"""
    time = case["names"]["time"]
    dtype = "float64" if case["time_units"].startswith("days") else case["time_dtype"]
    about_time = {"units": case["time_units"], "calendar": case["calendar"], "dtype": dtype}
    encoding: dict[str, dict[str, Any]] = {
        name: dict(about_time) for name in {time, "time_bnds"} & set(piece.variables)
    }
    for name in {*NAMES.values()} & {str(name) for name in piece.data_vars}:
        chunks = [-(-size // case["pieces"]) for size in piece[name].shape]
        encoding[name] = dict(case["storage"])
        if case["missing_value"] and case["storage"]["_FillValue"] is not None:
            encoding[name]["missing_value"] = case["storage"]["_FillValue"]
        if case["format"].startswith("zarr"):
            encoding[name] |= {"chunks": tuple(chunks)}
        elif case["format"].startswith("NETCDF4"):
            encoding[name] |= {"chunksizes": tuple(chunks), "zlib": case["compressed"]}
    if case["format"].startswith("zarr"):
        piece.to_zarr(path, zarr_format=int(case["format"][-1]), encoding=encoding, consolidated=False)
    else:
        limits = [time] if case["unlimited"] and case["format"].startswith("NETCDF4") else []  # 第 3 版的要在最前
        piece.to_netcdf(path, format=case["format"], engine="netcdf4", encoding=encoding, unlimited_dims=limits)


def run_import(paths: Sequence[Path], root: Path) -> DataConfig:
    out = root.with_suffix(".yaml")
    words = [word for key, name in NAMES.items() for word in ("--variable", f"{name}={key}")]
    for split, day in (("train", "2000-02-28"), ("val", "2000-02-29"), ("test", "2000-03-01")):
        words += [f"--{split}", day, day]
    main(["--source", *map(str, paths), "--root", str(root), *words, "--yaml", str(out)])
    return validate(DataConfig, read_mapping(out) | {"frames_in": 1}, "set")


def compare(case: dict[str, Any], path: Path, config: DataConfig) -> int:
    """一个文件里的，xarray 按名字取、按标签选层；含缺测的场没有文件。返回比过的场数。"""
    zarr = {"engine": "zarr", "consolidated": False} if path.suffix == ".zarr" else {}
    with xr.open_dataset(path, **zarr) as opened:
        whole = opened.rename({v: k for k, v in case["names"].items() if v in opened.variables}).load()
    whole = whole.isel(number=0) if "number" in whole.dims else whole
    for axis, there in ((config.latitude, whole.lat.values), (config.longitude, whole.lon.values)):
        off = (np.array(axis.values()) - there + 180) % 360 - 180
        np.testing.assert_allclose(off, 0, atol=1e-4)
    hours = whole.time.values.astype("datetime64[h]").astype(int).tolist()
    levels = [(100 if case["pressure_units"] == "Pa" else 1) * pressure for pressure in config.pressure_hpa]
    channels = {}  # 通道 → (T, lat, lon)
    if NAMES["single"] in whole:
        channels["single"] = whole[NAMES["single"]]
    if NAMES["layered"] in whole:
        channels |= {f"layered_level_{i:02d}": whole[NAMES["layered"]].sel(level=p) for i, p in enumerate(levels)}
    for channel, array in channels.items():
        fields = array.transpose("time", "lat", "lon").values.astype(np.float32)
        for hour, expected in zip(hours, fields, strict=True):
            file = field_path(config.root, channel, hour)
            if np.isfinite(expected).all():
                np.testing.assert_array_equal(np.load(file), expected)
            else:
                assert not file.exists()
    return len(channels) * len(hours)


@settings(max_examples=EXAMPLES[settings.get_current_profile_name()])
@given(case=cases)
def test_the_tree_is_what_xarray_reads(case: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        dataset = make(case)
        paths = write(case, dataset, Path(folder))
        config = run_import(paths, Path(folder) / "tree")
        hours = dataset[case["names"]["time"]].values.astype("datetime64[h]").astype(int)
        assert (config.interval_hours, config.first_hour) == (case["step"], int(hours[0]) % case["step"])
        assert config.pressure_hpa == [500.0, 850.0]
        assert sum(compare(case, path, config) for path in paths) == 3 * hours.size
