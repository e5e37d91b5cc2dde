"""成绩的图：RMSE、功率谱、秩直方图，每个通道一小格。只用 Figure 对象，颜色与报告相同。"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from util.plot.style import INK, MODEL_COLORS, QUIET, TITLE_SIZE, power_of_ten, pretty_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS_PER_FIGURE, MOST_COLUMNS = 12, 4
BASELINE_COLOR, DASHES = "#808080", ((5, 2), (1.5, 1.5), (6, 2, 1.5, 2), (9, 3))  # 基线都是灰的，靠虚线的花样区分
MOST_MARKERS, MOST_TICKS = 12, 6
MARKERS = ("s", "^", "D", "v", "P", "X")  # 发表的成绩
PANEL_WIDTH, PANEL_HEIGHT, PANEL_TITLE, BAR_HEIGHT = 2.75, 1.85, 0.45, 0.27  # 英寸，一格连同刻度
TITLE, LEGEND_ROW, LEGEND_LINE, LETTER, MARGIN = 0.42, 0.24, 0.6, 0.085, 0.08
Values = Mapping[str, Sequence[float | None]]  # 通道 → 一列数


def scores_figure(
    lead_hours: Sequence[int],
    units: Mapping[str, str],
    rmse: Mapping[str, Values],
    baselines: Collection[str],
    published: Collection[str] = (),
) -> list[Figure]:
    """各通道的 RMSE：随时效的曲线；只有一个时效时是每个模型一条的横条，写着数。

    Args:
        lead_hours: L 个时效，小时。
        units: 通道 → 单位；次序就是各格的次序。
        rmse: 模型 → 通道 → L 个值，物理单位；None 或 NaN 是没有的。模型的次序就是颜色的次序。
        baselines: rmse 里的哪些是基线。
        published: 哪些是别人发表的：通道、时效可以不全，只有几个时效的连成细线。
    """
    looks = model_looks(rmse, baselines, published)
    lacking = [float("nan")] * len(lead_hours)
    exponents = {c: _exponent([rmse[name].get(c, lacking) for name in rmse]) for c in units}
    corners = {channel: pretty_unit(unit, exponents[channel]) for channel, unit in units.items()}

    def values(name: str, channel: str) -> np.ndarray:
        return np.array(rmse[name].get(channel, lacking), np.float64) / 10.0 ** exponents[channel]

    def draw_lines(axes: Axes, channel: str) -> None:
        for name, look in looks.items():
            found = values(name, channel)
            kept = np.isfinite(found) if name in published else slice(None)
            axes.plot(np.array(lead_hours)[kept], found[kept], label=name, **look)
        axes.set(xlim=(0, 1.03 * max(lead_hours)), xticks=_lead_ticks(max(lead_hours)))
        axes.set_ylim(bottom=0)

    def draw_bars(axes: Axes, channel: str) -> None:
        lengths = np.array([values(name, channel)[0] for name in looks])
        for place, (look, length) in enumerate(zip(looks.values(), lengths, strict=True)):
            axes.barh(place, length, height=0.66, color=look["color"])
            axes.text(np.nan_to_num(length), place, f" {_number(length)}", va="center", size=8, color=INK)
        axes.set(xlim=(0, 1.3 * np.nanmax(lengths, initial=0) or 1), ylim=(len(looks) - 0.4, -0.6))
        axes.set_yticks(range(len(looks)), list(looks))
        axes.tick_params(axis="y", length=0, labelsize=9, labelcolor=INK)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.grid(visible=False)

    if len(lead_hours) == 1:
        height, left = PANEL_TITLE + BAR_HEIGHT * len(looks), LETTER * max(map(len, looks))
        return panels(corners, f"RMSE, +{lead_hours[0]} h", "", draw_bars, height, left)
    if len(lead_hours) <= MOST_MARKERS:
        own = [name for name in looks if name not in baselines and name not in published]
        looks |= {name: {**looks[name], "marker": "o"} for name in own}
    return panels(corners, "RMSE by lead time", "lead time, h", draw_lines)


def spectra_figure(
    wavenumber: Sequence[float],
    label: str,
    truth: Values,
    models: Mapping[str, Values],
    units: Mapping[str, str],
    lead_hours: int,
    baselines: Collection[str] = (),
) -> list[Figure]:
    """各通道的功率谱，双对数坐标；真值是黑线，预报落在下面就是被抹平了。

    Args:
        wavenumber: (K,)，大于零。
        label: 横轴的名字，例如 zonal wavenumber。
        truth: 通道 → (K,)，单位的平方；次序就是各格的次序，可以少于 units 的。
        models: 模型 → 通道 → (K,)；次序就是颜色的次序。
        units: 通道 → 单位。
        lead_hours: 这些预报的时效，小时。
        baselines: models 里的哪些是基线。
    """
    spectra = {"truth": truth, **models}
    looks = {"truth": {"color": INK, "linewidth": 1.8}, **model_looks(models, baselines)}

    def draw(axes: Axes, channel: str) -> None:
        for name, look in looks.items():
            power = np.array(spectra[name][channel], np.float64)
            axes.loglog(wavenumber, np.where(power > 0, power, np.nan), label=name, **look)
        _log_ticks(axes)

    return panels({c: _squared(units[c]) for c in truth}, f"Power spectra, +{lead_hours} h", label, draw)


def ranks_figure(ranks: Values, lead_hours: int) -> list[Figure]:
    """各通道的秩直方图：真值排在 M 个成员中第几位；离散度合适时是平的，中间低两边高是离散度不够。

    Args:
        ranks: 通道 → M + 1 个份额，合计为一，None 是没有的；次序就是各格的次序。
        lead_hours: 时效，小时。
    """
    from matplotlib.ticker import MaxNLocator

    highest = max(float(np.nanmax(np.array(shares, np.float64), initial=0)) for shares in ranks.values())

    def draw(axes: Axes, channel: str) -> None:
        shares = np.array(ranks[channel], np.float64)
        axes.bar(range(len(shares)), shares, width=0.9, color=MODEL_COLORS[0])
        axes.axhline(1 / len(shares), color=INK, linewidth=1, dashes=DASHES[0], label="calibrated: every rank alike")
        axes.set_ylim(0, 1.08 * highest or 1)
        axes.xaxis.set_major_locator(MaxNLocator(MOST_TICKS, integer=True))

    corners = dict.fromkeys(ranks, "share")
    return panels(corners, f"Rank histograms, +{lead_hours} h", "members below the truth", draw)


def model_looks(
    names: Collection[str], baselines: Collection[str], published: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """每个模型的线：模型依次取色，基线灰色虚线，发表的是带空心记号的细点线，颜色、记号轮着来。"""
    colors, dashes, others = 0, 0, 0
    looks: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in baselines:
            looks[name] = {"color": BASELINE_COLOR, "linewidth": 1.3, "dashes": DASHES[dashes % len(DASHES)]}
            dashes += 1
        elif name in published:
            lap, place = divmod(others, len(MODEL_COLORS))
            looks[name] = {"color": MODEL_COLORS[place], "linewidth": 0.9, "linestyle": ":"}
            looks[name] |= {"marker": MARKERS[lap % len(MARKERS)], "markersize": 5, "markerfacecolor": "white"}
            others += 1
        else:
            looks[name] = {"color": MODEL_COLORS[colors % len(MODEL_COLORS)], "linewidth": 1.8, "markersize": 3.5}
            colors += 1
    return looks


def panels(
    corners: Mapping[str, str],
    title: str,
    label: str,
    draw: Callable[[Axes, str], None],
    height: float = PANEL_HEIGHT,
    left: float = 0.0,
) -> list[Figure]:
    """每个通道一格，分成大小相近的几页；各页的格子同样大。

    Args:
        corners: 通道 → 右上角的字（单位）。
        label: 横轴的名字，整页写一次。
        height: 一格的高，英寸；left: 左边留给模型名的宽，英寸，这时各行的名字只写在第一列。
    """
    from matplotlib.figure import Figure

    pages = np.array_split(list(corners), math.ceil(len(corners) / PANELS_PER_FIGURE))
    columns = min(MOST_COLUMNS, math.ceil(math.sqrt(len(pages[0]))))
    figures = []
    for number, channels in enumerate(pages, 1):
        rows = math.ceil(len(channels) / columns)
        figure = Figure(dpi=130, facecolor="white")
        for place, channel in enumerate(channels.tolist()):
            axes = figure.add_subplot(rows, columns, place + 1)
            _frame(axes, channel, corners[channel])
            draw(axes, channel)
            if left:
                axes.tick_params(labelleft=place % columns == 0)
        heading = f"{title} ({number} of {len(pages)})" if len(pages) > 1 else title
        _head(figure, heading, left + PANEL_WIDTH * max(columns, 2), height * rows + (LEGEND_ROW if label else 0))
        if label:
            figure.supxlabel(label, size=9, color=QUIET)
        figures.append(figure)
    return figures


def _frame(axes: Axes, channel: str, corner: str) -> None:
    axes.set_title(channel, loc="left", size=9.5, weight="bold", color=INK)
    axes.set_title(corner, loc="right", size=8.5, color=QUIET)
    axes.tick_params(labelsize=8, labelcolor=QUIET, color=QUIET, length=2.5, width=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(linewidth=0.6, color=QUIET)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e2e2e2", linewidth=0.6)


def _head(figure: Figure, title: str, width: float, height: float) -> None:
    """标题与图例加在各格之上，图例有几行就留几行的高；width、height 是各格占的英寸。"""
    handles, names = figure.axes[0].get_legend_handles_labels()
    rows = math.ceil(sum(LEGEND_LINE + LETTER * len(name) for name in names) / width)
    head = TITLE + LEGEND_ROW * rows
    whole = head + height
    figure.set_size_inches(width, whole)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, height / whole), w_pad=MARGIN, h_pad=MARGIN, hspace=0)
    place = (MARGIN / width, 1 - MARGIN / whole)
    figure.text(*place, title, size=TITLE_SIZE, weight="bold", color=INK, va="top")
    if names:
        corner, columns = (place[0], 1 - TITLE / whole), math.ceil(len(names) / rows)
        look = {"ncols": columns, "frameon": False, "fontsize": 9, "borderpad": 0, "borderaxespad": 0}
        figure.legend(handles, names, loc="upper left", bbox_to_anchor=corner, **look)


def _exponent(rows: Sequence[Sequence[float | None]]) -> int:
    values = np.abs(np.array(rows, np.float64))
    return power_of_ten(float(np.nanmax(values, initial=0)))


def _squared(unit: str) -> str:
    """`m s-1` → `(m s⁻¹)²`；无量纲的为空。"""
    unit = pretty_unit("" if unit == "1" else unit)
    return f"({unit})²" if len(unit.split()) > 1 else f"{unit}²" if unit else ""


def _number(value: float) -> str:
    """四位有效数字；没有的写 missing。"""
    if not math.isfinite(value):
        return "missing"
    return f"{value:#.4g}".rstrip(".") if abs(value) < 9999.5 else f"{value:.0f}"


def _lead_ticks(last: int) -> list[int]:
    """整的时数，不超过 MOST_TICKS 个。"""
    steps = (1, 2, 3, 6, 12, 24, 48, 72, 120, 240)
    step = next((s for s in steps if last / s <= MOST_TICKS), last)
    return list(range(0, last + 1, step))


def _log_ticks(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
