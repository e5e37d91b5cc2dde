"""地图与曲线：方位、色标、RMSE 都与独立的算法核对，地图的方位直接看画出来的像素。"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.collections import PathCollection
from matplotlib.path import Path

from util.batch import DataSpec
from util.grid import output_grid
from util.logger import MetricRow
from util.plot.coast import coastlines
from util.plot.curves import curves_figure, runs_figure
from util.plot.maps import forecast_figure, grid_extent, weighted_rmse
from util.plot.sheet import labels_of, longitude_label
from util.plot.style import COLORS, color_limits, plotly_scale, power_of_ten, pretty_unit, save_figures


def make_spec(latitudes, longitudes, channels=("t2m",), units=("K",), pressures=(None,)) -> DataSpec:
    k = len(channels)
    lat, lon = tuple(map(float, latitudes)), tuple(map(float, longitudes))
    return DataSpec(channels, units, pressures, lat, lon, 3, 1, 6, (0.0,) * k, (1.0,) * k, False)


def maps(figure):
    """各格的图像，标签是单位；色标的图像没有标签。坐标是页上的英寸。"""
    return [image for image in figure.axes[0].images if not image.get_label().startswith("_")]


def sides(spec):
    """一格画的是哪里：西、东、南、北，格点外推半格，不出两极。"""
    (west, east, south, north), _ = grid_extent(output_grid(spec))
    return west, east, max(south, -90), min(north, 90)


GLOBAL_NORTH_FIRST = (84.375 - 11.25 * np.arange(16), 11.25 * np.arange(32))
GRIDS = {
    "global": GLOBAL_NORTH_FIRST,
    "global, south first, -180 to 180": (GLOBAL_NORTH_FIRST[0][::-1], -180 + 11.25 * np.arange(32)),
    "North America": (75 - 2.5 * np.arange(24), 200 + 2.5 * np.arange(48)),
    "Europe across Greenwich": (30 + 2.0 * np.arange(20), 350 + 2.0 * np.arange(20)),
}


@pytest.mark.parametrize(("latitudes", "longitudes"), GRIDS.values(), ids=GRIDS.keys())
def test_a_bright_cell_is_drawn_at_its_latitude_and_longitude(latitudes, longitudes):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    spec = make_spec(latitudes, longitudes)
    row, column = len(latitudes) // 4, len(longitudes) * 2 // 3
    field = np.zeros((1, spec.height, spec.width), np.float32)
    field[0, row, column] = 50.0  # 图上唯一的亮格
    (figure,) = forecast_figure(spec, None, field, "bright cell")
    page = figure.axes[0]
    for group in page.collections:
        group.set_visible(False)  # 海岸线、经纬线可能正压在要看的像素上
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    (image,) = maps(figure)
    west, east, south, north = sides(spec)
    left, right, bottom, top = image.get_extent()
    place = longitudes[column] + 360 * np.arange(-1, 2)
    place = place[(place > west) & (place < east)][0]
    for offset, bright in (((0, 0), True), ((0.75, 0), False), ((0, 0.75), False), ((0, -0.75), False)):
        step = abs(latitudes[1] - latitudes[0]), abs(longitudes[1] - longitudes[0])
        point = (place + offset[1] * step[1], latitudes[row] + offset[0] * step[0])
        across, up = (point[0] - west) / (east - west), (point[1] - south) / (north - south)
        x, y = page.transData.transform((left + across * (right - left), bottom + up * (top - bottom)))
        brightness = pixels[pixels.shape[0] - 1 - round(y), round(x), :3].sum()
        assert (brightness > 400) == bright, offset


def test_nothing_is_drawn_beyond_the_poles():
    """格点在两极的网格，图像越过极点半格：格子到 90° 为止，极点那一行只有一半高。"""
    spec = make_spec([90, 30, -30, -90], np.arange(6) * 60)
    field = np.repeat(np.array([50.0, 0, 0, 50])[:, None], 6, axis=1)[None]
    (figure,) = forecast_figure(spec, None, field, "poles")
    (image,) = maps(figure)
    clip = image.get_clip_box()
    assert clip is not None
    box = clip.transformed(figure.axes[0].transData.inverted())
    _, _, bottom, top = image.get_extent()
    assert (top - bottom) / box.height == pytest.approx(240 / 180)
    assert box.y0 - bottom == pytest.approx(top - box.y1) == pytest.approx(box.height / 6)


def test_rmse_in_the_header_is_the_latitude_weighted_one():
    latitudes, longitudes = GLOBAL_NORTH_FIRST
    spec = make_spec(latitudes, longitudes, ("z_level_03",), ("m2 s-2",), (500.0,))
    rng = np.random.default_rng(0)
    truth, forecast = rng.normal(5e4, 300, (2, 1, 16, 32))
    total = area = 0.0
    for row, latitude in enumerate(latitudes):  # 写开的循环；纬圈带的面积正比于两边正弦之差
        band = math.sin(math.radians(latitude + 5.625)) - math.sin(math.radians(latitude - 5.625))
        for column in range(32):
            total += band * (forecast[0, row, column] - truth[0, row, column]) ** 2
            area += band
    expected = math.sqrt(total / area)
    assert weighted_rmse((forecast - truth)[0], latitudes) == pytest.approx(expected, rel=1e-12)
    (figure,) = forecast_figure(spec, truth, forecast, "header")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert f"RMSE {expected:.3g} m² s⁻²" in texts
    assert "z_level_03 — geopotential, 500 hPa" in texts
    assert {"truth", "forecast", "forecast − truth"} <= set(texts)


def test_missing_values_are_left_out_of_the_rmse():
    difference = np.full((4, 6), 2.0)
    difference[1, :3] = np.nan
    assert weighted_rmse(difference, np.array([60.0, 20, -20, -60])) == pytest.approx(2.0)
    assert math.isnan(weighted_rmse(difference * np.nan, np.array([60.0, 20, -20, -60])))
    spec = make_spec([60, 20, -20, -60], np.arange(6) * 60)
    truth = np.full((1, 4, 6), np.nan)
    (figure,) = forecast_figure(spec, truth, np.ones((1, 4, 6)), "no truth at all")
    assert any("RMSE nan" in text.get_text() for text in figure.axes[0].texts)


def test_color_limits():
    spec = make_spec(*GLOBAL_NORTH_FIRST, ("t2m", "u10", "tp"), ("K", "m s-1", "m"), (None,) * 3)
    rng = np.random.default_rng(1)
    truth = np.stack([rng.normal(280, 10, (16, 32)), rng.normal(5, 3, (16, 32)), rng.gamma(0.3, 1e-3, (16, 32))])
    forecast = truth * 1.1
    (figure,) = forecast_figure(spec, truth, forecast, "limits")
    rows = [maps(figure)[3 * i : 3 * i + 3] for i in range(3)]
    for images in rows:
        assert images[0].get_clim() == images[1].get_clim()
        low, high = images[2].get_clim()
        assert low == -high < 0
    low, high = rows[1][0].get_clim()
    assert low == -high < 0
    assert rows[2][0].get_clim()[0] == 0
    assert rows[2][0].get_label() == "10⁻³ m"  # 毫米量级的米：提出 10 的幂
    np.testing.assert_allclose(np.asarray(rows[2][1].get_array()), forecast[2] * 1e3)


@pytest.mark.parametrize("value", [0.0, 54000.0])
def test_constant_fields_are_drawn(value):
    spec = make_spec(*GLOBAL_NORTH_FIRST, ("tp", "v10"), ("m", "m s-1"), (None, None))
    fields = np.full((2, 16, 32), value)
    (figure,) = forecast_figure(spec, fields, fields, "constant")
    for image in maps(figure):
        low, high = image.get_clim()
        assert high > low


def test_many_channels_make_several_figures(tmp_path):
    channels = tuple(f"q_level_{i:02d}" for i in range(11))
    spec = make_spec([10, 0, -10], [0, 10, 20, 30], channels, ("1",) * 11, (None,) * 11)
    figures = forecast_figure(spec, None, np.random.default_rng(0).random((11, 3, 4)), "a title")
    assert [len(maps(figure)) for figure in figures] == [9, 2]
    assert figures[1].axes[0].texts[0].get_text() == "a title (2 of 2)"
    paths = save_figures(figures, tmp_path / "figures" / "test+006h")
    assert [path.name for path in paths] == ["test+006h-1.png", "test+006h-2.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert all(path.with_suffix(".pdf").read_bytes().startswith(b"%PDF") for path in paths)
    assert not figures[1].axes  # 内存已释放


def test_panels_keep_the_shape_of_the_region():
    for latitudes, longitudes in GRIDS.values():
        spec = make_spec(latitudes, longitudes)
        (figure,) = forecast_figure(spec, None, np.random.default_rng(0).random((1, spec.height, spec.width)), "shape")
        (image,) = maps(figure)
        west, east, south, north = sides(spec)
        left, right, bottom, top = image.get_extent()
        middle = math.radians((max(latitudes) + min(latitudes)) / 2)
        degree_east, degree_north = (right - left) / (east - west), (top - bottom) / (north - south)
        assert degree_east / degree_north == pytest.approx(math.cos(middle), rel=1e-6)


@pytest.mark.parametrize(("latitudes", "longitudes"), GRIDS.values(), ids=GRIDS.keys())
def test_the_coast_is_on_every_map(latitudes, longitudes):
    spec = make_spec(latitudes, longitudes)
    truth, forecast = np.random.default_rng(0).random((2, 1, spec.height, spec.width))
    (figure,) = forecast_figure(spec, truth, forecast, "coast")
    west, east, south, north = sides(spec)
    expected = coastlines(west, east, south, north)
    assert len(expected) > 3
    stamps = [group for group in figure.axes[0].collections if isinstance(group, PathCollection)]
    assert len(stamps) == 2  # 垫底的白边、海岸线
    for stamp in stamps:
        (path,), places = stamp.get_paths(), np.asarray(stamp.get_offsets())
        assert len(places) == len(maps(figure)) == 3
        starts = np.flatnonzero(path.codes == Path.MOVETO)
        drawn = np.split(path.vertices, starts[1:])
        for image, place in zip(maps(figure), places, strict=True):
            left, right, bottom, top = image.get_extent()
            np.testing.assert_allclose(place, (left, bottom))
            scale = np.array([(right - left) / (east - west), (top - bottom) / (north - south)])
            for line, other in zip(drawn, expected, strict=True):
                np.testing.assert_allclose(line / scale + [west, south], other, atol=1e-9)


def test_the_color_bar_says_what_its_colors_mean():
    """刻度在该在的高度上；有超出两端的值时那一端是尖角。"""
    spec = make_spec(*GLOBAL_NORTH_FIRST, ("u10",), ("m s-1",))
    field = np.random.default_rng(0).uniform(-9, 9, (1, 16, 32))
    field[0, 3, 4:6] = -100, 100
    (figure,) = forecast_figure(spec, None, field, "bar")
    page = figure.axes[0]
    (image,) = maps(figure)
    (bar,) = [other for other in page.images if other is not image]
    _, right, bottom, top = bar.get_extent()
    low, high = image.get_clim()
    assert bar.get_clim() == (low, high) and bar.get_cmap() is image.get_cmap()
    np.testing.assert_allclose(np.asarray(bar.get_array())[[0, -1], 0], (high, low))
    labels = [t for t in page.texts if right < t.get_position()[0] < right + 0.1 and t.get_text() != "m s⁻¹"]
    assert [label.get_text() for label in labels] == ["−5", "0", "5"]
    for label in labels:
        value = float(label.get_text().replace("−", "-"))
        assert label.get_position()[1] == pytest.approx(bottom + (top - bottom) * (value - low) / (high - low))
    _, _, floor, ceiling = image.get_extent()
    assert floor < bottom and top < ceiling
    (figure,) = forecast_figure(spec, None, np.sign(field), "bar")
    (image, bar) = figure.axes[0].images
    assert bar.get_extent()[2:] == image.get_extent()[2:]


def test_a_map_without_any_coast(tmp_path):
    spec = make_spec([45, 44, 43], [215, 216, 217, 218])  # 太平洋中央
    (path,) = save_figures(forecast_figure(spec, None, np.zeros((1, 3, 4)), "the ocean"), tmp_path / "ocean")
    assert path.is_file()


def test_pdf_is_the_same_each_time(tmp_path):
    spec = make_spec(*GLOBAL_NORTH_FIRST)
    field = np.random.default_rng(0).random((1, 16, 32))
    first, second = (save_figures(forecast_figure(spec, None, field, "t"), tmp_path / name)[0] for name in "ab")
    content = first.with_suffix(".pdf").read_bytes()
    assert content == second.with_suffix(".pdf").read_bytes()
    assert len(content) < 300_000


def test_plotly_scales_are_the_colors_of_the_maps():
    for kind, name in COLORS.items():
        scale = plotly_scale(kind)
        assert [place for place, _ in scale] == [i / 32 for i in range(33)]
        for place, color in scale:
            found = re.fullmatch(r"rgb\((\d+),(\d+),(\d+)\)", str(color))
            assert found is not None
            rgb = [int(part) for part in found.groups()]
            np.testing.assert_allclose(rgb, 255 * np.array(colormaps[name](place)[:3]), atol=1)


def test_limits_by_kind():
    values = np.random.default_rng(2).normal(3, 1, 10_000)
    values[:100] = np.nan
    sure = np.sort(values[np.isfinite(values)])
    low, high = color_limits(values, "temperature")
    assert [low, high] == pytest.approx([sure[round(0.005 * 9899)], sure[round(0.995 * 9899)]], abs=0.02)
    assert color_limits(values, "difference") == color_limits(values, "wind")
    assert color_limits(values, "rain")[0] == 0
    assert color_limits(values * np.nan, "difference") == (-1, 1)


def test_labels():
    assert [longitude_label(v) for v in (0, 60, 180, -180, 200, 359, -10)] == [
        "0°",
        "60°E",
        "180°",
        "180°",
        "160°W",
        "1°W",
        "10°W",
    ]
    assert [pretty_unit(u) for u in ("K", "m2 s-2", "kg kg-1", "%", "")] == ["K", "m² s⁻²", "kg kg⁻¹", "%", ""]
    assert pretty_unit("kg kg-1", -3) == "10⁻³ kg kg⁻¹"
    assert labels_of([-0.5, 0.0, 0.25]) == ["−0.50", "0.00", "0.25"]
    assert labels_of([-20.0, 0.0]) == ["−20", "0"] and labels_of([0.1 + 0.2]) == ["0.3"]
    assert [power_of_ten(v) for v in (0, 0.5, 0.004, 2e-5, 54000, 101325)] == [0, 0, -3, -6, 0, 3]


def test_curves(tmp_path):
    rows = [MetricRow(i, 0, "train", "loss", 1 + 1 / (i + 1)) for i in range(200)]
    rows += [MetricRow(i, 0, "val", "loss", v) for i, v in ((50, 1.5), (100, 1.25), (150, 1.3), (199, math.nan))]
    rows += [MetricRow(9, 0, "train", "lr", 1e-4), MetricRow(9, 0, "test", "loss", 9.0)]
    figure = curves_figure(rows)
    lines = figure.axes[0].lines
    assert np.asarray(lines[0].get_ydata())[3] == 1.25
    smooth = np.asarray(lines[1].get_ydata())
    width = 200 // 40
    assert smooth[100] == pytest.approx(np.mean([1 + 1 / (i + 1) for i in range(100 - width, 101 + width)]))
    assert smooth[0] == pytest.approx(np.mean([1 + 1 / (i + 1) for i in range(width + 1)]))
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["train", "validation (best 1.25 at step 100)"]
    levels = {"persistence": 2.5, "climatology": 3.5}
    rows += [MetricRow(step, 0, "val", name, value) for step in (50, 100) for name, value in levels.items()]
    axes = curves_figure(rows).axes[0]
    assert axes.get_legend_handles_labels()[1][2:] == ["persistence, validation (2.5)", "climatology, validation (3.5)"]
    assert [set(np.asarray(line.get_ydata()).tolist()) for line in axes.lines[-2:]] == [{2.5}, {3.5}]
    assert axes.get_ylim()[1] > 3.5
    few = [MetricRow(i, 0, "train", "loss", 10.0**-i) for i in range(4)]
    for i, some in enumerate(([], few, rows)):
        assert save_figures([curves_figure(some)], tmp_path / f"v1.{i}") == [tmp_path / f"v1.{i}.png"]
        assert (tmp_path / f"v1.{i}.png").is_file()


def test_curves_of_several_runs_are_ratios_to_their_own_persistence():
    def rows(losses: dict[int, float], persistence: float) -> list[MetricRow]:
        found = [MetricRow(step, 0, "val", "loss", loss) for step, loss in losses.items()]
        return [MetricRow(5, 0, "train", "loss", 7.0), *found, MetricRow(30, 0, "val", "persistence", persistence)]

    runs = {"a": rows({10: 4.0, 20: math.nan, 30: 1.0}, 2.0), "b": rows({10: 0.2, 30: 0.3}, 0.1), "own": []}
    runs["own"] = rows({10: 1.0}, math.nan)  # 目标不是场的误差：不知道持续性预报的损失
    figure = runs_figure(runs)
    assert figure is not None
    b, a, persistence = figure.axes[0].lines  # 图例由高到低
    assert np.asarray(a.get_xydata()).tolist() == [[10, 2.0], [30, 0.5]]
    assert np.asarray(b.get_xydata()) == pytest.approx(np.array([[10, 2.0], [30, 3.0]]))
    assert set(np.asarray(persistence.get_ydata()).tolist()) == {1}
    assert figure.axes[0].get_legend_handles_labels()[1] == ["b (2)", "a (0.5)", "persistence"]
    assert runs_figure({"own": runs["own"]}) is None


def test_a_pdf_that_cannot_be_written_is_an_error_here(tmp_path):
    (tmp_path / "x.pdf").mkdir()
    with pytest.raises(OSError, match=r"x\.pdf"):
        save_figures([curves_figure([MetricRow(1, 0, "train", "loss", 1.0)])], tmp_path / "x")
    assert (tmp_path / "x.png").stat().st_size
