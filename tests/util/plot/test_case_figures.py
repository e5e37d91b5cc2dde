"""个例的图：画着的数就是给的数；等值线在那个值上；真值没有的、爆掉的也画得出；真渲染。"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.models.small import small_spec
from util.batch import DataSpec
from util.plot.cases import Line, compared_figure, members_figure, plume_figure, spaghetti_figure
from util.plot.sheet import Box, Pen, Sheet
from util.plot.style import save_figures

HOURS = np.arange(np.datetime64("1981-07-01T00"), np.datetime64("1981-07-03T00"), np.timedelta64(6, "h"))


@pytest.fixture
def spec() -> DataSpec:
    """跨过 0° 的一块，由南向北，六行九列。"""
    part = replace(
        small_spec(channels=2, grid=(6, 9)), latitudes=tuple(20.0 + 5 * i for i in range(6)),
        longitudes=tuple(-20.0 + 5 * i for i in range(9)),
    )  # fmt: skip
    return replace(part, channels=("t2m", "tp"), units=("K", "m"))


@pytest.fixture
def fields() -> np.ndarray:
    """(12, 6, 9)，K。"""
    return 280 + np.random.default_rng(0).normal(0, 5, (12, 6, 9))


def images(figure: Figure) -> list[np.ndarray]:
    """一格一张，末了每条色标一张。"""
    return [np.asarray(image.get_array()) for image in figure.axes[0].get_images()]


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_maps_show_truth_forecasts_and_errors(spec: DataSpec, fields: np.ndarray) -> None:
    truth, forecasts = fields[0], {"+6 h": fields[1], "+24 h": fields[2]}
    figure = compared_figure(spec, 0, truth, forecasts, "a title")
    shown = [image for image in images(figure) if image.shape == (6, 9)]
    for image, field in zip(shown, (truth, *fields[1:3], *(fields[1:3] - truth)), strict=True):
        np.testing.assert_allclose(image, field[::-1])  # 北在上
    edges = np.sin(np.deg2rad(np.arange(17.5, 50, 5)))
    weights = np.diff(edges)[:, None] / 9 / np.diff(edges).sum()
    for field in fields[1:3]:
        rmse = np.sqrt(((field - truth) ** 2 * weights).sum())
        assert f"error, RMSE {rmse:.3g} K" in words(figure)
    assert words(figure).count("K") == 2  # 每行的色标有单位


def test_small_numbers_are_scaled(spec: DataSpec, fields: np.ndarray) -> None:
    """以米计的降水：色标与图都提出 10 的幂。"""
    rain = (fields - 250) * 1e-6
    figure = compared_figure(spec, 1, rain[0], {"+6 h": rain[1]}, "rain")
    shown = [image for image in images(figure) if image.shape == (6, 9)]
    np.testing.assert_allclose(shown[0], rain[0][::-1] * 1e6)
    assert "10⁻⁶ m" in words(figure)


def test_members_share_one_scale(spec: DataSpec, fields: np.ndarray) -> None:
    leads = {f"+{h} h": {"mean": fields[h], "member 0": fields[h + 1]} for h in (1, 3)}
    figure = members_figure(spec, 0, fields[0], leads, "members")
    panels = [image for image in figure.axes[0].get_images() if np.asarray(image.get_array()).shape == (6, 9)]
    assert len(panels) == 6 and len({image.get_clim() for image in panels}) == 1
    assert {"+1 h: mean", "+3 h: mean", "member 0"} <= set(words(figure))


def test_a_contour_lies_where_the_field_has_the_value() -> None:
    """场就是纬度：33° 的等值线是纬度 33° 的那条横线；到不了的、全是 NaN 的没有线。"""
    sheet, box = Sheet(4.0, 3.0, (-22.5, 22.5, 17.5, 47.5)), Box(0.5, 0.5, 3.0, 2.0)
    longitudes, latitudes = np.arange(-20.0, 21, 5), np.arange(45.0, 19, -5)
    field = np.repeat(latitudes[:, None], 9, axis=1)
    places = longitudes, latitudes
    for some, level in ((field, 33.0), (field, 60.0), (np.full_like(field, np.nan), 33.0)):
        sheet.contour(box, places, some, level, Pen("black", 1.0))
    (lines,) = sheet.canvas.collections
    path: Any = lines.get_paths()[0]
    np.testing.assert_allclose(path.vertices[:, 1], 0.5 + 2.0 * (33 - 17.5) / 30)
    np.testing.assert_allclose(
        sorted(path.vertices[:, 0])[:: len(path.vertices) - 1], 0.5 + 3 * np.array([2.5, 42.5]) / 45
    )


def test_the_legend_of_one_panel_stays_on_the_page_and_off_the_title(spec: DataSpec, fields: np.ndarray) -> None:
    known = {"truth": fields[0], "climatology": fields[3]}
    title = "a long name of a case: t2m = 280 K, 1981-07-03 12 UTC and more words"
    figure = spaghetti_figure(spec, 280.0, known, {"+6 h": [fields[1], fields[2]]}, title)
    figure.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in figure.axes[0].texts}
    heading = next(box for words, box in boxes.items() if words.startswith("a long name"))
    for name in (*known, "ensemble mean", "members"):
        assert boxes[name].x1 < figure.bbox.x1 and boxes[name].y1 < heading.y0


@pytest.mark.parametrize("joined", [True, False])
def test_plumes_hold_every_member(spec: DataSpec, joined: bool) -> None:
    rng = np.random.default_rng(1)
    bundles = {f"from 07-0{i} 00": Line(HOURS[i : i + 4], rng.normal(280, 3, (5, 4))) for i in (1, 3)}
    known = {name: Line(HOURS, rng.normal(280, 3, (1, 8))) for name in ("truth", "climatology")}
    axes = plume_figure(spec, 0, known, bundles, "plume", joined=joined).axes[0]
    drawn = [np.asarray(line.get_ydata(), float) for line in axes.lines]
    wanted = [row for line in bundles.values() for row in (*line.members, line.members.mean(0))]
    wanted += [line.members[0] for line in known.values()]
    for one, other in zip(drawn, wanted, strict=True):
        np.testing.assert_allclose(one, other)
    assert axes.get_ylabel() == "K" and axes.get_xlabel() == "valid time, UTC"
    assert axes.get_legend_handles_labels()[1] == [*bundles, *known]


def test_missing_truth_and_lost_members_are_drawn(spec: DataSpec, fields: np.ndarray, tmp_path: Path) -> None:
    """插值得来的真值、爆掉的成员是空的：照样渲染成 PNG 与 PDF。"""
    nothing = np.full((6, 9), np.nan)
    known = {"truth": nothing, "climatology": fields[3]}
    leads = {"+6 h": [fields[1], fields[2], nothing], "+24 h": [nothing, fields[2], fields[4]]}
    times = Line(HOURS[:3], np.array([[280.0, np.nan, 281], [np.inf, 280, 279]]))
    pages = [
        compared_figure(spec, 0, nothing, {"+6 h": fields[1], "+24 h": nothing}, "maps"),
        spaghetti_figure(spec, 280.0, known, leads, "spaghetti"),
        members_figure(spec, 0, nothing, {"+6 h": {"mean": fields[1], "member 0": nothing}}, "members"),
        plume_figure(spec, 0, {"truth": Line(HOURS[:3], np.full((1, 3), np.nan))}, {"from": times}, "p", joined=True),
    ]
    assert "no truth" in words(pages[0])
    assert {"truth", "climatology", "ensemble mean", "members"} <= set(words(pages[1]))
    for number, page in enumerate(pages):
        (path,) = save_figures([page], tmp_path / f"page-{number}")
        assert path.stat().st_size > 5000 and path.with_suffix(".pdf").is_file()
