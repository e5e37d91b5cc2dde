"""并排的地图：每个通道一行，一行同一个色标；集合的成员、逐尺度的重建用它。只用 Figure 对象（Agg）。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from util.grid import output_grid
from util.plot.coast import coastlines
from util.plot.maps import grid_extent, pages_of
from util.plot.style import COAST, COLORS, INK, QUIET, TITLE_SIZE, color_limits, power_of_ten, pretty_unit
from util.variables import variable_info

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from util.batch import DataSpec

PANEL_WIDTH, MARGIN = 2.1, 1.0  # 英寸


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
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    grid = output_grid(spec)
    (west, east, south, north), aspect = grid_extent(grid)
    height = PANEL_WIDTH * (min(north, 90) - max(south, -90)) * aspect / (east - west)
    size = (PANEL_WIDTH * len(columns) + MARGIN, (height + 0.45) * len(channels) + 0.5)
    figure = Figure(figsize=size, dpi=130, facecolor="white", layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", size=TITLE_SIZE, weight="bold", color=INK)
    coast = coastlines(west, east, south, north)
    for i, panels in zip(channels, figure.subplots(len(channels), len(columns), squeeze=False), strict=True):
        name = spec.channels[i]
        colors = kind or variable_info(name).kind
        shown = {label: fields[i][grid.rows][:, grid.columns] for label, fields in columns.items()}  # 北在上
        low, high = color_limits(np.stack(list(shown.values())), colors)
        exponent = power_of_ten(max(abs(low), abs(high)))
        scale = 10.0**exponent
        for panel, (label, field) in zip(panels, shown.items(), strict=True):
            panel.imshow(
                field / scale, cmap=COLORS[colors], vmin=low / scale, vmax=high / scale,
                extent=(west, east, south, north), aspect="auto",
            )  # fmt: skip
            for ink, width, alpha in COAST:
                panel.add_collection(LineCollection(coast, colors=ink, linewidths=width, alpha=alpha), autolim=False)
            panel.set(xlim=(west, east), ylim=(max(south, -90), min(north, 90)), xticks=[], yticks=[])
            panel.set_title(label, loc="left", size=8.5, color=QUIET, pad=3)
        panels[0].set_ylabel(name, size=9, color=INK)
        bar = figure.colorbar(panels[0].images[0], ax=list(panels), fraction=0.05, pad=0.01, aspect=12)
        bar.ax.tick_params(labelsize=7.5, labelcolor=QUIET)
        bar.set_label(pretty_unit(spec.units[i], exponent), size=8.5, color=QUIET)
    return figure
