"""xarray.Dataset 与一次预报之间：历史由它来，预报写成它；名字、单位、气压、网格、时刻一样样核对，不合的一行说清。

变量认四种写法：自己的名字（t2m，z 带气压维，与 forecast.nc 相同），WeatherBench2 的（2m_temperature），
名字连着气压的（z500），不知气压的层（z_level_00）。坐标按值对，次序、多余的时刻、气压、格点都不要紧。
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr

from util.batch import DataSpec
from util.calendar import time_text
from util.files.field_layout import (
    attributes_of,
    forecast_coordinates,
    levels_of,
    space_coordinates,
    stack,
    variables_of,
)
from util.grid import output_grid
from util.source.axes import (
    CIRCLE,
    LEVEL_NAMES,
    ROUNDING,
    SHOWN,
    Dims,
    find_dims,
    listed,
    read_coordinates,
    read_pressures,
    span,
)
from util.source.lead_time import read_hours, time_name
from util.variables import Archived, archived, plain_units, split_channel


def read_history(dataset: xr.Dataset, spec: DataSpec) -> tuple[torch.Tensor, int]:
    """历史 (T_in, C, H, W)，标准化，止于 dataset 的末一个时刻；这个时刻，UTC 小时。

    Raises:
        ValueError: 哪一样不合，有的是什么，怎样就合。
    """
    if not isinstance(dataset, xr.Dataset):
        raise ValueError(f"the history is a {type(dataset).__name__}, not an xarray.Dataset with one variable a field")
    time = time_name(dataset)
    dims = find_dims(dataset.expand_dims(time) if dataset[time].ndim == 0 else dataset)
    arrays = [find_channel(dataset, spec, i, dims) for i in range(spec.num_channels)]
    hours = read_hours(arrays[0])
    wanted = find_frames(hours, spec)
    where = {
        dims.time: [hours.tolist().index(hour) for hour in wanted],
        dims.latitude: find_points("latitude", read_coordinates(dataset, dims.latitude), spec.latitudes),
        dims.longitude: find_points("longitude", read_coordinates(dataset, dims.longitude), spec.longitudes),
    }
    fields = [array.isel(where).values.astype(np.float32) for array in arrays]
    for channel, values in zip(spec.channels, fields, strict=True):
        if bad := int((~np.isfinite(values)).sum()):
            raise ValueError(f"{channel}: {bad} non-finite values in the {spec.frames_in} frames; fill them first")
    return spec.to_standard(torch.from_numpy(np.stack(fields, 1))), wanted[-1]


def find_channel(dataset: xr.Dataset, spec: DataSpec, channel: int, dims: Dims) -> xr.DataArray:
    """一个通道 (time, latitude, longitude)，单位是 spec 的。

    Raises:
        ValueError: 没有这个变量、这一层；单位不同；维不合。
    """
    pressure, units = spec.pressures[channel], spec.units[channel]
    variable, _ = split_channel(spec.channels[channel])
    there = archived(variable, units)
    names = [spec.channels[channel]] if pressure is None else [variable, f"{variable}{pressure:g}"]
    names += [there.name] if pressure is not None or names == [variable] else []
    name = next((name for name in names if name in dataset), None)
    if name is None:
        wanted = " or ".join(dict.fromkeys(names))
        raise ValueError(f"{spec.channels[channel]}: no variable {wanted}; the data set has {listed(dataset)}")
    array = dataset[name]
    if pressure is not None and name in (variable, there.name):
        array = at_pressure(array, name, pressure)
    if array[time_name(array)].ndim == 0:
        array = array.expand_dims(time_name(array))
    for dim in (dim for dim in array.dims if dim not in dims):
        if array.sizes[dim] > 1:
            raise ValueError(f"{name}: dimension {dim} has {array.sizes[dim]} entries; take one: dataset.isel({dim}=0)")
        array = array.isel({dim: 0})
    if set(array.dims) != {dims.time, dims.latitude, dims.longitude}:
        wanted = listed((dims.time, dims.latitude, dims.longitude))
        raise ValueError(f"{name}: dimensions {listed(array.dims)}; wanted {wanted}")
    array = array.transpose(dims.time, dims.latitude, dims.longitude)
    scale = read_scale(array, name, units, there)
    return array if scale == 1 else array * scale


def read_scale(array: xr.DataArray, name: str, units: str, there: Archived) -> float:
    """乘上它单位就是 units；存档的单位也认。

    Raises:
        ValueError: 别的单位，或没有写。
    """
    scales, found = {there.units: there.scale, units: 1.0}, plain_units(str(array.attrs.get("units", "")))
    if found not in scales:
        said = f"units {found!r}, wanted {units!r}: convert it and" if found else f"no units; if they are {units!r},"
        raise ValueError(f"{name}: {said} write dataset[{name!r}].attrs['units'] = {units!r}")
    return scales[found]


def at_pressure(array: xr.DataArray, name: str, pressure: float) -> xr.DataArray:
    """一层，hPa；气压是一条轴，或只剩一个值的坐标。

    Raises:
        ValueError: 没有气压，或没有这一层。
    """
    level = next((n for n in LEVEL_NAMES if n in array.coords), None)
    if level is None:
        raise ValueError(f"{name}: no pressure coordinate ({' or '.join(LEVEL_NAMES)}); wanted {pressure:g} hPa")
    if array[level].ndim == 0:
        array = array.expand_dims(level)
    order, pressures = read_pressures(array.to_dataset(name="field"), level)
    near = int(np.abs(np.array(pressures) - pressure).argmin())
    if abs(pressures[near] - pressure) > 1e-3 * pressure:
        raise ValueError(f"{name}: no {pressure:g} hPa; there: {listed(f'{p:g}' for p in pressures)} hPa")
    return array.isel({level: order[near]})


def find_frames(hours: np.ndarray, spec: DataSpec) -> list[int]:
    """历史各帧的 UTC 小时：止于 hours 的末一个，间隔照训练时的。

    Raises:
        ValueError: 缺哪些。
    """
    if not hours.size:
        raise ValueError("the data set has no times")
    last, there = int(hours.max()), set(hours.tolist())
    wanted = [last + back * spec.interval_hours for back in range(1 - spec.frames_in, 1)]
    lost = [time_text(hour) for hour in wanted if hour not in there]
    if lost:
        raise ValueError(
            f"time: {listed(lost[:SHOWN])} absent; the forecast from {time_text(last)} needs {spec.frames_in} frames "
            f"every {spec.interval_hours} h up to it, the data set has {hours.size} times from "
            f"{time_text(int(hours.min()))} to {time_text(last)}"
        )
    return wanted


def find_points(axis: str, have: np.ndarray, want: Sequence[float]) -> np.ndarray:
    """want 的各点在 have 的第几个；经度差整圈是同一个点。

    Raises:
        ValueError: 有的点没有。
    """
    asked = np.array(want)
    off = np.abs(have - asked[:, None])
    if axis == "longitude":
        off = np.abs(off - CIRCLE * np.rint(off / CIRCLE))
    lost = asked[off.min(1) > ROUNDING]
    if lost.size:
        raise ValueError(
            f"{axis}: {lost[0]:g} is not there ({lost.size} of {asked.size} points are not); wanted {span(asked)}, the "
            f"data set has {span(have)}; interpolate it to the grid of the model first"
        )
    return off.argmin(1)


def forecast_dataset(spec: DataSpec, fields: np.ndarray, init: int, attributes: Mapping[str, str]) -> xr.Dataset:
    """(M, L, C, H, W) 物理单位 → 与打开 forecast.nc（decode_timedelta=True）得到的相同。"""
    members, leads = len(fields), spec.leads(fields.shape[1])
    grid, levels = output_grid(spec), levels_of(spec)
    coordinates = forecast_coordinates(np.array([init]), leads, members)
    leading = [name for name in coordinates if name != "valid_time"]
    about = {"Conventions": "CF-1.8", **attributes}
    made = xr.Dataset(coords=coordinates | space_coordinates(grid, levels), attrs=about)
    for name, channels in variables_of(spec).items():
        vertical = [] if spec.pressures[channels[0]] is None else ["level"]
        values = stack(spec, fields if members > 1 else fields[0], channels, levels, grid)[None]
        made[name] = ((*leading, *vertical, "latitude", "longitude"), values, attributes_of(spec, name, channels))
    return xr.decode_cf(made, decode_timedelta=True)
