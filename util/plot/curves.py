"""训练与验证的曲线。"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from util.plot.style import INK, MODEL_COLORS, QUIET, TITLE_SIZE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from util.logger import MetricRow

TRAIN, VALIDATION = MODEL_COLORS[:2]
BESIDE = {"persistence": "--", "climatology": ":"}  # 旁边的基线：metrics.csv 里的名字 → 横线的样子
DASHES = ("-", "--", ":", "-.")  # 颜色用完一遍，换一种线


def curves_figure(rows: Iterable[MetricRow]) -> Figure:
    """训练与验证的损失对步数；训练损失另画滑动平均，原值放淡。

    Args:
        rows: MetricsLog.rows() 的行；取 name 为 loss、split 为 train 或 val 的，与两个基线的验证损失（各一条横线）。
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if math.isfinite(row.value)]
    losses = [row for row in rows if row.name == "loss"]
    beside = {row.name: row.value for row in rows if row.name in BESIDE}
    series = {s: np.array([(r.step, r.value) for r in losses if r.split == s]).reshape(-1, 2) for s in ("train", "val")}
    figure = Figure(figsize=(8, 4.5), dpi=130, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    train, val = series["train"], series["val"]
    if len(train):
        width = max(len(train) // 40, 1)
        axes.plot(*train.T, color=TRAIN, alpha=0.25 if width > 1 else 1, linewidth=1)
        axes.plot(*_running_mean(train, width).T, color=TRAIN, linewidth=1.8, label="train")
    if len(val):
        step, best = val[np.argmin(val[:, 1])]
        name = f"validation (best {best:.4g} at step {step:.0f})"
        axes.plot(*val.T, color=VALIDATION, linewidth=1.8, marker="o", markersize=4, label=name)
        axes.plot(step, best, color=VALIDATION, marker="o", markersize=9, markerfacecolor="none", linestyle="none")
    for name, value in beside.items():
        label = f"{name}, validation ({value:.4g})"
        axes.axhline(value, color=QUIET, linewidth=1.4, linestyle=BESIDE[name], label=label)
    _style_curves(axes, np.array([*train[:, 1], *val[:, 1], *beside.values()]))
    return figure


def runs_figure(runs: Mapping[str, Iterable[MetricRow]]) -> Figure | None:
    """几个运行的验证损失对步数，各除以自己的持续性预报的损失（数据、通道不同也在一把尺上）；低于一就是好过它。

    Args:
        runs: 名字 → MetricsLog.rows() 的行；没有验证损失、没有持续性预报的损失的（目标不是场的误差）不画。
            都没有就是 None。图例按最低的损失由高到低排，与曲线末端的次序相近。
    """
    from matplotlib.figure import Figure

    curves = {name: _validation_ratio(list(rows)) for name, rows in runs.items()}
    drawn = {name: points for name, points in curves.items() if len(points)}
    if not drawn:
        return None
    figure = Figure(figsize=(9.5, max(4.5, 0.9 + 0.22 * len(drawn))), dpi=130, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for name in sorted(drawn, key=lambda name: -drawn[name][:, 1].min()):
        place = list(drawn).index(name)  # 颜色随次序，不随成绩
        color, dash = MODEL_COLORS[place % len(MODEL_COLORS)], DASHES[place // len(MODEL_COLORS) % len(DASHES)]
        label = f"{name} ({drawn[name][:, 1].min():.3g})"
        axes.plot(*drawn[name].T, color=color, linestyle=dash, linewidth=1.6, marker="o", markersize=2.5, label=label)
    axes.axhline(1, color=QUIET, linewidth=1.4, linestyle=(0, (1, 1)), label="persistence")
    _style_curves(axes, np.array([1.0, *(v for points in drawn.values() for v in points[:, 1])]))
    axes.set_ylabel("loss / loss of persistence", color=INK)
    axes.set_title("Validation loss (and its lowest)", loc="left", pad=12, size=TITLE_SIZE, weight="bold", color=INK)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _validation_ratio(rows: list[MetricRow]) -> np.ndarray:
    """(N, 2) 的 (步, 验证损失 / 持续性预报的)；不知道后者时 N = 0。"""
    found = [row for row in rows if row.split == "val" and math.isfinite(row.value)]
    persistence = [row.value for row in found if row.name == "persistence" and row.value > 0]
    points = [(row.step, row.value / persistence[-1]) for row in found if row.name == "loss" and persistence]
    return np.array(points, np.float64).reshape(-1, 2)


def _running_mean(points: np.ndarray, width: int) -> np.ndarray:
    """(N, 2) 的 (步, 值)：值取居中的滑动平均，两端窗口变短。"""
    sums = np.concatenate([[0.0], np.cumsum(points[:, 1])])
    places = np.arange(len(points))
    low, high = np.maximum(places - width, 0), np.minimum(places + width + 1, len(points))
    low, high = (places, places + 1) if width == 1 else (low, high)
    return np.column_stack([points[:, 0], (sums[high] - sums[low]) / (high - low)])


def _style_curves(axes: Axes, values: np.ndarray) -> None:
    from matplotlib.ticker import LogLocator

    if len(values) == 0:
        axes.text(0.5, 0.5, "no losses recorded", transform=axes.transAxes, ha="center", color=QUIET)
    elif values.min() > 0 and values.max() > 4 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss", color=INK)
    axes.set_title("Training and validation loss", loc="left", pad=12, size=TITLE_SIZE, weight="bold", color=INK)
    axes.grid(color="#dddddd", linewidth=0.6, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=QUIET, labelsize=9)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
