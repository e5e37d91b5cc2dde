"""一页地图的底稿：全部东西画在一个轴里，它的坐标是页上的英寸，原点在左下角。

matplotlib 的每个轴、每条刻度、每段海岸线都是要单独安排的对象，一页二十几格就是几千个、好几秒。这里同样的线合成一组；
海岸线是一条路径，各格盖一次，PDF 里也只写一次；色标是一条图像。
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from util.plot.coast import coastlines
from util.plot.style import QUIET

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Extent = tuple[float, float, float, float]  # 西、东、南、北
Point = tuple[float, float]
TICK, PAD = 2.5 / 72, 2 / 72  # 刻度的长，字离刻度的远近
TIP = 0.04  # 色标两端的尖角占全长的几成
LABELS = 7.5  # 刻度上的字号


class Box(NamedTuple):
    """页上的一块，英寸：左下角与大小。"""

    x: float
    y: float
    width: float
    height: float

    @property
    def corners(self) -> list[Point]:
        right, top = self.x + self.width, self.y + self.height
        return [(self.x, self.y), (right, self.y), (right, top), (self.x, top), (self.x, self.y)]


class Pen(NamedTuple):
    """一种线；order 大的盖在上面。"""

    color: str
    width: float
    alpha: float = 1.0
    order: float = 2.0


EDGE = Pen(QUIET, 0.6, order=4)
GRATICULE = Pen("white", 0.5, 0.35)
COAST = (Pen("white", 1.1, 0.35, 3), Pen("#333333", 0.5, 0.8, 3))  # 深灰的线垫一道白边，在深色的底上也看得见


class Sheet:
    """一页同一个区域的图；画完了 page() 给出它。

    width、height: 英寸；extent: 图像的四边，可以半格越过极点，越过的不画。
    """

    def __init__(self, width: float, height: float, extent: Extent) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
        self.figure.suppressComposite = True  # 图像各按各的大小存，不先拼成整页一张
        self.canvas = self.figure.add_axes((0, 0, 1, 1))
        self.canvas.axis("off")
        self.width, self.height, self.extent = width, height, extent
        west, east, south, north = extent
        self.view = west, east, max(south, -90.0), min(north, 90.0)
        self.lines: dict[Pen, list[Sequence[Point]]] = {}
        self.boxes: list[Box] = []

    def text(self, x: float, y: float, words: str, size: float, color: str = QUIET, **look: Any) -> None:
        self.canvas.text(x, y, words, size=size, color=color, **look)

    def line(self, pen: Pen, points: Sequence[Point]) -> None:
        self.lines.setdefault(pen, []).append(points)

    def place(self, box: Box, longitude: Any, latitude: Any) -> tuple[Any, Any]:
        """一格里的一点在页上哪里；也可以是数组。"""
        west, east, south, north = self.view
        x = box.x + box.width * (longitude - west) / (east - west)
        return x, box.y + box.height * (latitude - south) / (north - south)

    def map(self, box: Box, field: np.ndarray, colors: str, limits: tuple[float, float], unit: str) -> AxesImage:
        """field (H, W)，北在上；limits: 色标的两端；unit: 图像的名字，色标照抄。"""
        from matplotlib.transforms import Bbox, TransformedBbox

        west, east, south, north = self.extent
        (left, bottom), (right, top) = self.place(box, west, south), self.place(box, east, north)
        image = self._image(field.astype(np.float64), (left, right, bottom, top), colors, limits)
        image.set_clip_box(TransformedBbox(Bbox.from_bounds(*box), self.canvas.transData))
        image.set_label(unit)
        self.frame(box)
        return image

    def frame(self, box: Box) -> None:
        """一格的边；海岸线盖在里面。"""
        self.line(EDGE, box.corners)
        self.boxes.append(box)

    def contour(
        self, box: Box, places: tuple[np.ndarray, np.ndarray], field: np.ndarray, level: float, pen: Pen
    ) -> None:
        """field (H, W) 的一条等值线；places: 各列的经度、各行的纬度。没有到这个值的不画。"""
        known = np.ma.masked_invalid(field)
        if not known.min() < level < known.max():  # 全是 NaN 的也不成立
            return
        x, _ = self.place(box, places[0], places[1][0])
        _, y = self.place(box, places[0][0], places[1])
        look = {"colors": [pen.color], "linewidths": [pen.width], "alpha": pen.alpha, "zorder": pen.order}
        self.canvas.contour(x, y, known, levels=[level], linestyles="solid", **look)

    def _image(
        self, values: np.ndarray, sides: Extent, colors: str | Colormap, limits: tuple[float, float]
    ) -> AxesImage:
        low, high = limits
        return self.canvas.imshow(values, cmap=colors, vmin=low, vmax=high, extent=sides, aspect="auto")

    def graticule(self, box: Box, names: tuple[bool, bool]) -> None:
        """整度数的经纬线与刻度；names: 写不写经度、纬度。"""
        west, east, south, north = self.view
        for longitude in degrees(west, east, max(int(box.width / 0.5), 2)):
            x, y = self.place(box, longitude, south)
            self.line(GRATICULE, [(x, y), self.place(box, longitude, north)])
            self.line(EDGE, [(x, y), (x, y - TICK)])
            if names[0]:
                self.text(x, y - TICK - PAD, longitude_label(longitude), LABELS, ha="center", va="top")
        for latitude in degrees(south, north, max(int(box.height / 0.25), 2)):
            x, y = self.place(box, west, latitude)
            self.line(GRATICULE, [(x, y), self.place(box, east, latitude)])
            self.line(EDGE, [(x, y), (x - TICK, y)])
            if names[1]:
                self.text(x - TICK - PAD, y, latitude_label(latitude), LABELS, ha="right", va="center_baseline")

    def bar(self, box: Box, image: AxesImage) -> None:
        """竖着的色标：有超出两端的值时那一端是尖角。"""
        low, high = image.get_clim()
        values = np.ma.masked_invalid(np.asarray(image.get_array()))
        tip, middle = TIP * box.height, box.x + box.width / 2
        below, above = tip * bool((values < low).any()), tip * bool((values > high).any())
        body = Box(box.x, box.y + below, box.width, box.height - below - above)
        (left, bottom), (right, _), (_, top), *_ = body.corners
        self._image(np.linspace(high, low, 256)[:, None], (left, right, bottom, top), image.get_cmap(), (low, high))
        ends = [
            ((left, bottom), (middle, box.y), (right, bottom)),
            ((right, top), (middle, box.y + box.height), (left, top)),
        ]
        for corners, color in zip(ends, image.get_cmap()((0.0, 1.0)), strict=True):
            self.canvas.fill(*zip(*corners, strict=True), facecolor=color, linewidth=0)
        self.line(EDGE, [*ends[0], *ends[1], (left, bottom)])
        ticks = round_values(low, high, max(int(box.height / 0.25), 3))
        for value, label in zip(ticks, labels_of(ticks), strict=True):
            y = bottom + (top - bottom) * (value - low) / (high - low)
            self.line(EDGE, [(right, y), (right + TICK, y)])
            self.text(right + TICK + PAD, y, label, LABELS, va="center_baseline")

    def page(self, coast_pens: Sequence[Pen] = COAST) -> Figure:
        """成组的线一并画上，各格盖上海岸线。"""
        from matplotlib.collections import LineCollection

        for pen, lines in self.lines.items():
            group = LineCollection(lines, colors=pen.color, linewidths=pen.width, alpha=pen.alpha, zorder=pen.order)
            self.canvas.add_collection(group, autolim=False)
        coast = coastlines(*self.view)
        if coast and self.boxes:
            self._stamp(coast, coast_pens)
        self.canvas.set(xlim=(0, self.width), ylim=(0, self.height))  # imshow 会按图像改动它
        return self.figure

    def _stamp(self, lines: Sequence[np.ndarray], pens: Sequence[Pen]) -> None:
        """同样的折线（经度、纬度）盖在每一格上。"""
        from matplotlib.collections import PathCollection
        from matplotlib.path import Path

        west, east, south, north = self.view
        scale = np.array([self.boxes[0].width / (east - west), self.boxes[0].height / (north - south)])
        path = Path.make_compound_path(*(Path((line - [west, south]) * scale) for line in lines))
        places = [(box.x, box.y) for box in self.boxes]
        for pen in pens:
            stamp = PathCollection(
                [path], offsets=places, offset_transform=self.canvas.transData, facecolors="none",
                edgecolors=pen.color, linewidths=pen.width, alpha=pen.alpha, zorder=pen.order,
            )  # fmt: skip
            stamp.set_transform(self.figure.dpi_scale_trans)
            self.canvas.add_collection(stamp, autolim=False)


def degrees(low: float, high: float, most: int) -> list[float]:
    """整度数的刻度，不超过 most 个。"""
    steps = (1, 2, 5, 10, 15, 20, 30, 45, 60, 90, 180)
    step = next((s for s in steps if (high - low) / s < most), 180)
    return [float(v) for v in range(math.ceil(low / step) * step, math.floor(high) + 1, step)]


def longitude_label(value: float) -> str:
    east = (value + 180) % 360 - 180  # [-180, 180)
    if east in (0, -180):
        return f"{abs(east):g}°"
    return f"{abs(east):g}°{'E' if east > 0 else 'W'}"


def latitude_label(value: float) -> str:
    return "0°" if value == 0 else f"{abs(value):g}°{'N' if value > 0 else 'S'}"


def round_values(low: float, high: float, most: int) -> list[float]:
    """[low, high] 里的整数值，间隔是 1、2、2.5、5 乘 10 的幂，不超过 most 段。"""
    from matplotlib.ticker import MaxNLocator

    values = MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [v for v in np.asarray(values).tolist() if low - 1e-9 * (high - low) <= v <= high + 1e-9 * (high - low)]


def labels_of(values: Sequence[float]) -> list[str]:
    """一样多的小数位，够写清每一个；负号是真正的负号。"""
    step = min(np.diff(values), default=1.0)
    digits = next(d for d in range(300) if all(abs(v - round(v, d)) < 1e-6 * step for v in values))
    return [f"{v:.{digits}f}".replace("-", "−") for v in values]
