"""evaluate.py --cases：框里的成绩、羽状图的数，与从存下的预报一格一格写开算的相同；多进程等于一个。"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import yaml

from engine.commands import evaluate_command
from tests.engine.runs import ROOT, train_small
from util.calendar import parse_time

CHANNELS = ("t2m", "u10", "z_level_00")
CASES = {
    "cases": [
        {
            "name": "greenwich", "dates": ["2000-02-13", "2000-02-14T12"], "latitude": [20, 70], "longitude": [-50, 50],
            "channels": ["z_level_00", "t2m"], "contours": {"t2m": [278.0, 280]},
        },
        {
            "name": "point", "dates": ["2000-02-16", "2000-02-17"], "point": [34, 113], "channels": ["u10"],
            "leads": [18],
        },
    ]
}  # fmt: skip
WORDS = ("--steps", "3", "--members", "3", "--perturb", "0.2")
EDGES = np.deg2rad(np.linspace(90, -90, 9))
AREA = np.sin(EDGES[:-1]) - np.sin(EDGES[1:])  # 各纬圈的格子
LATITUDES, LONGITUDES = 78.75 - 22.5 * np.arange(8), 22.5 * np.arange(16)


@pytest.fixture(scope="module")
def tree(make_tree, tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree") / "tree", CHANNELS, (8, 16), "2000-01-01", "2000-02-20")


@pytest.fixture(scope="module")
def trained(tree, tmp_path_factory, unrendered) -> Path:
    return train_small(
        tmp_path_factory.mktemp("run"), tree, data={"pressure_hpa": [50.0]}, model={"predict": "tendency"}
    )


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cases") / "cases.yaml"
    path.write_text(yaml.safe_dump(CASES), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def evaluated(trained, cases, tmp_path_factory, unrendered) -> Path:
    out = tmp_path_factory.mktemp("out")
    run(trained, out, *WORDS, "--cases", str(cases))
    return out


def run(checkpoint: Path, out: Path, *arguments: str) -> None:
    assert evaluate_command(["--checkpoint", str(checkpoint), "--out", str(out), *arguments]) == 0


def saved(out: Path) -> tuple[Any, Any]:
    forecast, truth = (xr.open_dataset(out / f"{name}.nc", decode_timedelta=True) for name in ("forecast", "truth"))
    return forecast, truth


def field(dataset: Any, channel: str) -> Any:
    return dataset["z"].isel(level=0) if channel == "z_level_00" else dataset[channel]


def plume(out: Path, name: str) -> list[dict[str, str]]:
    with (out / "cases" / name / "plume.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_box_against_the_saved_fields(evaluated):
    """框里的 RMSE、MAE、偏差、CRPS、离散度与羽状图的每个数，一格一格地加。"""
    forecast, truth = saved(evaluated)
    scores = json.loads((evaluated / "cases/greenwich/scores.json").read_text())
    rows = {(r["channel"], r["initial_time"], r["lead_hours"]): r for r in plume(evaluated, "greenwich")}
    inside = [(i, j) for i, lat in enumerate(LATITUDES) for j, lon in enumerate(LONGITUDES)
              if 20 <= lat <= 70 and (lon <= 50 or lon >= 310)]  # fmt: skip
    assert len(inside) == 2 * 5
    first, last = np.datetime64("2000-02-13T00"), np.datetime64("2000-02-14T12")
    total = sum(AREA[i] for i, _ in inside)
    count = 0
    for channel in ("z_level_00", "t2m"):
        predicted, real = field(forecast, channel), field(truth, channel)
        for lead in range(3):
            sums = dict.fromkeys(("square", "absolute", "error", "crps", "variance"), 0.0)
            pairs = 0
            for n, init in enumerate(forecast.time.values):
                moment = init + np.timedelta64(6 * (lead + 1), "h")
                if not first <= moment <= last:
                    continue
                fields = predicted.isel(time=n, prediction_timedelta=lead).values.astype(float)  # (M, H, W)
                seen = real.sel(time=moment).values.astype(float)
                pairs, count = pairs + 1, count + 1
                means = np.zeros(4)
                for i, j in inside:
                    x, y, share = fields[:, i, j], seen[i, j], AREA[i] / total
                    gap = sum(abs(a - b) for a in x for b in x) / (2 * 3 * 2)
                    values = ((x.mean() - y) ** 2, abs(x.mean() - y), x.mean() - y, np.abs(x - y).mean() - gap)
                    for key, value in zip(sums, (*values, x.var(ddof=1)), strict=True):
                        sums[key] += share * value
                    means += share * np.array([y, *x])
                row = rows[channel, str(init.astype("datetime64[h]")), str(6 * (lead + 1))]
                assert row["valid_time"] == str(moment.astype("datetime64[h]"))
                named = ("truth", "member_0", "member_1", "member_2")
                np.testing.assert_allclose([float(row[name]) for name in named], means, rtol=2e-6)
                assert float(row["ar_pred_video_vanilla"]) == pytest.approx(means[1:].mean(), rel=2e-6)
            found = {key: v[lead] for key, v in scores["scores"]["ar_pred_video_vanilla"][channel].items()}
            mean = {key: value / pairs for key, value in sums.items()}
            assert scores["pairs"][channel][lead] == pairs
            assert found["rmse"] == pytest.approx(np.sqrt(mean["square"]), rel=1e-4)
            assert found["mae"] == pytest.approx(mean["absolute"], rel=1e-4)
            assert found["bias"] == pytest.approx(mean["error"], rel=1e-3, abs=1e-3)
            assert found["crps"] == pytest.approx(mean["crps"], rel=1e-3)
            assert found["spread"] == pytest.approx(np.sqrt(mean["variance"]), rel=1e-4)
    assert count == len(rows) == 2 * 3 * 7


def test_baselines_from_the_raw_fields(tree, evaluated):
    """持续性预报：起报时刻的场，整个网格上那一点的与全场的 RMSE；不滚动也画得出。"""
    scores = json.loads((evaluated / "cases/point/scores.json").read_text())
    assert scores["channels"] == ["u10"] and scores["box"] == "whole grid"
    hours = tree.hours
    for row in plume(evaluated, "point"):
        init = hours.index(parse_time(row["initial_time"]))
        ahead = init + int(row["lead_hours"]) // 6
        assert float(row["persistence"]) == pytest.approx(float(tree.fields[init, 1, 2, 5]), abs=1e-4)
        assert float(row["truth"]) == pytest.approx(float(tree.fields[ahead, 1, 2, 5]), abs=1e-4)
    moments = range(parse_time("2000-02-16"), parse_time("2000-02-17") + 24, 6)
    errors = [tree.fields[hours.index(h - 12), 1] - tree.fields[hours.index(h), 1].astype(float) for h in moments]
    rmse = np.sqrt(np.mean([(error**2 * AREA[:, None]).sum() / (16 * AREA.sum()) for error in errors]))
    assert scores["scores"]["persistence"]["u10"]["rmse"][1] == pytest.approx(rmse, rel=1e-4)


def test_what_is_written(evaluated):
    for name, figures in (("greenwich", 2 * (1 + 1 + 1 + 1) + 1), ("point", 4)):  # t2m 有两条等值线
        folder = evaluated / "cases" / name
        found = sorted(path.stem for path in (folder / "figures").glob("*.png"))
        assert len(found) == figures and found == sorted(p.stem for p in (folder / "figures").glob("*.pdf"))
        assert {stem.partition("-")[0] for stem in found} == {"plume", "maps", "spaghetti", "members"}
        assert "../../report.html" in (folder / "report.html").read_text(encoding="utf-8")
        with (folder / "scores.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        scores = json.loads((folder / "scores.json").read_text())["scores"]
        for row in rows:
            value = scores[row["model"]][row["channel"]][row["metric"]][int(row["lead_hours"]) // 6 - 1]
            assert row["value"] == ("" if value is None else str(value))
        assert {row["model"] for row in rows} == {"ar_pred_video_vanilla", "persistence", "climatology"}
    page = (evaluated / "report.html").read_text(encoding="utf-8")
    assert '["greenwich","cases/greenwich/report.html"]' in page and "--cases" in page


def test_without_it_nothing_changes(trained, evaluated, tmp_path, unrendered):
    """同样的成绩、统计量；再评一次而不给，上一次的个例去掉，别人放在那里的文件不动。"""
    (tmp_path / "cases").symlink_to(evaluated / "cases")  # 一样的文件夹，不真删
    run(trained, tmp_path / "out", *WORDS)
    for name in ("metrics.csv", "scores.csv"):
        path = tmp_path / "out" / name
        assert not path.exists() or path.read_text() == (evaluated / name).read_text()
    with xr.open_dataset(tmp_path / "out/statistics.nc") as one, xr.open_dataset(evaluated / "statistics.nc") as two:
        xr.testing.assert_equal(one, two)
    assert not (tmp_path / "out/cases").exists()


def test_last_times_cases_go_away(trained, cases, tmp_path, unrendered):
    words = ("--stride", "5", "--save", "none")
    run(trained, tmp_path, *words, "--cases", str(cases))
    kept = tmp_path / "cases/point/notes.txt"
    kept.write_text("mine")
    run(trained, tmp_path, *words)
    assert [path for path in (tmp_path / "cases").rglob("*") if path.is_file()] == [kept]
    assert "cases/" not in (tmp_path / "report.html").read_text(encoding="utf-8").partition("plotly")[0]


def test_two_processes_equal_one(trained, cases, evaluated, tmp_path):
    arguments = ["--checkpoint", str(trained), *WORDS, "--cases", str(cases), "--save", "none"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "evaluate.py"]
    done = subprocess.run(
        [*command, *arguments, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("greenwich", "point"):
        for file in ("scores.csv", "plume.csv"):
            assert (tmp_path / "cases" / name / file).read_text() == (evaluated / "cases" / name / file).read_text()


def test_stride_takes_the_forecasts_there_are(trained, cases, evaluated, tmp_path, unrendered):
    """隔三个起报时间：成员的种子属于起报时间，羽状图的数是同样的，只是少几行。"""
    run(trained, tmp_path, *WORDS, "--stride", "3", "--save", "none", "--cases", str(cases))
    every = {tuple(row.values())[:4]: row for row in plume(evaluated, "greenwich")}
    some = plume(tmp_path, "greenwich")
    assert 0 < len(some) < len(every)
    for row in some:
        other = every[tuple(row.values())[:4]]
        for name in ("truth", "member_0", "member_2", "climatology"):
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-5)


def test_a_case_outside_the_split_is_one_line(trained, tmp_path):
    path = tmp_path / "cases.yaml"
    path.write_text("cases: [{name: old, dates: [1999-01-01, 1999-01-05]}]", encoding="utf-8")
    with pytest.raises(ValueError, match="case old: no forecast here is valid from 1999-01-01T00 to 1999-01-05T23"):
        run(trained, tmp_path / "out", "--cases", str(path))
    path.write_text("cases: [{name: old, date: [1999-01-01, 1999-01-05]}]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"unknown key cases\[0\].date"):
        run(tmp_path / "no.ckpt", tmp_path / "out", "--cases", str(path))  # 不等读检查点
