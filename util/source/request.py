"""要导入什么：`--map FILE.yaml`、`--preset NAME`（config/maps/ 里的一份），或命令行上的 --variable、--select……；

几种写法得出同一个 Request。
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from util.config import Limits
from util.strict import Day, Strict, nearest, parse_yaml, read_mapping, validate

Scalar = int | float | str
MAPS = Path(__file__).resolve().parents[2] / "config" / "maps"


def _in_order(days: list[str]) -> list[str]:
    if days[0] > f"{days[1]}-12-31":  # 只写年份的 END 到那一年的末尾；写到日的，添上的不起作用
        raise ValueError(f"the START {days[0]} is after the END {days[1]}")
    return days


Dates = Annotated[list[Day], Field(min_length=2, max_length=2), AfterValidator(_in_order)]


class Wanted(Strict):
    """目录树里的一个变量取自哪里：文件里的 source（不写就同名），写进树的是 scale · x + offset，单位 units。

    filter 挑 GRIB 的消息，如 {shortName: t, typeOfLevel: isobaricInhPa}；
    valid_range 同 data.valid_range，单位是 units。
    """

    source: str | None = None
    units: str | None = None
    scale: float = 1.0
    offset: float = 0.0
    valid_range: Limits | None = None
    filter: dict[str, Scalar] = Field(default={})

    @model_validator(mode="after")
    def _stated(self) -> Wanted:
        if self.scale == 0:
            raise ValueError("scale must not be 0")
        if self.converts and not self.units:
            raise ValueError("scale and offset need units, the units after the conversion")
        return self

    @property
    def converts(self) -> bool:
        return (self.scale, self.offset) != (1.0, 0.0)


class Request(Strict):
    """一次导入：目录树里的名字 → Wanted。

    pressure_hpa: 要哪些层，次序就是 level_00、level_01……；不写就是文件里的全部，由低压到高压。
    select: 经纬、时间、气压之外的维取哪一项（按坐标的值）；filter: 各变量共同的 GRIB 键。
    absent_chunks: Zarr 里没有写过的块是数据（fill_value）还是缺测；不写就只在说得准时导入。
    static: 不随时间变的场，写法同 variables。
    dates: 只要这两天之间的时刻，两端都含；不写就是全部。
    skip_lacking: 哪个来源里也没有的变量略去，不写就报错。
    """

    variables: dict[str, Wanted] = Field(default={})
    static: dict[str, Wanted] = Field(default={})
    pressure_hpa: list[float] = Field(default=[])
    select: dict[str, Scalar] = Field(default={})
    filter: dict[str, Scalar] = Field(default={})
    absent_chunks: Literal["data", "missing"] | None = None
    dates: Dates | None = None
    skip_lacking: bool = False

    @model_validator(mode="after")
    def _named(self) -> Request:
        for name in (*self.variables, *self.static):
            if not re.fullmatch(r"[A-Za-z]\w*", name) or "_level_" in name:
                raise ValueError(f"variables: {name!r} is not a name; use letters, digits and _, e.g. t2m")
        if both := sorted(set(self.variables) & set(self.static)):
            raise ValueError(f"{both[0]!r} is both in variables and in static; choose another name")
        if len(set(self.pressure_hpa)) < len(self.pressure_hpa):
            raise ValueError("pressure_hpa holds a level twice")
        return self

    def source(self, name: str) -> str:
        return self.variables[name].source or name

    def filters(self, name: str) -> dict[str, Scalar]:
        return {**self.filter, **self.variables[name].filter}


class _GivenDates(Strict):
    """命令行的 --dates：单独查，报错才说得出它的名字。"""

    dates: Dates = Field(alias="--dates")


def read_request(
    path: str | None,
    variables: Sequence[str],
    select: Sequence[str] = (),
    filters: Sequence[str] = (),
    absent_chunks: str | None = None,
    static: Sequence[str] = (),
    preset: str | None = None,
    levels: Sequence[float] = (),
    dates: Sequence[str] = (),
) -> Request:
    """命令行 → Request；variables 之外的可以加在 --map 之上，同一个键以命令行的为准。

    Args:
        variables、static: "SOURCE=NAME"，有 preset 时 variables 也可以是 preset 里的 "NAME"；
        select、filters: "KEY=VALUE"；preset: config/maps/ 里的名字；levels: hPa；dates: 起、止。

    Raises:
        ValueError: 两种写法都给了，或写法、键、类型不对。
    """
    if path and (variables or static or preset):
        option = "--preset" if preset else "--variable" if variables else "--static"
        raise ValueError(f"--map and {option} exclude each other; write the variables into the map")
    values: dict[str, Any] = read_mapping(path) if path else {}
    if preset:
        values = _narrowed(_read_preset(preset), preset, variables)
    elif not path:
        values = {"variables": _pairs("--variable", variables)}
    values |= {"static": _pairs("--static", static)} if static else {}
    for key, option, texts in (("select", "--select", select), ("filter", "--filter", filters)):
        if texts and isinstance(values.setdefault(key, {}), dict):  # 不是映射的，留给 validate 说
            values[key] = values[key] | _scalars(option, texts)
    if dates:
        validate(_GivenDates, {"--dates": list(dates)}, "command line")
    given = {"absent_chunks": absent_chunks, "pressure_hpa": list(levels), "dates": list(dates)}
    values |= {key: value for key, value in given.items() if value}
    request: Request = validate(Request, values, path or "command line")
    if path and not request.variables and not request.static:
        raise ValueError(f"{path}: variables is empty; write e.g. t2m: {{source: t2m}}")
    return request


def _read_preset(name: str) -> dict[str, Any]:
    there = sorted(path.stem for path in MAPS.glob("*.yaml"))
    if name not in there:
        raise ValueError(f"--preset {name}: {nearest(name, there, 'presets')}")
    return read_mapping(MAPS / f"{name}.yaml")


def _narrowed(values: dict[str, Any], preset: str, variables: Sequence[str]) -> dict[str, Any]:
    """写了 --variable 就只要那些，而且一个也不能缺。"""
    if not variables:
        return values
    held = values["variables"]
    chosen = [text for text in variables if "=" not in text]
    if unknown := [name for name in chosen if name not in held]:
        raise ValueError(f"--variable {unknown[0]}: not in the preset {preset} ({nearest(unknown[0], held)})")
    others = _pairs("--variable", [text for text in variables if "=" in text])
    return values | {"variables": {name: held[name] for name in chosen} | others, "skip_lacking": False}


def _pairs(option: str, texts: Sequence[str]) -> dict[str, dict[str, str]]:
    variables: dict[str, dict[str, str]] = {}
    for text in texts:
        source, _, name = text.partition("=")
        if not source or not re.fullmatch(r"[A-Za-z]\w*", name) or "_level_" in name:
            raise ValueError(f"{option} {text}: write SOURCE=NAME, NAME of letters, digits and _, e.g. air=air")
        if name in variables or {"source": source} in variables.values():
            raise ValueError(f"{option} {text}: {source!r} or {name!r} is given twice")
        variables[name] = {"source": source}
    return variables


def _scalars(option: str, texts: Sequence[str]) -> dict[str, Scalar]:
    found: dict[str, Scalar] = {}
    for text in texts:
        key, _, value = text.partition("=")
        scalar = parse_yaml(value, f"{option} {text}") if key and value else None
        if not isinstance(scalar, int | float | str) or isinstance(scalar, bool):
            raise ValueError(f"{option} {text}: write KEY=VALUE, a number or a word")
        if key in found:
            raise ValueError(f"{option} {text}: {key!r} is given twice")
        found[key] = scalar
    return found
