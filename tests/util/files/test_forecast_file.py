"""逐批写的 NetCDF 与 npy：由 xarray、NumPy 读回逐点核对；次序随意，中断不留文件，内存不随行数长。"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import h5netcdf
import h5py
import numpy as np
import pytest
import xarray as xr

from tests.util.files.test_netcdf import CHANNELS, PRESSURES, make_spec, opened
from util.batch import DataSpec
from util.files import field_layout, netcdf
from util.files.array_file import ArrayFile
from util.files.netcdf import ForecastFile, TruthFile, write_forecast

INIT = 397920 + 6 * np.arange(7)  # 2015-05-25 00 UTC 起
LEADS = [6, 12, 24]
TEMPORARY = ".{}.*.tmp"  # 写完之前的名字，每次不同
REGION = make_spec(latitudes=(10, 12, 14), longitudes=(-4, -2, 0, 2, 4))


def random_fields(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def written_forecast(path: Path, spec: DataSpec, members: int) -> np.ndarray:
    """七个初始时刻分三批、乱着次序写。"""
    fields = random_fields(len(INIT), members, len(LEADS), len(CHANNELS), spec.height, spec.width)
    with ForecastFile(path, spec, INIT, LEADS, members, {"title": "test"}) as file:
        for first, last in ((4, 7), (0, 1), (1, 4)):
            file.write(first, fields[first:last])
    return fields


def variable_of(channel: int) -> tuple[str, dict[str, float]]:
    """通道 → 文件里的变量名与 level。"""
    pressure = PRESSURES[channel]
    return (CHANNELS[channel], {}) if pressure is None else (CHANNELS[channel].split("_")[0], {"level": pressure})


def degrees_east(spec: DataSpec) -> np.ndarray:
    """全球网格的经度写成 0–360，跨本初子午线的区域不变。"""
    return np.array(spec.longitudes) % 360 if spec is not REGION else np.array(spec.longitudes)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("spec", [make_spec(), REGION], ids=["global", "region"])
def test_forecast_file_round_trip(tmp_path: Path, spec: DataSpec, members: int) -> None:
    fields = written_forecast(tmp_path / "deep" / "f.nc", spec, members)
    dataset = opened(tmp_path / "deep" / "f.nc")
    ensemble = ["number"] if members > 1 else []
    assert dataset["t2m"].dims == ("time", *ensemble, "prediction_timedelta", "latitude", "longitude")
    assert dataset["z"].dims == ("time", *ensemble, "prediction_timedelta", "level", "latitude", "longitude")
    moments = np.datetime64("1970-01-01T00", "ns") + INIT * np.timedelta64(1, "h")
    np.testing.assert_array_equal(dataset["time"], moments)
    leads = np.array(LEADS) * np.timedelta64(1, "h")
    np.testing.assert_array_equal(dataset["prediction_timedelta"], leads)
    np.testing.assert_array_equal(dataset["valid_time"], moments[:, None] + leads)
    assert set(dataset.coords) == {*dataset["z"].dims, "valid_time"}
    assert (np.diff(dataset["latitude"]) < 0).all() and (np.diff(dataset["longitude"]) > 0).all()
    place = {"latitude": np.array(spec.latitudes), "longitude": degrees_east(spec)}
    for c in range(len(CHANNELS)):
        name, level = variable_of(c)
        found = dataset[name].sel(level | place).to_numpy()
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, fields[:, :, :, c] if members > 1 else fields[:, 0, :, c])
    assert dataset["z"].sel(level=250).isnull().all() and dataset["t"].sel(level=[500, 850]).isnull().all()


def test_one_initial_time_is_the_file_of_write_forecast(tmp_path: Path) -> None:
    """同样的变量、坐标、属性与编码：两处写的文件在 xarray 里没有分别。"""
    spec, fields = make_spec(), random_fields(3, 2, len(CHANNELS), 4, 4)
    write_forecast(tmp_path / "one.nc", spec, fields, int(INIT[0]), [6, 12], {"title": "test"})
    with ForecastFile(tmp_path / "many.nc", spec, INIT[:1], [6, 12], 3, {"title": "test"}) as file:
        file.write(0, fields[None])
    one, many = (xr.open_dataset(tmp_path / f"{name}.nc", decode_cf=False) for name in ("one", "many"))
    with one, many:
        xr.testing.assert_identical(one.load(), many.load())


def test_rows_never_written_are_nan(tmp_path: Path) -> None:
    spec = make_spec()
    with ForecastFile(tmp_path / "f.nc", spec, INIT, LEADS, 1, {}) as file:
        file.write(2, random_fields(1, 1, len(LEADS), len(CHANNELS), 4, 4))
    there = opened(tmp_path / "f.nc")["t2m"].notnull().any(("prediction_timedelta", "latitude", "longitude"))
    assert np.flatnonzero(there).tolist() == [2]


def test_truth_file_round_trip(tmp_path: Path) -> None:
    """同一时刻写许多次；在任何窗口里有效过的场都在，从不有效的为 NaN。"""
    spec, hours = make_spec(), INIT[:5]
    fields = random_fields(5, len(CHANNELS), 4, 4)
    valid = np.random.default_rng(1).random((3, 5, len(CHANNELS))) < 0.4
    with TruthFile(tmp_path / "t.nc", spec, hours, {"title": "test"}) as file:
        for once in valid:
            order = np.random.default_rng(2).permutation(5)
            file.write(hours[order], fields[order], once[order])
        file.write(hours[:2].repeat(2), fields[[0, 0, 1, 1]], np.zeros((4, len(CHANNELS)), bool))
    dataset = opened(tmp_path / "t.nc")
    assert dataset["t2m"].dims == ("time", "latitude", "longitude")
    assert dataset["z"].dims == ("time", "level", "latitude", "longitude")
    assert set(dataset.coords) == {"time", "level", "latitude", "longitude"}
    ever = np.any(valid, axis=0)  # (N, C)
    assert ever.any() and not ever.all() and dataset.attrs["title"] == "test"
    place = {"latitude": np.array(spec.latitudes), "longitude": np.array(spec.longitudes) % 360}
    for c in range(len(CHANNELS)):
        name, level = variable_of(c)
        expected = np.where(ever[:, c, None, None], fields[:, c], np.nan)
        np.testing.assert_array_equal(dataset[name].sel(level | place), expected)
    with TruthFile(tmp_path / "u.nc", spec, hours, {}) as file, pytest.raises(AssertionError, match="does not have"):
        file.write(hours[:1] + 1, fields[:1], valid[0, :1])


def test_weatherbench_x_pairs_them_up(tmp_path: Path) -> None:
    """照 WeatherBench-X 的读法：预报的 time、prediction_timedelta 改名，目标按 init_time + lead_time 取。"""
    spec = make_spec()
    fields = written_forecast(tmp_path / "forecast.nc", spec, 1)[:, 0]  # (N, L, C, H, W)
    hours = np.unique(INIT[:, None] + LEADS)
    truth = random_fields(len(hours), len(CHANNELS), 4, 4) + 1
    with TruthFile(tmp_path / "truth.nc", spec, hours, {}) as file:
        file.write(hours, truth, np.ones(truth.shape[:2], bool))
    forecast = opened(tmp_path / "forecast.nc").rename({"time": "init_time", "prediction_timedelta": "lead_time"})
    target = opened(tmp_path / "truth.nc").rename({"time": "valid_time"})
    init, lead = forecast["init_time"].values[1:4], forecast["lead_time"].values
    assert lead.dtype.kind == "m" and init.dtype.kind == "M"
    when = xr.DataArray(init, coords={"init_time": init}) + xr.DataArray(lead, coords={"lead_time": lead})
    error = forecast.sel(init_time=init, lead_time=lead) - target.sel(valid_time=when)
    rows = np.searchsorted(hours, INIT[1:4, None] + LEADS)  # (n, L)
    expected = fields[1:4] - truth[rows]
    place = {"latitude": np.array(spec.latitudes), "longitude": np.array(spec.longitudes) % 360}
    for c in range(len(CHANNELS)):
        name, level = variable_of(c)
        np.testing.assert_array_equal(error[name].sel(level | place), expected[:, :, c])


def test_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """小的几个初始时刻一块；块太大时切开，一个场仍在一块里，内容不变；没有的层不占地方。"""
    spec = make_spec()
    for name, several, values, chunks in (
        ("small", 2**17, 2**22, (7, 3, 1, 1, 4, 4)),
        ("large", 1, 3 * 3 * 16, (1, 3, 1, 1, 4, 4)),
        ("larger", 1, 16, (1, 1, 1, 1, 4, 4)),
    ):
        monkeypatch.setattr(netcdf, "CHUNK", several)
        monkeypatch.setattr(field_layout, "CHUNK_VALUES", values)
        fields = written_forecast(tmp_path / f"{name}.nc", spec, 3)
        with h5netcdf.File(tmp_path / f"{name}.nc") as file, h5py.File(tmp_path / f"{name}.nc") as raw:
            assert file.variables["z"].chunks == chunks
            sizes = [raw[n].id.get_storage_size() / fields[:, :, :, 0].nbytes for n in ("z", "t")]
            assert sizes == [2, 1]
        place = {"latitude": np.array(spec.latitudes), "longitude": np.array(spec.longitudes) % 360}
        np.testing.assert_array_equal(opened(tmp_path / f"{name}.nc")["t2m"].sel(place), fields[:, :, :, 0])


def written_bytes() -> int:
    """这个进程至今交给系统去写的字节。"""
    return int(re.findall(r"wchar: (\d+)", Path("/proc/self/io").read_text())[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads /proc")
def test_every_chunk_is_written_once(tmp_path: Path) -> None:
    """几个时刻一批，一块要几批才满；真值的每个时刻来两次。写出去的字节就是场的字节，加上不多的元数据。"""
    spec, hours = make_spec(np.linspace(-84, 84, 16), np.arange(32) * 11.25), 6 * np.arange(200)
    fields, valid = random_fields(200, len(CHANNELS), 16, 32), np.ones((200, len(CHANNELS)), bool)
    before = written_bytes()
    with ForecastFile(tmp_path / "f.nc", spec, hours, [6, 12], 1, {}) as file:
        for row in range(0, 200, 3):
            for lead in range(2):
                file.put(slice(row, row + 3), fields[row : row + 3], lead=lead)
    middle = written_bytes()
    with TruthFile(tmp_path / "t.nc", spec, hours, {}) as file:
        for row in range(0, 198, 3):
            rows = np.array([row, row + 1, row + 1, row + 2])
            file.write(hours[rows], fields[rows], valid[rows])
    assert max((middle - before) / 2, written_bytes() - middle) < 1.2 * fields.nbytes
    there = opened(tmp_path / "f.nc")["sst"].isel(prediction_timedelta=1).to_numpy()
    np.testing.assert_array_equal(there, fields[:, 4, ::-1])


def test_array_file_round_trip(tmp_path: Path) -> None:
    fields = random_fields(7, 3, 2, 4, 5)
    with ArrayFile(tmp_path / "deep" / "preds.npy", fields.shape) as file:
        for first, last in ((4, 7), (0, 1), (1, 4)):
            file.write(first, fields[first:last])
        file.write(2, fields[2:3].astype(np.float64))  # 再写一遍无妨
        assert not (tmp_path / "deep" / "preds.npy").exists()
    found = np.load(tmp_path / "deep" / "preds.npy", mmap_mode="r")
    assert found.dtype == np.float32 and found.shape == fields.shape and found.flags.c_contiguous
    np.testing.assert_array_equal(found, fields)


def test_array_file_refuses_what_does_not_fit(tmp_path: Path) -> None:
    for row, fields, message in (
        (1, np.zeros((1, 2)), "2 rows were never written"),
        (0, np.zeros((1, 1)), "the file has"),
        (2, np.zeros((2, 2)), "rows 2 to 4"),
    ):
        with pytest.raises(AssertionError, match=message), ArrayFile(tmp_path / "a.npy", (3, 2)) as file:
            file.write(row, fields)
    assert list(tmp_path.iterdir()) == []


def make_forecast_file(path: Path) -> Any:
    return ForecastFile(path, make_spec(), INIT, LEADS, 1, {})


def make_truth_file(path: Path) -> Any:
    return TruthFile(path, make_spec(), INIT, {})


def make_array_file(path: Path) -> Any:
    return ArrayFile(path, (4, 2))


@pytest.mark.parametrize("make", [make_forecast_file, make_truth_file, make_array_file])
def test_an_exception_leaves_no_file_and_keeps_the_old_one(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    def stop(at: Path, seen: list[str]) -> None:
        with make(at):
            seen += sorted(path.name for path in tmp_path.iterdir())
            raise KeyboardInterrupt

    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        stop(tmp_path / "data", seen)
    assert len(seen) == 1 and fnmatch(seen[0], TEMPORARY.format("data")) and list(tmp_path.iterdir()) == []
    (tmp_path / "data").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        stop(tmp_path / "data", seen)
    assert fnmatch(seen[1], TEMPORARY.format("data")) and seen[1] != seen[0] and seen[2:] == ["data"]
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("data", b"old")]


def test_a_failing_start_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """文件头写好之后、进 with 之前出的错，__exit__ 管不到。"""

    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(h5netcdf.File, "create_variable", fail)
    with pytest.raises(OSError, match="No space"):
        make_forecast_file(tmp_path / "f.nc")
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys
from pathlib import Path
import numpy as np
from tests.util.files.test_netcdf import make_spec
from util.files.array_file import ArrayFile
from util.files.netcdf import ForecastFile, TruthFile

out, rows = Path(sys.argv[1]), int(sys.argv[2])
spec = make_spec(np.linspace(-84, 84, 16), np.arange(32) * 11.25)
hours, leads = np.arange(rows) * 6, [6, 12]
fields = np.random.default_rng(0).normal(size=(10, 2, 2, 6, 16, 32)).astype(np.float32)
valid = np.ones((20, 6), dtype=bool)
with (
    ForecastFile(out / "f.nc", spec, hours, leads, 2, {}) as forecast,
    TruthFile(out / "t.nc", spec, np.arange(rows + 2) * 6, {}) as truth,
    ArrayFile(out / "p.npy", (rows, 2, 6, 16, 32)) as array,
):
    for row in range(0, rows, 10):
        forecast.write(row, fields)
        truth.write((hours[row : row + 10, None] + leads).ravel(), fields[:, 0].reshape(20, 6, 16, 32), valid)
        array.write(row, fields[:, 0])
        if row % 100 == 90:
            status = Path("/proc/self/status").read_text().splitlines()
            print(next(line.split()[1] for line in status if line.startswith("RssAnon")), flush=True)
    input()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_constant_and_a_killed_process_leaves_only_temporary_names(tmp_path: Path) -> None:
    """写了 100 行与 600 行时的匿名内存相差不到 5%（多出的 500 行有 43 MB）；写完、还没离开时杀掉。"""
    command = [sys.executable, "-c", WRITER, str(tmp_path), "600"]
    root = Path(__file__).parents[3]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        used = [int(process.stdout.readline()) for _ in range(6)]
        process.send_signal(signal.SIGKILL)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 3
    assert all(map(fnmatch, names, map(TEMPORARY.format, ("f.nc", "p.npy", "t.nc"))))
    assert used[-1] < 1.05 * used[0], used
