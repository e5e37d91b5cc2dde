"""个例的图：同一刻几个时效的预报与误差，各成员的地图，面条图，羽状图；一个通道一张。"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from util.grid import OutputGrid, output_grid
from util.plot.maps import color_bar, grid_extent, weighted_rmse
from util.plot.sheet import Box, Pen, Sheet
from util.plot.style import COLORS, INK, MODEL_COLORS, QUIET, TITLE_SIZE, color_limits, power_of_ten, pretty_unit
from util.variables import variable_info

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from util.batch import DataSpec

WIDEST, TALLEST, NARROWEST = 2.5, 2.3, 1.45  # 一格的大小，英寸
SMALL = 1.6  # 各成员的一格
LEFT, RIGHT, GAP, BAR, BAR_LABELS = 0.5, 0.1, 0.12, 0.11, 0.72
TOP, PANEL_TITLE, TICKS, LINE = 0.42, 0.3, 0.3, 0.24
LEGEND = 5.4  # 面条图的图例要这么宽
MEMBERS_SHOWN = 6  # 各成员的地图至多几个
TRUTH, MEAN = Pen(INK, 2.0, order=6), Pen(MODEL_COLORS[1], 1.6, order=5.5)
FAINT = Pen("#8a8a8a", 0.5, 0.8, 3)  # 面条图的海岸线：底上没有颜色
MEMBER, NORMAL = Pen(MODEL_COLORS[0], 0.7, 0.55, 5), Pen(QUIET, 1.1, 0.9, 5.2)
Fields = Mapping[str, np.ndarray]  # 格的名字 → (H, W)，物理单位，照 spec 的网格


class Row(NamedTuple):
    """一行地图：各格（空着的是 None），配色，色标的两端。"""

    panels: Sequence[tuple[str, np.ndarray] | None]
    kind: str
    limits: tuple[float, float]


def compared_figure(spec: DataSpec, channel: int, truth: np.ndarray, forecasts: Fields, title: str) -> Figure:
    """上行真值与各时效的预报，同一个色标；下行各自的误差（预报减真值），写着框里的 RMSE。

    Args:
        truth: (H, W)，插值得来的是 NaN，那时没有误差。
        forecasts: 时效的名字 → (H, W)，由近到远。
    """
    kind, unit = variable_info(spec.channels[channel]).kind, spec.units[channel]
    errors = {name: field - truth for name, field in forecasts.items()}
    latitudes = np.array(spec.latitudes)

    def said(name: str) -> str:
        rmse = weighted_rmse(errors[name], latitudes)
        return f"error, RMSE {rmse:.3g} {pretty_unit(unit)}" if np.isfinite(rmse) else "no truth"

    limits = color_limits(np.stack([truth, *forecasts.values()]), kind)
    top = Row([("truth", truth), *forecasts.items()], kind, limits)
    limits = color_limits(np.stack([*errors.values()]), "difference")
    low = Row([None, *((said(name), error) for name, error in errors.items())], "difference", limits)
    return _rows_figure(spec, channel, [top, low], title)


def members_figure(spec: DataSpec, channel: int, truth: np.ndarray, leads: Mapping[str, Fields], title: str) -> Figure:
    """一个时效一行：真值、集合平均、各成员，全页同一个色标。leads: 时效的名字 → 格的名字 → (H, W)。"""
    kind = variable_info(spec.channels[channel]).kind
    limits = color_limits(np.stack([truth, *(field for one in leads.values() for field in one.values())]), kind)
    rows = []
    for lead, fields in leads.items():
        (name, first), *others = fields.items()
        rows.append(Row([("truth", truth), (f"{lead}: {name}", first), *others], kind, limits))
    return _rows_figure(spec, channel, rows, title, SMALL)


def spaghetti_figure(
    spec: DataSpec,
    level: float,
    known: Mapping[str, np.ndarray],
    leads: Mapping[str, Sequence[np.ndarray]],
    title: str,
) -> Figure:
    """一个时效一格：各成员在 level 的等值线，集合平均、真值与气候态的粗些。

    Args:
        known: truth 与 climatology，各 (H, W)。
        leads: 时效的名字 → 集合平均与各成员，各 (H, W)；只有一个成员时只有它。
    """
    grid = output_grid(spec)
    sheet, boxes = _sheet(spec, grid, (1, len(leads)), title, WIDEST, LINE)
    places, several = (grid.longitudes, grid.latitudes), len(next(iter(leads.values()))) > 1
    fixed = [(known["truth"], TRUTH), (known["climatology"], NORMAL)]
    for column, ((name, (mean, *members)), box) in enumerate(zip(leads.items(), boxes[0], strict=True)):
        sheet.text(box.x, box.y + box.height + 4 / 72, name, 8.5, INK)
        sheet.frame(box)
        sheet.graticule(box, (True, column == 0))
        for field, pen in [*fixed, (mean, MEAN), *((one, MEMBER) for one in members)]:
            sheet.contour(box, places, _north_up(field, grid), level, pen)
    pens = {"truth": TRUTH, "climatology": NORMAL, "ensemble mean" if several else "forecast": MEAN}
    x, y = LEFT, boxes[0][0].y + boxes[0][0].height + PANEL_TITLE + 0.06
    for word, pen in (pens | ({"members": MEMBER} if several else {})).items():
        sheet.line(pen, [(x, y), (x + 0.25, y)])
        sheet.text(x + 0.31, y, word, 8.5, va="center")
        x += 0.5 + 0.075 * len(word)
    return sheet.page([FAINT])


def _rows_figure(spec: DataSpec, channel: int, rows: Sequence[Row], title: str, widest: float = WIDEST) -> Figure:
    """几行地图，一行一个色标，色标上写着单位。"""
    grid = output_grid(spec)
    sheet, boxes = _sheet(spec, grid, (len(rows), max(len(row.panels) for row in rows)), title, widest)
    for i, (row, line) in enumerate(zip(rows, boxes, strict=True)):
        exponent = power_of_ten(max(map(abs, row.limits)))
        low, high = (value / 10.0**exponent for value in row.limits)
        unit = pretty_unit(spec.units[channel], exponent)
        drawn = [(panel, box, j) for j, (panel, box) in enumerate(zip(row.panels, line, strict=False)) if panel]
        images = []
        for (name, field), box, j in drawn:
            sheet.text(box.x, box.y + box.height + 4 / 72, name, 8.5, INK)
            shown = _north_up(field, grid) / 10.0**exponent
            images.append(sheet.map(box, shown, COLORS[row.kind], (low, high), unit))
            sheet.graticule(box, (i == len(rows) - 1 or j >= len(rows[i + 1].panels), box is drawn[0][1]))
        last = line[len(row.panels) - 1]
        color_bar(sheet, Box(last.x + last.width + GAP, last.y, BAR, last.height), images[-1])
    return sheet.page()


def _sheet(
    spec: DataSpec, grid: OutputGrid, shape: tuple[int, int], title: str, widest: float, head: float = 0.0
) -> tuple[Sheet, list[list[Box]]]:
    """空的一页与各格；shape: 几行几列；widest: 一格的宽；head: 标题之下另留的高，那时没有色标，英寸。"""
    (rows, columns), (extent, aspect) = shape, grid_extent(grid)
    west, east, south, north = extent
    ratio = (min(north, 90) - max(south, -90)) * aspect / (east - west)
    width = max(min(widest, TALLEST / ratio), NARROWEST)
    height = width * ratio
    page = max(LEGEND, LEFT + columns * (width + GAP) + (0.0 if head else BAR + BAR_LABELS) + RIGHT)
    lines = textwrap.wrap(title, max(20, int((page - 0.2) / 0.105)))
    top = TOP + LINE * (len(lines) - 1) + head
    sheet = Sheet(page, top + rows * (height + PANEL_TITLE) + TICKS, extent)
    sheet.text(0.1, sheet.height - 0.1, "\n".join(lines), TITLE_SIZE, INK, weight="bold", va="top")
    bottoms = [TICKS + (rows - 1 - i) * (height + PANEL_TITLE) for i in range(rows)]
    return sheet, [[Box(LEFT + j * (width + GAP), y, width, height) for j in range(columns)] for y in bottoms]


def _north_up(field: np.ndarray, grid: OutputGrid) -> np.ndarray:
    return field[grid.rows][:, grid.columns]


class Line(NamedTuple):
    """羽状图的一束：一次起报（或一个时效）的有效时刻 (T,) datetime64，各成员 (M, T)。"""

    times: np.ndarray
    members: np.ndarray


def plume_figure(
    spec: DataSpec,
    channel: int,
    known: Mapping[str, Line],
    bundles: Mapping[str, Line],
    title: str,
    *,
    joined: bool,
) -> Figure:
    """成员的细线、集合平均的粗线，对着有效时刻；真值黑线，气候态灰虚线。

    Args:
        known: truth 与 climatology，各一条。
        bundles: 名字 → 一束，由旧到新，越新越深。
        joined: 一束的成员是不是连续的一条路；不是就画点。
    """
    from matplotlib import colormaps
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.figure import Figure

    everything = np.concatenate([line.members.ravel() for line in (*known.values(), *bundles.values())])
    finite = np.abs(everything[np.isfinite(everything)])
    scale = power_of_ten(float(finite.max(initial=0.0)))
    figure = Figure(figsize=(8.5, 4.4), dpi=130, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    colors = colormaps["viridis_r"](np.linspace(0.25, 0.95, len(bundles)))
    for color, (name, line) in zip(colors, bundles.items(), strict=True):
        values = line.members / 10.0**scale  # (M, T)
        if len(values) > 1:
            look: dict[str, Any] = (
                {"linewidth": 0.6} if joined else {"linestyle": "none", "marker": ".", "markersize": 3.5}
            )
            axes.plot(line.times, values.T, color=color, alpha=0.45, **look)
        mark = "o" if len(line.times) < 30 else ""
        axes.plot(line.times, values.mean(0), color=color, linewidth=1.9, label=name, marker=mark, markersize=3.2)
    looks = {
        "truth": {"color": INK, "linewidth": 2.2, "zorder": 5},
        "climatology": {"color": "#808080", "linewidth": 1.5, "dashes": (4, 2)},
    }
    for name, line in known.items():
        axes.plot(line.times, line.members[0] / 10.0**scale, label=name, **looks[name])
    axes.set_title(title, loc="left", size=TITLE_SIZE, weight="bold", color=INK)
    axes.set_ylabel(pretty_unit(spec.units[channel], scale), color=INK)
    axes.set_xlabel("valid time, UTC", size=9, color=QUIET)
    axes.xaxis.set_major_locator(locator := AutoDateLocator(minticks=3, maxticks=8))
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.tick_params(labelsize=8.5, labelcolor=QUIET, color=QUIET)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e2e2e2", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
