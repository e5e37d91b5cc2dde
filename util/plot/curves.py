"""训练与验证的曲线。"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from util.plot.style import INK, MODEL_COLORS, QUIET, TITLE_SIZE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from util.logger import MetricRow

TRAIN, VALIDATION = MODEL_COLORS[:2]
BESIDE = {"persistence": "--", "climatology": ":"}  # 旁边的基线：metrics.csv 里的名字 → 横线的样子


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
