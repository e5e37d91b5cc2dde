"""时刻：从坐标读出有效时刻；预报的 time 是起报时刻，有效时刻 = 起报时刻 + 预报时效。

坐标都取自一个变量（DataArray），不取自整个文件：别的变量的预报时效与它无关。
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

TIME_NAMES = ("valid_time", "time")  # 两者都有（起报时刻与有效时刻）取有效时刻
INITIAL_NAMES = ("init_time", "initial_time", "forecast_reference_time", "reftime")  # 只有起报时刻的文件
LEAD_NAMES = ("prediction_timedelta", "step", "lead_time", "leadtime", "lead", "forecast_period", "forecast_hour")
SECONDS = {
    "nanoseconds": 1e-9,
    "microseconds": 1e-6,
    "milliseconds": 1e-3,
    "seconds": 1.0,
    "minutes": 60.0,
    "hours": 3600.0,
    "days": 86400.0,
}
SHORT_UNITS = {"ns": "nanoseconds", "s": "seconds", "sec": "seconds", "min": "minutes", "h": "hours", "hr": "hours"}
SHORT_UNITS |= {"hrs": "hours", "d": "days"} | {name.removesuffix("s"): name for name in SECONDS}


def time_name(found: xr.Dataset | xr.DataArray) -> str:
    """时间坐标的名字：一维的优先，标量次之。

    Raises:
        ValueError: 没有，或者维数更多。
    """
    names = [n for n in (*TIME_NAMES, *INITIAL_NAMES) if n in found.coords]
    name = next((n for size in (1, 0) for n in names if found[n].ndim == size), None)
    if name is None:
        there = ", ".join(map(str, found.coords))
        what = f"{names[0]} has {found[names[0]].ndim} dimensions" if names else f"there: {there}"
        raise ValueError(
            f"no time axis: needs a coordinate {' or '.join(TIME_NAMES)} with one dimension; {what}"
            " (--select DIM=VALUE takes one entry)"
        )
    return name


def read_hours(array: xr.DataArray) -> np.ndarray:
    """(T,) int64，有效时刻，1970 年以来的 UTC 小时；源文件的次序，不必有序。

    Raises:
        ValueError: 历法不是公历、有缺、不在整点；是起报时刻而预报时效不明。
    """
    return _full_hours(array, added_lead)


def initial_hours(array: xr.DataArray) -> np.ndarray:
    """同上，时间坐标本身：一份预报的起报时刻。"""
    return _full_hours(array, lambda _: None)


def _full_hours(array: xr.DataArray, lead_of: Callable[[xr.DataArray], np.ndarray | None]) -> np.ndarray:
    name = time_name(array)
    times = np.atleast_1d(array[name].values)  # 只是坐标，不碰场
    if times.dtype.kind != "M":  # 公历之外的历法，xarray 解成对象
        calendar = array[name].encoding.get("calendar", "none")
        raise ValueError(f"{name}: calendar {calendar!r}, dtype {times.dtype}; only standard-calendar dates are read")
    if np.isnat(times).any():
        raise ValueError(f"{name}: {int(np.isnat(times).sum())} of {times.size} times are missing")
    lead = lead_of(array)
    seconds = _seconds(times) + (0.0 if lead is None else 3600 * lead)
    hours = np.rint(seconds / 3600).astype(np.int64)
    off = np.flatnonzero(np.abs(seconds - hours * 3600.0) > 1)  # 以浮点日数存的时刻有舍入，一秒以内算整点
    if off.size:
        where = np.datetime64(int(np.rint(1000 * seconds[off[0]])), "ms")
        raise ValueError(f"{name}: {where} is not a full hour ({off.size} such times)")
    return hours


def added_lead(array: xr.DataArray) -> np.ndarray | None:
    """加在时间坐标上才是有效时刻的小时数，() 或 (T,)；时间坐标已是有效时刻就是 None。

    另有起报时刻的（CF 的 forecast_reference_time），由数值定：time = 起报 + 时效的是有效时刻。

    Raises:
        ValueError: 定不了。
    """
    name = time_name(array)
    if name == TIME_NAMES[0]:
        return None
    lead = next((array[str(n)] for n in (*array.coords, *array.dims) if is_lead(array, str(n))), None)
    initial = _is_initial(array, name)
    if lead is None:
        if initial:
            raise ValueError(f"{name} is the initial time of a forecast and no lead time is known; {_way_out(name)}")
        return None
    if lead.name not in array.coords:
        raise ValueError(f"{lead.name}: a lead-time axis without values, so no valid times; {_way_out(name)}")
    hours = lead_hours(lead).squeeze()
    others = [str(n) for n in array.coords if n != name and _is_initial(array, str(n))]
    if others and not initial:
        reference, times = (_seconds(array[n].values) for n in (others[0], name))
        if np.allclose(times, reference + 3600 * hours, rtol=0, atol=1):
            return None
        if not np.allclose(times, reference, rtol=0, atol=1):
            raise ValueError(f"{name} is neither {others[0]} nor {others[0]} + {lead.name}; {_way_out(name)}")
    elif hours.ndim and not initial:
        raise ValueError(f"{lead.name} changes along {name}: initial or valid times? {_way_out(name)}")
    return hours


def is_lead(found: xr.Dataset | xr.DataArray, name: str) -> bool:
    """是不是预报时效的轴：按名字，或按 CF 的 standard_name。"""
    there = name in found.coords
    return name in LEAD_NAMES or (there and found[name].attrs.get("standard_name") == "forecast_period")


def lead_hours(lead: xr.DataArray) -> np.ndarray:
    """预报时效，小时；形状不变。

    Raises:
        ValueError: 不是时间差，也没有写单位。
    """
    values = lead.values
    if values.dtype.kind == "m":
        return values / np.timedelta64(1, "h")
    given = str(lead.attrs.get("units", ""))
    units = SHORT_UNITS.get(given.lower(), given.lower())
    if units not in SECONDS and np.any(values != 0):
        raise ValueError(
            f"{lead.name}: units {given or 'none'} of a lead time, so no valid times; "
            f"write its attribute units into the file, one of {', '.join(SECONDS)}"
        )
    return np.asarray(values, dtype=np.float64) * SECONDS.get(units, 0.0) / 3600


def places_of_lead(lead: xr.DataArray, value: float | str) -> np.ndarray:
    """哪几项的预报时效是 value：先当文件里的数，没有才当小时数；也可以写 12h、1 day。"""
    there = np.atleast_1d(lead.values)
    found = np.flatnonzero(there == value) if there.dtype.kind != "m" and not isinstance(value, str) else np.zeros(0)
    if found.size:
        return found
    if isinstance(value, str):
        words = re.fullmatch(r"(\d+\.?\d*) *([a-z]+)", value.lower())
        units = SHORT_UNITS.get(words[2], words[2]) if words else ""
        if not words or units not in SECONDS:
            return found
        value = float(words[1]) * SECONDS[units] / 3600
    return np.flatnonzero(np.abs(np.atleast_1d(lead_hours(lead)) - value) < 1 / 3600)


def _is_initial(array: xr.DataArray, name: str) -> bool:
    named = name in INITIAL_NAMES or array[name].attrs.get("standard_name") == "forecast_reference_time"
    return named and array[name].dtype.kind == "M"


def _seconds(times: np.ndarray) -> np.ndarray:
    return np.asarray(times).astype("datetime64[ms]").astype(np.int64) / 1000.0


def _way_out(name: str) -> str:
    return f"name the axis {name} valid_time if it holds valid times, init_time if initial times beside a lead time"
