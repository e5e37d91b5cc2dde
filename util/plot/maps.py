"""地图：真值、预报、差值。"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from util.grid import OutputGrid, latitude_weights, output_grid
from util.plot.coast import coastlines
from util.plot.style import COAST, COLORS, INK, QUIET, TITLE_LINE, TITLE_SIZE, color_limits, power_of_ten, pretty_unit
from util.variables import variable_info

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from util.batch import DataSpec

Extent = tuple[float, float, float, float]  # 西、东、南、北
CHANNELS_PER_FIGURE = 9

# 版面尺寸，单位英寸：一律写明，面板才不会因为刻度文字的长短而错位
LEFT, RIGHT, GAP, BAR_GAP, BAR, BAR_LABELS = 0.62, 0.10, 0.28, 0.10, 0.10, 0.62
HEADER, PANEL_TITLE, TICKS, TOP, BOTTOM = 0.34, 0.22, 0.34, 0.30, 0.06
PANEL_WIDTH, PANEL_HEIGHT, NARROWEST, SLOT = 3.6, 3.6, 1.35, 1.8  # 面板的上限；窄高的区域仍占 SLOT 宽，标题才放得下


class Layout(NamedTuple):
    """一页的尺寸，单位英寸；columns 是各列面板左缘，bars 是色标左缘。"""

    width: float
    height: float
    panel_width: float
    panel_height: float
    columns: list[float]
    bars: list[float]


def forecast_figure(
    spec: DataSpec, truth: np.ndarray | None, forecast: np.ndarray, title: str, made: str = "forecast"
) -> list[Figure]:
    """每个通道一行：真值、预报、差值；没有真值时只有预报一列。每张图最多 9 个通道。

    Args:
        truth, forecast: (C, H, W)，物理单位，按 spec 的通道与网格顺序；NaN 处留空，不计入 RMSE。
        title: 图的标题。
        made: 第二列的叫法；自编码器的是 reconstruction。

    Returns:
        一张或几张图；真值与预报共用色标，差值的色标关于 0 对称，RMSE 按纬度加权。
    """
    size = (spec.num_channels, spec.height, spec.width)
    assert forecast.shape == size and (truth is None or truth.shape == size), f"fields are not (C, H, W) = {size}"
    grid = output_grid(spec)
    return [_page(spec, grid, truth, forecast, channels, heading, made) for channels, heading in pages_of(spec, title)]


def pages_of(spec: DataSpec, title: str) -> list[tuple[range, str]]:
    """各页的通道与标题，一页至多 9 个通道；不止一页时标题写明是第几页。"""
    starts = range(0, spec.num_channels, CHANNELS_PER_FIGURE)
    parts = [range(start, min(start + CHANNELS_PER_FIGURE, spec.num_channels)) for start in starts]
    numbered = len(parts) > 1
    return [(part, f"{title} ({n} of {len(parts)})" if numbered else title) for n, part in enumerate(parts, 1)]


def _page(
    spec: DataSpec,
    grid: OutputGrid,
    truth: np.ndarray | None,
    forecast: np.ndarray,
    channels: Sequence[int],
    title: str,
    made: str,
) -> Figure:
    from matplotlib.figure import Figure

    extent, aspect = grid_extent(grid)
    coast = coastlines(*extent)
    num_maps = 1 if truth is None else 3
    layout, lines = _layout(extent, aspect, num_maps, len(channels), title)
    figure = Figure(figsize=(layout.width, layout.height), dpi=130, facecolor="white")
    x = LEFT / layout.width
    figure.text(x, 1 - 0.16 / layout.height, "\n".join(lines), size=TITLE_SIZE, weight="bold", color=INK, va="top")
    row_height = HEADER + PANEL_TITLE + layout.panel_height + TICKS
    for row, i in enumerate(channels):
        bottom = BOTTOM + (len(channels) - 1 - row) * row_height + TICKS
        header = (bottom + layout.panel_height + PANEL_TITLE + 0.07) / layout.height
        figure.text(x, header, _describe(spec, i), size=10.5, weight="bold", color=INK, va="bottom")
        fields = [f[i][grid.rows][:, grid.columns] for f in (truth, forecast) if f is not None]  # (H, W)，北在上
        if truth is not None:
            fields.append(fields[1] - fields[0])
            error = f"RMSE {weighted_rmse(fields[2], grid.latitudes):.3g} {pretty_unit(spec.units[i])}"
            figure.text(layout.columns[2] / layout.width, header, error, size=10, color=INK, va="bottom")
        axes = [_panel(figure, layout, column, bottom, extent, coast) for column in range(num_maps)]
        _draw_row(axes, fields, variable_info(spec.channels[i]).kind, spec.units[i], extent, made)
        for bar, panel in zip(layout.bars, axes[-2:], strict=True):
            _color_bar(figure, layout, bar, bottom, panel)
    return figure


def _draw_row(axes: list[Axes], fields: list[np.ndarray], kind: str, unit: str, extent: Extent, made: str) -> None:
    """fields: [预报] 或 [真值, 预报, 差值]，各 (H, W)；一行用同一个 10 的幂。"""
    low, high = color_limits(np.stack(fields[:2]), kind)
    exponent = power_of_ten(max(abs(low), abs(high)))
    scale = 10.0**exponent
    maps = [(field, low, high, COLORS[kind]) for field in fields[:2]]
    if len(fields) == 3:
        maps.append((fields[2], *color_limits(fields[2], "difference"), COLORS["difference"]))
    names = ["truth", made, f"{made} − truth"] if len(fields) == 3 else [made]
    for panel, name, (field, vmin, vmax, colors) in zip(axes, names, maps, strict=True):
        values = field.astype(np.float64) / scale
        image = panel.imshow(values, cmap=colors, vmin=vmin / scale, vmax=vmax / scale, extent=extent, aspect="auto")
        image.set_label(pretty_unit(unit, exponent))
        panel.set_title(name, loc="left", size=8.5, color=QUIET, pad=4)
    for panel in axes[1:]:
        panel.tick_params(labelleft=False)


def weighted_rmse(difference: np.ndarray, latitudes: np.ndarray) -> float:
    """(H, W) 的差 → 纬度加权的均方根；NaN 不计，全是 NaN 时为 NaN。"""
    finite = np.isfinite(difference)
    weights = latitude_weights(latitudes.tolist()).numpy()[:, None] * finite  # (H, W)
    squares = np.where(finite, difference, 0).astype(np.float64) ** 2
    return float(np.sqrt((weights * squares).sum() / weights.sum())) if finite.any() else math.nan


def grid_extent(grid: OutputGrid) -> tuple[Extent, float]:
    """图像的四边（格点外推半格）和纵横比：区域图按中心纬度的余弦拉伸，全球图为 1。"""
    south, north = grid.latitudes.min(), grid.latitudes.max()
    west, east = grid.longitudes.min(), grid.longitudes.max()
    half_lat = (north - south) / max(len(grid.latitudes) - 1, 1) / 2 or 0.5
    half_lon = (east - west) / max(len(grid.longitudes) - 1, 1) / 2 or 0.5
    aspect = 1 / max(math.cos(math.radians((south + north) / 2)), 0.5)
    return (west - half_lon, east + half_lon, south - half_lat, north + half_lat), aspect


def _layout(extent: Extent, aspect: float, num_maps: int, num_rows: int, title: str) -> tuple[Layout, list[str]]:
    """由区域的形状定面板大小，再累加出整页；返回版面和折好行的标题。"""
    west, east, south, north = extent
    ratio = (min(north, 90) - max(south, -90)) * aspect / (east - west)
    width = max(min(PANEL_WIDTH, PANEL_HEIGHT / ratio), NARROWEST)
    slot, bar = max(width, SLOT), BAR_GAP + BAR + BAR_LABELS
    columns = [LEFT, LEFT + slot + GAP, LEFT + 2 * slot + GAP + bar] if num_maps == 3 else [LEFT]
    bars = [column + width + BAR_GAP for column in columns[-2:]]
    page_width = columns[-1] + max(slot, 2 * SLOT if num_maps == 1 else 0) + bar + RIGHT
    lines = textwrap.wrap(title, int((page_width - LEFT) / 0.105)) or [""]
    row = HEADER + PANEL_TITLE + width * ratio + TICKS
    page_height = BOTTOM + num_rows * row + TOP + TITLE_LINE * len(lines)
    return Layout(page_width, page_height, width, width * ratio, columns, bars), lines


def _panel(figure: Figure, layout: Layout, column: int, bottom: float, extent: Extent, coast: list[np.ndarray]) -> Axes:
    from matplotlib.collections import LineCollection

    left, right, south, north = extent
    x, w = layout.columns[column] / layout.width, layout.panel_width / layout.width
    panel = figure.add_axes((x, bottom / layout.height, w, layout.panel_height / layout.height))
    panel.set(xlim=(left, right), ylim=(max(south, -90), min(north, 90)))
    panel.set_xticks(_ticks(left, right, max(int(layout.panel_width / 0.5), 2)))
    panel.set_yticks(_ticks(max(south, -90), min(north, 90), max(int(layout.panel_height / 0.25), 2)))
    panel.xaxis.set_major_formatter(lambda value, _: _longitude_label(value))
    panel.yaxis.set_major_formatter(lambda value, _: _latitude_label(value))
    panel.tick_params(labelsize=7.5, labelcolor=QUIET, color=QUIET, length=2.5, width=0.6, pad=2)
    panel.grid(color="white", alpha=0.35, linewidth=0.5)
    for color, width, alpha in COAST:
        panel.add_collection(LineCollection(coast, colors=color, linewidths=width, alpha=alpha), autolim=False)
    for side in panel.spines.values():
        side.set(linewidth=0.6, color=QUIET)
    return panel


def _color_bar(figure: Figure, layout: Layout, left: float, bottom: float, panel: Axes) -> None:
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    image = panel.images[0]
    low, high = image.get_clim()
    values = np.ma.masked_invalid(np.asarray(image.get_array()))
    below, above = bool(np.any(values < low)), bool(np.any(values > high))
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[(below, above)]
    x, y, width, height = left, bottom, BAR, layout.panel_height  # 英寸
    axes = figure.add_axes((x / layout.width, y / layout.height, width / layout.width, height / layout.height))
    bar = figure.colorbar(image, cax=axes, extend=extend, extendfrac=0.04)
    bar.locator = MaxNLocator(nbins=max(int(layout.panel_height / 0.25), 3), steps=[1, 2, 2.5, 5, 10])
    bar.formatter = ScalarFormatter(useOffset=False)
    bar.formatter.set_scientific(False)  # 否则色标顶上会多出 1e-5 一类的字，压住单位
    bar.update_ticks()
    bar.outline.set(linewidth=0.6, edgecolor=QUIET)  # type: ignore[operator]
    axes.tick_params(labelsize=7.5, labelcolor=QUIET, color=QUIET, length=2.5, width=0.6, pad=2)
    unit = str(image.get_label())
    x, side = (left + BAR + 0.03, "left") if len(unit) <= 9 else (left + BAR + BAR_LABELS - 0.1, "right")  # 长的向左伸
    y = (bottom + layout.panel_height + 0.055) / layout.height
    figure.text(x / layout.width, y, unit, size=8.5, color=QUIET, ha=side, va="baseline")


def _ticks(low: float, high: float, most: int) -> list[float]:
    """整度数的刻度，不超过 most 个。"""
    steps = (1, 2, 5, 10, 15, 20, 30, 45, 60, 90, 180)
    step = next((s for s in steps if (high - low) / s < most), 180)
    return [float(v) for v in range(math.ceil(low / step) * step, math.floor(high) + 1, step)]


def _longitude_label(value: float) -> str:
    east = (value + 180) % 360 - 180  # [-180, 180)
    if east in (0, -180):
        return f"{abs(east):g}°"
    return f"{abs(east):g}°{'E' if east > 0 else 'W'}"


def _latitude_label(value: float) -> str:
    return "0°" if value == 0 else f"{abs(value):g}°{'N' if value > 0 else 'S'}"


def _describe(spec: DataSpec, channel: int) -> str:
    """`z_level_00 — geopotential, 500 hPa`。"""
    name, pressure = spec.channels[channel], spec.pressures[channel]
    about = variable_info(name).long_name
    words = [about] if about not in ("", name) else []
    words += [f"{pressure:g} hPa"] if pressure is not None else []
    return f"{name} — {', '.join(words)}" if words else name
