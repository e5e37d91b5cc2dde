"""预报与真值写成文件时怎样排：变量、维、坐标；NetCDF 与 Zarr 共用，CF-1.8 的名称与单位，维名与 WeatherBench-X 相同。

有气压的通道按变量合并，带 level 维（hPa 升序）；各变量层次不同时取并集，缺的层为 NaN：
文件里只有一个 level 坐标，`ds.z.sel(level=500)` 对每个变量都成立；缺的层不占地方，NetCDF 里不写，Zarr 里压缩掉。
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from util.grid import OutputGrid
from util.variables import split_channel, variable_info

if TYPE_CHECKING:
    from util.batch import DataSpec

Coordinates = dict[str, tuple[Any, np.ndarray, dict[str, str]]]  # 名称 → (维, 值, 属性)
CHUNK_VALUES = 2**22  # 一块的数据个数：读一个场也要解压整块，块不能超过 4 GiB


def variables_of(spec: DataSpec) -> dict[str, list[int]]:
    """输出变量 → 通道序号；不知气压的层各自成为一个变量（z_level_00），因为没有 level 坐标可用。"""
    groups: dict[str, list[int]] = {}
    for i, (channel, pressure) in enumerate(zip(spec.channels, spec.pressures, strict=True)):
        groups.setdefault(channel if pressure is None else split_channel(channel)[0], []).append(i)
    return groups


def levels_of(spec: DataSpec) -> list[float]:
    """level 坐标，hPa 升序。"""
    return sorted({p for p in spec.pressures if p is not None})


def attributes_of(spec: DataSpec, name: str, channels: list[int], kind: str = "") -> dict[str, str]:
    """一个变量的属性；表外变量没有的就不写。kind: 名字后面另说的，如 truth。"""
    about = variable_info(name)
    described = {
        "long_name": f"{about.long_name} ({kind})" if kind else about.long_name,
        "standard_name": about.standard_name,
        "units": spec.units[channels[0]],
    }
    return {key: value for key, value in described.items() if value}


def stack(spec: DataSpec, fields: np.ndarray, channels: list[int], levels: list[float], grid: OutputGrid) -> np.ndarray:
    """(..., C, H, W) → 单层变量 (..., H, W)，多层变量 (..., K, H, W)，缺的层为 NaN；已按输出排列。"""
    chosen = fields[..., channels, :, :][..., grid.rows, :][..., grid.columns].astype(np.float32)
    if spec.pressures[channels[0]] is None:
        return chosen[..., 0, :, :]
    places = [levels.index(p) for i in channels if (p := spec.pressures[i]) is not None]
    result = np.full((*chosen.shape[:-3], len(levels), *chosen.shape[-2:]), np.nan, np.float32)
    result[..., places, :, :] = chosen
    return result


def one_time(shape: Sequence[int]) -> list[int]:
    """第一维是时刻的变量，一个时刻的块；太大的从外往里切，一个场总是完整的。"""
    chunks = [1, *shape[1:]]
    for axis in range(1, len(chunks) - 2):
        if math.prod(chunks) > CHUNK_VALUES:
            chunks[axis] = 1
    return chunks


def newly_valid(written: np.ndarray, rows: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """一批真值里要写的，每个时刻一处：(n,) 序号，按时刻升序。同一时刻在许多窗口里出现，没有新的有效的场就不再写。

    written: (N, C) bool，哪些有效过，就地记下这一批的；rows: (n,) 各是第几个时刻；valid: (n, C)。
    """
    times, first = np.unique(rows, return_index=True)
    before = written[times]
    np.logical_or.at(written, rows, valid)
    return first[(written[times] & ~before).any(1)]


def hours_variable(hours: np.ndarray, about: dict[str, str]) -> tuple[np.ndarray, dict[str, str]]:
    """写成带单位的整数，读的一方自会换成时刻。"""
    units = {"units": "hours since 1970-01-01", "calendar": "proleptic_gregorian"}
    return np.asarray(hours, dtype=np.int64), about | units


def forecast_coordinates(init_hours: np.ndarray | None, leads: Sequence[int], members: int) -> Coordinates:
    coordinates: Coordinates = {}
    if init_hours is not None:
        about = {"standard_name": "forecast_reference_time", "long_name": "initial time", "axis": "T"}
        coordinates["time"] = ("time", *hours_variable(init_hours, about))
        about = {"standard_name": "time", "long_name": "valid time"}
        valid = np.asarray(init_hours)[:, None] + np.array(leads)  # (N, L)
        coordinates["valid_time"] = (("time", "prediction_timedelta"), *hours_variable(valid, about))
    if members > 1:
        about = {"standard_name": "realization", "long_name": "ensemble member", "units": "1"}
        coordinates["number"] = ("number", np.arange(members, dtype=np.int32), about)
    # 写成带单位的整数：xarray 自己写 timedelta64 时多出的 dtype 属性，Python 3.10 能装的最后一版（2025.6）打不开
    about = {"standard_name": "forecast_period", "long_name": "lead time", "units": "hours"}
    coordinates["prediction_timedelta"] = ("prediction_timedelta", np.array(leads, np.int64), about)
    return coordinates


def space_coordinates(grid: OutputGrid, levels: list[float]) -> Coordinates:
    coordinates: Coordinates = {}
    if levels:
        about = {"standard_name": "air_pressure", "long_name": "pressure", "units": "hPa"}
        coordinates["level"] = ("level", np.array(levels), about | {"axis": "Z", "positive": "down"})
    about = {"standard_name": "latitude", "long_name": "latitude", "units": "degrees_north", "axis": "Y"}
    coordinates["latitude"] = ("latitude", grid.latitudes, about)
    about = {"standard_name": "longitude", "long_name": "longitude", "units": "degrees_east", "axis": "X"}
    coordinates["longitude"] = ("longitude", grid.longitudes, about)
    return coordinates
