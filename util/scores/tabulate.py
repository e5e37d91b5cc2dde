"""从 statistics.nc 到成绩：可平均的统计量先在共同的（起报时间，时效，通道）上平均，最后才开方、相除。

不确定性用按日期分块的自助法（Künsch 1989）：把起报时间分成一周一块，整块地重抽，块内的天气相关不被打散；
两个模型用同一组重抽，差值的区间才不被共同的天气放大。
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np

from util.atomic import replacing
from util.scores.bootstrap import Blocks, block_sums, skill
from util.scores.common import Array, Common, Contender, common_pairs, unit_of
from util.scores.final import ASKED, METRICS, Means, final_scores, metric_unit
from util.scores.table import WHOLE, Cell, Numbers, ScoreTable, Skill


def tabulate(contenders: Sequence[Contender], baselines: Sequence[str], references: Sequence[str] = ()) -> ScoreTable:
    """各模型在共同的场上的成绩、相对各基线的技巧、场数。

    Args:
        baselines: 作为基线的 label。
        references: 除基线外还要与哪些模型作差（几个运行比较时的第一个），区间同样是成对重抽的。
    """
    common = common_pairs(contenders)
    blocks = {c.label: block_sums(c, common) for c in contenders}
    counts = common.keep.sum(0)  # (L, C)
    return ScoreTable(
        channels=common.channels,
        units={c: unit_of(contenders[0].file, c) for c in common.channels},
        lead_hours=common.leads,
        initial_times=len(common.hours),
        bootstrap_blocks=len(next(iter(blocks.values())).counts),
        pairs={c: counts[:, i].tolist() for i, c in enumerate(common.channels)},
        left_out={c: (len(common.hours) - counts[:, i]).tolist() for i, c in enumerate(common.channels)},
        **finish(contenders, common, blocks, baselines, references),
    )


class Finished(TypedDict):
    """ScoreTable 与 Cell 里由各块之和得来的三栏。"""

    scores: dict[str, dict[str, dict[str, Numbers]]]
    skill: dict[str, dict[str, dict[str, dict[str, Skill]]]]
    mean_rmse_ratio: dict[str, dict[str, Numbers]]


def finish(
    contenders: Sequence[Contender],
    common: Common,
    blocks: Mapping[str, Blocks],
    baselines: Sequence[str],
    references: Sequence[str],
) -> Finished:
    """各模型按块的和 → 成绩、技巧、与基线之比。"""
    scores = {c.label: _score_one(c, common, blocks[c.label]) for c in contenders}
    judged = [label for label in scores if label not in baselines]
    rivals = {label: [o for o in (*baselines, *references) if o in blocks and o != label] for label in judged}
    return {
        "scores": scores,
        "skill": {
            label: {other: _skill_one(blocks[label], blocks[other], common) for other in dict.fromkeys(others)}
            for label, others in rivals.items()
        },
        "mean_rmse_ratio": {
            base: {label: _mean_ratio(scores[label], scores[base]) for label in judged}
            for base in baselines
            if base in scores
        },
    }


def _score_one(contender: Contender, common: Common, blocks: Blocks) -> dict[str, dict[str, Numbers]]:
    """通道 → 成绩 → 每个时效一个数；没有那样的统计量的成绩（区域里的 SSIM）不在其中。"""
    with np.errstate(invalid="ignore"):
        counts = blocks.counts.sum(0)
        means = {name: total.sum(0) / counts for name, total in blocks.sums.items()}  # (L, C)
    scores = final_scores(Means(means, blocks.std, contender.members))
    result: dict[str, dict[str, Numbers]] = {c: {} for c in common.channels}
    for i, channel in enumerate(common.channels):
        result[channel] = {name: plain(values[:, i]) for name, values in scores.items() if has(name, values[:, i])}
        for k, threshold in enumerate(contender.file.threshold[contender.file.channels.index(channel)]):
            if math.isfinite(threshold):
                result[channel][f"brier>{threshold:.12g}"] = plain(means[f"brier_{k}"][:, i])
    return result


def has(name: str, values: Array) -> bool:
    """这个通道有没有这项成绩：只在降水上才有的，别的通道不写一列 null。"""
    return name not in ASKED or bool(np.isfinite(values).any())


def _skill_one(model: Blocks, base: Blocks, common: Common) -> dict[str, dict[str, Skill]]:
    """通道 → 成绩 → 技巧；只有由一个统计量的幂来的、两个模型都有的成绩有。"""
    both = model.sums.keys() & base.sums.keys()
    found = {m.name: skill(model, base, *m.skill) for m in METRICS if m.skill and m.skill.statistic in both}
    return {
        channel: {
            name: Skill(**{key: plain(v[:, i]) for key, v in one.items()})
            for name, one in found.items()
            if has(name, one["value"][:, i])
        }
        for i, channel in enumerate(common.channels)
    }


def _mean_ratio(model: Mapping[str, Mapping[str, Numbers]], base: Mapping[str, Mapping[str, Numbers]]) -> Numbers:
    """各通道 RMSE 之比的平均，每个时效一个数。"""
    pairs = [np.array([model[c]["rmse"], base[c]["rmse"]], dtype=float) for c in model]  # None → NaN
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.array([one / two for one, two in pairs])  # (C, L)
    good = np.isfinite(ratios)
    return plain(np.where(good, ratios, 0).sum(0) / np.where(good.any(0), good.sum(0), np.nan))


def plain(values: Array) -> Numbers:
    """JSON 里没有 NaN 与无穷，写 null。"""
    return [float(v) if math.isfinite(v) else None for v in values]


def write_csv(path: Path, table: ScoreTable, cells: Sequence[Cell] | None = None, more: Iterable[Found] = ()) -> None:
    """整齐的长表：每行一个数，model,channel,lead_hours,metric,value,low,high,unit；有 cells 时再加 region,period。

    more: 另外的，没有单位、没有区间。
    """
    empty: Numbers = [None] * len(table.lead_hours)
    others: dict[tuple[str, str], list[Line]] = {}
    for one in more:
        line = Line(one.model, one.channel, one.metric, "1", one.value, empty, empty)
        others.setdefault((one.region, one.period), []).append(line)
    head = ["model", "channel", "lead_hours", "metric", "value", "low", "high", "unit"]
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*head, "region", "period"] if cells else head)
        for part in (table, *(cells or ())):
            cell = (part.region, part.period) if isinstance(part, Cell) else (WHOLE, WHOLE)
            where = cell if cells else ()
            for model, channel, metric, unit, *columns in chain(_lines(part, table), others.get(cell, ())):
                for lead, *numbers in zip(table.lead_hours, *columns, strict=True):
                    values = ("" if value is None else value for value in numbers)
                    writer.writerow([model, channel, lead, metric, *values, unit, *where])


class Found(NamedTuple):
    """CSV 里另外的一项成绩的各个时效。"""

    model: str
    channel: str
    metric: str
    value: Numbers
    region: str = WHOLE
    period: str = WHOLE


class Line(NamedTuple):
    """CSV 里一项成绩的各个时效：值与区间的两端。"""

    model: str
    channel: str
    metric: str
    unit: str
    value: Numbers
    low: Numbers
    high: Numbers


def _lines(part: ScoreTable | Cell, table: ScoreTable) -> Iterator[Line]:
    """part 的各项成绩；通道的单位、时效是 table 的。"""
    empty: Numbers = [None] * len(table.lead_hours)
    for model, channels in part.scores.items():
        for channel, metrics in channels.items():
            for metric, values in metrics.items():
                yield Line(model, channel, metric, metric_unit(metric, table.units[channel]), values, empty, empty)
    for model, bases in part.skill.items():
        for base, channels in bases.items():
            for channel, metrics in channels.items():
                for metric, one in metrics.items():
                    unit = metric_unit(metric, table.units[channel])
                    low, high = one.difference_low or empty, one.difference_high or empty
                    name = f"{metric}_skill_vs_{base}"
                    yield Line(model, channel, name, "1", one.value, one.low or empty, one.high or empty)
                    yield Line(model, channel, f"{metric}_difference_vs_{base}", unit, one.difference, low, high)
