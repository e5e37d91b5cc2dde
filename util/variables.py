"""变量表：九个变量的文件夹、单位、CF 名称，与合理范围；表外的照样能用，单位、范围写在数据 YAML 里。"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator

from util.strict import nearest


class Variable(NamedTuple):
    """一个变量的说明。kind 决定配色：anomaly 用发散色，rain、temperature 等用顺序色。"""

    long_name: str
    standard_name: str
    units: str
    kind: Literal["temperature", "wind", "rain", "humidity", "height", "other"]


VARIABLES = {
    "t2m": Variable("2 metre temperature", "air_temperature", "K", "temperature"),
    "tp": Variable("total precipitation", "lwe_thickness_of_precipitation_amount", "m", "rain"),
    "u10": Variable("10 metre eastward wind", "eastward_wind", "m s-1", "wind"),
    "v10": Variable("10 metre northward wind", "northward_wind", "m s-1", "wind"),
    "r": Variable("relative humidity", "relative_humidity", "%", "humidity"),
    "t": Variable("temperature", "air_temperature", "K", "temperature"),
    "u": Variable("eastward wind", "eastward_wind", "m s-1", "wind"),
    "v": Variable("northward wind", "northward_wind", "m s-1", "wind"),
    "z": Variable("geopotential", "geopotential", "m2 s-2", "height"),
}


class Range(NamedTuple):
    """合理范围 [low, high]，只在单位是 units 时算数。"""

    low: float
    high: float
    units: str


# 宽到地球上没有过的才在外面：近地面的照世界气象组织的极端天气气候档案（wmo.asu.edu），高空的照美国标准大气 1976
# （到 0.01 hPa），再各放宽；降水、相对湿度的下限容得下打包与插值的小负数。
RANGES = {
    "t2m": Range(150, 350, "K"),
    "d2m": Range(120, 330, "K"),
    "skt": Range(150, 380, "K"),
    "sst": Range(250, 330, "K"),
    "t": Range(100, 380, "K"),
    "tp": Range(-0.01, 3, "m"),
    "u10": Range(-150, 150, "m s-1"),
    "v10": Range(-150, 150, "m s-1"),
    "u": Range(-300, 300, "m s-1"),
    "v": Range(-300, 300, "m s-1"),
    "w": Range(-100, 100, "Pa s-1"),
    "r": Range(-50, 300, "%"),
    "q": Range(-0.01, 0.1, "kg kg-1"),
    "z": Range(-9500, 900000, "m2 s-2"),  # 900 hPa 的台风里 1000 hPa 面约在 -8500；-9999 在外面
    "sp": Range(30000, 115000, "Pa"),
    "msl": Range(80000, 115000, "Pa"),
    "tcwv": Range(-1, 200, "kg m-2"),
}


class Archived(NamedTuple):
    """一个变量在存档里的名字与单位；scale: 这里的数除以它是存档里的数。"""

    name: str
    units: str
    scale: float = 1.0


# WeatherBench2 的写法，与 config/maps/weatherbench2.yaml 一致。没有 tp：那里各种累积各有名字，这里的累积几小时不知道
WEATHERBENCH = {
    "t2m": Archived("2m_temperature", "K"),
    "d2m": Archived("2m_dewpoint_temperature", "K"),
    "skt": Archived("skin_temperature", "K"),
    "sst": Archived("sea_surface_temperature", "K"),
    "t": Archived("temperature", "K"),
    "u10": Archived("10m_u_component_of_wind", "m s-1"),
    "v10": Archived("10m_v_component_of_wind", "m s-1"),
    "u": Archived("u_component_of_wind", "m s-1"),
    "v": Archived("v_component_of_wind", "m s-1"),
    "w": Archived("vertical_velocity", "Pa s-1"),
    "r": Archived("relative_humidity", "1"),
    "q": Archived("specific_humidity", "kg kg-1"),
    "z": Archived("geopotential", "m2 s-2"),
    "sp": Archived("surface_pressure", "Pa"),
    "msl": Archived("mean_sea_level_pressure", "Pa"),
    "tcwv": Archived("total_column_water_vapour", "kg m-2"),
    "tcc": Archived("total_cloud_cover", "1"),
}
SCALES = {("%", "1"): 100.0, ("(0 - 1)", "1"): 1.0}  # （这里的单位，存档的单位）→ scale
UNIT_SPELLING = {"degK": "K", "(0 - 1)": "1", "~": "1"}  # 常见而不合 CF 的写法
SINGLE_LEVEL = ("t2m", "tp", "u10", "v10")
PRESSURE_LEVEL = ("r", "t", "u", "v", "z")


FORCINGS = ("solar", "day_of_year", "hour_of_day", "latitude", "longitude")  # 算出来的；读来的是 static/NAME
STATIC = "static/"


def channel_name(variable: str, level: str | None) -> str:
    """("z", "level_00") → "z_level_00"；单层变量就是变量名。"""
    return variable if level is None else f"{variable}_{level}"


def split_channel(channel: str) -> tuple[str, str | None]:
    """channel_name 的逆。"""
    variable, found, number = channel.rpartition("_level_")
    return (variable, f"level_{number}") if found else (channel, None)


def channel_folder(channel: str) -> str:
    """通道在根目录下的文件夹："z_level_00" → "z_npy/level_00"，"t2m" → "t2m_npy"。"""
    variable, level = split_channel(channel)
    return f"{variable}_npy" if level is None else f"{variable}_npy/{level}"


def variable_info(channel: str) -> Variable:
    """通道的说明；表外变量只有名字。"""
    variable, _ = split_channel(channel)
    return VARIABLES.get(variable, Variable(variable, "", "", "other"))


def plain_units(text: str) -> str:
    """文件里的单位 → CF 的写法：`m s**-1` 是 `m s-1`。"""
    plain = text.replace("**", "")
    return UNIT_SPELLING.get(plain, plain)


def archived(variable: str, units: str) -> Archived:
    """在 WeatherBench2 里怎样写；单位换不过去的、那里没有的，用自己的名字与单位，不冒充存档里的。"""
    found = WEATHERBENCH.get(variable)
    if found and found.units == units:
        return found
    if found and (units, found.units) in SCALES:
        return found._replace(scale=SCALES[units, found.units])
    return Archived(variable, units)


def plausible_range(
    channel: str, units: Mapping[str, str], stated: Mapping[str, Sequence[float]]
) -> tuple[float, float] | None:
    """通道的合理范围：写明的（通道名的先于变量名的），没有写明而单位与表里的相同就用表里的；不知道是 None。"""
    variable, _ = split_channel(channel)
    for name in (channel, variable):
        if name in stated:
            low, high = stated[name]
            return low, high
    found = RANGES.get(variable)
    return (found.low, found.high) if found and units.get(variable, found.units) == found.units else None


def _levels(value: object) -> object:
    """变量的层：single、all 或层的列表；联合类型自己的报错看不懂，在它之前说清。"""
    named = isinstance(value, list) and value and all(re.fullmatch(r"level_\d+", str(v)) for v in value)
    if not named and (isinstance(value, list) or value not in ("single", "all")):
        raise ValueError("write single, all, or a list of levels like [level_00, level_01]")
    return value


Levels = Annotated[Literal["single", "all"] | list[str], BeforeValidator(_levels)]


def _limits(value: list[float]) -> list[float]:
    if len(value) != 2 or not value[0] < value[1]:
        raise ValueError("write [low, high], low below high, in the units of the channel")
    return value


Limits = Annotated[list[float], AfterValidator(_limits)]


def _known_forcings(names: list[str]) -> list[str]:
    for name in names:
        if name not in FORCINGS and not (name.startswith(STATIC) and name != STATIC):
            raise ValueError(f"{name!r} is no forcing; {nearest(name, [*FORCINGS, f'{STATIC}NAME'], 'forcings')}")
    if len(set(names)) < len(names):
        raise ValueError("a forcing is listed twice")
    return names


Forcings = Annotated[list[str], AfterValidator(_known_forcings)]
