"""预报与真值写成 NetCDF：怎样排见 field_layout，xarray 直接打开。

write_forecast 写一次预报；ForecastFile、TruthFile 逐批写许多次，内存里只有一批。
时效要读成 timedelta64（WeatherBench-X 需要），用 `xr.open_dataset(path, decode_timedelta=True)`。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from util.atomic import replacing
from util.files.field_layout import (
    Coordinates,
    attributes_of,
    forecast_coordinates,
    hours_variable,
    levels_of,
    newly_valid,
    one_time,
    space_coordinates,
    variables_of,
)
from util.files.hdf5 import hdf5_sink
from util.grid import output_grid

if TYPE_CHECKING:
    import h5netcdf
    from typing_extensions import Self

    from util.batch import DataSpec

CHUNK = 2**17  # 小的场几个时刻一块，一个变量同时写着的块（各时效、各层）合起来至多这么多个数
CACHE = 2 * 4 * CHUNK  # 每个变量的缓存，字节：一批跨得过两块


class FieldFile:
    """一份 NetCDF 里的全部变量，按前几维（时间、成员、时效）逐片写；用作上下文管理器。

    变量一直开着：关上一次，HDF5 就把它缓存着的块写一遍，没写满的以后还要读出来再写。块不压缩：float32 的场压过的还有
    七成多大，写却慢许多倍（docs/benchmarks.md）。一个时效、一层一块：逐个时效也写得，没有的层不写，也就不占地方。
    """

    def __init__(
        self,
        path: Path,
        spec: DataSpec,
        coordinates: Coordinates,
        attributes: Mapping[str, str],
        kinds: Sequence[str] = ("",),
        static: Mapping[str, tuple[np.ndarray, str]] = MappingProxyType({}),
        whole: bool = True,
    ) -> None:
        """coordinates: 网格以外的，次序即各维的次序；kinds: "" 写 `<变量>`，"truth" 写没有成员的 `<变量>_truth`。

        static: 不随时间变的场，名字 → ((H, W), 单位)。
        whole: 正常离开时才有正式的名字；不然从头就有，中断了也留下 flush 过的。
        """
        import h5netcdf
        import h5py

        self.spec, self.grid, self.levels = spec, output_grid(spec), levels_of(spec)
        with ExitStack() as stack:
            target = stack.enter_context(replacing(path)) if whole else path
            self.sink = stack.enter_context(hdf5_sink(target))
            with h5netcdf.File(self.sink, "w") as file:
                file.attrs.update({"Conventions": "CF-1.8", **attributes})
                _write_coordinates(file, coordinates | space_coordinates(self.grid, self.levels))
                for name, (values, units) in static.items():
                    field = values[self.grid.rows][:, self.grid.columns]
                    about = {"units": units} if units else {}
                    file.create_variable(name, ("latitude", "longitude"), data=field).attrs.update(about)
                leading = [name for name in coordinates if name != "valid_time"]
                for kind in kinds:
                    self._create(file, kind, [dim for dim in leading if dim != "number" or not kind])
            self.sink.check()
            raw = stack.enter_context(h5py.File(self.sink, "r+", rdcc_nbytes=CACHE))
            names = [_joined(name, kind) for kind in kinds for name in variables_of(spec)]
            self.variables: dict[str, Any] = {name: raw[name] for name in names}
            self.flush: Callable[[], None] = raw.flush  # 写到现在的都到盘上
            self._closing = stack.pop_all()

    def _create(self, file: h5netcdf.File, kind: str, leading: list[str]) -> None:
        for name, channels in variables_of(self.spec).items():
            vertical = ["level"] if self.spec.pressures[channels[0]] is not None else []
            dims = (*leading, *vertical, "latitude", "longitude")
            chunks = _chunks({dim: file.dimensions[dim].size for dim in dims})
            variable = file.create_variable(
                _joined(name, kind), dims, "f4", chunks=chunks, fillvalue=np.float32(np.nan)
            )
            variable.attrs.update(attributes_of(self.spec, name, channels, kind))
            if "valid_time" in file.variables:
                variable.attrs["coordinates"] = "valid_time"

    def put(self, place: int | slice, fields: np.ndarray, kind: str = "", lead: int | None = None) -> None:
        """fields (..., C, H, W) 物理单位，写在第一维的 place 处；lead: 只是第几个时效的，None 是全部。"""
        rows, columns = np.ix_(self.grid.rows, self.grid.columns)
        for name, channels in variables_of(self.spec).items():
            for channel in channels:
                pressure = self.spec.pressures[channel]
                inner = [] if lead is None else [lead]
                inner += [] if pressure is None else [self.levels.index(pressure)]
                field = fields[..., channel, rows, columns]  # (..., H, W)，北在上
                self.variables[_joined(name, kind)][(place, ..., *inner, slice(None), slice(None))] = field
        self.sink.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._closing.__exit__(*error)


class ForecastFile(FieldFile):
    """N 个初始时刻的预报 (time, [number], prediction_timedelta, [level], latitude, longitude)；M > 1 时才有 number 维。

    Args:
        path: 输出文件；文件夹不在时建立。
        init_hours: (N,) 最后一个输入帧的 UTC 小时（1970 年以来）。
        leads: L 个预报时效，小时。
        attributes: 附加的全局属性。
    """

    def __init__(
        self,
        path: Path,
        spec: DataSpec,
        init_hours: np.ndarray,
        leads: Sequence[int],
        members: int,
        attributes: Mapping[str, str],
    ) -> None:
        super().__init__(path, spec, forecast_coordinates(init_hours, leads, members), attributes)
        self.size = (members, len(leads), spec.num_channels, spec.height, spec.width)

    def write(self, row: int, fields: np.ndarray) -> None:
        """fields (B, M, L, C, H, W) 物理单位，是第 row … row + B - 1 个初始时刻的；没有写到的为 NaN。"""
        assert fields.shape[1:] == self.size, f"fields {fields.shape}, expected (B, {self.size})"
        self.put(slice(row, row + len(fields)), fields if self.size[0] > 1 else fields[:, 0])


class TruthFile(FieldFile):
    """真值 (time, [level], latitude, longitude)：time 是预报所指的时刻，WeatherBench-X 按它取目标。

    hours: (N,) UTC 小时，升序不重复；attributes: 附加的全局属性；static: 不随时间变的场，名字 → ((H, W), 单位)。
    """

    def __init__(
        self,
        path: Path,
        spec: DataSpec,
        hours: np.ndarray,
        attributes: Mapping[str, str],
        static: Mapping[str, tuple[np.ndarray, str]] = MappingProxyType({}),
    ) -> None:
        assert (np.diff(hours) > 0).all(), "hours are not ascending and unique"
        about = {"standard_name": "time", "long_name": "valid time", "axis": "T"}
        time = {"time": ("time", *hours_variable(hours, about))}
        super().__init__(path, spec, time, attributes, static=static)
        self.hours = np.asarray(hours)
        self.written = np.zeros((len(hours), spec.num_channels), dtype=bool)

    def write(self, hours: np.ndarray, fields: np.ndarray, valid: np.ndarray) -> None:
        """hours (n,)；fields (n, C, H, W) 物理单位；valid (n, C)，在任何一个窗口里都为假的场（插值得来）为 NaN。"""
        rows = np.searchsorted(self.hours, hours)
        assert (self.hours[rows] == hours).all(), "hours that the file does not have"
        some = newly_valid(self.written, rows, valid)
        rows, good = rows[some], self.written[rows[some]]
        values = np.where(good[:, :, None, None], fields[some], np.float32(np.nan))
        for run in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) > 1) + 1):  # 相连的一起写
            if run.size:
                self.put(slice(rows[run[0]], rows[run[-1]] + 1), values[run])


def write_forecast(
    path: Path,
    spec: DataSpec,
    forecast: np.ndarray,
    init_hour: int | None,
    leads: list[int],
    attributes: dict[str, str],
    truth: np.ndarray | None = None,
) -> None:
    """写一次预报；先写临时文件再改名，中断不会留下半个文件。

    Args:
        path: 输出文件；文件夹不在时建立。
        forecast: (M, L, C, H, W)，物理单位，按 spec 的通道与网格顺序；M > 1 时才有 number 维。
        init_hour: 最后一个输入帧的 UTC 小时（1970 年以来）；None（不知时刻）时没有 time 与 valid_time。
        leads: L 个预报时效，小时。
        attributes: 附加的全局属性。
        truth: (L, C, H, W)，写成 `<变量>_truth`。
    """
    size = (len(leads), spec.num_channels, spec.height, spec.width)
    assert forecast.shape[1:] == size, f"forecast {forecast.shape} does not match (M, L, C, H, W) = (M, {size})"
    assert truth is None or truth.shape == size, f"truth is not (L, C, H, W) = {size}"
    coordinates = forecast_coordinates(None if init_hour is None else np.array([init_hour]), leads, len(forecast))
    place = slice(None) if init_hour is None else 0
    with FieldFile(path, spec, coordinates, attributes, ("",) if truth is None else ("", "truth")) as file:
        file.put(place, forecast if len(forecast) > 1 else forecast[0])
        if truth is not None:
            file.put(place, truth, "truth")


def _joined(name: str, kind: str) -> str:
    return f"{name}_{kind}" if kind else name


def _write_coordinates(file: h5netcdf.File, coordinates: Coordinates) -> None:
    """一维的坐标也定下那一维的长度。"""
    file.dimensions = {name: len(values) for name, (dims, values, _) in coordinates.items() if dims == name}
    for name, (dims, values, about) in coordinates.items():
        file.create_variable(name, (name,) if dims == name else dims, data=values).attrs.update(about)


def _chunks(sizes: Mapping[str, int]) -> tuple[int, ...]:
    """各维的长度 → 块：一个时效、一层，小的场几个时刻。"""
    first, *rest = sizes.values()
    chunks = one_time([1 if dim in ("prediction_timedelta", "level") else size for dim, size in sizes.items()])
    chunks[0] = max(1, min(first, CHUNK // math.prod(rest)))
    return tuple(chunks)
