"""Zarr 的预报与真值：与 NetCDF 逐位相同；名字照一张写好的表；接着写、重写、拒绝、中断、两个进程。"""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from tests.util.files.test_netcdf import CHANNELS, make_spec, opened
from util.batch import DataSpec
from util.files.netcdf import ForecastFile, TruthFile
from util.files.zarr_fields import ZarrFields, appending, forecast_header, truth_header
from util.source.request import read_request
from util.variables import RANGES, VARIABLES, WEATHERBENCH, Archived, archived

INIT = 397920 + 6 * np.arange(6)  # 2015-05-25 00 UTC 起
LEADS = [6, 12]
MODEL = {"title": "test", "run": "small", "step": "300"}
# WeatherBench2 的数据说明与 WeatherBench-X 的读法里的名字；那里的 sst 是 K，这里的 degC 不用它的名字
NAMES = {"t2m": "2m_temperature", "z": "geopotential", "t": "temperature"}
OUT = "another --out"
PER_CHANNEL = ("channels", "units", "pressures", "mean", "std")


def fields_of(members: int, times: int = 6) -> np.ndarray:
    size = (times, members, len(LEADS), len(CHANNELS), 4, 4)
    return np.random.default_rng(0).normal(size=size).astype(np.float32)


def add(
    path: Path, hours: np.ndarray, fields: np.ndarray, again: str | None = OUT, about: dict[str, str] = MODEL
) -> None:
    """fields (N, M, L, C, H, W) 接在 path 里。"""
    spec = make_spec()
    header = forecast_header(spec, LEADS[: fields.shape[2]], fields.shape[1], about)
    with appending(path, header, hours, again):
        ZarrFields(path, spec).write_forecast(hours, fields)


def read(path: Path) -> xr.Dataset:
    return xr.open_zarr(path, chunks=None, consolidated=True).load()


@pytest.mark.parametrize("members", [1, 3])
def test_equals_the_netcdf_file(tmp_path: Path, members: int) -> None:
    """分两次接起来的，与一次写的 NetCDF 逐位相同；维、坐标、属性也相同，只有变量的名字不同。"""
    spec, fields = make_spec(), fields_of(members)
    with ForecastFile(tmp_path / "f.nc", spec, INIT, LEADS, members, MODEL) as file:
        file.write(0, fields)
    add(tmp_path / "f.zarr", INIT[:4], fields[:4])
    add(tmp_path / "f.zarr", INIT[4:], fields[4:])
    expected, found = opened(tmp_path / "f.nc").rename(NAMES), read(tmp_path / "f.zarr")
    assert found["prediction_timedelta"].dtype.kind == "m"
    xr.testing.assert_identical(found, expected)
    assert {name: found[name].encoding["chunks"][0] for name in found} == dict.fromkeys(found, 1)
    assert list(tmp_path.glob(".f.zarr.*.tmp")) == []


def test_every_known_variable_has_a_name() -> None:
    assert set(WEATHERBENCH) >= {*VARIABLES, *RANGES} - {"tp"}
    assert len({there.name for there in WEATHERBENCH.values()}) == len(WEATHERBENCH)
    assert {name: WEATHERBENCH[name].name for name in NAMES} == NAMES


def test_names_and_units_are_those_of_the_preset() -> None:
    """按 preset 导入、再写出来，就是存档里的名字与数；preset 里有、这里没有的只有 tp。"""
    request = read_request(None, (), preset="weatherbench2")
    assert set(request.variables) - set(WEATHERBENCH) == {"tp"}
    for name in set(request.variables) & set(WEATHERBENCH):
        wanted = request.variables[name]
        there = archived(name, wanted.units or "")
        assert (there.name, there.scale, 0.0) == (wanted.source, wanted.scale, wanted.offset), name
        assert there.units == ("1" if name in ("r", "tcc") else wanted.units)
    assert archived("sst", "degC") == Archived("sst", "degC")  # 换不过去的用自己的名字
    assert archived("tp", "m") == Archived("tp", "m")
    assert archived("tcc", "(0 - 1)") == archived("tcc", "1")


def test_what_bears_the_name_of_the_archive_has_its_units(tmp_path: Path) -> None:
    """相对湿度写成比值，补写时也是；降水、摄氏度的海温不用存档的名字；从前写成 % 的不接。"""
    channels, units = ("r_level_00", "r_level_01", "tcc", "tp", "sst"), ("%", "%", "%", "m", "degC")
    pressures = (850.0, 500.0, None, None, None)
    spec = replace(
        make_spec(), channels=channels, units=units, pressures=pressures, mean=(0.0,) * 5, std=(1.0,) * 5
    )  # fmt: skip
    fields = (100 * np.random.default_rng(0).random((2, 5, 4, 4))).astype(np.float32)
    path, hours, valid = tmp_path / "t.zarr", INIT[:2], np.ones((2, 5), bool)
    valid[0, 0] = False
    for good in (valid, ~valid):
        with appending(path, truth_header(spec, {}), hours):
            ZarrFields(path, spec).write_truth(hours, fields, good)
    found = read(path)
    about = {"relative_humidity": "1", "total_cloud_cover": "1", "tp": "m", "sst": "degC"}
    assert {str(name): array.attrs["units"] for name, array in found.items()} == about
    found = found.sel(latitude=np.array(spec.latitudes), longitude=np.array(spec.longitudes) % 360)
    for c, pressure in enumerate((850, 500)):
        ratio = found["relative_humidity"].sel(level=pressure).values
        np.testing.assert_allclose(ratio, fields[:, c].astype(float) / 100, rtol=1e-6)
    np.testing.assert_allclose(found["total_cloud_cover"], fields[:, 2].astype(float) / 100, rtol=1e-6)
    for c, name in ((3, "tp"), (4, "sst")):
        np.testing.assert_array_equal(found[name], fields[:, c])
    old = truth_header(spec, {})
    old["relative_humidity"].attrs["units"] = "%"
    with appending(tmp_path / "old.zarr", old, hours):
        pass
    with (
        pytest.raises(ValueError, match="its relative_humidity has .* units %, here .* units 1; give another --out"),
        appending(tmp_path / "old.zarr", truth_header(spec, {}), hours),
    ):
        pass


def test_truth_equals_the_netcdf_file(tmp_path: Path) -> None:
    """无效的场是 NaN；另一次评测里有效的补上，原来有的不动。"""
    spec, hours = make_spec(), INIT[:5]
    fields = fields_of(1, 5)[:, 0, 0]
    valid = np.random.default_rng(1).random((3, 5, len(CHANNELS))) < 0.4
    with TruthFile(tmp_path / "t.nc", spec, hours, {"title": "test"}) as file:
        for once in valid:
            file.write(hours, fields, once)
    for upto, once in zip((3, 5, 5), valid, strict=True):
        with appending(tmp_path / "t.zarr", truth_header(spec, {"title": "test"}), hours[:upto]):
            ZarrFields(tmp_path / "t.zarr", spec).write_truth(hours[:upto], fields[:upto], once[:upto])
    with appending(tmp_path / "t.zarr", truth_header(spec, {"title": "test"}), hours):
        ZarrFields(tmp_path / "t.zarr", spec).write_truth(hours, fields, valid[0])
    found, expected = read(tmp_path / "t.zarr"), opened(tmp_path / "t.nc").rename(NAMES)
    assert any(bool(array.isnull().any()) for array in found.drop_vars("geopotential").values())
    xr.testing.assert_identical(found, expected)


def test_again_is_refused_or_written_anew(tmp_path: Path) -> None:
    path, fields = tmp_path / "f.zarr", fields_of(1)
    add(path, INIT[:3], fields[:3])
    with pytest.raises(ValueError, match=r"holds 1 of these 2 times already, first 2015-05-25T12; another --out"):
        add(path, INIT[2:4], fields[2:4])
    assert read(path).sizes["time"] == 3
    add(path, INIT[2:4], fields[:2], None)
    expected = np.concatenate([fields[:2], fields[:2]])[:, 0, :, 0]
    np.testing.assert_array_equal(read(path)["2m_temperature"][..., ::-1, :].values, np.roll(expected, -2, -1))
    with pytest.raises(ValueError, match="ends at 2015-05-25T18, 2015-05-24T18 lies before that"):
        add(path, INIT[:1] - 6, fields[:1])


@pytest.mark.parametrize(
    ("members", "steps", "about", "message"),
    [
        (1, 2, {"run": "other"}, "its run is small, here other"),
        (1, 2, {"step": "400"}, "its step is 300, here 400"),
        (2, 2, {}, "it has no number, unlike"),
        (1, 1, {}, "its prediction_timedelta has 2 values from 6 to 12, here 1 values from 6 to 6"),
    ],
)
def test_another_model_is_refused(
    tmp_path: Path, members: int, steps: int, about: dict[str, str], message: str
) -> None:
    add(tmp_path / "f.zarr", INIT[:3], fields_of(1)[:3])
    with pytest.raises(ValueError, match=message):
        add(tmp_path / "f.zarr", INIT[3:], fields_of(members)[3:, :, :steps], OUT, MODEL | about)


def test_another_grid_or_set_of_channels_is_refused(tmp_path: Path) -> None:
    add(tmp_path / "f.zarr", INIT[:3], fields_of(1)[:3])
    region = make_spec(latitudes=(10, 12, 14))
    few = DataSpec.from_dict(make_spec().to_dict() | {k: list(getattr(make_spec(), k)[:3]) for k in PER_CHANNEL})
    celsius = DataSpec.from_dict(make_spec().to_dict() | {"units": ["degC", *make_spec().units[1:]]})
    for spec, message in (
        (region, "its latitude has 4 values from 45 to -45, here 3 values from 14 to 10"),
        (few, "its level has 3 values from 250 to 850, here 2 values from 500 to 850"),
        (celsius, "it has no t2m, unlike this forecast"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            appending(tmp_path / "f.zarr", forecast_header(spec, LEADS, 1, MODEL), INIT[3:], OUT),
        ):
            pass


def test_what_was_not_finished_is_not_seen(tmp_path: Path) -> None:
    """写到一半停了：读的一方看见的还是从前的；再来一次从那里接着，上一次多写的块不留下。"""
    path, fields, spec = tmp_path / "f.zarr", fields_of(1), make_spec()
    add(path, INIT[:2], fields[:2])
    header = forecast_header(spec, LEADS, 1, MODEL)

    def stop() -> None:
        with appending(path, header, INIT[2:]):
            ZarrFields(path, spec).write_forecast(INIT[2:5], fields[2:5] + 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert read(path).sizes["time"] == 2
    with appending(path, header, INIT[2:4]):
        ZarrFields(path, spec).write_forecast(INIT[2:3], fields[2:3])
    found = read(path)
    assert found.sizes["time"] == 4
    there = found["2m_temperature"].notnull().all(("prediction_timedelta", "latitude", "longitude"))
    assert there.values.tolist() == [True, True, True, False]  # 这一次没有写第四个：没有上一次的残余
    assert (tmp_path / "f.zarr/2m_temperature/3.0.0.0").exists() is False


def write_half(path: Path, first: int) -> None:
    """另一个进程：隔一个时刻写一个。"""
    ZarrFields(path, make_spec()).write_forecast(INIT[first::2], fields_of(1)[first::2])


def test_two_processes_write_their_own_times(tmp_path: Path) -> None:
    path = tmp_path / "f.zarr"
    with appending(path, forecast_header(make_spec(), LEADS, 1, MODEL), INIT):
        context = multiprocessing.get_context("fork")
        workers = [context.Process(target=write_half, args=(path, first)) for first in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
    add(tmp_path / "one.zarr", INIT, fields_of(1))
    xr.testing.assert_identical(read(path), read(tmp_path / "one.zarr"))


def test_nothing_but_the_folder_is_left(tmp_path: Path) -> None:
    """占着文件夹的是写它的命令，这里不另留下锁。"""
    add(tmp_path / "f.zarr", INIT, fields_of(1))
    assert [path.name for path in tmp_path.iterdir()] == ["f.zarr"]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.zarr").mkdir()
    (tmp_path / "f.zarr/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a Zarr folder that can be added to") as refused:
        add(tmp_path / "f.zarr", INIT[:2], fields_of(1)[:2])
    assert "\n" not in str(refused.value) and (tmp_path / "f.zarr/notes.txt").read_text() == "mine"


def test_zarr_reads_it_without_xarray(tmp_path: Path) -> None:
    """第 2 版的布局、合并的元数据：zarr 2 与 3 都认得。"""
    add(tmp_path / "f.zarr", INIT, fields_of(1))
    group = zarr.open_consolidated(str(tmp_path / "f.zarr"), mode="r")
    assert np.asarray(group["geopotential"]).shape == (6, 2, 3, 4, 4)
    assert (tmp_path / "f.zarr/.zgroup").is_file() and (tmp_path / "f.zarr/geopotential/5.0.0.0.0").is_file()
