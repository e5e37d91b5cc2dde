"""比较的文字表：先排成一块块的行，再写成对齐的文字或 Markdown，两种写法的数因此总相同。"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from engine.comparison.comparison import Comparison
from engine.evaluation.glimpse import evenly
from util.cli import number
from util.plot.style import pretty_unit
from util.report.bilingual import Bilingual
from util.scores.table import Numbers, Skill

MOST_LEADS = 8  # 文字表里至多这么多时效，均匀地取；全部在 CSV 与 JSON 里
COSTS = (  # 列名、Cost 的哪一栏、除以
    ("parameters", "parameters", 1),
    ("GFLOP/sample", "flops_per_sample", 1e9),
    ("training [s]", "training_seconds", 1),
    ("samples/s, training", "training_samples_per_second", 1),
    ("samples/s, inference", "inference_samples_per_second", 1),
    ("peak MiB, training", "training_peak_memory_bytes", 2**20),
    ("peak MiB, inference", "inference_peak_memory_bytes", 2**20),
    ("device", "device", 1),
)


class Block(NamedTuple):
    """一张表：第一列是名字，其余是数；没有行时只有说明文字。"""

    title: str
    text: str
    head: list[str]
    rows: list[list[str]]


def comparison_blocks(table: Comparison) -> list[Block]:
    """开头的说明与场数，每个通道一张表，代价，末了是各通道的平均。"""
    shown = evenly(len(table.lead_hours), MOST_LEADS)
    return [
        pairs_block(table),
        *(channel_block(table, channel, shown) for channel in table.channels),
        cost_block(table),
        *(ratio_block(table, base, shown) for base, ratios in table.mean_rmse_ratio.items() if ratios),
    ]


def pairs_block(table: Comparison) -> Block:
    """比较用了多少场，各运行自己有多少。"""
    names = [run.name for run in table.runs]
    rows = [[c, str(sum(table.pairs[c])), *(str(run.pairs[c]) for run in table.runs)] for c in table.channels]
    about = (
        f"Common to all: {table.initial_times} initial times, {table.first_initial_time} to "
        f"{table.last_initial_time} UTC; lead times {span_of(table.lead_hours)}. "
        "Counted are (initial time, lead time) pairs with a valid truth."
    )
    text = "\n".join([about, *(f"Note: {note}." for note in table.notes)])
    return Block("Pairs compared, and pairs each run has", text, ["channel", "compared", *names], rows)


def span_of(leads: Sequence[int]) -> str:
    if len(leads) == 1:
        return f"+{leads[0]} h"
    first, last, count = f"+{leads[0]}", f"+{leads[-1]} h", len(leads)
    return Bilingual(f"{first} to {last} ({count})", f"{first} 至 {last}（{count} 个）")


def channel_block(table: Comparison, channel: str, shown: Sequence[int]) -> Block:
    """一个通道：模型由好到差，发表的在后；RMSE，其下是 CRPS（有集合时）和相对各基线的技巧与 95 % 区间。"""
    scores = {model: one[channel] for model, one in table.scores.items() if channel in one}
    none: Numbers = [None] * len(table.lead_hours)
    rows = []
    own = [one["rmse"] for model, one in scores.items() if model not in table.published]
    shared = [i for i in range(len(none)) if all(values[i] is not None for values in own)]  # 缺时效的只在共同的上面排

    def order(model: str) -> tuple[bool, float]:
        values = scores[model].get("rmse", none)
        return model in table.published, mean([values[i] for i in shared] if shared else values)

    for model in sorted(scores, key=order):
        rows.append([model, *(digits(scores[model].get("rmse", none)[i]) for i in shown)])
        if any(run.members > 1 for run in table.runs) and "crps" in scores[model]:
            rows.append(["· CRPS", *(digits(scores[model]["crps"][i]) for i in shown)])
        for base, found in table.skill.get(model, {}).items():
            rows.append([f"· skill vs {base}", *(skill_text(found[channel]["rmse"], i) for i in shown)])
    unit = table.units[channel]
    title = f"{channel}: RMSE" + (f" [{pretty_unit(unit)}]" if unit != "1" else "")
    return Block(title, "", ["model", *(f"+{table.lead_hours[i]} h" for i in shown)], rows)


def skill_text(skill: Skill, i: int) -> str:
    """`0.412 [0.395, 0.430]`；起报时间太少、没有区间时只有值。"""
    value = number(skill.value[i], ".3f")
    if skill.low is None or skill.high is None or skill.low[i] is None:
        return value
    return f"{value} [{number(skill.low[i], '.3f')}, {number(skill.high[i], '.3f')}]"


def cost_block(table: Comparison) -> Block:
    rows = []
    for run in table.runs:
        cells = (getattr(run.cost, key) for _, key, _ in COSTS)
        rows.append([run.name, *(cost_text(v, scale) for v, (_, _, scale) in zip(cells, COSTS, strict=True))])
    return Block("Cost", "", ["model", *(name for name, _, _ in COSTS)], rows)


def cost_text(value: str | float | None, scale: float) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,}" if isinstance(value, int) and scale == 1 else f"{value / scale:.4g}"


def ratio_block(table: Comparison, base: str, shown: Sequence[int]) -> Block:
    """各通道 RMSE 之比的平均，由好到差。"""
    ratios = table.mean_rmse_ratio[base]
    rows = [
        [model, *(number(ratios[model][i], ".4f") for i in shown)]
        for model in sorted(ratios, key=lambda m: mean(ratios[m]))
    ]
    title = f"Mean over {len(table.channels)} channel(s) of RMSE / RMSE of {base}"
    return Block(title, "", ["model", *(f"+{table.lead_hours[i]} h" for i in shown)], rows)


def mean(values: Sequence[float | None]) -> float:
    """排序用：有值的平均；一个也没有的排在最后。"""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else math.inf


def digits(value: float | None) -> str:
    """四位有效数字。"""
    return number(value, "#.4g").rstrip(".")  # 1159. → 1159


def as_text(blocks: Sequence[Block]) -> str:
    """对齐的文字：第一列靠左，数靠右。"""
    parts = []
    for block in blocks:
        lines = [block.title] + ([block.text] if block.text else [])
        widths = [max(map(len, column)) for column in zip(block.head, *block.rows, strict=True)]
        for row in (block.head, *block.rows):
            cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def as_markdown(blocks: Sequence[Block]) -> str:
    parts = ["# Comparison"]
    for block in blocks:
        parts += [f"## {block.title}", *block.text.splitlines()]
        rows = [block.head, ["---", *["---:"] * (len(block.head) - 1)], *block.rows]
        parts.append("\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows))
    return "\n\n".join(parts)
