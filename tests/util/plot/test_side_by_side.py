"""并排的地图：每格画的是给的场，北在上；一行同一个色标；成员与逐尺度的图真的写出来。"""

from __future__ import annotations

import numpy as np
import pytest

from tests.util.plot.test_plot import GRIDS, make_spec, maps
from util.grid import output_grid
from util.plot.side_by_side import side_by_side_figures
from util.plot.style import COLORS, color_limits


@pytest.mark.parametrize(("latitudes", "longitudes"), GRIDS.values(), ids=GRIDS.keys())
def test_every_panel_shows_its_field_on_the_scale_of_its_row(latitudes, longitudes):
    spec = make_spec(latitudes, longitudes, ("t2m", "u10"), ("K", "m s**-1"), (None, None))
    rng = np.random.default_rng(0)
    columns = {name: rng.normal(size=(2, spec.height, spec.width)) for name in ("truth", "mean", "member 1")}
    (figure,) = side_by_side_figures(spec, columns, "a title")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[0] == "a title" and [t for t in texts if t in columns] == [*columns, *columns]
    assert [t for t in texts if t in spec.channels] == ["t2m", "u10"]
    grid, images = output_grid(spec), maps(figure)
    assert len(images) == 6
    for row, kind in enumerate(("temperature", "wind")):
        low, high = color_limits(np.stack([fields[row] for fields in columns.values()]), kind)
        for image, fields in zip(images[3 * row : 3 * row + 3], columns.values(), strict=True):
            np.testing.assert_allclose(np.asarray(image.get_array()), fields[row][grid.rows][:, grid.columns])
            assert image.get_clim() == pytest.approx((low, high)) and image.get_cmap().name == COLORS[kind]
    boxes = np.array([image.get_extent() for image in images]).reshape(2, 3, 4)
    assert (boxes[:, :-1, 1] < boxes[:, 1:, 0]).all() and (boxes[0, :, 2] > boxes[1, :, 3]).all()  # 由左到右、由上到下


def test_changes_have_their_own_colors_and_small_numbers_their_power_of_ten():
    spec = make_spec(*GRIDS["global"], ("tp",), ("m",), (None,))
    fields = np.full((1, spec.height, spec.width), 2e-5)
    fields[0, 0, 0] = -1e-5
    (figure,) = side_by_side_figures(spec, {"truth": fields}, "", "difference")
    (image,) = maps(figure)
    assert image.get_cmap().name == COLORS["difference"]
    assert np.asarray(image.get_array()).max() == pytest.approx(20)
    assert any("10⁻⁶" in text.get_text() for text in figure.axes[0].texts)


def test_many_channels_make_several_pages():
    names = tuple(f"z_level_{i:02d}" for i in range(11))
    spec = make_spec(*GRIDS["global"], names, ("m",) * 11, (500.0,) * 11)
    fields = np.random.default_rng(0).normal(size=(11, spec.height, spec.width))
    figures = side_by_side_figures(spec, {"truth": fields}, "title")
    texts = [[text.get_text() for text in figure.axes[0].texts] for figure in figures]
    drawn = [[text for text in page if text in names] for page in texts]
    assert [len(page) for page in drawn] == [9, 2] and [*drawn[0], *drawn[1]] == list(names)
    assert [page[0] for page in texts] == ["title (1 of 2)", "title (2 of 2)"]
