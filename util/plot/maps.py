"""地图：真值、预报、差值。"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from util.grid import OutputGrid, latitude_weights, output_grid
from util.plot.sheet import Box, Extent, Sheet
from util.plot.style import COLORS, INK, TITLE_LINE, TITLE_SIZE, color_limits, power_of_ten, pretty_unit
from util.variables import variable_info

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from util.batch import DataSpec

CHANNELS_PER_FIGURE = 9

# 版面尺寸，单位英寸：一律写明，面板才不会因为刻度文字的长短而错位
LEFT, RIGHT, GAP, BAR_GAP, BAR, BAR_LABELS = 0.62, 0.10, 0.28, 0.10, 0.10, 0.62
HEADER, PANEL_TITLE, TICKS, SPACE, TOP, BOTTOM = 0.34, 0.22, 0.34, 0.16, 0.30, 0.06  # 经度只写在末一行之下，占 TICKS
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
    extent, aspect = grid_extent(grid)
    layout, lines = _layout(extent, aspect, 1 if truth is None else 3, len(channels), title)
    sheet = Sheet(layout.width, layout.height, extent)
    sheet.text(LEFT, layout.height - 0.16, "\n".join(lines), TITLE_SIZE, INK, weight="bold", va="top")
    for row, i in enumerate(channels):
        below = len(channels) - 1 - row
        bottom = BOTTOM + TICKS + below * (HEADER + PANEL_TITLE + layout.panel_height + SPACE)
        header = bottom + layout.panel_height + PANEL_TITLE + 0.07
        sheet.text(LEFT, header, describe_channel(spec, i), 10.5, INK, weight="bold", va="bottom")
        fields = [f[i][grid.rows][:, grid.columns] for f in (truth, forecast) if f is not None]  # (H, W)，北在上
        if truth is not None:
            fields.append(fields[1] - fields[0])
            error = f"RMSE {weighted_rmse(fields[2], grid.latitudes):.3g} {pretty_unit(spec.units[i])}"
            sheet.text(layout.columns[2], header, error, 10, INK, va="bottom")
        boxes = [Box(x, bottom, layout.panel_width, layout.panel_height) for x in layout.columns]
        images = _draw_row(sheet, boxes, fields, variable_info(spec.channels[i]).kind, spec.units[i], made)
        for column, box in enumerate(boxes):
            sheet.graticule(box, (below == 0, column == 0))
        for x, image in zip(layout.bars, images[-2:], strict=True):
            color_bar(sheet, Box(x, bottom, BAR, layout.panel_height), image)
    return sheet.page()


def _draw_row(
    sheet: Sheet, boxes: list[Box], fields: list[np.ndarray], kind: str, unit: str, made: str
) -> list[AxesImage]:
    """fields: [预报] 或 [真值, 预报, 差值]，各 (H, W)；一行用同一个 10 的幂。"""
    low, high = color_limits(np.stack(fields[:2]), kind)
    exponent = power_of_ten(max(abs(low), abs(high)))
    scale = 10.0**exponent
    maps = [(field, low, high, COLORS[kind]) for field in fields[:2]]
    if len(fields) == 3:
        maps.append((fields[2], *color_limits(fields[2], "difference"), COLORS["difference"]))
    names = ["truth", made, f"{made} − truth"] if len(fields) == 3 else [made]
    images = []
    for box, name, (field, vmin, vmax, colors) in zip(boxes, names, maps, strict=True):
        sheet.text(box.x, box.y + box.height + 4 / 72, name, 8.5)
        images.append(sheet.map(box, field / scale, colors, (vmin / scale, vmax / scale), pretty_unit(unit, exponent)))
    return images


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
    rows = num_rows * (HEADER + PANEL_TITLE + width * ratio + SPACE) - SPACE
    page_height = BOTTOM + TICKS + rows + TOP + TITLE_LINE * len(lines)
    return Layout(page_width, page_height, width, width * ratio, columns, bars), lines


def color_bar(sheet: Sheet, box: Box, image: AxesImage) -> None:
    """色标，上面写着单位；长的单位向左伸。"""
    sheet.bar(box, image)
    unit = str(image.get_label())
    x, side = (box.x + BAR + 0.03, "left") if len(unit) <= 9 else (box.x + BAR + BAR_LABELS - 0.1, "right")
    sheet.text(x, box.y + box.height + 0.055, unit, 8.5, ha=side, va="baseline")


def describe_channel(spec: DataSpec, channel: int) -> str:
    """`z_level_00 — geopotential, 500 hPa`。"""
    name, pressure = spec.channels[channel], spec.pressures[channel]
    about = variable_info(name).long_name
    words = [about] if about not in ("", name) else []
    words += [f"{pressure:g} hPa"] if pressure is not None else []
    return f"{name} — {', '.join(words)}" if words else name
