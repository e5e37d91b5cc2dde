"""预报与真值写成 Zarr（第 2 版）：一个时刻一块，往后接着写；维照 WeatherBench-X，变量照 WeatherBench2 的名字与单位。

写的次序：appending 先把各数组接长，各进程再各写各的块，都写完了才合并元数据。读的一方（xr.open_zarr）按合并的元数据看，
所以没写完的时刻看不见；中断了再来，从合并的元数据所说的长度接着。
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from util.atomic import replacing
from util.calendar import time_text
from util.files.field_layout import (
    Coordinates,
    attributes_of,
    forecast_coordinates,
    hours_variable,
    levels_of,
    newly_valid,
    one_time,
    space_coordinates,
    stack,
    variables_of,
)
from util.grid import output_grid
from util.variables import Archived, archived

if TYPE_CHECKING:
    import xarray as xr

    from util.batch import DataSpec

TIMES_PER_CHUNK = 1024  # 时刻坐标本身：零号进程一个人写，块大些，打开才快


def forecast_header(spec: DataSpec, leads: Sequence[int], members: int, attributes: Mapping[str, str]) -> xr.Dataset:
    """还没有时刻的预报 (time, [number], prediction_timedelta, [level], latitude, longitude)；M > 1 时才有 number 维。

    attributes: 哪个模型、怎样预报的；接着写时须相同。
    """
    coordinates = forecast_coordinates(np.zeros(0, np.int64), leads, members)
    dims, values, about = coordinates["prediction_timedelta"]
    coordinates["prediction_timedelta"] = (dims, values, about | {"dtype": "timedelta64[ns]"})  # 没有它，读出来是整数
    return _header(spec, coordinates, attributes)


def truth_header(spec: DataSpec, attributes: Mapping[str, str]) -> xr.Dataset:
    """还没有时刻的真值 (time, [level], latitude, longitude)；time 是有效时刻。"""
    about = {"standard_name": "time", "long_name": "valid time", "axis": "T"}
    return _header(spec, {"time": ("time", *hours_variable(np.zeros(0, np.int64), about))}, attributes)


@contextmanager
def appending(path: Path, header: xr.Dataset, hours: np.ndarray, again: str | None = None) -> Iterator[None]:
    """其间各进程可以写 hours 这些时刻；正常离开时读的一方才看得见。

    同时只许一处写：由命令占着 path 所在的文件夹（atomic.reserved）。

    Args:
        path: 没有就建；有就往后接。
        hours: (N,) UTC 小时，升序。
        again: 那里已有的时刻怎么办：None 为照写不误，否则是拒绝时说给用户的出路。

    Raises:
        ValueError: 网格、时效、成员、变量、模型不同，指出哪里不同；时刻已有，或在那里最后的时刻之前。
    """
    import zarr

    if not path.exists():
        _create(path, header)
    held = _held_hours(path, header)
    known = np.isin(hours, held)
    if known.any() and again:
        first = time_text(int(hours[known][0]))
        raise ValueError(f"{path} holds {known.sum()} of these {len(hours)} times already, first {first}; {again}")
    new = hours[~known]
    if new.size and held.size and new[0] < held[-1]:
        raise ValueError(
            f"{path} ends at {time_text(int(held[-1]))}, {time_text(int(new[0]))} lies before that and is not in "
            "it; times are only added at the end: give another --out"
        )
    _lengthen(path, header, held, new)
    yield
    zarr.consolidate_metadata(str(path))


class Chunks:
    """一个数组的块，逐个编码、写盘：经 zarr 写一块要一两毫秒，几乎全是它自己的，这里零点几毫秒（docs/benchmarks.md）。

    块的名字与编码照数组的元数据，见 zarr_metadata；先写临时名再改名，重写到一半被杀，读的一方看见的是从前的。
    """

    def __init__(self, folder: Path) -> None:
        import numcodecs

        about = json.loads((folder / ".zarray").read_text(encoding="utf-8"))
        assert about["order"] == "C" and not about["filters"], f"{folder}: {about}"
        self.folder, self.chunks, self.dtype = folder, about["chunks"], np.dtype(about["dtype"])
        self.codec: Any = numcodecs.get_codec(about["compressor"])
        self.mark = about.get("dimension_separator", ".")

    def write(self, row: int, values: np.ndarray) -> None:
        """第 row 个时刻的 (...)；一块里的各维不是 1 就是全部。"""
        cuts = [range(size // part) for size, part in zip(values.shape, self.chunks[1:], strict=True)]
        for place in product(*cuts):
            here = tuple(slice(i * part, (i + 1) * part) for i, part in zip(place, self.chunks[1:], strict=True))
            with replacing(self.folder / self.mark.join(map(str, (row, *place)))) as temporary:
                temporary.write_bytes(self.codec.encode(np.ascontiguousarray(values[here], self.dtype)))

    def read(self, row: int) -> np.ndarray:
        """第 row 个时刻原来的数；很少用到，由 zarr 读。"""
        import zarr

        return np.asarray(zarr.open_array(str(self.folder), mode="r")[row])


class ZarrFields:
    """接长了的数组，按时刻写；各进程各开一份，不写同一个时刻就互不相干。"""

    def __init__(self, path: Path, spec: DataSpec) -> None:
        import zarr

        self.spec, self.grid, self.levels = spec, output_grid(spec), levels_of(spec)
        self.hours: np.ndarray = np.asarray(zarr.open_array(str(path / "time"), mode="r")[:])
        names = (_archived(spec, name, channels).name for name, channels in variables_of(spec).items())
        self.chunks = {name: Chunks(path / name) for name in names}
        self.written = np.zeros((len(self.hours), spec.num_channels), dtype=bool)

    def rows(self, hours: np.ndarray) -> np.ndarray:
        rows = np.searchsorted(self.hours, hours)
        assert (self.hours[rows] == hours).all(), "hours that the store does not have"
        return rows

    def write_forecast(self, hours: np.ndarray, fields: np.ndarray) -> None:
        """hours (B,) 起报时刻，UTC 小时；fields (B, M, L, C, H, W) 物理单位。"""
        rows = self.rows(hours).tolist()
        for name, channels in variables_of(self.spec).items():
            chunks, stacked = self._stacked(name, channels, fields if fields.shape[1] > 1 else fields[:, 0])
            for row, values in zip(rows, stacked, strict=True):
                chunks.write(row, values)

    def write_truth(self, hours: np.ndarray, fields: np.ndarray, valid: np.ndarray) -> None:
        """hours (n,) 有效时刻；fields (n, C, H, W) 物理单位；valid (n, C) 为假的场不写，那里原来的数不动。"""
        rows = self.rows(hours)
        some = newly_valid(self.written, rows, valid)
        rows, good = rows[some], self.written[rows[some]]
        fields = np.where(good[:, :, None, None], fields[some], np.float32(np.nan))
        for name, channels in variables_of(self.spec).items():
            chunks, stacked = self._stacked(name, channels, fields)
            for row, values, whole in zip(rows.tolist(), stacked, np.all(good[:, channels], axis=1), strict=True):
                there = np.isfinite(values)
                if there.any():
                    chunks.write(row, values if whole else np.where(there, values, chunks.read(row)))

    def _stacked(self, name: str, channels: list[int], fields: np.ndarray) -> tuple[Chunks, np.ndarray]:
        """一个变量写在哪里，写什么。"""
        there = _archived(self.spec, name, channels)
        stacked = stack(self.spec, fields, channels, self.levels, self.grid) / np.float32(there.scale)
        return self.chunks[there.name], stacked


def _archived(spec: DataSpec, name: str, channels: Sequence[int]) -> Archived:
    return archived(name, spec.units[channels[0]])


def _header(spec: DataSpec, coordinates: Coordinates, attributes: Mapping[str, str]) -> xr.Dataset:
    import xarray as xr

    space = space_coordinates(output_grid(spec), levels_of(spec))
    header = xr.Dataset(coords=coordinates | space, attrs={"Conventions": "CF-1.8", **attributes})
    leading = [name for name in coordinates if name != "valid_time"]
    for name, channels in variables_of(spec).items():
        vertical = ["level"] if spec.pressures[channels[0]] is not None else []
        dims = (*leading, *vertical, "latitude", "longitude")
        empty = np.zeros([header.sizes[dim] for dim in dims], np.float32)
        there = _archived(spec, name, channels)
        header[there.name] = (dims, empty, attributes_of(spec, name, channels) | {"units": there.units})
    return header


def _create(path: Path, header: xr.Dataset) -> None:
    """只有坐标、元数据，还没有时刻。"""
    encoding = {name: {"chunks": one_time(header[name].shape), "_FillValue": np.float32(np.nan)} for name in header}
    for name in {"time", "valid_time"} & set(header.coords):
        encoding[name] = {"chunks": [TIMES_PER_CHUNK, *header[name].shape[1:]]}
    with replacing(path) as temporary:
        header.to_zarr(temporary, mode="w-", zarr_format=2, consolidated=True, encoding=encoding)


def _held_hours(path: Path, header: xr.Dataset) -> np.ndarray:
    """那里已写完的时刻；别的坐标、变量、单位、属性须与 header 的相同。"""
    import xarray as xr

    try:
        held = xr.open_zarr(path, chunks=None, consolidated=True, decode_times=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a Zarr folder that can be added to ({error}); give another --out") from None
    for name in dict.fromkeys([*header.variables, *held.variables]):
        if name not in ("time", "valid_time") and (text := _difference(name, held, header)):
            raise ValueError(f"{path}: {text}; give another --out")
    for key, value in header.attrs.items():
        if held.attrs.get(key) != value:
            raise ValueError(f"{path}: its {key} is {held.attrs.get(key)}, here {value}; give another --out")
    return np.asarray(held["time"].values, np.int64)


def _difference(name: object, held: xr.Dataset, header: xr.Dataset) -> str | None:
    """一个变量或坐标在两处的不同；相同是 None。"""
    if name not in held.variables or name not in header.variables:
        return f"it has {'no ' if name not in held.variables else ''}{name}, unlike this forecast"
    there, here = held[name], header[name]
    same = np.array_equal(there.values, here.values) if name in header.coords else _words(there) == _words(here)
    return None if same else f"its {name} has {_words(there)}, here {_words(here)}"


def _words(array: xr.DataArray) -> str:
    """坐标有多少个值、从哪里到哪里；变量的维与单位。"""
    if array.dims == (array.name,):
        return f"{array.size} values from {array.values[0]:g} to {array.values[-1]:g}"
    return f"dimensions {', '.join(map(str, array.dims))} and units {array.attrs.get('units')}"


def _lengthen(path: Path, header: xr.Dataset, held: np.ndarray, new: np.ndarray) -> None:
    """各数组长到放得下 new；先缩到 held：上一次没写完的块一并删去。时刻的坐标当即写好。"""
    import zarr

    hours = np.concatenate([held, new])
    coordinates: dict[object, np.ndarray] = {"time": hours}
    if "valid_time" in header:
        coordinates["valid_time"] = hours[:, None] + header["prediction_timedelta"].values
    for name in (name for name, variable in header.variables.items() if "time" in variable.dims):
        array = zarr.open_array(str(path / str(name)), mode="r+")
        for size in (len(held), len(hours)):
            if array.shape[0] != size:
                array.resize((size, *array.shape[1:]))
        if name in coordinates:
            array[:] = coordinates[name]
