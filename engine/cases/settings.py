"""--cases 的 YAML：几段点名的天气，各是名字、有效日期、框、通道，与画什么；写错的在读入时就停。"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator, model_validator

from util.calendar import parse_time
from util.scores.regions import Box, Degrees
from util.strict import Name, PositiveInt, Strict, brief, read_mapping, validate

WRITTEN = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d(:00)?)?")
DAY = len("1981-07-01")


def _time(value: object) -> int:
    if not isinstance(value, str) or not WRITTEN.fullmatch(value):
        raise ValueError("write a day or an hour in UTC, like 1981-07-01 or 1981-07-01T12")
    return parse_time(value)


def _dates(value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("write [first, last], both included, like [1981-07-01, 1981-07-05]")
    first, last = map(_time, value)
    if len(value[1]) == DAY:
        last += 23  # 末一天也算在内
    if last < first:
        raise ValueError("the last date lies before the first")
    return first, last


Time = Annotated[int, BeforeValidator(_time)]  # UTC 小时
Dates = Annotated[tuple[int, int], BeforeValidator(_dates)]


class Case(Box):
    """一个个例；latitude、longitude 同 config/regions.yaml，都不写是整个网格。

    dates: 有效时刻的起止，都算在内。channels: 看哪些，不写是全部（多了均匀地取几个）。
    point: [纬度, 经度]，羽状图画最近的格点；不写画框的面积平均。
    moments: 地图画哪些有效时刻；不写是正中的一个。leads: 地图画哪些时效，小时；不写是均匀的几个。
    contours: 通道 → 面条图的等值线，物理单位；不写是那一刻气候态在框里的中位数。
    """

    name: Name
    dates: Dates
    channels: list[str] | None = Field(default=None, min_length=1)
    point: Degrees | None = None
    moments: list[Time] | None = Field(default=None, min_length=1)
    leads: list[PositiveInt] | None = Field(default=None, min_length=1)
    contours: dict[str, Annotated[list[float], Field(min_length=1)]] = Field(default={})

    @field_validator("point")
    @classmethod
    def _on_earth(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not (-90 <= value[0] <= 90 and -180 <= value[1] <= 360):
            raise ValueError("a point is [latitude, longitude], -90 to 90 and -180 to 360")
        return value

    @model_validator(mode="after")
    def _inside_the_dates(self) -> Case:
        first, last = self.dates
        if not all(first <= moment <= last for moment in self.moments or ()):
            raise ValueError("moments must lie within dates")
        if outside := [c for c in self.contours if self.channels and c not in self.channels]:
            raise ValueError(f"contours names {brief(outside[0])}, which channels does not")
        return self


class CasesFile(Strict):
    """config/cases.yaml。"""

    cases: list[Case] = Field(min_length=1)

    @field_validator("cases")
    @classmethod
    def _own_folders(cls, value: list[Case]) -> list[Case]:
        names = [case.name.casefold() for case in value]
        if twice := [case.name for case in value if names.count(case.name.casefold()) > 1]:
            raise ValueError(f"two cases are called {twice[0]}; each has a folder of its own")
        return value


def read_cases(path: Path) -> list[Case]:
    """不看数据就查得出的都查过了。

    Raises:
        ValueError: 没有文件；键、值不对。一行。
    """
    return validate(CasesFile, read_mapping(path), str(path)).cases
