"""比较的结果：只用大家都有的起报时间与通道，每个时效上有它的人都有的场；基线各列一次，旁边写明哪些不能比。"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from engine.comparison.entries import Entry
from engine.evaluation import baselines
from engine.evaluation.metrics_file import Cost, Provenance
from engine.evaluation.results import add_spectral_distance
from util.calendar import time_text
from util.report.bilingual import Bilingual
from util.scores.cells import tabulate_cells
from util.scores.common import Common, Contender, common_pairs
from util.scores.table import Cell, ScoreTable
from util.scores.tabulate import tabulate
from util.strict import nearest

log = logging.getLogger("ar_pred")
BASES: dict[str, str] = dict(zip(baselines.NAMES, ("持续性预报", "气候态", "线性回归"), strict=True))
SAME = 1e-4  # 同一个基线在两份评测里的 RMSE 至多相差这么多（相对）：float32 与设备的舍入之上


@dataclass(frozen=True, kw_only=True)
class Place:
    """表上的名字，和它的文件夹。"""

    name: str
    folder: str


@dataclass(frozen=True, kw_only=True)
class ComparedRun(Provenance, Place):
    """一个参加比较的评测：名字、来历、代价和它自己有多少场（pairs: 通道 → 各时效之和）。"""

    initial_times: int
    lead_hours: list[int]
    pairs: dict[str, int]
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Span:
    """比较了谁、哪一段：runs 各一个评测，notes 是不能比的、没有用上的。

    baselines、published 是表上的哪些行是基线、是别人发表的；start_hours 是起报时间在一天里的钟点。
    """

    runs: list[ComparedRun]
    notes: list[str]
    baselines: list[str]
    published: list[str]
    first_initial_time: str
    last_initial_time: str
    start_hours: list[int]


@dataclass(frozen=True, kw_only=True)
class Comparison(ScoreTable, Span):
    """comparison.json 的全部，再加 cells；各运行的窗口不同时没有谱。

    cells: 各区域、各段时间的；scorecard: 评分卡对着谁。
    """

    spectrum_label: str | None = None
    cells: list[Cell] | None = None
    scorecard: str | None = None


def make_comparison(
    entries: Sequence[Entry],
    contenders: Sequence[Contender],
    notes: Sequence[str] = (),
    by: Sequence[str] = (),
    scorecard: str | None = None,
) -> Comparison:
    """共同的场上的成绩表，加上来历、代价、各有多少场、说明（接在 notes 之后）。

    各份评测都有的区域总在其中；by 同 tabulate_cells；scorecard 是表上的一个名字，各运行都与它成对地比。

    Raises:
        ValueError: 没有共同的部分，真值不是同一份，没有 scorecard 这一行，或没有别的运行与它比。
    """
    labels = [c.label for c in contenders]
    if scorecard is not None and scorecard not in labels:
        raise ValueError(f"--scorecard {scorecard}: not among those compared; {nearest(scorecard, labels, 'names')}")
    common = common_pairs(contenders)
    notes = [*notes, *entry_notes(entries, common), *check_baselines(entries, contenders, common)]
    known = [c.label for c in contenders if c.label in baselines.NAMES]
    runs = [c.label for c in contenders if c.label not in baselines.NAMES]
    if scorecard is not None and not set(runs) - {scorecard}:
        rest = ", ".join(label for label in labels if label != scorecard)
        raise ValueError(f"--scorecard {scorecard}: no other run to compare with it; add one, or choose among {rest}")
    references = [*runs[:1], *([scorecard] if scorecard in runs[1:] else [])]
    table, label = tabulate(contenders, known, references), None
    cells = tabulate_cells(contenders, known, references, by)
    if same_fields(entries, table):
        table, label = add_spectral_distance(table, contenders), entries[0].result.spectrum_label
    else:
        notes.append(
            Bilingual(
                "spectra and log-spectral distance are left out: they are means over all windows of a run, "
                "and the runs were not scored on the same windows and lead times",
                "没有谱与对数谱距离：它们是一个运行全部窗口的平均，而各运行评分的窗口或时效不同",
            )
        )
    for note in notes:
        log.warning("%s", note)
    return Comparison(
        runs=[describe_entry(e, table.channels) for e in entries],
        notes=notes,
        baselines=known,
        published=[],
        first_initial_time=time_text(int(common.hours[0])),
        last_initial_time=time_text(int(common.hours[-1])),
        start_hours=np.unique(common.hours % 24).tolist(),
        **vars(table),
        spectrum_label=label,
        cells=cells or None,
        scorecard=scorecard,
    )


def describe_entry(entry: Entry, channels: Sequence[str]) -> ComparedRun:
    """一个运行的来历、代价和它自己有多少场。"""
    own = entry.result
    return ComparedRun(
        **{field.name: getattr(own, field.name) for field in fields(Provenance)},
        name=entry.label,
        folder=str(entry.folder),
        initial_times=own.initial_times,
        lead_hours=own.lead_hours,
        pairs={c: sum(own.pairs[c]) for c in channels},
        cost=own.cost,
    )


def entry_notes(entries: Sequence[Entry], common: Common) -> list[str]:
    """哪些通道、时效不是人人都有；标准差不同时，以标准差为尺的成绩不能比。"""
    notes: list[str] = []
    for entry in entries:
        if lacking := [str(lead) for lead in common.leads if lead not in entry.file.leads]:
            hours = f"+{', +'.join(lacking)} h"
            said = f"{entry.label} has no forecast at {hours}: a gap there, others are compared"
            notes.append(Bilingual(said, f"{entry.label} 没有 {hours} 的预报：那里空着，别的照常比较"))
        if extra := [c for c in entry.file.channels if c not in common.channels]:
            names = ", ".join(extra)
            said = f"not compared, because not every run has them in the same unit: {names} of {entry.label}"
            notes.append(Bilingual(said, f"没有比较，因为不是每个运行都以同样的单位有：{entry.label} 的 {names}"))
    first = entries[0]
    for other in entries[1:]:
        for c in common.channels:
            one, two = (e.file.std[e.file.channels.index(c)] for e in (first, other))
            if not np.isclose(one, two, rtol=SAME):
                said = (
                    f"SSIM and PSNR do not compare between {first.label} and {other.label}: they count in standard "
                    f"deviations, which for {c} are {one:.6g} and {two:.6g}"
                )
                pair = f"{first.label} 与 {other.label}"
                unlike = f"{c} 的标准差是 {one:.6g} 与 {two:.6g}"
                notes.append(Bilingual(said, f"{pair} 的 SSIM、PSNR 不能相比：它们以标准差为尺，而 {unlike}"))
                break
    return notes


def check_baselines(entries: Sequence[Entry], contenders: Sequence[Contender], common: Common) -> list[str]:
    """各评测里的同一个基线应当一样：持续性预报只由真值决定，不同就是真值不同；别的只是说明用的是谁的。

    Raises:
        ValueError: 持续性预报不同。
    """
    notes: list[str] = []
    for base, holders in ((b, [e for e in entries if e.holds(b)]) for b in baselines.NAMES):
        shown = next((e for c in contenders if c.label == base for e in holders if e.file is c.file), None)
        if base == baselines.PERSISTENCE:
            unchecked = [e.label for e in entries if e not in holders]
            notes += [
                Bilingual(
                    f"{label}: no plain {base} to check its truth by",
                    f"{label}：没有未扰动的{BASES[base]}，无从核对真值",
                )
                for label in unchecked
            ]
        if shown is None:
            continue
        reference = shown.rmse(base, common)  # (L, C)
        for other in (e for e in holders if e is not shown):
            values = other.rmse(base, common)
            both = np.isin(common.leads, shown.file.leads) & np.isin(common.leads, other.file.leads)
            differs = ~np.isclose(values, reference, rtol=SAME, atol=0, equal_nan=True) & both[:, None]
            if not differs.any():
                continue
            c = int(differs.any(0).argmax())
            lead = int(differs[:, c].argmax())
            place, numbers = common.channels[c], (f"{reference[lead, c]:.6g}", f"{values[lead, c]:.6g}")
            found = (
                f"RMSE of {base} for {place} at +{common.leads[lead]} h is {numbers[0]} in {shown.folder}, "
                f"{numbers[1]} in {other.folder}"
            )
            if base == baselines.PERSISTENCE:
                raise ValueError(
                    f"{shown.label} and {other.label} were scored against different truth (another tree, or other "
                    f"units?): {found}, on the same pairs"
                )
            own = base == baselines.CLIMATOLOGY  # 距平是相对各自的气候态的
            said = (
                f"{found} (fitted to other data); shown is the one of {shown.folder}"
                + ("; ACC and activity ratio of each run refer to its own" if own else ""),
                f"{BASES[base]}的 {place} 在 +{common.leads[lead]} h 的均方根误差，{shown.folder} 里是 {numbers[0]}，"
                f"{other.folder} 里是 {numbers[1]}（由别的数据拟合）；列出的是 {shown.folder} 的"
                + ("；各运行的 ACC 与活动度之比相对自己的气候态" if own else ""),
            )
            notes.append(Bilingual(*said))
    return notes


def same_fields(entries: Sequence[Entry], table: ScoreTable) -> bool:
    """每个运行自己的场恰好就是共同的场：共同的是各自的子集，所以时效与场数相同就够了。"""
    return all(
        e.result.lead_hours == table.lead_hours and all(e.result.pairs[c] == table.pairs[c] for c in table.channels)
        for e in entries
    )
