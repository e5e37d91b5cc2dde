"""海岸线：认得的地方真有岸，切断与抽稀与写开的算法核对。"""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from util.plot.coast import _clip, _thin, coastlines

PLACES = {  # 经度、纬度
    "Cape Agulhas": (20.0, -34.8),
    "Brest": (-4.5, 48.4),
    "Cape Soya, Hokkaido": (141.9, 45.5),
    "Cape Horn": (-67.3, -56.0),
    "Point Barrow": (-156.5, 71.4),
    "Perth": (115.8, -32.0),
    "Chicago": (-87.6, 41.9),
    "Uelen, beyond the date line": (-169.8, 66.2),
    "East Cape, New Zealand": (178.5, -37.7),
    "McMurdo": (166.7, -77.9),
}
FAR_FROM_THE_COAST = [(-140.0, 35.0), (-35.0, 30.0), (95.0, 60.0), (25.0, 10.0), (80.0, -35.0), (0.0, -80.0)]
BOXES = {
    "globe": (0.0, 360.0, -90.0, 90.0),
    "globe from the date line": (-180.0, 180.0, -90.0, 90.0),
    "globe with half a cell": (-2.8125, 357.1875, -90.0, 90.0),
    "North America": (200.0, 330.0, 15.0, 75.0),
    "across Greenwich": (-20.0, 40.0, 30.0, 70.0),
    "across the date line": (140.0, 220.0, -50.0, 70.0),
    "eastwards of 360": (350.0, 410.0, 30.0, 70.0),
}


def nearest(lines: list[np.ndarray], place: tuple[float, float]) -> float:
    """place 到最近的岸线的距离，度；线段切细了逐点量。"""
    fine = np.vstack([_fine(line) for line in lines])
    east = (fine[:, 0] - place[0] + 180) % 360 - 180
    return float(np.hypot(east * np.cos(np.radians(place[1])), fine[:, 1] - place[1]).min())


def _fine(line: np.ndarray) -> np.ndarray:
    parts = np.linspace(0, 1, 50)[:, None, None]
    return (line[:-1] + parts * np.diff(line, axis=0)).reshape(-1, 2)


def length(lines: list[np.ndarray]) -> float:
    return float(sum(np.hypot(*np.diff(line, axis=0).T).sum() for line in lines))


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES.keys())
def test_every_point_is_in_the_box(box):
    west, east, south, north = box
    lines = coastlines(*box)
    assert len(lines) > 10
    for line in lines:
        assert line.ndim == 2
        assert line.shape[0] > 1 and line.shape[1] == 2
        assert (line >= [west - 1e-9, south - 1e-9]).all() and (line <= [east + 1e-9, north + 1e-9]).all()
        steps = np.diff(line, axis=0) * np.stack([np.cos(np.radians(line[:-1, 1])), np.ones(len(line) - 1)], axis=1)
        assert np.hypot(*steps.T).max() < 9  # 最长的是抽稀了的平直海岸；横穿地图的线会有几十到三百多度


@pytest.mark.parametrize(("place"), PLACES.values(), ids=PLACES.keys())
def test_known_places_lie_on_the_coast(place):
    assert nearest(coastlines(0, 360, -90, 90), place) < 0.7


@pytest.mark.parametrize("place", FAR_FROM_THE_COAST)
def test_nothing_is_drawn_in_the_open(place):
    assert nearest(coastlines(-180, 180, -90, 90), place) > 5


def test_both_conventions_show_the_same_coast():
    east, west = coastlines(0, 360, -90, 90), coastlines(-180, 180, -90, 90)
    assert length(east) == pytest.approx(length(west), rel=1e-9)
    whole = {(round(x % 360, 6), round(y, 6)) for line in west for x, y in line}
    shifted = {(round(x % 360, 6), round(y, 6)) for line in east for x, y in line}
    apart = whole ^ shifted  # 只有切断的地方不同
    assert len(apart) < 0.02 * len(whole)
    assert all(x in (0, 180) for x, _ in apart)


@pytest.mark.parametrize("west", [-300.0, -33.3, 100.0])
def test_where_the_globe_is_cut_does_not_matter(west):
    assert length(coastlines(west, west + 360, -90, 90)) == pytest.approx(length(coastlines(0, 360, -90, 90)), rel=1e-9)


def test_the_whole_globe_is_small_and_a_region_is_finer():
    globe = coastlines(0, 360, -90, 90)
    text = json.dumps([np.round(line, 2).tolist() for line in globe], separators=(",", ":"))
    assert len(text) < 60_000
    europe = coastlines(-10, 30, 35, 60)
    inside = [piece for line in globe for piece in _clip(line, np.array([0.0, 35]), np.array([30.0, 60]))]
    assert sum(map(len, europe)) > 3 * sum(map(len, inside))


def test_clip_against_small_steps():
    rng = np.random.default_rng(0)
    line = rng.normal(0, 1, (60, 2))
    line[10:13] = [[-1, 0], [-1, 0.5], [0.5, 0.5]]  # 沿着框边走
    low, high = np.array([-1.0, -0.5]), np.array([0.7, 0.8])
    pieces = _clip(line, low, high)
    expected = 0.0
    for a, b in pairwise(line):
        middles = a + (np.arange(4000)[:, None] + 0.5) / 4000 * (b - a)
        expected += np.hypot(*(b - a)) * ((middles >= low) & (middles <= high)).all(axis=1).mean()
    assert length(pieces) == pytest.approx(expected, rel=1e-3)
    ends = np.vstack([piece[[0, -1]] for piece in pieces])[1:-1]
    on_wall = (np.isclose(ends, low) | np.isclose(ends, high)).any(axis=1)
    assert on_wall.all()  # 除了折线自己的首尾，断开的地方都在框边上
    assert _clip(line + 100, low, high) == []


def test_thinned_lines_stay_within_the_tolerance():
    angle = np.linspace(0, 2 * np.pi, 400)
    radius = 5 + 0.3 * np.sin(9 * angle) + 0.02 * np.random.default_rng(0).normal(size=400)
    ring = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    ring[-1] = ring[0]
    thin = _thin(ring, 0.1)
    assert 10 < len(thin) < 100
    np.testing.assert_array_equal(thin[[0, -1]], ring[[0, -1]])
    fine = _fine(thin)
    assert max(np.hypot(*(fine - point).T).min() for point in ring) < 0.1 + 0.02
