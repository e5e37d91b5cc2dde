"""成绩的图：画出来的数从轴上读回，与给进去的比较。"""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from util.plot.scores import BASELINE_COLOR, ranks_figure, scores_figure, spectra_figure
from util.plot.style import MODEL_COLORS, save_figures

UNITS = {"t2m": "K", "tp": "m", "z_level_00": "m2 s-2"}
SIZES = {"t2m": 2.0, "tp": 4e-4, "z_level_00": 250.0}
MODELS = ("ar_pred", "other run", "persistence", "climatology")
BASELINES = {"persistence", "climatology"}


def make_rmse(num_leads: int) -> dict[str, dict[str, list[float | None]]]:
    rng = np.random.default_rng(num_leads)
    return {m: {c: (SIZES[c] * (1 + rng.random(num_leads))).tolist() for c in UNITS} for m in MODELS}


def headings(axes) -> tuple[str, str]:
    return axes.get_title(loc="left"), axes.get_title(loc="right")


def bars(axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def test_lines_by_lead_time():
    leads = [6, 12, 24]
    rmse = make_rmse(3)
    rmse["ar_pred"]["t2m"][1] = None
    (figure,) = scores_figure(leads, UNITS, rmse, BASELINES)
    assert [headings(axes) for axes in figure.axes] == [("t2m", "K"), ("tp", "10⁻⁶ m"), ("z_level_00", "m² s⁻²")]
    for axes, channel, scale in zip(figure.axes, UNITS, (1, 1e6, 1), strict=True):
        assert [line.get_label() for line in axes.lines] == list(MODELS)
        for line, name in zip(axes.lines, MODELS, strict=True):
            np.testing.assert_array_equal(line.get_xdata(), leads)
            expected = np.array(rmse[name][channel], float) * scale
            np.testing.assert_allclose(np.asarray(line.get_ydata(), float), expected)
            assert line.is_dashed() == (name in BASELINES)
        assert [line.get_color() for line in axes.lines] == [*MODEL_COLORS[:2], BASELINE_COLOR, BASELINE_COLOR]
        assert axes.get_ylim()[0] == 0
    assert figure.axes[0].lines[2].get_linestyle() == "--"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(MODELS)


def test_bars_with_one_lead():
    rmse = make_rmse(1)
    rmse["climatology"]["t2m"] = [float("nan")]
    (figure,) = scores_figure([6], UNITS, rmse, BASELINES)
    assert figure.texts[0].get_text() == "RMSE, +6 h"
    for axes, channel, scale in zip(figure.axes, UNITS, (1, 1e6, 1), strict=True):
        expected = np.array([rmse[name][channel] for name in MODELS], float)[:, 0] * scale
        np.testing.assert_allclose([bar.get_width() for bar in bars(axes)], expected)
        assert [to_hex(bar.get_facecolor()).upper() for bar in bars(axes)[:2]] == list(MODEL_COLORS[:2])
    texts = [text.get_text().strip() for text in figure.axes[0].texts]
    assert [float(text) for text in texts[:3]] == pytest.approx([rmse[m]["t2m"][0] for m in MODELS[:3]], rel=1e-3)
    assert texts[3] == "missing"
    rmse["ar_pred"]["t2m"] = [1158.2]
    (figure,) = scores_figure([6], UNITS, rmse, BASELINES)
    assert figure.axes[0].texts[0].get_text().strip() == "1158"
    names = [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes]
    assert names == [list(MODELS), [], list(MODELS)]  # 两列：模型的名字只写在第一列


@pytest.mark.parametrize("leads", [[6], [6, 12, 18]])
def test_twenty_five_channels_make_three_pages(leads, tmp_path):
    units = {f"q_level_{i:02d}": "kg kg-1" for i in range(25)}
    rmse = {m: {c: [1e-3 * (i + 1)] * len(leads) for i, c in enumerate(units)} for m in MODELS}
    figures = scores_figure(leads, units, rmse, BASELINES)
    assert [len(figure.axes) for figure in figures] == [9, 8, 8]
    assert [headings(axes)[0] for figure in figures for axes in figure.axes] == list(units)
    assert figures[2].texts[0].get_text().endswith("(3 of 3)")
    figures[0].draw_without_rendering()
    boxes = [axes.get_position().bounds for axes in figures[0].axes]
    assert np.ptp([box[2:] for box in boxes], axis=0) == pytest.approx([0, 0], abs=1e-9)  # 各格同样大
    paths = save_figures(figures[:1], tmp_path / "scores")
    assert paths[0].with_suffix(".pdf").stat().st_size < 100_000


def test_no_text_overlaps_the_head():
    """图例再多也不压住标题和各格。"""
    names = [f"a run with a rather long name {i}" for i in range(9)]
    rmse = {name: {"t2m": [1.0 + i, 2.0 + i]} for i, name in enumerate(names)}
    (figure,) = scores_figure([6, 12], {"t2m": "K"}, rmse, {names[8]})
    figure.draw_without_rendering()
    title, legend = figure.texts[0].get_window_extent(), figure.legends[0].get_window_extent()
    panel = figure.axes[0].get_tightbbox()
    assert panel is not None
    assert panel.y1 < legend.y0 < legend.y1 < title.y0
    assert legend.x1 < figure.bbox.x1 and title.y1 < figure.bbox.y1
    colors = [line.get_color() for line in figure.axes[0].lines]
    assert colors == [*MODEL_COLORS, *MODEL_COLORS[:2], BASELINE_COLOR]


def test_spectra():
    wavenumber = np.arange(1, 17)
    truth = {c: (SIZES[c] ** 2 * wavenumber**-3.0).tolist() for c in UNITS}
    blurred = {c: [*np.multiply(truth[c][:-1], 0.5), 0.0] for c in UNITS}
    (figure,) = spectra_figure(
        wavenumber.tolist(), "zonal wavenumber", truth, {"ar_pred": blurred, "climatology": truth}, UNITS, 6, BASELINES
    )
    assert [headings(axes)[1] for axes in figure.axes] == ["K²", "m²", "(m² s⁻²)²"]
    for axes, channel in zip(figure.axes, UNITS, strict=True):
        assert axes.get_xscale() == axes.get_yscale() == "log"
        lines = {line.get_label(): np.asarray(line.get_ydata()) for line in axes.lines}
        assert list(lines) == ["truth", "ar_pred", "climatology"]
        np.testing.assert_allclose(lines["truth"], truth[channel])
        np.testing.assert_allclose(lines["ar_pred"][:-1], np.array(truth[channel])[:-1] / 2)
        assert np.isnan(lines["ar_pred"][-1])  # 零没有对数
    assert [line.get_color() for line in figure.axes[0].lines] == ["#222222", MODEL_COLORS[0], BASELINE_COLOR]
    figure.draw_without_rendering()


def test_spectra_of_some_channels():
    """通道多时报告里只有几个的谱：画的就是那几个。"""
    units = {f"q_level_{i:02d}": "kg kg-1" for i in range(30)}
    power = {c: [4.0, 2.0, 1.0] for c in list(units)[::2]}
    figures = spectra_figure([1, 2, 3], "zonal wavenumber", power, {"ar_pred": power}, units, 6)
    assert [headings(axes)[0] for figure in figures for axes in figure.axes] == list(power)


def test_rank_histograms():
    shares = {"t2m": [0.4, 0.1, 0.1, 0.4], "tp": [0.25] * 4, "u10": [None] * 4}
    (figure,) = ranks_figure(shares, 12)
    assert figure.texts[0].get_text() == "Rank histograms, +12 h"
    for axes, expected in zip(figure.axes, shares.values(), strict=True):
        np.testing.assert_allclose([bar.get_height() for bar in bars(axes)], np.array(expected, float))
        np.testing.assert_allclose(np.asarray(axes.lines[0].get_ydata()), [0.25, 0.25])
        assert axes.get_ylim() == pytest.approx((0, 0.432))
    figure.draw_without_rendering()
