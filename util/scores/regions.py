"""分区评分的区域：YAML 里的框、纬度带、多边形、海陆 → 网格上的 0 与 1，以格心在不在里面为准。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, field_validator

from util.data.tree_files import read_field
from util.scores.table import WHOLE
from util.strict import Strict, brief, read_mapping, validate

if TYPE_CHECKING:
    from util.batch import DataSpec

NEAR = 1e-6  # 度：恰在边上的格心算在内，坐标的舍入不算数
LAND = 0.5  # 陆地占格子的一半以上是陆，其余是海
Array = np.ndarray


def _two(value: object) -> object:
    """YAML 里只有列表，整数也是度数。"""
    if not isinstance(value, list) or len(value) != 2 or not all(type(v) in (int, float) for v in value):
        raise ValueError("write two numbers, in degrees")
    return tuple(map(float, value))


Degrees = Annotated[tuple[float, float], BeforeValidator(_two)]


class Box(Strict):
    """经纬度的框；latitude: 南、北两界；longitude: 西、东两界，由西向东走，可以跨过 0° 与 180°；两界都算在内。"""

    latitude: Degrees | None = None
    longitude: Degrees | None = None

    @field_validator("latitude")
    @classmethod
    def _north_of_south(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not -90 <= value[0] < value[1] <= 90:
            raise ValueError("write [south, north] in degrees, -90 <= south < north <= 90")
        return value

    @field_validator("longitude")
    @classmethod
    def _from_west_to_east(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not (all(-180 <= v <= 360 for v in value) and value[0] != value[1]):
            raise ValueError("write [west, east] in degrees, -180 to 360, from west to east: [350, 20] crosses 0")
        return value

    def rows(self, latitudes: Array) -> Array:
        """(H,) → (H,) bool。"""
        south, north = self.latitude or (-90.0, 90.0)
        return (latitudes >= south - NEAR) & (latitudes <= north + NEAR)

    def columns(self, longitudes: Array) -> Array:
        """(W,) → (W,) bool。"""
        if self.longitude is None:
            return np.ones(len(longitudes), dtype=bool)
        west, east = self.longitude
        width = (east - west) % 360 or 360.0
        return (longitudes - west + NEAR) % 360 <= width + 2 * NEAR


class Area(Box):
    """一块地方：写了的条件都满足的格点。

    polygon: 各顶点的 [纬度, 经度]，相邻两点取经度近的一边连直线。surface: 要有 land_sea。
    """

    polygon: list[Degrees] | None = None
    surface: Literal["land", "sea"] | None = None

    @field_validator("polygon")
    @classmethod
    def _closes(cls, value: list[tuple[float, float]] | None) -> list[tuple[float, float]] | None:
        if value is None:
            return None
        if len(set(value)) < 3:
            raise ValueError(f"a polygon has 3 corners or more, [latitude, longitude] each; found {len(set(value))}")
        if not all(-90 <= lat <= 90 and -180 <= lon <= 360 for lat, lon in value):
            raise ValueError("a corner is [latitude, longitude], -90 to 90 and -180 to 360")
        if abs(_unwrapped([*value, value[0]])[-1] - value[0][1]) > 1:
            raise ValueError("this polygon goes round a pole; use latitude for that")
        return value

    def holds(self, latitudes: Array, longitudes: Array, land: Array | None) -> Array:
        """(H,)、(W,)、(H, W) 陆地为真 → (H, W) bool。"""
        inside = self.rows(latitudes)[:, None] & self.columns(longitudes)
        if self.polygon is not None:
            inside &= in_polygon(self.polygon, latitudes, longitudes)
        if self.surface is not None:
            assert land is not None
            inside &= land if self.surface == "land" else ~land
        return inside


class RegionsFile(Strict):
    """config/regions.yaml。

    land_sea: 陆地的份额，`.npy` (H, W)，与数据同样的网格（如导入的 static/lsm.npy）。
    regions: 名字 → 一块或几块，几块取并集。
    """

    land_sea: str | None = None
    regions: dict[str, dict[str, Any] | list[dict[str, Any]]] = Field(min_length=1)


def check_regions(path: Path) -> tuple[RegionsFile, dict[str, list[Area]]]:
    """文件，与名字 → 几块地方；不看数据就查得出的都查过了。

    Raises:
        ValueError: 没有文件；键、值不对。一行。
    """
    content: RegionsFile = validate(RegionsFile, read_mapping(path), str(path))
    land = content.land_sea is not None
    return content, {name: _areas(_where(path, name), name, given, land) for name, given in content.regions.items()}


def read_regions(path: Path, spec: DataSpec) -> dict[str, Array]:
    """名字 → (H, W) bool，次序照文件。

    Raises:
        ValueError: 键、值不对；没有海陆的文件或尺寸不对；区域在网格之外，或里面没有格点。一行。
    """
    content, regions = check_regions(path)
    land = None
    if content.land_sea is not None:
        land = read_field(Path(content.land_sea), (spec.height, spec.width)) > LAND
    latitudes, longitudes = np.array(spec.latitudes), np.array(spec.longitudes)
    masks = {}
    for name, areas in regions.items():
        masks[name] = np.any([area.holds(latitudes, longitudes, land) for area in areas], axis=0)
        if not masks[name].any():
            raise ValueError(
                f"{_where(path, name)} = {brief(content.regions[name])}: no grid point lies inside; the grid has "
                f"latitudes {_span(latitudes)}, longitudes {_span(longitudes)}"
            )
    return masks


def _where(path: Path, name: str) -> str:
    return f"{path}: regions.{name}"


def _areas(where: str, name: str, given: Mapping[str, Any] | list[Any], land: bool) -> list[Area]:
    """land: 有没有海陆的文件。"""
    if name == WHOLE or not name.strip() or "," in name:
        raise ValueError(f"{where}: another name, please: {WHOLE} is the whole grid, and a name has no comma")
    found = []
    pieces = given if isinstance(given, list) else [given]
    for i, piece in enumerate(pieces):
        place = f"{where}[{i}]" if isinstance(given, list) else where
        head, _, key = place.rpartition(": ")
        area: Area = validate(Area, piece, head, key)
        if area.surface and not land:
            raise ValueError(f"{place}.surface = {area.surface!r} needs land_sea, a .npy file of the land fraction")
        found.append(area)
    return found


def _span(values: Array) -> str:
    return f"{values[0]:g} to {values[-1]:g} ({len(values)})"


def _unwrapped(polygon: Sequence[tuple[float, float]]) -> list[float]:
    """各顶点的经度，相邻两点之差不到半圈。"""
    longitudes = [polygon[0][1]]
    for _, east in polygon[1:]:
        longitudes.append(longitudes[-1] + (east - longitudes[-1] + 180) % 360 - 180)
    return longitudes


def in_polygon(polygon: Sequence[tuple[float, float]], latitudes: Array, longitudes: Array) -> Array:
    """(H, W) bool：格心向东的射线穿过奇数条边。经度先挪到多边形的那一圈上。"""
    east, north = np.array(_unwrapped(polygon)), np.array([lat for lat, _ in polygon])
    x = east.min() + (longitudes - east.min()) % 360
    inside = np.zeros((len(latitudes), len(x)), dtype=bool)
    for i in range(len(polygon)):
        (x0, y0), (x1, y1) = (east[i - 1], north[i - 1]), (east[i], north[i])
        crossed = (y0 > latitudes) != (y1 > latitudes)  # (H,)
        with np.errstate(divide="ignore", invalid="ignore"):
            place = x0 + (latitudes - y0) * (x1 - x0) / (y1 - y0)
        inside ^= crossed[:, None] & (x < place[:, None])
    return inside
