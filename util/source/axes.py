"""源文件的轴：按名字认出时间、气压、经纬度各维，读出裁剪之后的坐标；只读坐标，不读场。"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from util.config import Axis
from util.source.lead_time import time_name

if TYPE_CHECKING:
    import xarray as xr

LATITUDE_NAMES = ("latitude", "lat")
LONGITUDE_NAMES = ("longitude", "lon")
LEVEL_NAMES = ("pressure_level", "isobaricInhPa", "plev", "level", "lev")
CIRCLE = 360.0
ROUNDING = CIRCLE * float(np.finfo(np.float32).eps)  # 单精度存的坐标的舍入误差，度
SHOWN = 20  # 报错与摘要里最多逐条列出几个
HPA_PER_UNIT = {"hPa": 1.0, "mbar": 1.0, "millibar": 1.0, "millibars": 1.0, "Pa": 0.01}


class Dims(NamedTuple):
    """源文件里各维的名字；没有气压维时 level 为 None，一个文件一个时刻、没有时间维时 time 为 None。"""

    time: str | None
    level: str | None
    latitude: str
    longitude: str


def find_dims(dataset: xr.Dataset) -> Dims:
    """按名字认出各维；次序不限，有效时刻可以挂在另一个名字的维上。

    Raises:
        ValueError: 缺时间、纬度或经度。
    """
    moments = dataset[time_name(dataset)].dims
    time = str(moments[0]) if moments else None
    level = next((n for n in LEVEL_NAMES if n in dataset.dims), None)
    return Dims(time, level, *horizontal_dims(dataset))


def horizontal_dims(found: xr.Dataset | xr.DataArray) -> tuple[str, str]:
    """纬度、经度两维的名字。

    Raises:
        ValueError: 缺哪一个。
    """
    horizontal = []
    for names in (LATITUDE_NAMES, LONGITUDE_NAMES):
        name = next((n for n in names if n in found.dims and n in found.coords), None)
        if name is None:
            raise ValueError(f"no axis named {' or '.join(names)}; dimensions there: {listed(found.dims)}")
        horizontal.append(name)
    return horizontal[0], horizontal[1]


def read_coordinates(dataset: xr.Dataset | xr.DataArray, name: str) -> np.ndarray:
    """一条水平轴的坐标 (n,)，双精度，度；经度展开成一段连着的：350、355、0、5 是 -10、-5、0、5。

    在 [-180, 360] 里的不动，其余起于 [-180, 180)。

    Raises:
        ValueError: 一个也没有，或有缺的。
    """
    values = dataset[name].values.astype(np.float64)
    if not values.size or not np.isfinite(values).all():
        missing = int((~np.isfinite(values)).sum())
        raise ValueError(f"{name}: {missing} of {values.size} coordinates are missing")
    if name in LONGITUDE_NAMES:
        values = np.unwrap(values, period=CIRCLE)
        if values.min() < -180 - ROUNDING or values.max() > CIRCLE + ROUNDING:
            values -= CIRCLE * np.floor((values.min() + 180 + ROUNDING) / CIRCLE)
    return values


def same_coordinates(one: np.ndarray, other: np.ndarray) -> bool:
    """两条轴是否相同：差在单精度的舍入之内，经度可以相差整圈。"""
    if one.size != other.size:
        return False
    off = one - other
    return bool((np.abs(off - CIRCLE * np.rint(off[0] / CIRCLE)) <= ROUNDING).all())


def read_axis(dataset: xr.Dataset | xr.DataArray, name: str, region: slice) -> Axis:
    """等距坐标轴裁剪之后的 first、step、count；方向照源文件，经度展开（read_coordinates）。

    Raises:
        ValueError: 不等距（高斯网格等）。
    """
    values, dtype = read_coordinates(dataset, name), dataset[name].dtype
    rounding = ROUNDING if dtype.kind == "f" and dtype.itemsize < 8 else CIRCLE * float(np.finfo(np.float64).eps)
    step = float(values[-1] - values[0]) / max(values.size - 1, 1)
    error = np.abs(values - (values[0] + step * np.arange(values.size))).max()
    if error > 1e-3 * abs(step) + rounding:
        likely = ", as on a Gaussian grid" if name in LATITUDE_NAMES else ""
        raise ValueError(
            f"{name}: not evenly spaced (up to {error:.4g} degrees off steps of {step:.4g}){likely}; "
            "the YAML holds first, step and count only, so regrid to an even grid: --regrid METHOD "
            "--latitude FIRST STEP COUNT --longitude FIRST STEP COUNT"
        )
    step = _shortest(step, rounding / values.size)
    first = _shortest(float(values[0]), rounding) + region.start * step
    return Axis(first=_shortest(first, rounding), step=step, count=region.stop - region.start)


def read_pressures(dataset: xr.Dataset, name: str) -> tuple[list[int], list[float]]:
    """气压轴上由低压到高压的下标，和相应的气压 (hPa)；level_00 是气压最低的一层。

    Raises:
        ValueError: 单位不是气压，或数值不像气压。
    """
    if name not in dataset.coords:
        raise ValueError(f"{name}: a dimension without pressures")
    units = dataset[name].attrs.get("units", "hPa")  # 旧的 ERA5 文件常不写，数值就是 hPa
    if units not in HPA_PER_UNIT:
        raise ValueError(f"{name}: units {units!r} are not a pressure; allowed: {listed(HPA_PER_UNIT)}")
    pressures = dataset[name].values.astype(np.float64) * HPA_PER_UNIT[units]
    if not ((pressures > 0) & (pressures <= 1100)).all() or np.unique(pressures).size != pressures.size:
        raise ValueError(f"{name}: {listed(pressures)} hPa are not distinct pressures between 0 and 1100")
    order = np.argsort(pressures)
    return order.tolist(), [_shortest(p, 1e-6) for p in pressures[order].tolist()]


def has_levels(dataset: xr.Dataset, source: str, dims: Dims) -> bool:
    """变量有没有气压维；顺便查它的维是否都能导入（长度为 1 的维不算）。

    Raises:
        ValueError: 缺时间或经纬度，或有别的维（成员、预报步）。
    """
    sizes = dataset[source].sizes
    absent = [dim for dim in (dims.time, dims.latitude, dims.longitude) if dim and dim not in sizes]
    if absent:
        raise ValueError(f"variable {source}: no dimension {listed(absent)}; its dimensions: {listed(sizes) or 'none'}")
    extra = [f"{dim} ({size})" for dim, size in sizes.items() if dim not in dims and size > 1]
    if extra:
        raise ValueError(
            f"variable {source}: dimension {listed(extra)} cannot be imported; --select DIM=VALUE takes one entry"
        )
    return dims.level in sizes


def listed(items: Iterable[Any]) -> str:
    """逗号隔开，报错和摘要用。"""
    return ", ".join(str(item) for item in items)


def span(values: np.ndarray) -> str:
    """一条轴，报错用。"""
    return f"{values.size} values from {values[0]:g} to {values[-1]:g}" if values.size else "none"


def _shortest(value: float, tolerance: float) -> float:
    """容差之内小数位最少的写法：float32 的 0.1 存成 0.1。"""
    return next((r for r in (round(value, digits) for digits in range(12)) if abs(r - value) <= tolerance), value)
