"""报告的内容：Page 的每一栏是页面的一节，由成绩、谱、训练的曲线、配置与环境装成；场的几节在 page_fields.py。

加一节：这里的 Page 多一栏（它的写法是一个记录）、make_page 或 add_scores 多填一栏；util/report/ 里放一个画它的 .js。
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from engine.evaluation.glimpse import evenly
from engine.evaluation.metrics_file import Cost, Result
from engine.evaluation.page_fields import Coast, Maps, Phrase, Series, make_coast, make_maps, make_series, numbers
from engine.evaluation.results import Seen
from engine.evaluation.task import Task
from engine.verification.page import Drift, EventsPage, drift_page, events_page
from engine.verification.result import SPHERE
from engine.versions import versions
from util.calendar import time_text
from util.config import RunConfig
from util.data.dataset import WeatherData
from util.data.index import SPLITS
from util.logger import read_metrics
from util.plot.curves import BESIDE
from util.scores.common import Contender
from util.scores.statistics_file import Statistics
from util.scores.table import WHOLE, Cell, Numbers, ScoreTable, Skill
from util.strict import dump_yaml
from util.variables import variable_info

CURVE_POINTS = 1000  # 损失曲线至多这么多点，再多就隔着取
MISSING_SHOWN = 50
SCORE_CELLS = 1000  # 页面里通道 × 时效至多这么多；全部的在 metrics.csv
REGION_CELLS = 12_000  # 各区域、时段的合起来，模型 × 通道 × 时效
Said = str | int | Phrase  # 照原样，或两种语言各说一句
Facts = list[tuple[str, Said]]  # 标签与值
Value = TypeVar("Value")
Places = Sequence[int | None]  # 各时效在表里的序号，None 是空着的


@dataclass(frozen=True)
class ModelLine:
    """models 的一行；次序就是颜色的次序。"""

    name: str
    role: Literal["model", "baseline", "published"]


@dataclass(frozen=True)
class ChannelLine:
    """channels 的一行；kind 是配色。"""

    name: str
    long_name: str
    unit: str
    kind: str


@dataclass(frozen=True)
class FieldCounts:
    """一个通道每个时效计了、没有计多少场。"""

    scored: list[int]
    left_out: list[int]


@dataclass(frozen=True)
class CellLine:
    """cells 的一行：一个区域、一段时间的成绩，三栏同 Page 的；all 是整个网格、全部时间。"""

    region: str
    period: str
    scores: dict[str, dict[str, dict[str, Numbers]]]
    skill: dict[str, dict[str, dict[str, dict[str, Skill]]]]
    fields: dict[str, FieldCounts]


@dataclass(frozen=True)
class Spectra:
    """功率谱，单位的平方：通道 → 时效 → K 个波数；通道与时效可以少于页面的。"""

    label: str
    lead_hours: list[int]
    wavenumber: list[int]
    truth: dict[str, list[Numbers]]
    models: dict[str, dict[str, list[Numbers]]]


@dataclass(frozen=True)
class Curves:
    """训练与验证的损失，各是 [步, 值]；两个基线的验证损失，没有就是 None。"""

    train: list[tuple[int, float]]
    val: list[tuple[int, float]]
    persistence: float | None = None
    climatology: float | None = None


@dataclass(frozen=True)
class DataFacts:
    """数据的说明；missing 的一行是通道、个数、最早、最晚、原因。"""

    facts: Facts
    missing: list[tuple[str, int, str, str, str]]


@dataclass(frozen=True, kw_only=True)
class CostLine(Cost):
    """costs 的一行：一个模型的名字与代价。"""

    name: str


@dataclass(frozen=True)
class ComparisonFacts:
    """pairs：共同的（起报时间，时效）有多少。"""

    pairs: int
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Page:
    """report.html 的全部：一栏一节，None 的没有标题也没有菜单项。各栏的键与写法就是页面的 JSON。"""

    kind: Literal["run", "evaluation", "comparison"]
    title: str
    subtitle: str | None = None
    facts: Facts
    reproduce: list[str] | None = None  # 命令
    links: list[tuple[str, str]] | None = None  # 文字与相对的地址
    models: list[ModelLine] | None = None
    channels: list[ChannelLine] | None = None
    lead_hours: list[int] | None = None
    scores: dict[str, dict[str, dict[str, Numbers]]] | None = None  # 模型 → 通道 → 成绩 → 每个时效
    skill: dict[str, dict[str, dict[str, dict[str, Skill]]]] | None = None  # 模型 → 基线 → 通道 → 成绩
    fields: dict[str, FieldCounts] | None = None
    cells: list[CellLine] | None = None
    scorecard: str | None = None  # 分区评分卡先对着哪个模型
    ranks: dict[str, list[Numbers]] | None = None  # 通道 → 时效 → M + 1 个份额
    spectra: Spectra | None = None
    sphere: Spectra | None = None
    events: EventsPage | None = None
    drift: Drift | None = None
    series: Series | None = None
    maps: Maps | None = None
    coast: Coast | None = None
    costs: list[CostLine] | None = None
    comparison: ComparisonFacts | None = None
    curves: Curves | None = None
    data: DataFacts | None = None
    config: str | None = None  # YAML
    environment: dict[str, str] | None = None  # 名字 → 版本


def make_page(
    kind: Literal["run", "evaluation"],
    title: str,
    facts: Facts,
    reproduce: str,
    config: RunConfig,
    data: WeatherData,
    missing: Path,
    curves: Path,
) -> Page:
    """与成绩无关的各节；没有成绩（不能预报的配置）时就是整个页面。

    Args:
        missing: 缺失与读坏的文件的清单 missing.csv。
        curves: 训练的 metrics.csv；没有这个文件就没有曲线。
    """
    return Page(
        kind=kind,
        title=title,
        subtitle=config.model["name"],
        facts=facts,
        reproduce=[reproduce],
        curves=read_curves(curves),
        data=data_facts(data, config, missing),
        config=dump_yaml(config.model_dump()),
        environment=versions(),
    )


def add_scores(page: Page, task: Task, result: Result, seen: Seen, statistics_path: Path) -> Page:
    """页面里由一次评测得来的各节。"""
    with Statistics(statistics_path) as statistics:
        contenders = [Contender(name, statistics, name) for name in task.models]
        channels = [task.spec.channels[c] for c in task.glimpse.channels]
        spectra = make_spectra(result.spectrum_label, contenders, channels, task.glimpse.leads)
        wide = task.verifier is not None and task.verifier.sphere
        sphere = make_spectra("total wavenumber", contenders, channels, task.glimpse.leads, SPHERE) if wide else None
        maps = make_maps(task, seen, statistics)
    shown = page_leads(result)
    page = add_cells(add_table(page, result, shown), result, result.cells, shown)
    if task.verifier and result.events:
        glimpse = task.glimpse
        page = replace(
            page,
            sphere=sphere,
            events=events_page(
                task.verifier.asked, task.spec, seen.events, [*task.models], glimpse.channels, glimpse.leads
            ),
            drift=drift_page(result.events, shown) if task.steps > 1 else None,
        )
    return replace(
        page,
        facts=[*score_facts(task, result, len(shown)), *page.facts],
        models=model_lines(list(task.models), [n for n in task.models if n != task.judged]),
        ranks={c: thin(rows, shown) for c, rows in result.rank_histogram.items()} if result.rank_histogram else None,
        spectra=spectra,
        series=make_series(task, seen),
        maps=maps,
        coast=make_coast(task),
        costs=[cost_line(task.judged, result.cost)],
    )


def score_facts(task: Task, result: Result, shown: int) -> Facts:
    """开头的几行：评了什么；shown 是页面里放几个时效。"""
    hours, options = task.init_hours, task.options
    first, last = (time_text(int(h)) for h in (hours[0], hours[-1]))
    left_out, scored = (sum(map(sum, counts.values())) for counts in (result.left_out, result.pairs))
    facts: Facts = [
        ("split", options.split),
        ("windows", phrase("factWindows", len(hours), first, last)),
        ("fields scored", phrase("factScored", scored, left_out)),
    ]
    if options.members > 1:
        noise = [options.perturb] if options.perturb else []
        facts += [("members", phrase("factMembersNoise" if noise else "factMembers", options.members, *noise))]
    if shown < task.steps:
        facts += [("lead times", phrase("factLeads", shown, task.steps))]
    return facts


def phrase(key: str, *values: str | float) -> Phrase:
    """页面按语言说出的一句话；句子在 util/report/words.js 里。"""
    return Phrase(key, list(values))


def model_lines(names: Sequence[str], baselines: Sequence[str], published: Sequence[str] = ()) -> list[ModelLine]:
    """被评的在前，基线其次，别人发表的在后。"""
    judged = [ModelLine(n, "model") for n in names if n not in baselines and n not in published]
    others = [*(ModelLine(n, "baseline") for n in baselines), *(ModelLine(n, "published") for n in published)]
    return [*judged, *others]


def page_leads(table: ScoreTable) -> list[int]:
    """页面里放哪些时效（序号）：通道、时效都多时均匀地取一些；有没有分区都一样。"""
    return evenly(len(table.lead_hours), max(2, SCORE_CELLS // len(table.channels)))


def add_table(page: Page, table: ScoreTable, leads: Sequence[int]) -> Page:
    """通道、成绩、技巧与场数，只留 leads 这些时效（序号）。"""
    return replace(
        page,
        channels=[channel_line(c, table.units[c]) for c in table.channels],
        lead_hours=thin(table.lead_hours, leads),
        scores=thin_scores(table, leads),
        skill=thin_skills(table, leads),
        fields={c: FieldCounts(thin(table.pairs[c], leads), thin(table.left_out[c], leads)) for c in table.channels},
    )


def add_cells(page: Page, table: ScoreTable, cells: Sequence[Cell] | None, leads: Sequence[int]) -> Page:
    """各区域、各段时间；放不下时先舍去既分区域又分时段的，再少放几个时效（别的时效空着），末了才舍去别的格。"""
    if not cells:
        return page
    room = REGION_CELLS // (len(table.scores) * len(table.channels))  # 格 × 时效
    ordered = sorted(cells, key=lambda cell: WHOLE not in (cell.region, cell.period))
    simple = sum(WHOLE in (cell.region, cell.period) for cell in cells)
    kept = ordered[: max(1, simple, room // len(leads))]
    held = {leads[i] for i in evenly(len(leads), max(2, room // len(kept)))}
    kept = kept[: max(1, room // len(held))]
    places = [i if i in held else None for i in leads]
    said = phrase("factCells", len(kept), len(cells), len(held), len(table.lead_hours))
    facts = [*page.facts, ("regions and periods", said)]
    none = [0] * len(leads)
    lines = [
        CellLine(
            cell.region,
            cell.period,
            thin_scores(cell, places),
            thin_skills(cell, places),
            {c: FieldCounts(thin(counts, leads), none) for c, counts in cell.pairs.items()},
        )
        for cell in kept
    ]
    whole = len(kept) == len(cells) and len(held) == len(leads)
    return replace(page, facts=page.facts if whole else facts, cells=lines)


def thin_scores(table: ScoreTable | Cell, leads: Places) -> dict[str, dict[str, dict[str, Numbers]]]:
    return {
        model: {c: {name: pick(values, leads) for name, values in found.items()} for c, found in one.items()}
        for model, one in table.scores.items()
    }


def thin_skills(table: ScoreTable | Cell, leads: Places) -> dict[str, dict[str, dict[str, dict[str, Skill]]]]:
    return {
        model: {
            base: {c: {name: thin_skill(s, leads) for name, s in found.items()} for c, found in one.items()}
            for base, one in bases.items()
        }
        for model, bases in table.skill.items()
    }


def thin_skill(skill: Skill, leads: Places) -> Skill:
    return replace(skill, **{key: pick(values, leads) for key, values in vars(skill).items() if values is not None})


def pick(values: Numbers, leads: Places) -> Numbers:
    return [None if i is None else values[i] for i in leads]


def thin(values: Sequence[Value], leads: Sequence[int]) -> list[Value]:
    return [values[i] for i in leads]


def channel_line(name: str, unit: str) -> ChannelLine:
    info = variable_info(name)
    return ChannelLine(name, info.long_name, unit, info.kind)


def cost_line(name: str, cost: Cost) -> CostLine:
    return CostLine(**vars(cost), name=name)


def make_spectra(
    label: str, contenders: Sequence[Contender], channels: Sequence[str], leads: Sequence[int], name: str = "spectrum"
) -> Spectra:
    """物理单位的功率谱；contenders 各自的文件里，真值的谱与时效都相同，取头一个的。leads 是序号。"""

    def by_channel(file: Statistics, values: np.ndarray | None) -> dict[str, list[Numbers]]:  # (L, C, K)
        assert values is not None
        places = {c: file.channels.index(c) for c in channels}
        return {c: [numbers(values[lead, i] * file.std[i] ** 2, 4) for lead in leads] for c, i in places.items()}

    def of(contender: Contender) -> dict[str, list[Numbers]]:
        spectra, place = contender.file.result(name), contender.file.models.index(contender.model)
        return by_channel(contender.file, None if spectra is None else spectra[place])

    file = contenders[0].file
    truth = by_channel(file, file.result(f"{name}_truth"))
    return Spectra(
        label=label,
        lead_hours=[int(file.leads[lead]) for lead in leads],
        wavenumber=list(range(1, len(truth[channels[0]][0]) + 1)),
        truth=truth,
        models={c.label: of(c) for c in contenders},
    )


def data_facts(data: WeatherData, config: RunConfig, missing: Path) -> DataFacts:
    """各划分的样本数、段数；缺失与读坏的文件按通道与原因合计。"""
    spec = data.spec
    parts = config.data.part_configs()
    facts: Facts = [(f"data set {name}", part.store or part.root) for name, part in parts.items()]
    facts += [] if parts else [("root", config.data.root)]
    facts += [("statistics", config.data.statistics)] if config.data.statistics else []
    facts += [("store", str(config.data.store))] if config.data.source == "store" else []
    facts += [("grid", f"{spec.height} x {spec.width}")]
    facts += [("interval", f"{spec.interval_hours} h"), ("files standardised", str(spec.standardized).lower())]
    for split in SPLITS:
        dates = " to ".join(getattr(config.data.splits, split))
        facts.append((split, f"{dates}: {data.samples(split)} samples in {len(data.segments[split])} segment(s)"))
    groups: dict[tuple[str, str], list[str]] = {}
    if missing.is_file():
        with missing.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                groups.setdefault((row["channel"], row["reason"]), []).append(row["time"])
    rows = [(channel, len(times), min(times), max(times), reason) for (channel, reason), times in groups.items()]
    return DataFacts(facts, rows[:MISSING_SHOWN])


def read_curves(path: Path) -> Curves | None:
    """训练与验证损失；没有这个文件就没有这一节。点太多时隔着取，最后一个总在。"""
    if not path.is_file():
        return None
    points: dict[str, list[tuple[int, float]]] = {"train": [], "val": []}
    beside: dict[str, float] = {}
    for row in read_metrics(path):
        if row.name in BESIDE:
            beside[row.name] = float(f"{row.value:.6g}")
        if row.name == "loss" and row.split in points and math.isfinite(row.value):
            points[row.split].append((row.step, float(f"{row.value:.6g}")))
    every = {split: -(-len(found) // CURVE_POINTS) or 1 for split, found in points.items()}
    kept = {split: found[:: -every[split]][::-1] for split, found in points.items()}
    curves = Curves(**kept, persistence=beside.get("persistence"), climatology=beside.get("climatology"))
    return curves if curves.train or curves.val else None
