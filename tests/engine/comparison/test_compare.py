"""compare.py：表里的数与写开的 NumPy 相同；只用共同的场，基线各列一次，真值不同就拒绝。"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.commands import compare_command
from engine.comparison.comparison import Comparison, make_comparison
from engine.comparison.entries import choose_contenders, open_entries
from engine.comparison.text import as_markdown, as_text, comparison_blocks
from tests.models.small import small_spec
from util.files.records import as_json
from util.scores.statistics_file import StatisticsFile
from util.scores.table import Skill

LEADS, CHANNELS, UNITS = (6, 12, 18), ("a", "b", "c"), ("K", "m s-1", "1")
HOURS = 24 * 4000 + 6 * np.arange(4 * 7 * 6)  # 六周，每天四个起报时间
POWERS = {  # 统计量的量纲：物理单位的几次方
    **dict.fromkeys(("square", "plain_square", "variance"), 2),
    **dict.fromkeys(("absolute", "error", "plain_absolute", "crps"), 1),
    **dict.fromkeys(("ssim", "forecast_anomaly", "truth_anomaly", "anomaly_product"), 0),
    **dict.fromkeys(("forecast_activity", "truth_activity"), 0),
}
COST = {
    "parameters": 1234567,
    "flops_per_sample": 5_000_000_000,
    "training_seconds": 61.5,
    "training_samples_per_second": 20.25,
    "inference_samples_per_second": 80.0,
    "training_peak_memory_bytes": 2**29,
    "inference_peak_memory_bytes": 2**28,
    "device": "CPU, 1 thread(s)",
}


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """几周的数据就给区间，测试才小。"""
    monkeypatch.setattr("util.scores.bootstrap.FEWEST_BLOCKS", 4)


def physical(model: str, size: float = 1.0) -> dict[str, np.ndarray]:
    """一个模型的统计量 (T, 3, 3)，物理单位：同名的模型在每个文件里相同。size 乘在误差上。"""
    rng = np.random.default_rng([*model.encode()])
    shape = (len(HOURS), len(LEADS), len(CHANNELS))
    return {name: (rng.random(shape) + 0.5) * size**power for name, power in POWERS.items() if name != "variance"}


def write(
    folder: Path,
    run: str,
    models: Mapping[str, dict[str, np.ndarray]],
    judged: str = "ar",
    rows: slice = slice(None),
    leads: Sequence[int] = (0, 1),
    channels: Sequence[int] = (0, 1),
    std: Sequence[float] = (2.0, 5.0),
    members: int = 1,
    units: Sequence[str] = UNITS,
    grid: tuple[int, int] = (4, 8),
    regions: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """models 的一部分写成一份评测：statistics.nc（标准化，float32）与 metrics.json。"""
    hours, hold = HOURS[rows], [LEADS[i] for i in leads]
    spec = replace(
        small_spec(channels=len(channels), grid=grid),
        channels=tuple(CHANNELS[c] for c in channels), units=tuple(units[c] for c in channels), std=tuple(std),
    )  # fmt: skip
    about = {"run": run, "checkpoint": f"checkpoints/{run}/best.ckpt", "step": 7, "split": "test", "stride": 1}
    about |= {"model": judged, "members": members, "steps": len(hold), "perturb": 0.0, "smooth": 0.0}
    folder.mkdir(parents=True)
    shape = (len(models), len(hold), len(channels))
    with StatisticsFile(
        folder / "statistics.nc", spec, list(models), hours, hold, np.full((len(channels), 0), np.nan), about, regions
    ) as file:
        for model, values in models.items():
            part = {n: v[rows][:, leads][:, :, channels] / np.array(std) ** POWERS.get(n, 0) for n, v in values.items()}
            if regions:  # 第 r 个区域的统计量是整个网格的 r + 2 倍
                scales = np.arange(len(regions)) + 2
                part |= {f"{n}_by_region": v[..., None] * scales for n, v in part.items() if n != "ssim"}
            file.write(0, {model: {n: v.astype(np.float32) for n, v in part.items()}})
        spectra = np.random.default_rng(len(models)).random((*shape, 4)) + 0.5
        file.add("spectrum", ("model", "prediction_timedelta", "channel", "wavenumber"), spectra)
        truth = ("prediction_timedelta", "channel", "wavenumber")
        file.add("spectrum_truth", truth, np.ones((*shape[1:], 4)))
    scored = np.isfinite(models[judged]["square"][rows][:, leads][:, :, channels]).sum(0)  # (L, C)
    table = {**about, "initial_times": len(hours), "lead_hours": hold, "cost": COST}
    pairs = {c: scored[:, i].tolist() for i, c in enumerate(spec.channels)}
    table |= {"pairs": pairs, "left_out": pairs, "channels": spec.channels, "units": {}, "bootstrap_blocks": 6}
    table |= {key: {} for key in ("scores", "skill", "mean_rmse_ratio", "samples_per_second")}  # 比较不看
    (folder / "metrics.json").write_text(json.dumps({**table, "spectrum_label": "zonal wavenumber"}))
    return folder


def models(size: float = 1.0, judged: str = "ar", **others: float) -> dict[str, dict[str, np.ndarray]]:
    """持续性预报、气候态和被评的模型；others: 名字 → 误差的倍数。"""
    sizes = {"persistence": 1.5, "climatology": 2.0} | others | {judged: size}
    return {name: physical(name, value) for name, value in sizes.items()}


def comparison_of(*folders: Path, **options: Any) -> Comparison:
    """只要数，不画图、不写页面；options 同 make_comparison。"""
    with ExitStack() as stack:
        entries = open_entries(stack, folders, ())
        return make_comparison(entries, choose_contenders(entries), **options)


def table_of(*folders: Path) -> dict[str, Any]:
    """comparison.json 里的。"""
    return as_json(comparison_of(*folders))


def text_of(*folders: Path) -> str:
    return as_text(comparison_blocks(comparison_of(*folders)))


def compare(out: Path, *folders: Path) -> dict[str, Any]:
    """走完整个命令。"""
    assert compare_command(["--runs", *map(str, folders), "--out", str(out)]) == 0
    return json.loads((out / "comparison.json").read_text())


def rmse(values: Mapping[str, np.ndarray], rows: np.ndarray, lead: int, channel: str) -> float:
    """写开的：这些起报时间上的均方根。"""
    squares = values["square"][rows, LEADS.index(lead), CHANNELS.index(channel)]
    return float(np.sqrt(sum(squares.tolist()) / len(squares)))


@pytest.fixture
def two(tmp_path) -> tuple[dict[str, Any], dict[str, Any], Path, Path]:
    """起报时间、时效、通道、标准差都不全相同；B 有一个无效的场，多一个基线。"""
    a, b = models(0.9), models(0.5, linear_regression=1.2)
    for values in b.values():
        for array in values.values():
            array[20, 1, 1] = np.nan
    one = write(tmp_path / "log/A/test", "A", a)
    other = write(tmp_path / "log/B/scores", "B", b, "ar", slice(8, 160, 2), (1, 2), (1, 2), (4.0, 1.0))
    return a, b, one, other


def test_numbers_on_the_common_pairs(two):
    """运行的文件夹与评测的文件夹都可以给；RMSE、技巧、场数、平均比值都与写开的相同。"""
    a, b, one, other = two
    table = table_of(one.parent, other)
    assert list(table["scores"]) == ["A", "B", "persistence", "climatology", "linear_regression"]
    assert table["lead_hours"] == [6, 12, 18] and table["channels"] == ["b"]
    rows = np.array([r for r in range(8, 160, 2) if r != 20])
    assert table["initial_times"] == 76 and table["pairs"] == {"b": [76, 75, 76]}
    assert table["left_out"] == {"b": [0, 1, 0]}
    assert [run["pairs"] for run in table["runs"]] == [{"b": 2 * len(HOURS)}, {"b": 75 + 76}]
    values = {"A": a["ar"], "B": b["ar"], **{name: b[name] for name in b if name != "ar"}}
    wanted = {name: rmse(one, rows, 12, "b") for name, one in values.items()}
    for name, value in wanted.items():
        assert table["scores"][name]["b"]["rmse"][1] == pytest.approx(value, rel=1e-6)
        crps = values[name]["crps"][rows, 1, 1].mean()
        assert table["scores"][name]["b"]["crps"][1] == pytest.approx(crps, rel=1e-6)
    every = np.arange(8, 160, 2)
    assert table["scores"]["A"]["b"]["rmse"][::2] == [pytest.approx(rmse(a["ar"], every, 6, "b"), rel=1e-6), None]
    assert table["scores"]["B"]["b"]["rmse"][::2] == [None, pytest.approx(rmse(b["ar"], every, 18, "b"), rel=1e-6)]
    gaps = [note for note in table["notes"] if "a gap there" in note]
    assert [note.partition(":")[0] for note in gaps] == ["A has no forecast at +18 h", "B has no forecast at +6 h"]
    for run in ("A", "B"):
        for base in ("persistence", "climatology", "linear_regression"):
            found = table["skill"][run][base]["b"]["rmse"]
            assert found["value"][1] == pytest.approx(1 - wanted[run] / wanted[base], rel=1e-5)
            assert found["low"][1] < found["value"][1] < found["high"][1]
            assert table["mean_rmse_ratio"][base][run][1] == pytest.approx(wanted[run] / wanted[base], rel=1e-5)
    assert "log_spectral_distance" not in table["scores"]["A"]["b"]
    assert any("spectra" in note for note in table["notes"])
    assert any("a of A" in note for note in table["notes"]) and any("c of B" in note for note in table["notes"])
    assert any(note.endswith("which for b are 5 and 4") for note in table["notes"])


def test_baselines_have_the_leads_of_every_run(tmp_path):
    """同样的数据：A 有 +6、+12，B 有 +12、+18，基线三个时效都有，技巧处处算得出；运行没有的才是缺口。"""
    one = write(tmp_path / "A", "A", models(0.9))
    other = write(tmp_path / "B", "B", models(0.8), leads=(1, 2))
    table = table_of(one, other)
    every = np.arange(len(HOURS))
    wanted = [pytest.approx(rmse(physical("persistence", 1.5), every, lead, "a"), rel=1e-6) for lead in LEADS]
    assert table["scores"]["persistence"]["a"]["rmse"] == wanted
    assert table["scores"]["A"]["a"]["rmse"][2] is None and table["scores"]["B"]["a"]["rmse"][0] is None
    for run, lead, size in (("A", 6, 0.9), ("B", 18, 0.8)):
        base = rmse(physical("climatology", 2.0), every, lead, "a")
        skill = 1 - rmse(physical("ar", size), every, lead, "a") / base
        found = table["skill"][run]["climatology"]["a"]["rmse"]["value"][LEADS.index(lead)]
        assert found == pytest.approx(skill, rel=1e-5)


def test_outputs_agree(two, tmp_path):
    """文字、Markdown、CSV 里的数都是 JSON 里的；由好到差；报告有链接。"""
    _, _, one, other = two
    (one.parent / "report.html").write_text("")
    out = tmp_path / "log/comparison"
    table = compare(out, one.parent, other)
    text, markdown = ((out / f"comparison.{suffix}").read_text(encoding="utf-8") for suffix in ("txt", "md"))
    wanted = sorted(table["scores"], key=lambda name: table["scores"][name]["b"]["rmse"][1])
    body = text.split("b: RMSE")[1].split("\n\n")[0]
    rows = [re.split(r"\s{2,}", line) for line in body.splitlines()[2:]]
    assert [row[0] for row in rows if not row[0].startswith("·")] == wanted
    values = [f"{table['scores'][name]['b']['rmse'][1]:#.4g}" for name in wanted]
    assert [row[2] for row in rows if row[0] in wanted] == values
    skill = table["skill"]["B"]["persistence"]["b"]["rmse"]
    shown = "{:.3f} [{:.3f}, {:.3f}]".format(*(skill[k][1] for k in ("value", "low", "high")))
    assert any(row[0] == "· skill vs persistence" and row[2] == shown for row in rows)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if "|" in line]
    assert [row for row in cells if row[0] in wanted and len(row) == 4][: len(wanted)] == [
        row for row in rows if row[0] in wanted
    ]
    assert "compared" in text and "1,234,567" in text and "5" in text and "512" in text
    with (out / "comparison.csv").open(encoding="utf-8") as file:
        lines = {(r["model"], r["channel"], r["lead_hours"], r["metric"]): r for r in csv.DictReader(file)}
    assert float(lines["B", "b", "12", "rmse"]["value"]) == table["scores"]["B"]["b"]["rmse"][1]
    assert lines["B", "b", "6", "rmse"]["value"] == ""
    assert float(lines["B", "b", "12", "rmse_skill_vs_persistence"]["low"]) == skill["low"][1]
    for name in ("figures/rmse.png", "figures/rmse.pdf", "compare.log"):
        assert (out / name).stat().st_size > 0, name
    page = (out / "report.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert found is not None
    content = json.loads(found[1])
    assert content["kind"] == "comparison" and content["comparison"]["pairs"] == 76
    assert content["links"] == [["A", "../A/report.html"]] and [c["name"] for c in content["costs"]] == ["A", "B"]
    assert [m["role"] for m in content["models"]] == ["model", "model", "baseline", "baseline", "baseline"]
    assert "spectra" not in content
    assert content["reproduce"] == [f"python compare.py --runs {one.parent} {other} --out {out}"]
    assert not list(out.glob(".*"))


def test_learning_curves_of_runs_that_have_them(tmp_path):
    """运行自己文件夹里的评测画得出学习曲线；--out 写到别处的、旁边是别人的 metrics.csv 的不画。"""
    log = "step,epoch,split,name,value\n10,0,val,loss,0.5\n10,0,val,persistence,1.0\n"
    folders = [write(tmp_path / "A/test", "A", models(0.9)), write(tmp_path / "elsewhere/b", "B", models(0.8))]
    (tmp_path / "elsewhere/metrics.csv").write_text("not,a,log\n")
    compare(tmp_path / "none", *folders)
    assert not (tmp_path / "none/figures/training.png").exists()
    (tmp_path / "A/metrics.csv").write_text(log)
    compare(tmp_path / "some", *folders)
    assert (tmp_path / "some/figures/training.png").stat().st_size > 0


def test_spectra_when_the_windows_are_the_same(tmp_path):
    folders = [write(tmp_path / name, name, models(size)) for name, size in (("A", 0.9), ("B", 0.8))]
    table = compare(tmp_path / "out", *folders)
    spectra = np.random.default_rng(3).random((3, 2, 2, 4)) + 0.5  # 与 write 里的相同；第三个是 ar
    distance = np.sqrt(((10 * np.log10(spectra[2, :, 1])) ** 2).mean(-1))
    np.testing.assert_allclose(table["scores"]["B"]["b"]["log_spectral_distance"], distance, rtol=1e-12)
    assert not table["notes"]
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert '"spectra":{"label":"zonal wavenumber"' in page


def test_regions_hours_and_a_scorecard(tmp_path, monkeypatch):
    """几份都有的区域、各有效钟点；评分卡对着一个运行，文件、图、页面里都有。"""
    masks = {"north": np.arange(4)[:, None] + np.zeros(8) < 2, "east": np.zeros((4, 1)) + np.arange(8) > 3}
    a = write(tmp_path / "A", "A", models(0.9), regions=masks)
    b = write(tmp_path / "B", "B", models(0.8), regions={"south": ~masks["north"], "north": masks["north"]})
    out = tmp_path / "out"
    words = ["--runs", str(a), str(b), "--out", str(out), "--by", "hour", "--scorecard", "climatology"]
    assert compare_command(words) == 0
    table = json.loads((out / "comparison.json").read_text())
    assert "cells" not in table  # 几百格的 JSON 读不回来
    found = as_json(comparison_of(a, b, by=("hour",), scorecard="climatology"))["cells"]
    cells = {(cell["region"], cell["period"]): cell for cell in found}
    assert set(cells) == {
        (r, p) for r in ("all", "north") for p in ("all", *(f"{h:02d} UTC" for h in (0, 6, 12, 18)))
    } - {("all", "all")}
    rows = np.flatnonzero((HOURS + 12) % 24 == 6)
    wanted = rmse(physical("ar", 0.9), rows, 12, "b")
    assert cells["all", "06 UTC"]["scores"]["A"]["b"]["rmse"][1] == pytest.approx(wanted, rel=1e-6)
    north = cells["north", "all"]["scores"]
    for name, place in (("A", 2), ("B", 3)):  # north 在两份里的次序不同
        whole = table["scores"][name]["a"]["rmse"][0]
        assert north[name]["a"]["rmse"][0] == pytest.approx(whole * np.sqrt(place), rel=1e-6)
    cards = list(csv.DictReader((out / "scorecard.csv").read_text().splitlines()))
    assert {card["reference"] for card in cards} == {"climatology"} and {card["model"] for card in cards} == {"A", "B"}
    skill = cells["north", "06 UTC"]["skill"]["B"]["climatology"]["b"]["rmse"]
    (card,) = (
        c for c in cards
        if [c[k] for k in ("model", "region", "period", "channel", "metric", "lead_hours")]
        == ["B", "north", "06 UTC", "b", "rmse", "12"]
    )  # fmt: skip
    assert float(card["change"]) == -100 * skill["value"][1] and float(card["high"]) == -100 * skill["low"][1]
    assert card["significant"] == "true"
    names = {p.name for p in (out / "figures").iterdir()}
    assert {"scorecard-1.png", "scorecard-2.png", "scorecard-1.pdf", "scorecard-2.pdf"} < names
    page = (out / "report.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert found is not None
    content = json.loads(found[1])
    assert content["scorecard"] == "climatology" and len(content["cells"]) == len(cells)
    assert content["reproduce"][0].endswith("--by hour --scorecard climatology")
    assert compare_command(["--runs", str(a), str(b), "--out", str(out), "--scorecard", "B"]) == 0
    assert set(json.loads((out / "comparison.json").read_text())["skill"]["A"]) == {"persistence", "climatology", "B"}
    with pytest.raises(ValueError, match="--scorecard climatlogy: not among those compared; nearest: climatology"):
        compare_command([*words[:-1], "climatlogy"])
    assert (out / "scorecard.csv").is_file()
    with pytest.raises(ValueError, match="--scorecard A: no other run to compare with it; .* among persistence, clim"):
        compare_command(["--runs", str(a), "--out", str(tmp_path / "one"), "--scorecard", "A"])
    assert not (tmp_path / "one/scorecard.csv").exists()
    monkeypatch.setattr("engine.evaluation.page.REGION_VALUES", 100)  # 九格，一个时效也放不下
    assert compare_command([*words[:4], str(out), "--by", "hour"]) == 0
    assert not (out / "scorecard.csv").exists() and not [*(out / "figures").glob("scorecard*")]
    found = re.search(
        r'<script type="application/json"[^>]*>(.*?)</script>', (out / "report.html").read_text(), re.DOTALL
    )
    assert found is not None
    fewer = json.loads(found[1])
    assert len(fewer["cells"]) < len(content["cells"])
    assert [fewer[key] for key in ("lead_hours", "scores")] == [content[key] for key in ("lead_hours", "scores")]


def test_a_baseline_run_is_that_baseline(tmp_path):
    """训练过的持续性预报、线性回归就是基线那一行，不出现两次，代价照列；同一基线的第二个运行自成一行。"""
    folders = [
        write(tmp_path / "A", "A", models(0.9)),
        write(tmp_path / "P", "pers", {k: v for k, v in models().items() if k != "ar"}, "persistence"),
        write(tmp_path / "L", "lr", models(0.7, "linear_regression"), "linear_regression"),
        write(tmp_path / "M", "ridge", models(0.6, "linear_regression"), "linear_regression"),
    ]
    table = table_of(*folders)
    assert list(table["scores"]) == ["A", "ridge", "persistence", "climatology", "linear_regression"]
    assert [run["name"] for run in table["runs"]] == ["A", "persistence", "linear_regression", "ridge"]
    assert set(table["skill"]) == {"A", "ridge"}
    ratio = rmse(physical("linear_regression", 0.6), np.arange(len(HOURS)), 6, "a")
    assert table["scores"]["ridge"]["a"]["rmse"][0] == pytest.approx(ratio, rel=1e-6)
    assert text_of(*folders).count("1,234,567") == 4


def test_one_run_and_the_same_run_twice(tmp_path):
    one = write(tmp_path / "A/test", "A", models(0.9))
    two = write(tmp_path / "A/long", "A", models(0.9), rows=slice(0, 8))
    assert list(table_of(one.parent)["scores"]) == ["A", "persistence", "climatology"]
    table = table_of(one, two)
    assert list(table["scores"])[:2] == ["A (test)", "A (long)"]
    assert "low" not in table["skill"]["A (long)"]["persistence"]["a"]["rmse"]  # 两天，不够估区间
    third = write(tmp_path / "other/long", "A", models(0.9))
    assert list(table_of(one, two, third)["scores"])[:3] == ["A (test)", f"A ({two})", f"A ({third})"]
    with pytest.raises(ValueError, match="is given twice"):
        table_of(one, one.parent)


def test_a_run_called_like_a_baseline(tmp_path):
    """名字像基线而模型不是：不会与基线那一行混在一起；扰动初值的持续性预报也不是基线。"""
    named = write(tmp_path / "p", "persistence", models(0.9))
    noisy = models(0.8)
    noisy["persistence"]["variance"] = noisy["persistence"]["square"]
    del noisy["ar"]
    ensemble = write(tmp_path / "e", "noisy", noisy, "persistence", members=3)
    table = table_of(named, ensemble)
    assert list(table["scores"]) == ["persistence (run)", "noisy", "persistence", "climatology"]
    assert table["notes"] == ["noisy: no plain persistence to check its truth by"]


def test_ensembles_show_crps(tmp_path):
    ensemble = models(0.9)
    ensemble["ar"]["variance"] = 0.8 * ensemble["ar"]["square"]
    folders = [write(tmp_path / "A", "A", models(0.9)), write(tmp_path / "E", "E", ensemble, members=4)]
    table = table_of(*folders)
    assert table["scores"]["E"]["a"]["spread_skill"] == [pytest.approx(np.sqrt(5 / 4 * 0.8), rel=1e-5)] * 2
    assert text_of(*folders).count("· CRPS") == 2 * 4
    assert "· CRPS" not in text_of(folders[0])


def test_a_file_that_lends_leads_may_lack_a_score(tmp_path):
    """甲另有一项（如 --events 的），乙有更远的时效：那里没有这一项，别的照比。"""
    more = models(0.9)
    for one in more.values():
        one["energy"] = one["square"] * 0.5
    first = write(tmp_path / "A", "A", more, leads=(0, 1))
    second = write(tmp_path / "B", "B", models(0.8), leads=(1, 2))
    table = table_of(first, second)
    assert all(one["rmse"][2] is not None for one in table["scores"]["persistence"].values())
    assert "A" in table["scores"] and "B" in table["scores"]


def test_other_climatology_is_noted(tmp_path, caplog):
    folders = [write(tmp_path / "A", "A", models(0.9)), write(tmp_path / "B", "B", models(0.8, climatology=2.1))]
    table = table_of(*folders)
    assert table["scores"]["climatology"]["a"]["rmse"][0] == pytest.approx(
        rmse(physical("climatology", 2.0), np.arange(len(HOURS)), 6, "a"), rel=1e-6
    )
    (note,) = table["notes"]
    assert "RMSE of climatology for a at +6 h" in note and f"shown is the one of {folders[0]}" in note
    assert note in caplog.text and note in as_markdown(comparison_blocks(comparison_of(*folders)))


def test_other_truth_is_refused(tmp_path):
    good = write(tmp_path / "A", "A", models(0.9))
    other = models(0.8)
    other["persistence"]["square"][:, :, 1] *= 1.001
    bad = write(tmp_path / "B", "B", other)
    with pytest.raises(ValueError, match=r"^A and B were scored against different truth .*persistence for b at \+6 h"):
        table_of(good, bad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": slice(0, 4)}, "no common initial time"),
        ({"leads": (2,)}, "no common lead time"),
        ({"units": ("degC", "km h-1", "1")}, "no common channel with the same unit"),
        ({"grid": (8, 16)}, "scores do not compare"),
    ],
)
def test_nothing_in_common(tmp_path, changes, message):
    good = write(tmp_path / "A", "A", models(0.9), rows=slice(4, None))
    bad = write(tmp_path / "B", "B", models(0.8), **changes)
    with pytest.raises(ValueError, match=message) as error:
        table_of(good, bad)
    assert "\n" not in str(error.value)


def test_mistakes_are_one_line(tmp_path):
    good = write(tmp_path / "A", "A", models(0.9))
    with pytest.raises(ValueError, match=r"nothing: no statistics\.nc there or in its test/"):
        table_of(good, tmp_path / "nothing")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        compare(good / "metrics.json", good)
    table = json.loads((good / "metrics.json").read_text())
    (good / "metrics.json").write_text(json.dumps({**table, "step": 8}))
    with pytest.raises(ValueError, match="has step = 8, statistics.nc beside it 7"):
        table_of(good)
    (good / "metrics.json").write_text(json.dumps({**table, "pairs": 3}))
    with pytest.raises(ValueError, match=r"metrics\.json: pairs: input should be a valid dictionary"):
        table_of(good)
    (good / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        table_of(good)
    (good / "metrics.json").unlink()
    with pytest.raises(ValueError, match="did not finish"):
        table_of(good)


def test_many_leads_are_thinned_in_the_text(tmp_path):
    """文字表里至多 8 个时效，首尾在内；数在它自己的列里。"""
    comparison = comparison_of(write(tmp_path / "A", "A", models(0.9)))
    hours = list(range(6, 246, 6))
    scores = {name: {"a": {"rmse": [hour / 100 for hour in hours]}} for name in comparison.scores}
    skill = Skill([hour / 1000 for hour in hours], [0.0] * len(hours))
    skills = {"A": {base: {"a": {"rmse": skill}} for base in comparison.baselines}}
    longer = replace(comparison, channels=["a"], lead_hours=hours, mean_rmse_ratio={}, scores=scores, skill=skills)
    rows = [re.split(r"\s{2,}", line) for line in as_text(comparison_blocks(longer)).splitlines()]
    head = next(row for row in rows if row[0] == "model")
    assert len(head) == 9 and head[1] == "+6 h" and head[-1] == "+240 h"
    (row,) = (row for row in rows if row[0] == "A" and len(row) == 9 and "," not in row[1])
    assert [float(v) for v in row[1:]] == [int(h[1:-2]) / 100 for h in head[1:]]
