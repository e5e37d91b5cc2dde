"""累加完了的和 → metrics.json 的 events 一节，与 statistics.nc 里的完整的表；只在零号进程，只用 NumPy。"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from engine.verification.record import EventScores
from util.batch import DataSpec
from util.scores.table import WHOLE, Numbers, ScoreTable
from util.scores.tabulate import Found, plain
from util.verification.drift import USEFUL_ACC, lost_skill, physical_moments, wind_pairs
from util.verification.events import brier_parts, categorical, economic_value, roc_area
from util.verification.sphere import effective_wavenumber

Array = np.ndarray
ChannelScores = dict[str, dict[str, dict[str, Numbers]]]  # 通道 → 事件 → 成绩
Sums = Mapping[tuple[str, str], Array]  # （SUMS 之一，模型或 truth）→ (L, C, …) 计的场之和
SPHERE = "spherical_spectrum"  # statistics.nc 里的名字
REGIONAL, PERIODIC = "table_by_region", "table_by_period"  # 末尾多一维的 table
SPECTRUM_FLOOR = 1e-8  # 真值的功率低于总量的这一份，只是舍入的噪声


class Asked(NamedTuple):
    """问了什么：事件 → 各通道的名字（没有的是 None），FSS 的窗，误差的几档（标准差），看了几个训练时刻。

    regions、periods: 事件另在哪里、什么时候问，名字。
    """

    events: list[tuple[str | None, ...]]
    sizes: list[int]
    exceedance: list[float]
    times: int
    regions: list[str]
    periods: list[str]


def event_scores(
    asked: Asked, spec: DataSpec, sums: Sums, counts: Array, zonal: Mapping[str, Array], table: ScoreTable, base: str
) -> EventScores:
    """counts: (L, C) 计的场数；zonal: 模型与 truth → (L, C, K) 之和；base: 气候态在表上的名字。"""
    models, of = list(table.scores), sums.get
    spheres = {name: values for (kind, name), values in sums.items() if kind == "sphere"}
    spectra = {"zonal": zonal} | ({"spherical": spheres} if spheres else {})
    moments = {name: mean_of(sums["moments", name], counts) for name in ("truth", *models)}
    return EventScores(
        training_times=asked.times,
        scores={m: by_channel(asked, spec, of(("table", m)), of(("fractions", m))) for m in models},
        error_exceedance={name: exceedance(asked, spec, sums, counts, name) for name in models},
        effective_wavenumber={
            kind: {name: resolved(values[name], values["truth"], spec) for name in models}
            for kind, values in spectra.items()
        },
        drift={name: drift(values, spec) for name, values in moments.items()},
        kinetic_energy={name: kinetic_energy(values, spec) for name, values in moments.items()},
        **lost(table, models, base),
    )


def mean_of(total: Array, counts: Array) -> Array:
    """(L, C, …) 之和 → 平均；一个场也没有的是 NaN。"""
    with np.errstate(divide="ignore", invalid="ignore"):
        return total / counts.reshape(*counts.shape, *[1] * (total.ndim - 2))


def by_channel(asked: Asked, spec: DataSpec, tables: Array | None, errors: Array | None = None) -> ChannelScores:
    """(L, C, E, M + 1, 2)、(L, C, E, S, 2) → 通道 → 事件 → 成绩；没有问事件时是空的。"""
    if tables is None:
        return {}
    named = {**categorical(tables), **brier_parts(tables), "roc_area": roc_area(tables)}
    named["best_economic_value"] = np.nan_to_num(economic_value(tables), nan=-np.inf).max(-1)
    if errors is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            skill = 1 - errors[..., 0] / errors[..., 1]
        named |= {f"fss_{size}": skill[..., s] for s, size in enumerate(asked.sizes)}
    return {
        channel: {
            label: {name: plain(values[:, c, e]) for name, values in named.items()}
            for e, names in enumerate(asked.events)
            if (label := names[c]) is not None
        }
        for c, channel in enumerate(spec.channels)
    }


def exceedance(asked: Asked, spec: DataSpec, sums: Sums, counts: Array, model: str) -> dict[str, dict[str, Numbers]]:
    """通道 → |误差| 的界，物理单位 → 面积的份额。"""
    if not asked.exceedance:
        return {}
    share = mean_of(sums["exceedance", model], counts)  # (L, C, X)
    return {
        channel: {f"{x * spec.std[c]:.6g}": plain(share[:, c, i]) for i, x in enumerate(asked.exceedance)}
        for c, channel in enumerate(spec.channels)
    }


def resolved(forecast: Array, truth: Array, spec: DataSpec) -> dict[str, list[int | None]]:
    """通道 → 各时效的有效波数；和里的场数相同，不必除。"""
    return {
        channel: [effective_wavenumber(forecast[lead, c], truth[lead, c], SPECTRUM_FLOOR) for lead in range(len(truth))]
        for c, channel in enumerate(spec.channels)
    }


def drift(moments: Array, spec: DataSpec) -> dict[str, dict[str, Numbers]]:
    """(L, C, 3) → 通道 → 全球平均与场内方差，物理单位。"""
    found = {}
    for c, channel in enumerate(spec.channels):
        physical = physical_moments(moments[:, c], spec.mean[c], spec.std[c])
        found[channel] = {name: plain(physical[name]) for name in ("mean", "variance")}
    return found


def kinetic_energy(moments: Array, spec: DataSpec) -> dict[str, Numbers]:
    """一对风的名字 → 各时效的 ½⟨u² + v²⟩，m² s⁻²。"""
    square = {
        channel: physical_moments(moments[:, c], spec.mean[c], spec.std[c])["square"]
        for c, channel in enumerate(spec.channels)
    }
    return {f"{u}+{v}": plain((square[u] + square[v]) / 2) for u, v in wind_pairs(spec.channels)}


def lost(table: ScoreTable, models: list[str], base: str) -> dict[str, dict[str, dict[str, int | None]]]:
    """技巧用完的时效，小时。"""
    hours, useful = table.lead_hours, [-USEFUL_ACC] * len(table.lead_hours)
    climate, rest = table.scores[base], [name for name in models if name != base]

    def below(values: Numbers) -> Numbers:
        return [None if v is None else -v for v in values]

    return {
        "hours_to_climatology": {
            name: {c: lost_skill(hours, one["rmse"], climate[c]["rmse"]) for c, one in table.scores[name].items()}
            for name in rest
        },
        "hours_to_useful": {
            name: {c: lost_skill(hours, below(one["acc"]), useful) for c, one in table.scores[name].items()}
            for name in rest
        },
    }


def event_variables(
    asked: Asked, sums: Sums, counts: Array, models: list[str]
) -> Iterator[tuple[str, tuple[str, ...], Array | Sequence[object]]]:
    """statistics.nc 里的：完整的表（可靠性、ROC、经济价值都由它画）、邻域的误差、球谐谱；都是计的场上的平均。"""
    lead = ("prediction_timedelta", "channel")
    if asked.events:
        names = [[names[c] or "" for names in asked.events] for c in range(counts.shape[1])]
        yield "event", ("channel", "event"), names
    cell = {"table": (), REGIONAL: ("region",), PERIODIC: ("period",)}
    for (kind, name), total in sums.items():
        if kind in cell:
            dims = (*lead, "event", f"count_{total.shape[3]}", "outcome", *cell[kind])
            with np.errstate(invalid="ignore"):  # 没有窗口的一段时间
                yield f"event_{kind.replace('table', f'table_{name}')}", dims, total / total.sum((3, 4), keepdims=True)
        elif kind == "fractions":
            yield f"fraction_errors_{name}", (*lead, "event", "neighbourhood", "part"), mean_of(total, counts)
    if asked.periods:
        yield "period", ("period",), asked.periods
    spheres = {name: mean_of(total, counts) for (kind, name), total in sums.items() if kind == "sphere"}
    if spheres:
        yield SPHERE, ("model", *lead, "total_wavenumber"), np.stack([spheres[name] for name in models])
        yield f"{SPHERE}_truth", (*lead, "total_wavenumber"), spheres["truth"]
    if asked.sizes:
        yield "neighbourhood_cells", ("neighbourhood",), np.array(asked.sizes)


def csv_lines(scores: EventScores, table: ScoreTable) -> Iterator[Found]:
    """metrics.csv 的各行，都没有单位。table 里有的（--thresholds 的 Brier）不再写。"""
    for model, channels in scores.scores.items():
        for channel, name, values in _named(channels):
            if name not in table.scores[model][channel]:
                yield Found(model, channel, name, values)
    for model, channels in scores.error_exceedance.items():
        for channel, found in channels.items():
            for limit, values in found.items():
                yield Found(model, channel, f"error_exceedance>{limit}", values)


def cell_lines(asked: Asked, spec: DataSpec, sums: Sums) -> Iterator[Found]:
    """metrics.csv 里各区域（全部时间）的、各段时间（整个网格）的；没有问就没有。"""
    for kind, names in ((REGIONAL, asked.regions), (PERIODIC, asked.periods)):
        for key, total in sums.items():
            for i, name in enumerate(names if key[0] == kind else ()):
                where = (name, WHOLE) if kind == REGIONAL else (WHOLE, name)
                for channel, score, values in _named(by_channel(asked, spec, total[..., i])):
                    yield Found(key[1], channel, score, values, *where)


def _named(channels: ChannelScores) -> Iterator[tuple[str, str, Numbers]]:
    """通道、表上的名字（csi>q0.98）、各时效。"""
    for channel, events in channels.items():
        for event, found in events.items():
            for name, values in found.items():
                yield channel, f"{name}{event}", values
