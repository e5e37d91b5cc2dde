"""评分卡：各模型相对一个参考预报，误差在每个通道、时效、区域、时段的变化与是否显著。"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from util.atomic import replacing
from util.scores.table import WHOLE, Cell, ScoreTable, Skill


@dataclass(frozen=True)
class Card:
    """一个三角：change 是误差的相对变化（%，负为更好），low、high 是它的 95 % 区间，区间不含零为显著。"""

    model: str
    reference: str
    region: str
    period: str
    channel: str
    metric: str
    lead_hours: int
    change: float | None
    low: float | None
    high: float | None
    significant: bool


def make_cards(table: ScoreTable, cells: Sequence[Cell] | None, reference: str) -> list[Card]:
    """各模型 × 区域 × 时段 × 通道 × 成绩 × 时效；只有与 reference 成对重抽过的（skill 里有的）。"""
    return [card for part in (table, *(cells or ())) for card in _cards(part, table.lead_hours, reference)]


def _cards(part: ScoreTable | Cell, leads: Sequence[int], reference: str) -> Iterator[Card]:
    region, period = (part.region, part.period) if isinstance(part, Cell) else (WHOLE, WHOLE)
    for model, bases in part.skill.items():
        for channel, found in bases.get(reference, {}).items():
            for metric, skill in found.items():
                for i, lead in enumerate(leads):
                    yield Card(model, reference, region, period, channel, metric, lead, *_change(skill, i))


def _change(skill: Skill, i: int) -> tuple[float | None, float | None, float | None, bool]:
    """技巧 1 − 模型/参考 → 变化 %：两端也换过来。"""
    low, high = (None if ends is None else ends[i] for ends in (skill.low, skill.high))
    change, upper, lower = (None if v is None else -100 * v for v in (skill.value[i], low, high))
    return change, lower, upper, lower is not None and upper is not None and lower * upper > 0


def write_cards(path: Path, cards: Sequence[Card]) -> None:
    """一行一个三角。"""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Card)])
        for card in cards:
            values = vars(card) | {"significant": str(card.significant).lower()}
            writer.writerow(["" if value is None else value for value in values.values()])
