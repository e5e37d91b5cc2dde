"""各种图共用的样子：颜色、色标、单位的写法、存成 PNG 与 PDF。"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {  # 色盲可辨
    "temperature": "plasma",
    "wind": "PuOr_r",
    "rain": "Blues",
    "humidity": "YlGnBu",
    "height": "viridis",
    "other": "cividis",
    "difference": "RdBu_r",
}
SYMMETRIC = ("wind", "difference")  # 有正负号的量，色标关于 0 对称
SCALE_POINTS = 33
INK, QUIET = "#222222", "#666666"
MODEL_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe & Ito，次序即模型的次序
TITLE_SIZE, TITLE_LINE = 13, 0.24


def color_limits(values: np.ndarray, kind: str) -> tuple[float, float]:
    """色标的下限与上限，报告里的地图也用：取 0.5–99.5 百分位（个别极值由色标两端的尖角表示），不计 NaN。

    Args:
        values: 任意形状，画在同一个色标上的全部值。
        kind: COLORS 的键；风和差值关于 0 对称，降水从 0 起。
    """
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return (-1.0, 1.0) if kind in SYMMETRIC else (0.0, 1.0)
    if kind in SYMMETRIC:
        high = float(np.percentile(np.abs(finite), 99.5)) or float(np.abs(finite).max()) or 1.0
        return -high, high
    low, high = (float(v) for v in np.percentile(finite, [0.5, 99.5]))
    if kind == "rain":
        low, high = 0.0, high if high > 0 else float(finite.max())
    return (low, high) if high > low else (low, low + 1)


def plotly_scale(kind: str) -> list[list[float | str]]:
    """kind（COLORS 的键）的配色写成 plotly 的色标：[[0, "rgb(r,g,b)"], …, [1, "rgb(r,g,b)"]]。"""
    from matplotlib import colormaps

    places = np.linspace(0, 1, SCALE_POINTS)
    rgb = colormaps[COLORS[kind]](places, bytes=True)[:, :3].tolist()
    return [[place, f"rgb({r},{g},{b})"] for place, (r, g, b) in zip(places.tolist(), rgb, strict=True)]


def power_of_ten(largest: float) -> int:
    """太小或太大的数（以米计的降水、以帕计的气压）提出 10 的幂，刻度上才是短数字。"""
    if largest == 0 or not math.isfinite(largest) or 0.01 <= largest < 1e5:
        return 0
    return 3 * math.floor(math.log10(largest) / 3)


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def pretty_unit(unit: str, exponent: int = 0) -> str:
    """`m2 s-2` → `m² s⁻²`；数值除以了 10 的 exponent 次方时，单位前写上这个幂。"""
    unit = re.sub(r"(?<=[A-Za-z])-?\d+", lambda found: _superscript(int(found[0])), unit)
    return f"10{_superscript(exponent)} {unit}" if exponent else unit


def remove_figures(folder: Path, names: Iterable[str]) -> None:
    """去掉 save_figures 从前以这些名字写下的：与这一次的结果不是一回事。别的文件不动。"""
    for name in names:
        for path in [*folder.glob(f"{name}.p[nd][gf]"), *folder.glob(f"{name}-[0-9]*.p[nd][gf]")]:
            path.unlink(missing_ok=True)


def save_figures(figures: Sequence[Figure], path_stem: Path) -> list[Path]:
    """写成 `stem.png`，多张时 `stem-1.png`、`stem-2.png`……，旁边各有一份 PDF；返回 PNG 的路径，并释放图的内存。"""
    path_stem.parent.mkdir(parents=True, exist_ok=True)
    names = [path_stem.name] if len(figures) == 1 else [f"{path_stem.name}-{i}" for i in range(1, len(figures) + 1)]
    paths = [path_stem.parent / f"{name}.png" for name in names]
    for figure, path in zip(figures, paths, strict=True):
        figure.savefig(path)
        figure.set_layout_engine("none")  # 已经排好了
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})  # 同样的图，同样的字节
        figure.clear()
    return paths
