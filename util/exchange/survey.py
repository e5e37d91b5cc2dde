"""导入的第一遍：逐块读全部的场，得统计量、缺测的场、填充值、合理范围之外的点。

之外的照样是数据，只在摘要里说；但单位没有人写过、多半的点又在之外的，多半是另一种单位，写之前就停。
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from util.data.index import split_hours
from util.exchange.masking import Filled
from util.exchange.plan import Block, ImportPlan, block_parts, read_block
from util.files.moments import Moments, measure

MOST = 0.5
Take = Callable[[str, int, np.ndarray], bool]  # (通道, 小时, 场 (H, W)) → 用得了


class Outside(NamedTuple):
    """一个通道在合理范围之外的：几个场、几个点、最小、最大、头一个时刻。"""

    fields: int = 0
    points: int = 0
    low: float = np.inf
    high: float = -np.inf
    first: int = sys.maxsize

    def merge(self, other: Outside) -> Outside:
        low, high, first = min(self.low, other.low), max(self.high, other.high), min(self.first, other.first)
        return Outside(self.fields + other.fields, self.points + other.points, low, high, first)


class Survey(NamedTuple):
    """过一遍所得：各通道训练日期内的统计量，合理范围之外的（没有的通道不在内）；含缺测的 (通道, 小时)，
    其中有填充值的 (通道, 小时, 值)。
    """

    moments: dict[str, Moments]
    outside: dict[str, Outside]
    holes: list[tuple[str, int]]
    filled: list[tuple[str, int, float]]

    def add(self, other: Survey) -> None:
        """other 是这之后的。"""
        for name, moments in other.moments.items():
            self.moments[name] = self.moments.get(name, Moments()).merge(moments)
        for name, far in other.outside.items():
            self.outside[name] = self.outside.get(name, Outside()).merge(far)
        self.holes.extend(other.holes)
        self.filled.extend(other.filled)


def survey(plan: ImportPlan, parts: Iterable[tuple[Block, Survey]]) -> Survey:
    """逐块过一遍；parts: 一块，与 measure_block 所给的。"""
    from tqdm import tqdm

    found = Survey({}, {}, [], [])
    with tqdm(total=plan.hours.size * len(plan.names), unit="field", desc="import", disable=None) as bar:
        for block, part in parts:
            found.add(part)
            bar.update(block.hours.size * len(plan.channels[block.name]))
    return found


def measure_block(plan: ImportPlan, block: Block, values: np.ndarray, filled: Filled, take: Take) -> Survey:
    """一块 read_block 所读的 (n, 通道, H, W)；用不了的场是 holes。"""
    channels, hours, train = plan.channels[block.name], block.hours.tolist(), split_hours(plan.config)["train"]
    found = Survey({}, {}, [], [(channels[c], hours[i], value) for (i, c), value in filled.items()])
    for name, fields in zip(channels, values.swapaxes(0, 1), strict=True):  # (n, H, W)
        limits = plan.config.limits(name)
        good = {hour: field for hour, field in zip(hours, fields, strict=True) if take(name, hour, field)}
        found.holes.extend((name, hour) for hour in hours if hour not in good)
        found.moments[name] = measure(field for hour, field in good.items() if hour in train)
        for hour, field in good.items():
            if far := find_outside(hour, field, limits):
                found.outside[name] = found.outside.get(name, Outside()).merge(far)
    return found


def find_outside(hour: int, field: np.ndarray, limits: tuple[float, float] | None) -> Outside | None:
    """一个有限的场 (H, W) 在 limits 之外的；没有，或 limits 不知道，是 None。"""
    if limits is None or (limits[0] <= field.min() and field.max() <= limits[1]):
        return None
    values = field[(field < limits[0]) | (field > limits[1])]
    return Outside(1, values.size, float(values.min()), float(values.max()), hour)


def undeclared(plan: ImportPlan) -> list[str]:
    """单位没有人写过的变量：文件里没有，导入时也没有写明。"""
    return [
        name
        for name, files in plan.files.items()
        if not plan.request.variables[name].units and not any(held.array.attrs.get("units") for held in files)
    ]


def refuse_other_units(plan: ImportPlan) -> None:
    """单位没有人写过的变量，看头一块：多半的点在合理范围之外，就不是以为的单位。

    Raises:
        ValueError: 有这样的变量。
    """
    for name in undeclared(plan):
        if (limits := plan.config.limits(name)) is None:
            continue
        first = plan.files[name][0]
        values, _ = read_block(plan, Block(name, first, block_parts(first)[0]))
        values = values[np.isfinite(values)]
        share = np.mean((values < limits[0]) | (values > limits[1])) if values.size else 0
        if share > MOST:
            units = plan.config.units.get(name)
            assumed = f" ({units} assumed)" if units else ""
            raise ValueError(
                f"{name}: {share:.0%} of the points in its first block ({values.min():.4g} to {values.max():.4g}) are "
                f"outside {limits[0]:g} to {limits[1]:g}, and the file has no units{assumed}; "
                f"give them in a --map file: {name}: {{source: {plan.request.source(name)}, units: UNITS, scale: A, "
                "offset: B}, UNITS being those of A x + B, scale and offset only where they convert"
            )
