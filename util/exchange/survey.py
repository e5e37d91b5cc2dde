"""导入的第一遍：按计划逐块读（read_blocks）全部的场，得统计量、缺测的场、合理范围之外的点。

之外的照样是数据，只在摘要里说；但单位没有人写过、多半的点又在之外的，多半是另一种单位，写之前就停。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from util.data.index import split_hours
from util.exchange.plan import ImportPlan, block_parts, read_block
from util.moments import Moments, measure

MOST = 0.5


class Outside(NamedTuple):
    """一个通道在合理范围之外的：几个场、几个点、最小、最大、头一个时刻。"""

    fields: int
    points: int
    low: float
    high: float
    first: int

    def merge(self, other: Outside) -> Outside:
        low, high, first = min(self.low, other.low), max(self.high, other.high), min(self.first, other.first)
        return Outside(self.fields + other.fields, self.points + other.points, low, high, first)


class Survey(NamedTuple):
    """过一遍所得：各通道训练日期内的统计量，含缺测的 (通道, 小时)，合理范围之外的（没有的通道不在内）。"""

    moments: dict[str, Moments]
    holes: list[tuple[str, int]]
    outside: dict[str, Outside]


def survey(plan: ImportPlan, take: Callable[[str, int, np.ndarray], bool]) -> Survey:
    """全部场逐块过一遍；take(通道, 小时, 场 (H, W)) 说它用不用得了。"""
    from tqdm import tqdm

    found = Survey({name: Moments() for name in plan.names}, [], {})
    train = split_hours(plan.config)["train"]
    with tqdm(total=plan.hours.size * len(plan.names), unit="field", desc="import", disable=None) as bar:
        for variable, channels in plan.channels.items():
            for hours, block in read_blocks(plan, variable):
                inside = (hours >= train.start) & (hours < train.stop)
                for name, fields in zip(channels, block.swapaxes(0, 1), strict=True):  # (n, H, W)
                    good = np.array([take(name, int(h), field) for h, field in zip(hours, fields, strict=True)])
                    found.holes.extend((name, hour) for hour in hours[~good].tolist())
                    found.moments[name] = found.moments[name].merge(measure(fields[good & inside]))
                    if far := find_outside(hours[good], fields[good], plan.config.limits(name)):
                        found.outside[name] = found.outside[name].merge(far) if name in found.outside else far
                    bar.update(hours.size)
    return found


def read_blocks(plan: ImportPlan, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """逐块给出 (n,) 小时和 (n, 通道, H, W) 的 float32，同 read_block；含缺测的场照样交出去。"""
    for held in plan.files[name]:
        for part in block_parts(held):
            yield held.hours[part], read_block(plan, name, held, part)


def find_outside(hours: np.ndarray, fields: np.ndarray, limits: tuple[float, float] | None) -> Outside | None:
    """(n,) 小时、(n, H, W) 有限的场 → limits 之外的；没有，或 limits 不知道，是 None。"""
    if limits is None or not fields.size or (limits[0] <= fields.min() and fields.max() <= limits[1]):
        return None
    far = (fields < limits[0]) | (fields > limits[1])
    which, values = far.any(axis=(1, 2)), fields[far]
    return Outside(int(which.sum()), values.size, float(values.min()), float(values.max()), int(hours[which].min()))


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
        _, block = next(read_blocks(plan, name))
        values = block[np.isfinite(block)]
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
