"""--events 的 YAML：问哪些；每个键都有缺省，不给文件就是全部缺省。"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from util.strict import PositiveInt, Strict, read_mapping, validate


def _tails(values: list[float]) -> list[float]:
    if 0.5 in values:
        raise ValueError("the median is no event; below 0.5 is a low extreme, above it a high one")
    return sorted(set(values))


def _odd(values: list[int]) -> list[int]:
    if even := [n for n in values if n % 2 == 0]:
        raise ValueError(f"{even[0]} is even; a neighbourhood has a middle: 3, 5, 7, ...")
    return sorted(set(values))


Quantile = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


class Events(Strict):
    """事件与附加的评分。"""

    quantiles: Annotated[list[Quantile], AfterValidator(_tails)] = Field(
        default=[0.02, 0.05, 0.95, 0.98]
    )  # 距平的分位数
    training_times: PositiveInt = 1461  # 分位数由几个训练时刻估计；6 小时一个时约当一年
    neighbourhoods: Annotated[list[PositiveInt], AfterValidator(_odd)] = Field(default=[3, 5, 9])  # FSS 的窗，格
    exceedance: list[Positive] = Field(default=[0.5, 1.0, 2.0])  # 误差超过几个训练标准差
    variogram_points: Annotated[int, Field(ge=2, le=256)] = 64
    dry_mm: Positive = 0.1  # SEEPS：不超过它算干；6 小时的累积 0.1，24 小时的 0.25


def read_events(path: str) -> Events:
    """path 为空时全是缺省。

    Raises:
        ValueError: 没有这个文件，或写错了一个键；一行。
    """
    if "=" in path:
        raise ValueError(f"--events {path}: the name of a YAML or nothing; write data.KEY=VALUE before --events")
    return validate(Events, read_mapping(path), path) if path else Events()
