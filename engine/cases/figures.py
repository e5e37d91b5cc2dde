"""一个个例的图：羽状图、地图、面条图、各成员；画什么由 plan 定，这里给它们起名字、排次序。"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from engine.cases.collect import TRUTH, CaseFound, Shot
from engine.cases.plan import Plan
from util.calendar import moment_of, time_text
from util.plot.cases import MEMBERS_SHOWN, Line, compared_figure, members_figure, plume_figure, spaghetti_figure
from util.plot.maps import describe_channel
from util.plot.sheet import latitude_label, longitude_label
from util.plot.style import power_of_ten, pretty_unit, save_figures
from util.variables import variable_info

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {
    "plume": "casePlume",
    "maps": "caseMaps",
    "spaghetti": "caseSpaghetti",
    "members": "caseMembers",
}  # 文件名的开头 → 页面的节
WEBP_QUALITY = 85
BUNDLES = 5  # 羽状图至多画几束


class Picture(NamedTuple):
    """一张图：哪一种，哪个通道，有效时刻（羽状图没有），等值线（面条图才有），PNG 在哪里，页面里的 WebP。"""

    kind: str
    channel: str
    hour: int | None
    contour: str
    path: Path
    small: bytes


def draw_case(
    plan: Plan, found: CaseFound, judged: str, normal: str, inits: np.ndarray, folder: Path
) -> Iterator[Picture]:
    """一张张画、存；normal: 气候态在 found 里的名字。"""
    for c, channel in enumerate(plan.spec.channels):
        figure = draw_plume(plan, found, judged, normal, inits, c)
        yield Picture("plume", channel, None, "", *save_both(figure, folder / f"plume-{channel}"))
        for hour, pairs in plan.shots.items():
            shots = {}
            for row, lead in pairs:
                hours = plan.spec.lead(lead)
                shots[f"+{hours} h, from {moment_of(int(inits[row])):%m-%d %H}"] = found.shots[row, lead]
            for kind, contour, figure in draw_moment(plan, shots, c, hour):
                end = "-".join(filter(None, (channel, time_text(hour), contour)))
                yield Picture(kind, channel, hour, contour, *save_both(figure, folder / f"{kind}-{end}"))


def save_both(figure: Figure, stem: Path) -> tuple[Path, bytes]:
    """PNG 与 PDF 存下；页面里的是 WebP：海岸线的细线在 PNG 里大好几倍，一页放不下几张。"""
    small = stem.parent / f"{stem.name}.webp"
    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(small, pil_kwargs={"quality": WEBP_QUALITY, "method": 4})
    content = small.read_bytes()
    small.unlink()
    (path,) = save_figures([figure], stem)
    return path, content


def draw_moment(plan: Plan, shots: Mapping[str, Shot], c: int, hour: int) -> Iterator[tuple[str, str, Figure]]:
    """一个通道、一个有效时刻：（哪一种，等值线，图）；shots: 时效的名字 → 场。"""
    spec, when = plan.spec, f"{moment_of(hour):%Y-%m-%d %H} UTC"
    heading = f"{plan.case.name}: {describe_channel(spec, c)}, {when}"
    first = next(iter(shots.values()))
    truth, normal = first.truth[c], first.normal[c]
    forecasts = {name: shot.forecast[c] for name, shot in shots.items()}
    yield "maps", "", compared_figure(spec, c, truth, forecasts, heading)
    several = len(first.members) > 1
    own = {name: shot.members[:, c] if several else () for name, shot in shots.items()}
    for level in contour_levels(plan, c, truth, normal):
        leads = {name: [forecasts[name], *own[name]] for name in shots}
        title = f"{plan.case.name}: {spec.channels[c]} = {amount(level, spec.units[c])}, {when}"
        yield (
            "spaghetti",
            f"{level:g}",
            spaghetti_figure(spec, level, {"truth": truth, "climatology": normal}, leads, title),
        )
    if several:
        maps = {
            name.partition(",")[0]: {
                "mean": forecasts[name],
                **{f"member {i}": field for i, field in enumerate(own[name][:MEMBERS_SHOWN])},
            }
            for name in shots
        }
        yield "members", "", members_figure(spec, c, truth, maps, heading)


def contour_levels(plan: Plan, c: int, truth: np.ndarray, normal: np.ndarray) -> list[float]:
    """面条图的等值线：YAML 写的，或那一刻气候态在框里的中位数（降水是九成分位数），取到整；真值到不了就取真值的。"""
    channel = plan.spec.channels[c]
    if channel in plan.case.contours:
        return list(dict.fromkeys(plan.case.contours[channel]))
    share = 0.9 if variable_info(channel).kind == "rain" else 0.5
    shown = truth if np.isfinite(truth).all() else normal
    level = float(np.quantile(normal, share))
    if not shown.min() < level < shown.max():
        level = float(np.quantile(shown, share))
    spread = float(shown.max() - shown.min())
    if not spread > 0:
        return [level]
    step = 10.0 ** math.floor(math.log10(spread / 10))
    return [round(level / step) * step]


def draw_plume(plan: Plan, found: CaseFound, judged: str, normal: str, inits: np.ndarray, c: int) -> Figure:
    """各起报时间一束；每次起报在这几天里只有一个时刻的（不滚动），各时效一束。"""
    spec, case = plan.spec, plan.case
    hours = inits[found.rows] + spec.lead(found.leads)  # (n,) 有效时刻
    rows, counts = np.unique(found.rows, return_counts=True)
    joined = bool((counts > 1).any())
    groups, keys = (rows[counts > 1], found.rows) if joined else (np.unique(found.leads), found.leads)
    chosen = groups[np.unique(np.linspace(0, len(groups) - 1, min(len(groups), BUNDLES)).round().astype(int))]

    def bundle(name: str, some: np.ndarray) -> Line:
        order = np.flatnonzero(some)[np.argsort(hours[some], kind="stable")]
        return Line(hours[order].astype("datetime64[h]"), found.values[name][order, :, c].T)

    def called(key: int) -> str:
        return f"from {moment_of(int(inits[key])):%m-%d %H}" if joined else f"+{spec.lead(key)} h"

    _, once = np.unique(hours, return_index=True)  # 真值、气候态每个时刻一个
    single = np.isin(np.arange(len(hours)), once)
    known = {TRUTH: bundle(TRUTH, single), "climatology": bundle(normal, single)}
    title = f"{case.name}: {describe_channel(spec, c)}, {place_text(plan)}"
    bundles = {called(int(key)): bundle(judged, keys == key) for key in chosen}
    return plume_figure(spec, c, known, bundles, title, joined=joined)


def place_text(plan: Plan) -> str:
    """羽状图画的是哪里。"""
    if plan.point is None:
        return "box mean"
    row, column = plan.point
    return f"{latitude_label(plan.spec.latitudes[row])} {longitude_label(plan.spec.longitudes[column])}"


def amount(value: float, unit: str) -> str:
    """`280 K`、`80 × 10⁻⁶ m`。"""
    exponent = power_of_ten(abs(value))
    words = [f"{value / 10.0**exponent:g}", *(["×"] if exponent else []), pretty_unit(unit, exponent)]
    return " ".join(words[: -1 if unit == "1" and not exponent else None])
