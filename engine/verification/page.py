"""报告与图里的事件：几个通道、几个时效的曲线，由累加完了的表画出。"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from engine.verification.record import EventScores
from engine.verification.result import Asked, Sums
from util.batch import DataSpec
from util.plot.events import drift_figure, neighbourhood_figure, reliability_figure, roc_figure, value_figure
from util.scores.table import Numbers
from util.scores.tabulate import plain
from util.verification.events import LOSS_RATIOS, economic_value, rates, reliability

Figures = dict[str, list]
FIGURES = (  # --events 的图的名字，再评一次时先去掉
    *("reliability", "roc", "economic_value", "fractions_skill", "spherical_spectra"),
    *("drift_mean", "drift_variance", "drift_energy"),
)


@dataclass(frozen=True)
class EventCurves:
    """一个模型、通道、事件、时效的各条曲线。"""

    observed: Numbers  # M + 1 个，说 0、1 / M、…… 时真的发生的频率
    share: Numbers
    hit: Numbers  # M + 2 个，从总说有到总说没有
    false: Numbers
    value: Numbers
    fss: Numbers


@dataclass(frozen=True)
class EventsPage:
    """页面的 events：curves 是模型 → 通道 → 事件 → 各时效。"""

    lead_hours: list[int]
    ratios: list[float]
    sizes: list[int]
    curves: dict[str, dict[str, dict[str, list[EventCurves]]]]


@dataclass(frozen=True)
class Drift:
    """页面的 drift：哪一样 → 模型与 truth → 通道或一对风 → 各时效；时效是成绩的。"""

    mean: dict[str, dict[str, Numbers]]
    variance: dict[str, dict[str, Numbers]]
    energy: dict[str, dict[str, Numbers]]


def events_page(
    asked: Asked, spec: DataSpec, sums: Sums, models: Sequence[str], channels: Sequence[int], leads: Sequence[int]
) -> EventsPage | None:
    """channels、leads：放哪些，序号。没有事件时没有这一节。"""
    if not asked.events:
        return None

    def of(name: str) -> dict[str, dict[str, list[EventCurves]]]:
        table, errors = sums["table", name], sums.get(("fractions", name))
        (_, observed, share), (hit, false) = reliability(table), rates(table)
        value = economic_value(table)
        with np.errstate(divide="ignore", invalid="ignore"):
            skill = np.zeros((*table.shape[:3], 0)) if errors is None else 1 - errors[..., 0] / errors[..., 1]
        rows = (observed, share, hit, false, value, skill)
        return {
            spec.channels[c]: {
                label: [EventCurves(*(rounded(one[lead, c, e]) for one in rows)) for lead in leads]
                for e, names in enumerate(asked.events)
                if (label := names[c]) is not None
            }
            for c in channels
        }

    hours = spec.leads(max(leads) + 1)
    curves = {name: of(name) for name in models}
    return EventsPage([hours[lead] for lead in leads], LOSS_RATIOS.tolist(), asked.sizes, curves)


def rounded(values: np.ndarray) -> Numbers:
    return [None if v is None else float(f"{v:.4g}") for v in plain(values)]


def drift_page(scores: EventScores, leads: Sequence[int] | None = None) -> Drift:
    """leads: 放哪些时效，序号；None 是全部。"""

    def kept(values: Numbers) -> Numbers:
        return values if leads is None else [values[i] for i in leads]

    def of(what: str) -> dict[str, dict[str, Numbers]]:
        return {name: {c: kept(one[what]) for c, one in found.items()} for name, found in scores.drift.items()}

    energy = {name: {pair: kept(one) for pair, one in found.items()} for name, found in scores.kinetic_energy.items()}
    return Drift(of("mean"), of("variance"), energy)


def event_figures(page: EventsPage, baselines: set[str]) -> Figures:
    """文件的名字 → 图；末一个时效，每个通道一格：分位数最高的那个事件，没有就是末一个（其余的在页面里）。"""
    last = page.lead_hours[-1]
    models = [name for name in page.curves if name not in baselines] + [n for n in page.curves if n in baselines]

    def of(what: str) -> dict[str, dict[str, Numbers]]:
        return {
            name: {
                f"{channel} {event}": getattr(events[event][-1], what)
                for channel, events in page.curves[name].items()
                for event in shown_event(events)
            }
            for name in models
        }

    observed = of("observed")
    said = {n: np.linspace(0, 1, len(next(iter(one.values())))).tolist() for n, one in observed.items()}
    figures = {
        "reliability": reliability_figure(said, observed, of("share"), last, baselines),
        "roc": roc_figure(of("hit"), of("false"), last, baselines),
        "economic_value": value_figure(page.ratios, of("value"), last, baselines),
    }
    if page.sizes:
        figures["fractions_skill"] = neighbourhood_figure(page.sizes, of("fss"), last, baselines)
    return figures


def shown_event(events: Collection[str]) -> list[str]:
    """图里的那一个事件；一个也没有时是空的。"""
    return sorted(event for event in events if event.startswith(">q"))[-1:] or [*events][-1:]


def drift_figures(drift: Drift, lead_hours: Sequence[int], units: dict[str, str], baselines: set[str]) -> Figures:
    """文件的名字 → 图；气候态的方差不画：它只有季节与日变化的。"""
    squares = {channel: "" if unit == "1" else f"({unit})2" for channel, unit in units.items()}
    figures = {
        "drift_mean": drift_figure(lead_hours, "Area mean", units, drift.mean, baselines),
        "drift_variance": drift_figure(lead_hours, "Variance within a field", squares, drift.variance, baselines),
    }
    if pairs := dict.fromkeys(drift.energy["truth"], "m2 s-2"):
        figures["drift_energy"] = drift_figure(lead_hours, "Kinetic energy", pairs, drift.energy, baselines)
    return figures
