"""评分卡的图：一格一个区域，行是通道，列是时效；三角向上为好、向下为差，大小是变化，实心为显著。"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from util.plot.style import INK, QUIET, TITLE_SIZE, save_figures
from util.scores.scorecard import Card
from util.scores.table import WHOLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GOOD, BAD, BAND = "#2166ac", "#b2182b", "#f4f5f7"
FULL_CHANGE = 20.0  # 变化到这么多（%）三角就不再变大
CELL, LETTER, PANEL_HEAD, HEAD, FOOT, GAP = 0.23, 0.085, 0.34, 0.58, 0.34, 0.16  # 英寸
MOST_WIDTH, MOST_CHANNELS, MOST_HEIGHT = 13.0, 30, 14.0
SIZES = (14.0, 110.0)  # 三角的面积，平方点


def save_scorecards(cards: Sequence[Card], metric: str, stem: Path) -> list[Path]:
    """全部时间的，每个模型一张（几页）；返回 PNG 的路径。"""
    whole = [card for card in cards if card.period == WHOLE and card.metric == metric]
    groups: dict[str, list[Card]] = {}
    for card in whole:
        groups.setdefault(f"{metric.upper()} of {card.model} against {card.reference}", []).append(card)
    figures = [figure for title, some in groups.items() for figure in scorecard_figures(some, title)]
    return save_figures(figures, stem) if figures else []


def scorecard_figures(cards: Sequence[Card], title: str) -> list[Figure]:
    """一个模型、一个时段、一种成绩的评分卡；区域、通道多时分成几页。

    Args:
        cards: 次序就是通道、区域、时效的次序。
    """
    channels, regions = (list(dict.fromkeys(getattr(c, key) for c in cards)) for key in ("channel", "region"))
    leads = sorted({card.lead_hours for card in cards})
    left = LETTER * max(map(len, channels)) + 0.1
    width = max(CELL * len(leads), LETTER * max(map(len, regions))) + GAP
    columns = max(1, min(len(regions), int((MOST_WIDTH - left) / width)))
    groups = np.array_split(channels, math.ceil(len(channels) / MOST_CHANNELS))
    pages = []
    for group in (one.tolist() for one in groups):
        height = CELL * len(group) + PANEL_HEAD
        rows = max(1, int((MOST_HEIGHT - HEAD - FOOT) / height))
        pages += [(group, regions[i : i + rows * columns]) for i in range(0, len(regions), rows * columns)]
    return [_page(cards, title, group, some, leads, (left, width, columns)) for group, some in pages]


def _page(
    cards: Sequence[Card],
    title: str,
    channels: Sequence[str],
    regions: Sequence[str],
    leads: Sequence[int],
    layout: tuple[float, float, int],
) -> Figure:
    """layout: 左边留给通道名的宽、一格的宽（英寸）与一行几格。"""
    from matplotlib.figure import Figure

    left, width, columns = layout
    rows, columns = math.ceil(len(regions) / columns), min(columns, len(regions))
    height = CELL * len(channels) + PANEL_HEAD
    size = (max(left + width * columns, 7.0), HEAD + height * rows + FOOT)
    figure = Figure(figsize=size, dpi=130, facecolor="white")
    for place, region in enumerate(regions):
        row, column = divmod(place, columns)
        corner = (left + width * column, size[1] - HEAD - height * (row + 1))
        box = (corner[0] / size[0], corner[1] / size[1], CELL * len(leads) / size[0], CELL * len(channels) / size[1])
        axes = figure.add_axes(box)
        _panel(axes, [c for c in cards if c.region == region], channels, leads)
        axes.set_title("whole grid" if region == WHOLE else region, loc="left", size=9, weight="bold", color=INK, pad=3)
        axes.tick_params(labelleft=column == 0)
        axes.tick_params(labelbottom=place + columns >= len(regions))
    figure.text(0.1 / size[0], 1 - 0.1 / size[1], title, size=TITLE_SIZE, weight="bold", color=INK, va="top")
    about = f"up, blue: smaller error, full size at {FULL_CHANGE:g} %; filled: 95 % interval without zero; lead time, h"
    figure.text(0.1 / size[0], 1 - 0.36 / size[1], about, size=8.5, color=QUIET, va="top")
    return figure


def _panel(axes: Axes, cards: Sequence[Card], channels: Sequence[str], leads: Sequence[int]) -> None:
    shown = [card for card in cards if card.change is not None and card.channel in channels]
    for better in (True, False):
        for sure in (True, False):
            some = [c for c in shown if ((c.change or 0.0) <= 0) == better and c.significant == sure]
            color = GOOD if better else BAD
            axes.scatter(
                [leads.index(c.lead_hours) for c in some],
                [channels.index(c.channel) for c in some],
                [marker_size(c.change or 0.0) for c in some],
                marker="^" if better else "v",
                facecolor=color if sure else "white",
                edgecolor=color,
                linewidth=0.8,
                zorder=2,
            )
    for row in range(0, len(channels), 2):
        axes.axhspan(row - 0.5, row + 0.5, color=BAND, zorder=0, linewidth=0)
    axes.set(xlim=(-0.5, len(leads) - 0.5), ylim=(len(channels) - 0.5, -0.5))
    every = math.ceil(LETTER * len(str(leads[-1])) / CELL)
    axes.set_xticks(range(0, len(leads), every), [str(lead) for lead in leads[::every]])
    axes.set_yticks(range(len(channels)), list(channels))
    axes.tick_params(length=0, labelsize=7.5, labelcolor=QUIET)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.spines[:].set(linewidth=0.6, color="#c3cad2")


def marker_size(change: float) -> float:
    """三角的面积与变化成正比，有下限，到 FULL_CHANGE 为止。"""
    return SIZES[0] + (SIZES[1] - SIZES[0]) * min(1.0, abs(change) / FULL_CHANGE)
