"""发表的成绩放在自己的旁边：对上气压、单位与时效；做法的不同各一行；什么也对不上时一行说清。"""

from __future__ import annotations

import csv
import json
import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from engine.commands import compare_command
from engine.comparison.comparison import make_comparison
from engine.comparison.entries import choose_contenders, open_entries
from engine.comparison.published import add_published, read_published
from tests.engine.comparison import test_compare
from tests.engine.comparison.test_compare import models, write
from util.scores.final import METRICS

TABLE = Path("docs/reference_scores.csv")
HEAD = "source,model,grid,test_years,start_hours,members,convention,variable,pressure_hpa,lead_hours,metric,value,unit"
FACTS = "4 x 8,1980-1981,0 6 12 18,1,root of the mean"


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join([HEAD, *lines]) + "\n")
    return path


def test_the_published_table():
    """形状、出处，与抽查的几个数（field 的表里抄的）。"""
    rows = read_published([TABLE])
    assert len({row.source for row in rows}) == 5 and rows[0].label == "Deterministic-6h (published)"
    assert {row.metric for row in rows} == {"rmse", "crps", "spread_skill"} <= {m.name for m in METRICS}
    found = {(row.model, row.level, row.lead_hours, row.metric): row for row in rows}
    for key, value in {
        ("Deterministic-6h", "z500", "72", "rmse"): 509.7,
        ("AR-24h diffusion", "z500", "120", "crps"): 242.7,
        ("ARCI-24/6h", "t2m", "24", "spread_skill"): 0.95,
        ("Graph-EFM", "v10", "24", "crps"): 1.284,
        ("unet 1.06 M + rollout 4", "z500", "120", "rmse"): 675.217,
        ("climatology 2020", "u10", "72", "rmse"): 3.426,
        ("IFS", "t850", "120", "rmse"): 2.03,
        ("U-Cast", "u10", "24", "crps"): 0.345,
        ("zoo source CNN", "t2m", "6-24", "rmse"): 1.203,
    }.items():
        assert found[key].value == value
    units = {"z500": "m2 s-2", "t850": "K", "t2m": "K", "u10": "m s-1", "v10": "m s-1"}
    assert all(row.unit == ("1" if row.metric == "spread_skill" else units[row.level]) for row in rows)
    values = {level: [r.value for r in rows if r.level == level and r.metric == "rmse"] for level in units}
    assert {level: (min(some), max(some)) for level, some in values.items()} == {
        "z500": (33.934, 1033.0), "t850": (0.357, 4.56), "t2m": (0.335, 3.8), "u10": (0.4, 4.6), "v10": (0.425, 5.038)
    }  # fmt: skip


def test_beside_the_own_run(tmp_path, monkeypatch):
    """层按气压对上，单层的照名字；表、图、页面与 CSV 里都有；不同的做法各一行。"""
    monkeypatch.setattr(test_compare, "CHANNELS", ("z_level_03", "t2m", "c"))
    whole = test_compare.small_spec
    pressures = (500.0, None)
    monkeypatch.setattr(test_compare, "small_spec", lambda **how: replace(whole(**how), pressures=pressures))
    run = write(tmp_path / "A", "A", models(0.9), units=("m2 s-2", "K", "1"))
    reference = table(
        tmp_path / "r.csv",
        f"S,far,{FACTS},z,500,12,rmse,3.5,m2 s-2",
        "S,far,4 x 8,2018,0 6 12 18,10,fair,z,500,12,crps,1.5,m2 s-2",
        f"S,near,{FACTS},t2m,,6,rmse,1.25,K",
        f"S,near,{FACTS},t2m,,6,mae,0.75,degC",
        f"S,near,{FACTS},z,850,6,rmse,9,m2 s-2",
        "T,pooled,8 x 8,1980-1981,0 6 12 18,1,mean of the roots,t2m,,6-12,rmse,1.5,K",
        f"T,later,{FACTS},t2m,,24,rmse,2,K",
    )
    out = tmp_path / "out"
    assert compare_command(["--runs", str(run), "--reference", str(reference), "--out", str(out)]) == 0
    found = json.loads((out / "comparison.json").read_text())
    assert found["published"] == ["far (published)", "near (published)"]
    assert found["scores"]["far (published)"] == {"z_level_03": {"rmse": [None, 3.5], "crps": [None, 1.5]}}
    assert found["scores"]["near (published)"] == {"t2m": {"rmse": [1.25, None]}}
    assert found["notes"] == [
        "published rmse of t2m over +6 to +12 h together, pooled 1.5 (K; T)",
        "published by S: test years 2018, here 1980-1981 (far)",
        "published by S: members 10, here 1 (far)",
        "published by T: grid 8 x 8, here 4 x 8",
        "published by T: convention of rmse mean of the roots, here root of the mean",
    ]
    body = (out / "comparison.txt").read_text().split("t2m: RMSE")[1].split("\n\n")[0]
    assert re.split(r"\s{2,}", body.splitlines()[-1]) == ["near (published)", "1.250", "-"]  # 自己的在前
    with (out / "comparison.csv").open() as file:
        lines = {(r["model"], r["lead_hours"], r["metric"]): r["value"] for r in csv.DictReader(file)}
    assert lines["far (published)", "12", "crps"] == "1.5" and lines["far (published)", "6", "crps"] == ""
    content = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', (out / "report.html").read_text())
    assert content is not None
    page = json.loads(content[1])
    assert page["comparison"]["notes"] and all(set(note) == {"en", "zh"} for note in page["comparison"]["notes"])
    assert page["comparison"]["notes"][-1]["zh"] == "T 发表的：rmse 的求法 先开方再平均，这里 先平均再开方"
    assert [m["role"] for m in page["models"]] == ["model", "baseline", "baseline", "published", "published"]
    assert page["reproduce"][0].endswith(f"--out {out} --reference {reference}")
    assert (out / "figures/rmse.png").stat().st_size > 0


def test_nothing_fits_is_one_line(tmp_path, caplog):
    with ExitStack() as stack:
        entries = open_entries(stack, [write(tmp_path / "A", "A", models(0.9))], ())
        own = make_comparison(entries, choose_contenders(entries))
        found = add_published(own, entries[0].file, read_published([TABLE]))
    (note,) = found.notes
    assert note.startswith("no published score is of a channel, unit and lead time compared here: published are z500")
    assert note.endswith("compared are a [K], b [m s-1] at +6, +12 h") and "\n" not in note and note in caplog.text
    assert found == replace(own, notes=[note])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([f"S,far,{FACTS},z,500,12,rmse,many,m2 s-2"], r"r\.csv, line 2: value: input should be a valid number"),
        ([f"S,far,{FACTS},z,500,12,rmsee,1,K"], "no metric 'rmsee'; nearest: rmse"),
        ([f"S,far,{FACTS},z,500,soon,rmse,1,K"], "lead_hours = 'soon', must be hours"),
        ([f"S,far,{FACTS},z,500,12,rmse,1,K"] * 2, r"rmse of far for z500 at \+12 h is given twice"),
        ([f"{s},far,{FACTS},z,{s}00,12,rmse,1,K" for s in "12"], "a model far from 1, another from 2"),
    ],
)
def test_mistakes_are_one_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        read_published([table(tmp_path / "r.csv", *lines)])
    with pytest.raises(ValueError, match="no such file"):
        read_published([tmp_path / "none.csv"])
    (tmp_path / "other.csv").write_text("model,value\n")
    with pytest.raises(ValueError, match="its first line is"):
        read_published([tmp_path / "other.csv"])
