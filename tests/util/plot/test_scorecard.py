"""评分卡：三角的方向、实心与大小；区域、通道多时分页；CSV 里的数。"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from util.plot.scorecard import BAD, FULL_CHANGE, GOOD, SIZES, marker_size, save_scorecards, scorecard_figures
from util.scores.scorecard import Card, make_cards, write_cards
from util.scores.table import Cell, ScoreTable, Skill

LEADS = [24, 120]


def table_of(skill: dict[str, list[float | None]]) -> tuple[ScoreTable, Cell]:
    """一个模型对一个基线；一个区域的技巧是整个网格的一半。"""

    def made(scale: float) -> dict:
        scaled = {k: [None if v is None else scale * v for v in values] for k, values in skill.items()}
        one = Skill(**scaled, difference=[0.0] * len(LEADS))
        return {"m": {"base": {"t": {"rmse": one}, "z": {"rmse": one}}}}

    rest = {"scores": {}, "mean_rmse_ratio": {}, "bootstrap_blocks": 30, "pairs": {}}
    cell = Cell(region="tropics", period="all", skill=made(0.5), **rest)
    about = {"channels": ["t", "z"], "units": {}, "lead_hours": LEADS, "initial_times": 9, "left_out": {}}
    return ScoreTable(**about, skill=made(1.0), **rest), cell


def test_cards_are_the_skill_turned_round(tmp_path: Path) -> None:
    """技巧 0.1（0.05 到 0.2）是误差 −10 %（−20 到 −5）。"""
    table, cell = table_of({"value": [0.1, -0.3], "low": [0.05, -0.6], "high": [0.2, 0.1]})
    cards = make_cards(table, [cell], "base")
    assert len(cards) == 2 * 2 * 2 and make_cards(table, [cell], "other") == []
    first = cards[0]
    assert (first.region, first.channel, first.lead_hours, first.significant) == ("all", "t", 24, True)
    assert (first.change, first.low, first.high) == pytest.approx((-10, -20, -5))
    assert not cards[1].significant and cards[4].change == pytest.approx(-5)
    write_cards(tmp_path / "c.csv", cards)
    rows = list(csv.DictReader((tmp_path / "c.csv").read_text(encoding="utf-8").splitlines()))
    assert float(rows[5]["change"]) == pytest.approx(15) and rows[5]["region"] == "tropics"
    assert [row["significant"] for row in rows[:2]] == ["true", "false"]


def test_no_interval_is_not_significant() -> None:
    table, _ = table_of({"value": [0.1, None]})
    cards = make_cards(table, None, "base")
    assert [(c.change, c.low, c.significant) for c in cards[:2]] == [
        (pytest.approx(-10), None, False),
        (None, None, False),
    ]


def cards_of(channels: int, regions: int, leads: int) -> list[Card]:
    rng = np.random.default_rng(0)
    return [
        Card("m", "base", f"region-{r}", "all", f"c{c}", "rmse", 24 * (lead + 1), v, v - 3, v + 3, abs(v) > 3)
        for r in range(regions)
        for c in range(channels)
        for lead in range(leads)
        for v in [float(rng.normal(scale=10))]
    ]


def test_triangles_point_to_the_better() -> None:
    cards = cards_of(2, 1, 3)
    (figure,) = scorecard_figures(cards, "title")
    (axes,) = figure.axes
    found = {}
    for group in axes.collections:
        assert isinstance(group, PathCollection)
        sizes, offsets = np.atleast_1d(group.get_sizes()), np.asarray(group.get_offsets())
        up = np.asarray(group.get_paths()[0].vertices)[:, 1].argmax() == 0  # 第一个顶点是尖
        for (x, y), size in zip(offsets.tolist(), sizes.tolist(), strict=True):
            filled = to_hex(np.asarray(group.get_facecolor())[0]) != "#ffffff"
            found[int(x), int(y)] = (up, filled, size, to_hex(np.asarray(group.get_edgecolor())[0]))
    assert len(found) == 6
    for card in cards:
        assert card.change is not None
        up, filled, size, color = found[card.lead_hours // 24 - 1, int(card.channel[1])]
        assert (up, filled) == (card.change <= 0, card.significant) and color == (GOOD if up else BAD)
        assert size == pytest.approx(marker_size(card.change))
    assert marker_size(-2 * FULL_CHANGE) == SIZES[1] and marker_size(0) == SIZES[0]


def test_many_regions_and_channels_make_pages(tmp_path: Path) -> None:
    paths = save_scorecards(cards_of(33, 7, 10), "rmse", tmp_path / "scorecard")
    assert len(paths) > 1 and all(p.stat().st_size and p.with_suffix(".pdf").stat().st_size for p in paths)
    assert save_scorecards(cards_of(2, 1, 2), "crps", tmp_path / "none") == []
