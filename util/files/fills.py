"""填充值：有限、却不是数据的数。导入、读树、检查、统计量都由这里认。

远的（1e15 以上，没有哪个物理量有这么大）逐点算缺测；小的记号（9999、-9999……）只有整场都是它，才算这一场缺测：
单独一点可能是数据。落在通道合理范围之内的都是数据：干的降水、夜里的辐射整场是 0。
来源：NetCDF 的 netcdf.h（NC_FILL_*）；CMIP 与 CESM 的 1e20、1e36；wgrib 的 9.999e20；Ferret 的 -1e34；MERRA-2 的 1e15；
ROMS 的 1e37；GDAL、ESRI 的 ±FLT_MAX；GRIB 与站点资料的 9999 一类。
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

FAR = (9.969209968386869e36, 3.4028234663852886e38, -3.4028234663852886e38, 1.8446744073709552e19)
FAR += (9.223372036854776e18, -9.223372036854776e18, 9.999e20, 1e15, 1e20, 1e30, 1e35, 1e36, 1e37)
FAR += (-9.999e20, -1e15, -1e20, -1e30, -1e34, -1e35, -1e36, 1e34)
CODES = (9999.0, -9999.0, 99999.0, -99999.0, -999.0, -999.9, -9999.9, 32767.0, -32767.0, -32768.0, 65535.0)
CODES += (2147483647.0, -2147483647.0, -2147483648.0, 4294967295.0)
RTOL = 1e-5  # float32 的舍入、写成六位数字的 9.96921e36
LEAST_FAR = 1e15 * (1 - RTOL)
MOST_STD = 1e12  # 训练日期里只有一个 1e15 时，标准差也在此之上


class Fills(NamedTuple):
    """一个通道里认作填充值的：far 逐点，codes 只在整场都是它时。"""

    far: tuple[float, ...] = FAR
    codes: tuple[float, ...] = CODES


def fills_of(limits: tuple[float, float] | None, scale: float = 1.0, offset: float = 0.0) -> Fills:
    """合理范围 limits（不知道是 None）之外的填充值；文件里的数 × scale + offset 才是 limits 的单位。"""
    low, high = limits or (np.inf, -np.inf)
    kept = [tuple(f for f in fills if not low <= scale * f + offset <= high) for fills in (FAR, CODES)]
    return Fills(*kept)


def standardized_too(fills: Fills, mean: float, std: float) -> Fills:
    """连同它们标准化之后的样子：文件可能是连填充值一起标准化的。"""
    far, codes = ([(f - mean) / std for f in values] for values in fills)
    return Fills(fills.far + tuple(f for f in far if abs(f) >= LEAST_FAR), fills.codes + tuple(codes))


def refuse_filled(where: str, std: float, way_out: str) -> None:
    """从前把填充值当数据算出来的统计量。

    Raises:
        ValueError: 标准差大得只能是那样来的。
    """
    if std > MOST_STD:
        raise ValueError(f"{where}: std {std:g}, so fill values were taken for data when it was computed; {way_out}")


def match(value: float, fills: tuple[float, ...], rtol: float = RTOL) -> float | None:
    """value 是其中的哪一个。"""
    return next((f for f in fills if abs(value - f) <= rtol * abs(f)), None)


def surely_data(field: np.ndarray, fills: Fills) -> bool:
    """(H, W) 连续的 float32 里全是有限值、没有填充值；只看一遍，比逐点问有限还快，说不准的（数太大）为假。

    平方和：NaN、无穷、一个 1e15 都使它越过界限。整场相同的，首尾两点就相同。
    """
    flat, first = field.ravel(), field.item(0)
    with np.errstate(over="ignore"):
        small = (flat.dot(flat) if flat.itemsize == 4 else np.einsum("i,i", flat, flat)) < LEAST_FAR**2
    return bool(small) and not (first == field.item(-1) and match(first, fills.codes) is not None)


def find_fill(field: np.ndarray, fills: Fills, rtol: float = RTOL) -> tuple[float, np.ndarray] | None:
    """(填充值, 它在哪里 (H, W) bool)；没有是 None，有几种的取最多的，位置却是全部的。rtol: field 舍入得多粗。"""
    first = field.item(0)
    if match(first, fills.codes + fills.far, rtol) is not None and (field == field.flat[0]).all():
        return first, np.ones(field.shape, dtype=bool)
    size = np.abs(field)
    far = size >= LEAST_FAR  # NaN 不算
    if not far.any():
        return None
    values, counts = np.unique(field[far], return_counts=True)
    known = [match(float(v), fills.far, rtol) is not None for v in values]
    if not any(known):
        return None
    return float(values[known][counts[known].argmax()]), np.isin(field, values[known])
