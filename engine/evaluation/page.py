"""报告的内容：Page 的每一栏是页面的一节，由成绩、谱、训练的曲线、配置与环境装成；场的几节在 page_fields.py。

加一节：这里的 Page 多一栏（它的写法是一个记录）、make_page 或 add_scores 多填一栏；util/report/ 里放一个画它的 .js。
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from engine.evaluation.glimpse import evenly
from engine.evaluation.metrics_file import Cost, Result
from engine.evaluation.page_facts import Curves, DataFacts, Facts, data_facts, read_curves, windows_text
from engine.evaluation.page_fields import Coast, Maps, Series, make_coast, make_maps, make_series, numbers
from engine.evaluation.results import Seen
from engine.evaluation.task import Task
from engine.verification.page import Drift, EventsPage, drift_page, events_page
from engine.verification.result import SPHERE
from engine.versions import versions
from util.calendar import time_text
from util.config import RunConfig
from util.data.dataset import WeatherData
from util.report import channel_line
from util.report.bilingual import Bilingual, split_text
from util.scores.common import Contender
from util.scores.statistics_file import Statistics
from util.scores.table import WHOLE, Cell, Numbers, ScoreTable, Skill
from util.strict import dump_yaml

SCORE_CELLS = 1000  # 页面里通道 × 时效至多这么多；全部的在 metrics.csv
REGION_VALUES = 80_000  # 各区域、时段的成绩与技巧一共多少个数，约 0.8 MB
FEWEST_LEADS = 4  # 每格这么多时效也放不下全部成绩时，只留主要的
MAIN_METRICS = ("rmse", "bias", "acc", "crps")
Value = TypeVar("Value")


@dataclass(frozen=True)
class ModelLine:
    """models 的一行；次序就是颜色的次序。"""

    name: str
    role: Literal["model", "baseline", "published"]


@dataclass(frozen=True)
class FieldCounts:
    """一个通道每个时效计了、没有计多少场。"""

    scored: list[int]
    left_out: list[int]


@dataclass(frozen=True)
class SkillLine:
    """技巧与它的区间，各时效；起报时间太少时没有区间。差值不在页面里，在 CSV。"""

    value: Numbers
    low: Numbers | None
    high: Numbers | None


Skills = dict[str, dict[str, dict[str, dict[str, SkillLine]]]]  # 模型 → 基线 → 通道 → 成绩


@dataclass(frozen=True)
class CellLine:
    """cells 的一行：一个区域、一段时间的成绩，三栏同 Page 的；all 是整个网格、全部时间。"""

    region: str
    period: str
    scores: dict[str, dict[str, dict[str, Numbers]]]
    skill: Skills
    fields: dict[str, FieldCounts]


@dataclass(frozen=True)
class Spectra:
    """功率谱，单位的平方：通道 → 时效 → K 个波数；通道与时效可以少于页面的。"""

    label: str
    lead_hours: list[int]
    wavenumber: list[int]
    truth: dict[str, list[Numbers]]
    models: dict[str, dict[str, list[Numbers]]]


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
    channels: list[dict[str, str]] | None = None
    lead_hours: list[int] | None = None
    scores: dict[str, dict[str, dict[str, Numbers]]] | None = None  # 模型 → 通道 → 成绩 → 每个时效
    skill: Skills | None = None
    fields: dict[str, FieldCounts] | None = None
    cells: list[CellLine] | None = None
    cell_leads: list[int] | None = None  # cells 里的是 lead_hours 的哪几个（序号）
    scorecard: str | None = None  # 分区评分卡先对着哪个模型
    ranks: dict[str, list[Numbers]] | None = None  # 通道 → 时效 → M + 1 个份额
    spectra: Spectra | None = None
    sphere: Spectra | None = None
    events: EventsPage | None = None
    drift: Drift | None = None
    series: Series | None = None
    maps: Maps | None = None  # 各起报时间
    roll: Maps | None = None  # 一次长的预报，各时效
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
        maps, roll = (make_maps(task, seen, statistics, which) for which in ("maps", "roll"))
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
        ranks=make_ranks(result, channels, shown),
        spectra=spectra,
        series=make_series(task, seen),
        maps=maps,
        roll=roll,
        coast=make_coast(task),
        costs=[cost_line(task.judged, result.cost)],
    )


def make_ranks(result: Result, channels: Sequence[str], leads: Sequence[int]) -> dict[str, list[Numbers]] | None:
    """秩直方图，与谱同样的几个通道。"""
    found = result.rank_histogram
    return {c: [digits(row, range(len(row))) for row in thin(found[c], leads)] for c in channels} if found else None


def score_facts(task: Task, result: Result, shown: int) -> Facts:
    """开头的几行：评了什么；shown 是页面里放几个时效。"""
    hours, options = task.init_hours, task.options
    first, last = (time_text(int(h)) for h in (hours[0], hours[-1]))
    left_out, scored = (sum(map(sum, counts.values())) for counts in (result.left_out, result.pairs))
    facts: Facts = [
        ("split", split_text(options.split)),
        ("windows", windows_text(len(hours), first, last)),
        (
            "fields scored",
            Bilingual(
                f"{scored:,} ({left_out:,} left out: interpolated truth)",
                f"{scored:,} 场（另有 {left_out:,} 场真值系插值而得，未计入）",
            ),
        ),
    ]
    if options.members > 1:
        count, noise = options.members, f"{options.perturb:g}"
        noisy = Bilingual(f"{count}, initial noise {noise} std", f"{count} 个，初值噪声为 {noise} 倍标准差")
        facts += [("members", noisy if options.perturb else count)]
    if shown < task.steps:
        english = f"{shown} of {task.steps} on this page, all in metrics.csv"
        facts += [("lead times", Bilingual(english, f"本页 {shown} 个，共 {task.steps} 个，全部见 metrics.csv"))]
    return facts


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
    """各区域、各段时间；放不下时先只留主要的成绩，再舍去既分区域又分时段的，再少放几个时效，末了才舍去别的格。"""
    if not cells:
        return page
    ordered = sorted(cells, key=lambda cell: WHOLE not in (cell.region, cell.period))
    simple = sum(WHOLE in (cell.region, cell.period) for cell in cells)
    metrics, room = None, REGION_VALUES // values_per_lead(cells[0])  # 格 × 时效
    if room < simple * min(len(leads), FEWEST_LEADS):
        metrics, room = MAIN_METRICS, REGION_VALUES // values_per_lead(cells[0], MAIN_METRICS)
    kept = ordered[: max(1, simple, room // len(leads))]
    places = evenly(len(leads), max(2, room // len(kept)))
    kept = kept[: max(1, room // len(places))]
    held = [leads[place] for place in places]
    lines = [
        CellLine(
            cell.region,
            cell.period,
            thin_scores(cell, held, metrics),
            thin_skills(cell, held, metrics),
            {c: FieldCounts(thin(counts, held), [0] * len(held)) for c, counts in cell.pairs.items()},
        )
        for cell in kept
    ]
    page = replace(page, cells=lines, cell_leads=places)
    whole = metrics is None and len(kept) == len(cells) and len(held) == len(leads)
    if whole:
        return page
    shown, times, all_times = len(kept), len(held), len(table.lead_hours)
    main = ("", "") if metrics is None else ("the main scores of ", "，只有主要的成绩")
    english = f"{main[0]}{shown} of {len(cells)} on this page, at {times} of {all_times} lead times"
    chinese = f"本页 {shown} 个（共 {len(cells)} 个），各 {times} 个时效（共 {all_times} 个）{main[1]}"
    said = Bilingual(f"{english}; all in the CSV beside it", f"{chinese}，全部见旁边的 CSV")
    return replace(page, facts=[*page.facts, ("regions and periods", said)])


def values_per_lead(cell: Cell, metrics: Sequence[str] | None = None) -> int:
    """一格一个时效有多少个数。"""

    def count(found: Mapping[str, object]) -> int:
        return sum(metrics is None or name in metrics for name in found)

    scores = sum(count(found) for one in cell.scores.values() for found in one.values())
    skills = sum(count(found) for bases in cell.skill.values() for one in bases.values() for found in one.values())
    return max(1, scores + 3 * skills)


def thin_scores(
    table: ScoreTable | Cell, leads: Sequence[int], metrics: Sequence[str] | None = None
) -> dict[str, dict[str, dict[str, Numbers]]]:
    """metrics: 只留这些成绩，None 是全部。"""
    return {
        model: {
            c: {name: digits(values, leads) for name, values in found.items() if metrics is None or name in metrics}
            for c, found in one.items()
        }
        for model, one in table.scores.items()
    }


def thin_skills(table: ScoreTable | Cell, leads: Sequence[int], metrics: Sequence[str] | None = None) -> Skills:
    return {
        model: {
            base: {
                c: {name: thin_skill(s, leads) for name, s in found.items() if metrics is None or name in metrics}
                for c, found in one.items()
            }
            for base, one in bases.items()
        }
        for model, bases in table.skill.items()
    }


def thin_skill(skill: Skill, leads: Sequence[int]) -> SkillLine:
    low, high = (None if bound is None else digits(bound, leads) for bound in (skill.low, skill.high))
    return SkillLine(digits(skill.value, leads), low, high)


def digits(values: Numbers, leads: Sequence[int]) -> Numbers:
    """五位有效数字：页面写四位。"""
    return [None if v is None else float(f"{v:.5g}") for v in thin(values, leads)]


def thin(values: Sequence[Value], leads: Sequence[int]) -> list[Value]:
    return [values[i] for i in leads]


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
