"""并排的地图：每个通道一行，一行同一个色标；集合的成员、逐尺度的重建用它。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from util.grid import output_grid
from util.plot.maps import grid_extent, pages_of
from util.plot.sheet import Box, Sheet
from util.plot.style import COLORS, INK, TITLE_SIZE, color_limits, power_of_ten, pretty_unit
from util.variables import variable_info

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from util.batch import DataSpec

PANEL_WIDTH, GAP, LEFT, RIGHT, BAR = 2.1, 0.07, 0.32, 0.75, 0.11  # 英寸
TOP, PANEL_TITLE, BOTTOM = 0.45, 0.28, 0.08


def side_by_side_figures(
    spec: DataSpec, columns: Mapping[str, np.ndarray], title: str, kind: str | None = None
) -> list[Figure]:
    """各列的图，一页至多 9 个通道。

    Args:
        columns: 列的名字 → (C, H, W)，物理单位，按 spec 的通道与网格顺序；一行的色标由这一行全部的列定。
        kind: 配色（COLORS 的键）；None：按变量。差用 "difference"。
    """
    return [_page(spec, columns, channels, heading, kind) for channels, heading in pages_of(spec, title)]


def _page(
    spec: DataSpec, columns: Mapping[str, np.ndarray], channels: Sequence[int], title: str, kind: str | None
) -> Figure:
    grid = output_grid(spec)
    extent, aspect = grid_extent(grid)
    west, east, south, north = extent
    height = PANEL_WIDTH * (min(north, 90) - max(south, -90)) * aspect / (east - west)
    row_height, bar = height + PANEL_TITLE, LEFT + len(columns) * (PANEL_WIDTH + GAP)
    sheet = Sheet(bar + RIGHT, TOP + len(channels) * row_height + BOTTOM, extent)
    sheet.text(0.08, sheet.height - 0.1, title, TITLE_SIZE, INK, weight="bold", va="top")
    for row, i in enumerate(channels):
        bottom = BOTTOM + (len(channels) - 1 - row) * row_height
        colors = kind or variable_info(spec.channels[i]).kind
        shown = {label: fields[i][grid.rows][:, grid.columns] for label, fields in columns.items()}  # 北在上
        low, high = color_limits(np.stack(list(shown.values())), colors)
        exponent = power_of_ten(max(abs(low), abs(high)))
        scale, unit = 10.0**exponent, pretty_unit(spec.units[i], exponent)
        sheet.text(
            LEFT - 0.08, bottom + height / 2, spec.channels[i], 9, INK, rotation="vertical", ha="right", va="center"
        )
        images = []
        for column, (label, field) in enumerate(shown.items()):
            box = Box(LEFT + column * (PANEL_WIDTH + GAP), bottom, PANEL_WIDTH, height)
            sheet.text(box.x, box.y + height + 3 / 72, label, 8.5)
            images.append(sheet.map(box, field / scale, COLORS[colors], (low / scale, high / scale), unit))
        sheet.bar(Box(bar, bottom, BAR, height), images[0])
        sheet.text(sheet.width - 0.08, bottom + height / 2, unit, 8.5, rotation="vertical", ha="right", va="center")
    return sheet.page()
