"""别人发表的成绩放在自己的旁边：对上通道与时效，做法上哪里不同各说一行。表的写法见 docs/reference_scores.csv。"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from engine.comparison.comparison import Comparison
from util.files.records import read_record
from util.report.bilingual import Bilingual
from util.scores.final import METRICS, metric_unit
from util.scores.statistics_file import Statistics
from util.strict import nearest
from util.variables import split_channel

log = logging.getLogger("ar_pred")
# 这里的成绩怎样求平均（util/scores/final.py）；发表的写法与此不同就说明
OWN_CONVENTION = {
    "rmse": ("root of the mean",),
    "crps": ("fair", "absolute error"),  # 一个成员时就是绝对误差
    "spread_skill": ("ratio of the means",),
}

# 表里的写法的中文，报告里说做法不同时用
WORDS = {
    "grid": "网格",
    "test years": "测试的年份",
    "start hours": "起报的钟点",
    "members": "成员数",
    "not stated": "没有说",
    "ordinary": "普通的",
    "fair": "公平的",
    "absolute error": "绝对误差",
    "mean of the ratios": "先相除再平均",
    "ratio of the means": "先平均再相除",
    "mean of the roots": "先开方再平均",
    "root of the mean": "先平均再开方",
}


@dataclass(frozen=True)
class PublishedScore:
    """表的一行，一个数。

    source 是出处；grid（纬 x 经）、test_years、start_hours、members、convention（先开方还是先平均一类）是做法，
    不知道的写 not stated；pressure_hpa 单层的变量空着；lead_hours 是一个时效，或合在一起算的一段（6-24）；
    metric 与 unit 是 metrics.csv 的写法。
    """

    source: str
    model: str
    grid: str
    test_years: str
    start_hours: str
    members: str
    convention: str
    variable: str
    pressure_hpa: float | None
    lead_hours: str
    metric: str
    value: float
    unit: str

    @property
    def label(self) -> str:
        """表上的名字：一看就知道不是自己算的。"""
        return f"{self.model} (published)"

    @property
    def level(self) -> str:
        """z500、t2m。"""
        return self.variable if self.pressure_hpa is None else f"{self.variable}{self.pressure_hpa:g}"


def read_published(paths: Sequence[Path]) -> list[PublishedScore]:
    """读几份表。

    Raises:
        ValueError: 没有这个文件，缺一栏，哪一行不对，一个数给了两次，或两个出处有同名的模型。
    """
    rows: list[PublishedScore] = []
    columns = [field.name for field in fields(PublishedScore)]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"--reference {path}: no such file")
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != columns:
                raise ValueError(f"{path}: its first line is {reader.fieldnames}; wanted {','.join(columns)}")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                found = read_record(PublishedScore, {**row, "pressure_hpa": row["pressure_hpa"] or None}, where)
                _check_row(found, where)
                rows.append(found)
    _check_distinct(rows)
    return rows


def _check_row(row: PublishedScore, where: str) -> None:
    names = [metric.name for metric in METRICS]
    if row.metric not in names:
        raise ValueError(f"{where}: no metric {row.metric!r}; {nearest(row.metric, names, 'metrics')}")
    if not all(part.isdecimal() for part in row.lead_hours.split("-", 1)):
        raise ValueError(f"{where}: lead_hours = {row.lead_hours!r}, must be hours (24) or a span of them (6-24)")


def _check_distinct(rows: Iterable[PublishedScore]) -> None:
    sources: dict[str, str] = {}
    seen: set[tuple[str, ...]] = set()
    for row in rows:
        if sources.setdefault(row.model, row.source) != row.source:
            raise ValueError(f"--reference: a model {row.model} from {sources[row.model]}, another from {row.source}")
        key = (row.model, row.level, row.lead_hours, row.metric)
        if key in seen:
            raise ValueError(f"--reference: {row.metric} of {row.model} for {row.level} at +{key[2]} h is given twice")
        seen.add(key)


def add_published(comparison: Comparison, file: Statistics, rows: Sequence[PublishedScore]) -> Comparison:
    """比较里有的通道与时效上，发表的成绩各成一行；合在一段时效上的与做法的不同写进说明。

    Args:
        file: 参加比较的一份统计量：网格与各通道的气压。
    """
    placed = [(row, c) for row in rows for c in comparison.channels if fits(row, c, file)]
    leads = [str(lead) for lead in comparison.lead_hours]
    scores = dict(comparison.scores)
    for row, channel in placed:
        if row.lead_hours in leads:
            one = scores.setdefault(row.label, {}).setdefault(channel, {})
            one.setdefault(row.metric, [None] * len(leads))[leads.index(row.lead_hours)] = row.value
    spans = [(row, c) for row, c in placed if within(row.lead_hours, comparison.lead_hours)]
    used = [row for row, _ in placed if row.lead_hours in leads] + [row for row, _ in spans]
    notes = [*span_notes(spans), *protocol_notes(used, comparison, file)] if used else [nothing_fits(rows, comparison)]
    if not used:
        log.warning("%s", notes[0])
    labels = dict.fromkeys(row.label for row in used if row.label in scores)
    return replace(comparison, scores=scores, published=list(labels), notes=[*comparison.notes, *notes])


def fits(row: PublishedScore, channel: str, file: Statistics) -> bool:
    """这一行说的是不是这个通道：变量与气压相同（单层的 z500 也算），单位相同。"""
    place = file.channels.index(channel)
    same = (split_channel(channel)[0], file.pressures[place]) == (row.variable, row.pressure_hpa)
    return (same or channel == row.level) and metric_unit(row.metric, file.units[place]) == row.unit


def within(span: str, leads: Sequence[int]) -> bool:
    """合在一起算的一段，两端都是比较里有的时效。"""
    first, dash, last = span.partition("-")
    return bool(dash) and int(first) in leads and int(last) in leads


def span_notes(spans: Sequence[tuple[PublishedScore, str]]) -> list[str]:
    """合在一段时效上的成绩放不进哪一个时效的一栏，各说一行。"""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row, channel in spans:
        what = (row.metric, channel, row.lead_hours.replace("-", " to +"), row.unit, row.source)
        groups.setdefault(what, []).append(f"{row.model} {row.value:g}")
    return [
        Bilingual(
            f"published {metric} of {channel} over +{span} h together, {', '.join(values)} ({unit}; {source})",
            f"发表的 {channel} 的 {metric}，+{span} h 合在一起：{'、'.join(values)}（{unit}；{source}）",
        )
        for (metric, channel, span, unit, source), values in groups.items()
    ]


def protocol_notes(used: Sequence[PublishedScore], comparison: Comparison, file: Statistics) -> list[str]:
    """每个出处的做法与这里哪里不同，一处一行；只有几个模型不同时点名。"""
    own = {
        "grid": (f"{len(file.latitudes)} x {len(file.longitudes)}",),
        "test years": (years_of(comparison),),
        "start hours": (hours_text(comparison.start_hours),),
        "members": tuple(dict.fromkeys(str(run.members) for run in comparison.runs)),
        **{f"convention of {metric}": known for metric, known in OWN_CONVENTION.items()},
    }
    models: dict[str, dict[str, None]] = {}  # 出处 → 模型；字典当有次序的集合
    differing: dict[tuple[str, str, str], dict[str, None]] = {}
    for row in used:
        models.setdefault(row.source, {})[row.model] = None
        facts = {"grid": row.grid, "test years": row.test_years, "start hours": row.start_hours}
        facts |= {"members": row.members, f"convention of {row.metric}": row.convention}
        for what, theirs in facts.items():
            if what in own and theirs not in own[what]:
                differing.setdefault((row.source, what, theirs), {})[row.model] = None
    return [
        Bilingual(
            f"published by {source}: {what} {theirs}, here {' or '.join(own[what])}"
            + ("" if who == models[source] else f" ({', '.join(who)})"),
            f"{source} 发表的：{theirs_chinese(what)} {theirs_chinese(theirs)}，这里 "
            + " 或 ".join(map(theirs_chinese, own[what]))
            + ("" if who == models[source] else f"（{'、'.join(who)}）"),
        )
        for (source, what, theirs), who in differing.items()
    ]


def theirs_chinese(text: str) -> str:
    """表里的一个词的中文；网格、年份与不认得的照原样。"""
    what, _, metric = text.partition(" of ")
    return f"{metric} 的求法" if what == "convention" else WORDS.get(text, text)


def years_of(comparison: Comparison) -> str:
    """2018，或 2017-2018。"""
    first, last = (time[:4] for time in (comparison.first_initial_time, comparison.last_initial_time))
    return first if first == last else f"{first}-{last}"


def hours_text(hours: Sequence[int]) -> str:
    """0 6 12 18；每个钟点都有时 0-23。"""
    return "0-23" if len(hours) == 24 else " ".join(map(str, hours))


def nothing_fits(rows: Sequence[PublishedScore], comparison: Comparison) -> str:
    theirs = ", ".join(dict.fromkeys(f"{row.level} {row.metric} [{row.unit}]" for row in rows))
    leads = sorted({row.lead_hours for row in rows}, key=lambda text: int(text.split("-")[0]))
    ours = ", ".join(f"{c} [{comparison.units[c]}]" for c in comparison.channels)
    here, there = (f"+{', +'.join(map(str, hours))} h" for hours in (comparison.lead_hours, leads))
    return Bilingual(
        f"no published score is of a channel, unit and lead time compared here: published are {theirs} at "
        f"{there}, compared are {ours} at {here}",
        f"发表的成绩里没有这里比较的通道、单位与时效：发表的是 {there} 的 {theirs}，比较的是 {here} 的 {ours}",
    )
