"""按区域、季、月、钟点的成绩：每格与写开的循环相同，自助法只在有场的那些周里重抽；时效的缺口只是缺口。"""

from __future__ import annotations

import csv
import math
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.util.scores.test_scores import NAMES, spec_with
from util.files.records import as_json
from util.scores.bootstrap import BLOCK_HOURS, RESAMPLES, part_sums
from util.scores.cells import tabulate_cells
from util.scores.common import Contender
from util.scores.statistics_file import Statistics, StatisticsFile
from util.scores.table import Cell, ScoreTable
from util.scores.tabulate import tabulate, write_csv

EPOCH = datetime(1970, 1, 1)
START = (datetime(2001, 1, 1) - EPOCH).days * 24
LEADS = [6, 24, 240]
REGIONS = {"north": np.arange(4)[:, None] + np.zeros(8) < 2, "east": np.zeros((4, 1)) + np.arange(8) > 3}
MODELS = ("model", "persistence")
SEASON = {12: "DJF", 1: "DJF", 2: "DJF", 3: "MAM", 4: "MAM", 5: "MAM"} | dict.fromkeys((6, 7, 8), "JJA")
Values = dict[str, dict[str, np.ndarray]]


def write(path: Path, leads: list[int] = LEADS, seed: int = 0, days: int = 220, regions: Any = REGIONS) -> Values:
    """每天两个起报时间；整个网格 (T, L, C) 与各区域 (T, L, C, R) 的随机统计量。"""
    spec, hours = spec_with((2.0, 0.5)), START + np.arange(0, 24 * days, 12)
    rng = np.random.default_rng(seed)
    shape = (len(hours), len(leads), 2)
    gone = rng.random(shape) < 0.1
    values: Values = {}
    with StatisticsFile(
        path, spec, MODELS, hours, leads, np.full((2, 0), np.nan), {"model": "model", "members": 1}, regions
    ) as file:
        for model in MODELS:
            made = {name: rng.random(shape).astype(np.float32) + 0.1 for name in NAMES}
            regional = [name for name in NAMES if name != "ssim"] if regions else []
            made |= {f"{name}_by_region": rng.random((*shape, 2)).astype(np.float32) + 0.1 for name in regional}
            for array in made.values():
                array[gone] = np.nan
            values[model] = made
        for row in range(0, len(hours), 50):
            file.write(row, {m: {n: a[row : row + 50] for n, a in made.items()} for m, made in values.items()})
    return values


def contenders(file: Statistics) -> list[Contender]:
    return [Contender(m, file, m) for m in file.models]


def chosen(period: str, lead: int, hour: int) -> bool:
    moment = EPOCH + timedelta(hours=hour + lead)
    names = (SEASON.get(moment.month, "SON"), moment.strftime("%b"), f"{moment.hour:02d} UTC", "all")
    return period in names


Made = tuple[Values, np.ndarray, list[Cell], ScoreTable]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    path = tmp_path_factory.mktemp("made") / "s.nc"
    values = write(path)
    with pytest.MonkeyPatch.context() as patch, Statistics(path) as file:
        patch.setattr("util.scores.common.READ_BYTES", 8 * 3 * 2 * 60)  # 一段段地读
        patch.setattr("util.scores.bootstrap.FEWEST_BLOCKS", 4)
        cells = tabulate_cells(contenders(file), ["persistence"], by=("season", "month", "hour"))
        return values, file.hours, cells, tabulate(contenders(file), ["persistence"])


def test_cells_are_loops(made: Made) -> None:
    values, hours, cells, _ = made
    names = {(cell.region, cell.period) for cell in cells}
    times = {"DJF", "MAM", "JJA", *("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug"), "00 UTC", "12 UTC"}
    times |= {"06 UTC", "18 UTC"}  # 6 小时的时效
    assert {p for r, p in names if r == "all"} == times | ({p for r, p in names if r == "all"} & {"Sep", "SON"})
    assert {r for r, _ in names} == {"all", "north", "east"} and ("all", "all") not in names
    for cell in cells:
        for i, lead in enumerate(LEADS):
            rows = [t for t, hour in enumerate(hours.tolist()) if chosen(cell.period, lead, hour)]
            for c, std in enumerate((2.0, 0.5)):
                kept = [t for t in rows if np.isfinite(values["model"]["square"][t, i, c])]
                assert cell.pairs[f"c{c}"][i] == len(kept)
                for model in MODELS:
                    if cell.region == "all":
                        found = values[model]["square"][kept, i, c]
                    else:
                        found = values[model]["square_by_region"][kept, i, c, ["north", "east"].index(cell.region)]
                    wanted = math.sqrt(sum(map(float, found)) / len(kept)) * std if kept else None
                    value = cell.scores[model][f"c{c}"]["rmse"][i]
                    assert value == (None if wanted is None else pytest.approx(wanted, rel=1e-6))


def test_the_bootstrap_of_a_cell_draws_its_own_weeks(made: Made) -> None:
    """春季、北区、+24 小时：只有这一季的周，每周的和写开了加。"""
    values, hours, cells, _ = made
    cell = next(cell for cell in cells if (cell.region, cell.period) == ("north", "MAM"))
    weeks = (hours - hours[0]) // BLOCK_HOURS
    anywhere = np.array([any(chosen("MAM", lead, h) for lead in LEADS) for h in hours.tolist()])
    used = np.unique(weeks[anywhere])
    assert cell.bootstrap_blocks == len(used) < len(np.unique(weeks))
    draws = np.random.default_rng(0).multinomial(len(used), [1 / len(used)] * len(used), RESAMPLES)
    sums: dict[str, list[float]] = {m: [] for m in MODELS}
    counts = []
    for week in used:
        rows = [t for t in np.flatnonzero(weeks == week) if chosen("MAM", 24, int(hours[t]))]
        rows = [t for t in rows if np.isfinite(values["model"]["square"][t, 1, 0])]
        counts.append(len(rows))
        for model in MODELS:
            sums[model].append(float(values[model]["square_by_region"][rows, 1, 0, 0].astype(float).sum()))
    with np.errstate(invalid="ignore"):
        rmse = {m: 2.0 * np.sqrt(draws @ np.array(sums[m]) / (draws @ np.array(counts))) for m in MODELS}
    found = as_json(cell.skill["model"]["persistence"]["c0"]["rmse"])
    for key, samples in (
        ("", 1 - rmse["model"] / rmse["persistence"]),
        ("difference_", rmse["model"] - rmse["persistence"]),
    ):
        assert found[f"{key}low"][1] == pytest.approx(np.percentile(samples, 2.5), rel=1e-5)
        assert found[f"{key}high"][1] == pytest.approx(np.percentile(samples, 97.5), rel=1e-5)


def test_csv_says_where_and_when(made: Made, tmp_path: Path) -> None:
    _, _, cells, table = made
    write_csv(tmp_path / "m.csv", table, cells)
    with (tmp_path / "m.csv").open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    found = {tuple(r[k] for k in ("region", "period", "model", "channel", "lead_hours", "metric")): r for r in rows}
    assert len(found) == len(rows)
    cell = next(cell for cell in cells if (cell.region, cell.period) == ("east", "Feb"))
    value = found["east", "Feb", "model", "c1", "24", "rmse"]["value"]
    assert float(value) == cell.scores["model"]["c1"]["rmse"][1]
    assert float(found["all", "all", "model", "c1", "24", "rmse"]["value"]) == table.scores["model"]["c1"]["rmse"][1]


def test_without_regions_and_periods_there_is_nothing(tmp_path: Path) -> None:
    write(tmp_path / "s.nc", regions=None, days=20)
    with Statistics(tmp_path / "s.nc") as file:
        assert tabulate_cells(contenders(file), ["persistence"]) == []
        assert {c.region for c in tabulate_cells(contenders(file), [], by=["hour"])} == {"all"}


def test_regions_of_two_files_must_be_the_same(tmp_path: Path) -> None:
    write(tmp_path / "a.nc", days=20)
    write(tmp_path / "b.nc", days=20, regions={"north": REGIONS["north"], "east": ~REGIONS["east"]})
    with Statistics(tmp_path / "a.nc") as a, Statistics(tmp_path / "b.nc") as b:
        cells = tabulate_cells([Contender("A", a, "model"), Contender("B", b, "model")], [])
    assert [(c.region, c.period) for c in cells] == [("north", "all")]


def test_a_missing_lead_is_a_gap(tmp_path: Path) -> None:
    """B 没有 +24 小时：那里留空，A 的照样在；场数按时效，只除去有这个时效的人的缺口。"""
    a, b = write(tmp_path / "a.nc", seed=1), write(tmp_path / "b.nc", [6, 240], seed=2)
    with Statistics(tmp_path / "a.nc") as one, Statistics(tmp_path / "b.nc") as two:
        given = [Contender("A", one, "model"), Contender("B", two, "model"), Contender("P", one, "persistence")]
        table = tabulate(given, ["P"], ["A"])
    assert table.lead_hours == LEADS
    for c, channel in enumerate(("c0", "c1")):
        for i, lead in enumerate(LEADS):
            square = a["model"]["square"][:, i, c]
            good = np.isfinite(square)
            if lead != 24:
                good &= np.isfinite(b["model"]["square"][:, [6, 240].index(lead), c])
            assert table.pairs[channel][i] == good.sum()
            wanted = math.sqrt(square[good].astype(float).mean()) * (2.0, 0.5)[c]
            assert table.scores["A"][channel]["rmse"][i] == pytest.approx(wanted, rel=1e-6)
        assert [v is None for v in table.scores["B"][channel]["rmse"]] == [False, True, False]
        assert table.skill["B"]["A"][channel]["rmse"].value[1] is None
    assert table.mean_rmse_ratio["P"]["B"][1] is None and table.mean_rmse_ratio["P"]["A"][1] is not None


def test_finer_periods_hold_no_more_weeks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """季、月、钟点一起分：一次留着的各块的和，不过全部时间的两倍。"""
    monkeypatch.setattr("util.scores.bootstrap.RESAMPLES", 10)
    write(tmp_path / "s.nc", days=100, regions=None)
    held = []

    def counted(*given: Any) -> Any:
        found = part_sums(*given)
        held.append(sum(len(blocks.counts) for blocks in found))
        return found

    monkeypatch.setattr("util.scores.cells.part_sums", counted)
    with Statistics(tmp_path / "s.nc") as file:
        tabulate_cells(contenders(file), ["persistence"], by=("season", "month", "hour"))
    assert max(held) <= 2 * math.ceil(100 / 7) < sum(held) / 2
