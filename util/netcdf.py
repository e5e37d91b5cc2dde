"""预报写成 NetCDF：CF-1.8 的名称、单位和坐标，维名与 WeatherBench-X 相同，xarray 直接打开。"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from util.data.variables import describe, split_channel

if TYPE_CHECKING:
    import xarray as xr

    from util.batch import DataSpec


class OutputGrid(NamedTuple):
    """输出的排列：fields[..., rows, :][..., columns] 由北向南、由西向东，坐标单位为度。"""

    rows: np.ndarray
    columns: np.ndarray
    latitudes: np.ndarray
    longitudes: np.ndarray


def output_grid(spec: DataSpec) -> OutputGrid:
    """由北向南，经度 0–360 升序；跨过本初子午线的区域若取 0–360 会被撕成两半，改用 -180–180。"""
    latitudes, given = np.array(spec.latitudes), np.round(spec.longitudes, 9)  # -1e-14 取模会变成 360
    rows = np.argsort(-latitudes, kind="stable")
    longitudes = given % 360
    step = np.abs(np.diff(given)).min(initial=360.0)
    if np.diff(np.sort(longitudes)).max(initial=0.0) > 1.5 * step:
        longitudes = given - 360 * np.floor((given.min() + 180) / 360)
    columns = np.argsort(longitudes, kind="stable")
    return OutputGrid(rows, columns, latitudes[rows], longitudes[columns])


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

    有气压的通道按变量合并，带 level 维（hPa 升序）；各变量层次不同时取并集，缺的层为 NaN：
    文件里只有一个 level 坐标，`ds.z.sel(level=500)` 对每个变量都成立，而压缩后的 NaN 不占地方。
    时效要读成 timedelta64（WeatherBench-X 需要），用 `xr.open_dataset(path, decode_timedelta=True)`。

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
    dataset = _dataset(spec, forecast, init_hour, leads, truth)
    dataset.attrs = {"Conventions": "CF-1.8", **attributes}
    encoding: dict[Any, dict[str, Any]] = {name: {"_FillValue": None} for name in dataset.coords}
    for name in dataset.data_vars:
        encoding[name] = {"dtype": "float32", "zlib": True, "complevel": 1, "shuffle": True}
    for name in {"time", "valid_time"} & set(dataset.coords):
        encoding[name] |= {"units": "hours since 1970-01-01", "calendar": "proleptic_gregorian", "dtype": "int64"}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        dataset.to_netcdf(temporary, format="NETCDF4", engine="h5netcdf", encoding=encoding)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _dataset(
    spec: DataSpec, forecast: np.ndarray, init_hour: int | None, leads: list[int], truth: np.ndarray | None
) -> xr.Dataset:
    """坐标与全部变量；forecast (M, L, C, H, W)，truth (L, C, H, W)。"""
    import xarray as xr

    grid = output_grid(spec)
    levels = sorted({p for p in spec.pressures if p is not None})
    dataset = xr.Dataset(coords=_coordinates(grid, levels, init_hour, leads, forecast.shape[0]))
    start = ["time"] if init_hour is not None else []
    member = ["number"] if forecast.shape[0] > 1 else []
    for name, channels in _variables(spec).items():
        about = describe(name)
        attributes = {"standard_name": about.standard_name, "units": spec.units[channels[0]]}
        attributes = {key: value for key, value in attributes.items() if value}  # 表外变量没有的就不写
        vertical = ["level"] if spec.pressures[channels[0]] is not None else []
        fields = _stack(spec, forecast, channels, levels, grid)  # (M, L, [K], H, W)
        fields = fields if member else fields[0]
        dims = [*start, *member, "prediction_timedelta", *vertical, "latitude", "longitude"]
        described = {"long_name": about.long_name, **attributes}
        dataset[name] = (dims, fields[None] if start else fields, described)
        if truth is not None:
            fields = _stack(spec, truth, channels, levels, grid)  # (L, [K], H, W)
            dims = [dim for dim in dims if dim != "number"]
            described = {"long_name": f"{about.long_name} (truth)", **attributes}
            dataset[f"{name}_truth"] = (dims, fields[None] if start else fields, described)
    return dataset


def _variables(spec: DataSpec) -> dict[str, list[int]]:
    """输出变量 → 通道序号；不知气压的层各自成为一个变量（z_level_00），因为没有 level 坐标可用。"""
    groups: dict[str, list[int]] = {}
    for i, (channel, pressure) in enumerate(zip(spec.channels, spec.pressures, strict=True)):
        groups.setdefault(channel if pressure is None else split_channel(channel)[0], []).append(i)
    return groups


def _stack(
    spec: DataSpec, fields: np.ndarray, channels: list[int], levels: list[float], grid: OutputGrid
) -> np.ndarray:
    """(..., C, H, W) → 单层变量 (..., H, W)，多层变量 (..., K, H, W)，缺的层为 NaN；已按输出排列。"""
    chosen = fields[..., channels, :, :][..., grid.rows, :][..., grid.columns].astype(np.float32)
    if spec.pressures[channels[0]] is None:
        return chosen[..., 0, :, :]
    places = [levels.index(p) for i in channels if (p := spec.pressures[i]) is not None]
    result = np.full((*chosen.shape[:-3], len(levels), *chosen.shape[-2:]), np.nan, np.float32)
    result[..., places, :, :] = chosen
    return result


def _coordinates(
    grid: OutputGrid, levels: list[float], init_hour: int | None, leads: list[int], num_members: int
) -> dict[str, Any]:
    # 写成带单位的整数：xarray 自己写 timedelta64 时多出的 dtype 属性，Python 3.10 能装的最后一版（2025.6）打不开
    about = {"standard_name": "forecast_period", "long_name": "lead time", "units": "hours"}
    coordinates: dict[str, Any] = {"prediction_timedelta": ("prediction_timedelta", np.array(leads, np.int64), about)}
    if init_hour is not None:
        init = np.array([init_hour], "datetime64[h]").astype("datetime64[ns]")
        valid = init[:, None] + np.array(leads, "timedelta64[h]")  # (1, L)
        about = {"standard_name": "forecast_reference_time", "long_name": "initial time", "axis": "T"}
        coordinates["time"] = ("time", init, about)
        about = {"standard_name": "time", "long_name": "valid time"}
        coordinates["valid_time"] = (("time", "prediction_timedelta"), valid, about)
    if num_members > 1:
        about = {"standard_name": "realization", "long_name": "ensemble member", "units": "1"}
        coordinates["number"] = ("number", np.arange(num_members, dtype=np.int32), about)
    if levels:
        about = {"standard_name": "air_pressure", "long_name": "pressure", "units": "hPa"}
        coordinates["level"] = ("level", np.array(levels), about | {"axis": "Z", "positive": "down"})
    about = {"standard_name": "latitude", "long_name": "latitude", "units": "degrees_north", "axis": "Y"}
    coordinates["latitude"] = ("latitude", grid.latitudes, about)
    about = {"standard_name": "longitude", "long_name": "longitude", "units": "degrees_east", "axis": "X"}
    coordinates["longitude"] = ("longitude", grid.longitudes, about)
    return coordinates
