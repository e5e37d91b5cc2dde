"""并排的地图：每格画的是给的场，北在上；一行同一个色标；成员与逐尺度的图真的写出来。"""

from __future__ import annotations

import numpy as np
import pytest

from tests.util.plot.test_plot import GRIDS, make_spec
from util.grid import output_grid
from util.plot.side_by_side import side_by_side_figures
from util.plot.style import COLORS, color_limits


@pytest.mark.parametrize(("latitudes", "longitudes"), GRIDS.values(), ids=GRIDS.keys())
def test_every_panel_shows_its_field_on_the_scale_of_its_row(latitudes, longitudes):
    spec = make_spec(latitudes, longitudes, ("t2m", "u10"), ("K", "m s**-1"), (None, None))
    rng = np.random.default_rng(0)
    columns = {name: rng.normal(size=(2, spec.height, spec.width)) for name in ("truth", "mean", "member 1")}
    (figure,) = side_by_side_figures(spec, columns, "a title")
    assert figure.get_suptitle() == "a title"
    panels = [axes for axes in figure.axes if axes.images]
    grid = output_grid(spec)
    assert len(panels) == 6 and [p.get_title(loc="left") for p in panels[:3]] == list(columns)
    for row, kind in enumerate(("temperature", "wind")):
        low, high = color_limits(np.stack([fields[row] for fields in columns.values()]), kind)
        for panel, fields in zip(panels[3 * row : 3 * row + 3], columns.values(), strict=True):
            image = panel.images[0]
            np.testing.assert_allclose(np.asarray(image.get_array()), fields[row][grid.rows][:, grid.columns])
            assert image.get_clim() == pytest.approx((low, high)) and image.get_cmap().name == COLORS[kind]
    assert [panels[0].get_ylabel(), panels[3].get_ylabel()] == ["t2m", "u10"]


def test_changes_have_their_own_colors_and_small_numbers_their_power_of_ten():
    spec = make_spec(*GRIDS["global"], ("tp",), ("m",), (None,))
    fields = np.full((1, spec.height, spec.width), 2e-5)
    fields[0, 0, 0] = -1e-5
    (figure,) = side_by_side_figures(spec, {"truth": fields}, "", "difference")
    (panel,) = [axes for axes in figure.axes if axes.images]
    assert panel.images[0].get_cmap().name == COLORS["difference"]
    assert np.asarray(panel.images[0].get_array()).max() == pytest.approx(20)
    assert any("10⁻⁶" in axes.get_ylabel() for axes in figure.axes)


def test_many_channels_make_several_pages():
    names = tuple(f"z_level_{i:02d}" for i in range(11))
    spec = make_spec(*GRIDS["global"], names, ("m",) * 11, (500.0,) * 11)
    fields = np.random.default_rng(0).normal(size=(11, spec.height, spec.width))
    figures = side_by_side_figures(spec, {"truth": fields}, "title")
    drawn = [[axes.get_ylabel() for axes in figure.axes if axes.images] for figure in figures]
    assert [len(page) for page in drawn] == [9, 2] and [*drawn[0], *drawn[1]] == list(names)
    assert [figure.get_suptitle() for figure in figures] == ["title (1 of 2)", "title (2 of 2)"]
