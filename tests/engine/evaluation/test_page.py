"""页面里放多少：分区分时段的格再多，整个网格的曲线与表也不少一个时效。"""

from __future__ import annotations

import itertools

from engine.evaluation.page import FEWEST_LEADS, REGION_VALUES, Page, add_cells, add_table, page_leads
from util.report.bilingual import Bilingual
from util.scores.table import Cell, Numbers, ScoreTable, Skill

CHANNELS = [f"c{i}" for i in range(69)]
LEADS = [6 * (i + 1) for i in range(40)]
MODELS = ("model", "persistence", "climatology")


def parts(scale: float) -> dict:
    numbers: Numbers = [scale * lead for lead in LEADS]
    return {
        "bootstrap_blocks": 30,
        "pairs": {c: [9] * len(LEADS) for c in CHANNELS},
        "scores": {m: {c: {"rmse": numbers} for c in CHANNELS} for m in MODELS},
        "skill": {"model": {"persistence": {c: {"rmse": Skill(numbers, numbers)} for c in CHANNELS}}},
        "mean_rmse_ratio": {},
    }


def make_cells(regions: int, periods: tuple[str, ...]) -> list[Cell]:
    names = ["all", *(f"r{i}" for i in range(regions))]
    places = [place for place in itertools.product(names, ("all", *periods)) if place != ("all", "all")]
    return [Cell(region=region, period=period, **parts(i + 2.0)) for i, (region, period) in enumerate(places)]


def test_regions_leave_the_main_curves_alone() -> None:
    units = dict.fromkeys(CHANNELS, "K")
    table = ScoreTable(
        channels=CHANNELS, units=units, lead_hours=LEADS, initial_times=9, left_out=parts(1.0)["pairs"], **parts(1.0)
    )
    shown = page_leads(table)
    plain = add_table(Page(kind="evaluation", title="", facts=[]), table, shown)
    assert plain.lead_hours is not None and len(plain.lead_hours) == 1000 // 69
    cells = make_cells(13, ("DJF", "MAM", "JJA", "SON"))
    page = add_cells(plain, table, cells, shown)
    assert page.cells is not None and (page.lead_hours, page.scores) == (plain.lead_hours, plain.scores)
    names = {(cell.region, cell.period) for cell in page.cells}
    assert names >= {(c.region, c.period) for c in cells if "all" in (c.region, c.period)}  # 13 个区域与 4 季都在
    held = [shown[i] for i in page.cell_leads or []]
    assert len(held) >= FEWEST_LEADS and (held[0], held[-1]) == (shown[0], shown[-1])
    for line in page.cells:
        (cell,) = (c for c in cells if (c.region, c.period) == (line.region, line.period))
        assert line.scores["model"]["c0"]["rmse"] == [cell.scores["model"]["c0"]["rmse"][i] for i in held]
        assert len(line.fields["c0"].scored) == len(held)
    one = (len(MODELS) + 3) * len(CHANNELS)  # 三个模型的成绩，一个技巧的三个数
    assert REGION_VALUES / 2 < one * len(held) * len(page.cells) <= REGION_VALUES
    assert page.facts == [("regions and periods", page.facts[0][1])]


def test_the_main_scores_stay_when_all_do_not_fit() -> None:
    cells, units = make_cells(13, ("DJF", "MAM", "JJA", "SON")), dict.fromkeys(CHANNELS, "K")
    more = [f"m{i}" for i in range(30)]
    for cell in cells:
        for one in cell.scores.values():
            for found in one.values():
                found.update(dict.fromkeys(more, found["rmse"]))
    table = ScoreTable(
        channels=CHANNELS, units=units, lead_hours=LEADS, initial_times=9, left_out=parts(1.0)["pairs"], **parts(1.0)
    )
    page = add_cells(Page(kind="evaluation", title="", facts=[]), table, cells, page_leads(table))
    assert page.cells is not None and [*page.cells[0].scores["model"]["c0"]] == ["rmse"]
    said = page.facts[0][1]
    assert isinstance(said, Bilingual) and said.startswith("the main scores of ") and "主要" in said.chinese


def test_a_few_cells_keep_every_lead() -> None:
    cells, units = make_cells(2, ()), dict.fromkeys(CHANNELS, "K")
    table = ScoreTable(
        channels=CHANNELS, units=units, lead_hours=LEADS, initial_times=9, left_out=parts(1.0)["pairs"], **parts(1.0)
    )
    page = add_cells(Page(kind="evaluation", title="", facts=[]), table, cells, page_leads(table))
    assert page.cells is not None and page.facts == [] and len(page.cells) == 2
    assert all(v is not None for line in page.cells for v in line.scores["model"]["c68"]["rmse"])
