"""事件的图：可靠性、ROC、经济价值、邻域的技巧；每个（通道，事件）一小格。还有滚动时的漂移，每个通道一小格。"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from util.plot.scores import DASHES, Values, model_looks, panels
from util.plot.style import INK, QUIET, pretty_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[str, Mapping[str, Sequence[float | None]]]  # 模型 → 格 → 一列数
SQUARE = 2.35  # 方的一格，连同刻度，英寸
EVEN = {"color": QUIET, "linewidth": 0.9, "dashes": DASHES[0]}  # 参照线


def reliability_figure(
    probability: Mapping[str, Sequence[float]],
    observed: Curves,
    share: Curves,
    lead_hours: int,
    baselines: Collection[str],
) -> list[Figure]:
    """可靠性图：点的大小是那一档的份额；在对角线上是说多少就发生多少。

    Args:
        probability: 模型 → 它说得出的各个概率（成员数加一个）。
        observed、share: 模型 → 格的名字 → 那时发生的频率、那一档的份额。
    """
    looks = model_looks(observed, baselines)

    def draw(axes: Axes, panel: str) -> None:
        axes.plot([0, 1], [0, 1], label="said as often as seen", **EVEN)
        for name, look in looks.items():
            seen, size = _array(observed[name][panel]), np.nan_to_num(_array(share[name][panel]))
            axes.plot(probability[name], seen, label=name, **{**look, "marker": None})
            axes.scatter(probability[name], seen, s=6 + 60 * np.sqrt(size), color=look["color"], zorder=3, linewidths=0)
        _unit_square(axes)

    return _figures(observed, f"Reliability, +{lead_hours} h", "probability said; how often it happened", draw)


def roc_figure(hit: Curves, false: Curves, lead_hours: int, baselines: Collection[str]) -> list[Figure]:
    """ROC：命中率对空报率，判据是至少几个成员；对角线是没有分辨力。"""
    looks = model_looks(hit, baselines)

    def draw(axes: Axes, panel: str) -> None:
        axes.plot([0, 1], [0, 1], label="no discrimination", **EVEN)
        for name, look in looks.items():
            axes.plot(_array(false[name][panel]), _array(hit[name][panel]), label=name, **{**look, "marker": "o"})
        _unit_square(axes)

    return _figures(hit, f"ROC, +{lead_hours} h", "false alarm rate; hit rate", draw)


def value_figure(ratios: Sequence[float], value: Curves, lead_hours: int, baselines: Collection[str]) -> list[Figure]:
    """相对经济价值对花费损失比；低于 −0.2 的不画：那里不如只看气候。"""
    looks = model_looks(value, baselines)

    def draw(axes: Axes, panel: str) -> None:
        axes.axhline(0, **EVEN)
        for name, look in looks.items():
            axes.plot(ratios, _array(value[name][panel]), label=name, **{**look, "marker": None})
        axes.set(xlim=(0, 1), ylim=(-0.2, 1))

    return _figures(value, f"Relative economic value, +{lead_hours} h", "cost / loss", draw)


def neighbourhood_figure(
    sizes: Sequence[int], skill: Curves, lead_hours: int, baselines: Collection[str]
) -> list[Figure]:
    """分数技巧评分对窗的边长。"""
    looks = model_looks(skill, baselines)

    def draw(axes: Axes, panel: str) -> None:
        for name, look in looks.items():
            axes.plot(sizes, _array(skill[name][panel]), label=name, **{**look, "marker": "o", "markersize": 3.5})
        axes.set(ylim=(0, 1), xticks=sizes)

    return _figures(skill, f"Fractions skill score, +{lead_hours} h", "neighbourhood, cells", draw)


def drift_figure(
    lead_hours: Sequence[int],
    what: str,
    units: Mapping[str, str],
    lines: Mapping[str, Values],
    baselines: Collection[str],
) -> list[Figure]:
    """一样东西（全球平均、方差……）随时效；lines 里的 truth 是黑线。units: 格 → 单位，次序就是各格的次序。"""
    models = [name for name in lines if name != "truth"]
    looks = {"truth": {"color": INK, "linewidth": 1.8}, **model_looks(models, baselines)}

    def draw(axes: Axes, panel: str) -> None:
        for name, look in looks.items():
            axes.plot(lead_hours, _array(lines[name][panel]), label=name, **{**look, "marker": None})
        axes.set_xlim(0, 1.03 * max(lead_hours))
        axes.ticklabel_format(axis="y", useOffset=False)

    corners = {panel: pretty_unit("" if unit == "1" else unit) for panel, unit in units.items()}
    return panels(corners, f"{what} by lead time", "lead time, h", draw)


def _figures(curves: Curves, title: str, label: str, draw: Callable[[Axes, str], None]) -> list[Figure]:
    names = next(iter(curves.values()))
    return panels(dict.fromkeys(names, ""), title, label, draw, SQUARE)


def _array(values: Sequence[float | None]) -> np.ndarray:
    return np.array(values, np.float64)


def _unit_square(axes: Axes) -> None:
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
