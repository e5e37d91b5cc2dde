"""变量表：九个变量的文件夹、单位、CF 名称；表外的变量照样能用，单位写在数据 YAML 里。"""

from __future__ import annotations

from typing import Literal, NamedTuple


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
SINGLE_LEVEL = ("t2m", "tp", "u10", "v10")
PRESSURE_LEVEL = ("r", "t", "u", "v", "z")


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
