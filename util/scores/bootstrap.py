"""按一周一块的自助法：成绩的置信区间与两两之差。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from util.scores.common import Array, Common, Contender, read_kept

BLOCK_HOURS = 7 * 24
RESAMPLES = 1000
FEWEST_BLOCKS = 20  # 再少，百分位自助法的「95 %」实际盖不到九成


class Blocks(NamedTuple):
    """一个模型每块的统计量之和 (N, L, C)、场数 (N, L, C)，和换回物理单位的标准差 (C,)。"""

    sums: dict[str, Array]
    counts: Array
    std: Array


def block_ids(common: Common) -> Array:
    """(T,) 各起报时间在第几块。"""
    return np.unique((common.hours - common.hours[0]) // BLOCK_HOURS, return_inverse=True)[1]


class Part(NamedTuple):
    """一段时间：哪些起报时间与时效 (T, L) bool，和碰到的块 (N,)，升序。"""

    chosen: Array
    weeks: Array


def block_sums(contender: Contender, common: Common, names: Sequence[str] | None = None) -> Blocks:
    """各统计量（names，默认全部）按块求和；这个模型没有的统计量（全是 NaN）不在其中。"""
    whole = Part(np.ones(common.keep.shape[:2], dtype=bool), np.unique(block_ids(common)))
    return part_sums(contender, common, [whole], names or contender.file.names)[0]


def part_sums(
    contender: Contender, common: Common, parts: Sequence[Part], names: Sequence[str], region: str | None = None
) -> list[Blocks]:
    """同 block_sums，一遍读出几段时间的，各只有自己碰到的块；region 同 Statistics.read。"""
    ids, shape = block_ids(common), common.keep.shape[1:]
    places = [np.searchsorted(part.weeks, ids) for part in parts]  # (T,) 各起报时间在这一段的第几块
    had = contender.held(common.leads)
    counts = [np.zeros((len(part.weeks), *shape)) for part in parts]
    for count, part, own in zip(counts, parts, places, strict=True):
        for t in np.flatnonzero((part.chosen & common.keep.any(2)).any(1)):
            count[own[t]] += common.keep[t] & (part.chosen[t] & had)[:, None]
    sums: list[dict[str, Array]] = [{} for _ in parts]
    for name in names:
        totals, present = [np.zeros_like(count) for count in counts], False
        for place, held, values in read_kept(contender, name, common, region):
            here = common.keep[place] & held[:, None]
            present |= bool(np.isfinite(values[here]).any())
            for total, part, own in zip(totals, parts, places, strict=True):
                keep = part.chosen[place][..., None] & here
                rows = keep.any((1, 2))
                add_rows(total, own[place[rows]], np.where(keep[rows], values[rows], 0.0))
        if present:
            for one, total in zip(sums, totals, strict=True):
                one[name] = total
    std = contender.file.std[[contender.file.channels.index(c) for c in common.channels]]
    return [Blocks(one, count, std) for one, count in zip(sums, counts, strict=True)]


def add_rows(total: Array, ids: Array, values: Array) -> None:
    """total[ids[i]] += values[i]，依次加；场大时比 np.add.at 快十倍。"""
    for i, row in zip(ids, values, strict=True):
        total[i] += row


def skill(model: Blocks, base: Blocks, name: str, power: float, scaled: bool = True) -> dict[str, Array]:
    """相对 base 的技巧 1 − 模型/base 与差值 模型 − base（物理单位），各带 95 % 区间，都是 (L, C)。

    Args:
        name, power: 成绩 = (统计量的平均) 的 power 次方：RMSE 为 ("square", 0.5)。
        scaled: 成绩有通道的单位。
    """

    def final(weights: Array, blocks: Blocks) -> Array:
        sums, counts = (np.tensordot(weights, a, axes=1) for a in (blocks.sums[name], blocks.counts))
        return (sums / counts) ** power * (blocks.std if scaled else 1.0)

    number = len(model.counts)
    ones, draws = np.ones(number), np.random.default_rng(0).multinomial(number, [1 / number] * number, RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        one, two = final(ones, model), final(ones, base)
        result = {"value": 1 - one / two, "difference": one - two}
        if number >= FEWEST_BLOCKS:
            many, other = final(draws, model), final(draws, base)  # (R, L, C)
            for key, samples in (("", 1 - many / other), ("difference_", many - other)):
                result[f"{key}low"], result[f"{key}high"] = np.percentile(samples, [2.5, 97.5], axis=0)
    return result
