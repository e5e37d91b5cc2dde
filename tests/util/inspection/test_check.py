"""检查整棵树：每一种毛病都点得出名字和个数，不在第一处停下；退出码 0 / 1 / 2；报告机器可读。"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.runs import ROOT, write_run
from tests.trees import DAMAGE, DAYS, SPLITS, damage, rewrite, standardize_files
from util.calendar import parse_time, time_text
from util.commands.check import main
from util.data.tree_files import field_path

T0 = parse_time("2000-01-01")
CHANNELS = ("t2m", "tp", "z_level_00")
FOLDERS = ("t2m_npy", "tp_npy", "z_npy/level_00")


@pytest.fixture
def tree(make_tree, tmp_path: Path):
    return make_tree(tmp_path / "tree", CHANNELS, **DAYS)


def check(tree: Any, folder: Path, *overrides: str, workers: int = 1, **data: Any) -> tuple[int, dict[str, Any]]:
    """运行检查，返回退出码与 JSON 报告。"""
    config = write_run(folder, tree, data={"splits": SPLITS, **data})
    out = folder / "reports" / "check.json"
    status = main(["--config", str(config), *overrides, "--out", str(out), "--workers", str(workers)])
    return status, json.loads(out.read_text())


def channel_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [c for c in report["channels"] if c["channel"] == name]
    return found


@pytest.mark.parametrize("standardized", [False, True])
def test_a_good_tree(tree, tmp_path: Path, capsys: pytest.CaptureFixture[str], standardized: bool):
    if standardized:
        standardize_files(tree)
    status, report = check(tree, tmp_path)
    assert status == 0
    assert (report["ok"], report["files_expected"], report["files_bad"]) == (True, 144, 0)
    assert [c["channel"] for c in report["channels"]] == list(CHANNELS)
    for c, entry in enumerate(report["channels"]):
        values = tree.fields[:24, c].astype(np.float64)  # 训练段
        if standardized:
            whole = tree.fields[:, c].astype(np.float64)
            values = (values - whole.mean()) / whole.std()
        assert entry["measured"] == pytest.approx({"mean": values.mean(), "std": values.std()}, rel=1e-5, abs=1e-6)
        assert entry["files_are"] == ("standard" if standardized else "raw")
        assert (entry["expected"], entry["present"], entry["problems"]) == (48, 48, [])
        stated = json.loads((tree.root / FOLDERS[c] / "mean_std.json").read_text())
        assert entry["mean_std_json"] == {"mean": stated["mean"][0], "std": stated["std"][0]}
    printed = capsys.readouterr()
    assert "144 files of 3 channels checked: 0 bad, 0 channels with problems" in printed.out
    assert "check: 100%" in printed.err


def test_every_damage_is_counted_and_listed(tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made = {str(damage(tree, "tp", T0 + 12 * i, how)): (T0 + 12 * i, how) for i, how in enumerate(DAMAGE)}
    status, report = check(tree, tmp_path)
    assert status == 1
    assert not report["ok"]
    assert len(report["bad_files"]) == report["files_bad"] == len(DAMAGE)
    for bad in report["bad_files"]:
        hour, how = made.pop(bad["path"])
        _, fault, words = DAMAGE[how]
        assert (bad["channel"], bad["hour"], bad["time"], bad["fault"]) == ("tp", hour, time_text(hour), fault)
        assert words in bad["reason"]
    assert not made
    counts = Counter(fault for _, fault, _ in DAMAGE.values())
    entry = channel_of(report, "tp")
    for fault, number in counts.items():
        assert entry[re.sub("[ -]", "_", fault)] == number
        assert f"{number} {fault}" in entry["problems"]
    assert (entry["expected"], entry["present"]) == (48, 48 - counts["missing"])
    assert all(not channel_of(report, c)["problems"] for c in ("t2m", "z_level_00"))
    rows = {cells[0]: cells for line in capsys.readouterr().out.splitlines() if (cells := line.split())}
    assert rows["t2m"][1:9] == ["48", "48", "0", "0", "0", "0", "0", "0"]
    assert rows["t2m"][-1] == "ok"


def test_the_table_says_which_channel_is_wrong(tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for h in (6, 12, 18, 48):
        damage(tree, "t2m", T0 + h, "removed")
    check(tree, tmp_path)
    printed = capsys.readouterr().out
    assert re.search(r"^ +t2m +48 +44 +4 +0 +0 +0 +0 +0 .* raw +WRONG$", printed, re.M)
    assert re.search(r"^ +tp +48 +48 +0 +0 +0 +0 +0 +0 .* raw +ok$", printed, re.M)
    first = field_path(tree.root, "t2m", T0 + 6)
    assert f"t2m 2000-01-01T06 to 2000-01-01T18 (3 files): missing ({first}, ...)" in printed  # 相邻的并成一行
    assert f"t2m 2000-01-03T00: missing ({field_path(tree.root, 't2m', T0 + 48)})" in printed
    assert "t2m: 4 missing" in printed


def test_more_than_twenty_lines_are_cut(tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for hour in tree.hours[::2]:
        damage(tree, "t2m", hour, "removed")
    _, report = check(tree, tmp_path)
    assert "... and 4 more lines like these; --out FILE keeps every one" in capsys.readouterr().out
    assert len(report["bad_files"]) == 24


def test_a_missing_year_is_a_finding(tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.rmtree(tree.root / "tp_npy" / "2000")
    (tree.root / "z_npy/level_00/mean_std.json").write_text("{")
    damage(tree, "t2m", T0, "text")
    status, report = check(tree, tmp_path)
    assert status == 1
    entry = channel_of(report, "tp")
    assert (entry["present"], entry["missing"], entry["measured"], entry["files_are"]) == (0, 48, None, None)
    assert {b["reason"] for b in report["bad_files"] if b["channel"] == "tp"} == {
        f"missing (no folder {tree.root}/tp_npy/2000)"
    }
    assert "tp 2000-01-01T00 to 2000-01-12T18 (48 files): missing (no folder" in capsys.readouterr().out
    assert "malformed (JSONDecodeError" in channel_of(report, "z_level_00")["problems"][0]
    assert channel_of(report, "t2m")["problems"] == ["1 unreadable"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("mean_std.json", None, "mean_std.json: missing; expected"),
        ("mean_std.json", "[]", "mean_std.json: malformed (TypeError"),
        ("mean_std.json", '{"mean": [1], "std": [0]}', "std 0.0; expected"),
        ("min_max.json", "oops", "min_max.json: malformed (JSONDecodeError"),
        ("min_max.json", '{"min": [2], "max": [1]}', "min_max.json: min 2.0, max 1.0; expected"),
    ],
)
def test_bad_json_files(tree, tmp_path: Path, name: str, text: str | None, said: str):
    path = tree.root / "t2m_npy" / name
    path.unlink() if text is None else path.write_text(text)
    status, report = check(tree, tmp_path)
    assert status == 1
    (problem,) = channel_of(report, "t2m")["problems"]
    assert said in problem
    assert not report["bad_files"]


def test_min_max_may_be_absent(tree, tmp_path: Path):
    (tree.root / "t2m_npy/min_max.json").unlink()
    assert check(tree, tmp_path)[0] == 0


@pytest.mark.parametrize("choice", ["auto", "yes"])
def test_statistics_that_disagree(tree, tmp_path: Path, choice: str):
    (tree.root / "t2m_npy/mean_std.json").write_text('{"mean": [6.85], "std": [12.0]}')
    status, report = check(tree, tmp_path, f"data.standardize={choice}")
    assert status == 1
    entry = channel_of(report, "t2m")
    assert entry["files_are"] == "neither"
    (problem,) = entry["problems"]
    assert re.fullmatch(
        r"statistics disagree with the files \(measured mean 2\d\d.*, std 1.*; mean_std.json 6.85, 12\)", problem
    )


def test_one_channel_unlike_the_others(tree, tmp_path: Path):
    standardize_files(tree, "t2m")
    status, report = check(tree, tmp_path)
    assert status == 1
    assert "the files look standard, unlike other channels" in channel_of(report, "t2m")["problems"][0]
    assert not channel_of(report, "tp")["problems"]


def test_files_against_the_declared_state(tree, tmp_path: Path):
    status, report = check(tree, tmp_path, "data.standardize=no")
    assert status == 1
    assert all("look raw, against data.standardize = no" in c["problems"][0] for c in report["channels"])
    assert check(tree, tmp_path, "data.standardize=yes")[0] == 0


def test_files_that_look_both_ways(make_tree, tmp_path: Path):
    tree = make_tree(tmp_path / "tree", ("t2m",), **DAYS)
    standardize_files(tree)
    (tree.root / "t2m_npy/mean_std.json").write_text('{"mean": [0.0], "std": [1.0]}')
    status, report = check(tree, tmp_path)
    assert status == 1
    assert "set data.standardize to yes (files are raw) or no" in report["channels"][0]["problems"][0]
    assert check(tree, tmp_path, "data.standardize=no")[0] == 0


def test_only_sampled_hours_of_the_splits_are_read(make_tree, tmp_path: Path):
    tree = make_tree(tmp_path / "tree", ("t2m",), **DAYS, interval=1)
    for hour in tree.hours:
        if hour % 6 or hour >= parse_time("2000-01-11"):
            damage(tree, "t2m", hour, "removed")
    splits = {**SPLITS, "test": ["2000-01-10", "2000-01-10"]}
    assert check(tree, tmp_path, splits=splits, interval_hours=6)[1]["files_expected"] == 40
    status, report = check(tree, tmp_path, splits=splits, interval_hours=6)
    assert (status, report["files_bad"]) == (0, 0)
    assert check(tree, tmp_path, splits=splits, interval_hours=3)[1]["files_bad"] == 40


def test_statistics_are_those_of_the_training_dates(tree, tmp_path: Path):
    for hour in tree.hours[24:]:
        rewrite(field_path(tree.root, "t2m", hour), lambda f: f * 100)
    assert check(tree, tmp_path)[0] == 0


def test_processes_change_nothing(tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("util.inspection.check.FILES_PER_TASK", 7)
    for i, how in enumerate(DAMAGE):
        damage(tree, CHANNELS[i % 3], T0 + 18 * i, how)
    assert check(tree, tmp_path, workers=1) == check(tree, tmp_path, workers=2)


def test_one_value_and_the_implausible_are_told_but_kept(tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """干的降水是数据；一个点超出合理范围只提一句，范围可以写明。"""
    for i in range(3):
        rewrite(field_path(tree.root, "tp", T0 + 6 * i), lambda f: 0 * f)
    warm = field_path(tree.root, "t2m", parse_time("2000-01-08"))
    rewrite(warm, lambda f: np.where(np.arange(f.size).reshape(f.shape) % 10 == 5, np.float32(-9999), f))
    status, report = check(tree, tmp_path)
    assert (status, report["files_bad"]) == (0, 0)
    (dry,) = channel_of(report, "tp")["remarks"]
    assert dry == "3 files hold one value everywhere (0 in 3; first 2000-01-01T00)"
    (far,) = channel_of(report, "t2m")["remarks"]
    assert far.startswith("1 files with 3 points outside 150 to 350 (lowest -9999, highest ")
    assert "first 2000-01-08T00" in far
    printed = capsys.readouterr().out
    assert f"t2m: {far}" in printed
    assert re.search(r"^ +t2m .* raw +ok, 1 outside$", printed, re.M)
    assert "0 bad, 0 channels with problems, 1 files with points outside the plausible range" in printed
    assert channel_of(report, "t2m")["files_outside"] == 1
    assert not channel_of(check(tree, tmp_path, "data.valid_range.t2m=[-1e5, 1e5]")[1], "t2m")["remarks"]


def test_a_code_inside_the_range_is_data(tree, tmp_path: Path):
    rewrite(field_path(tree.root, "z_level_00", parse_time("2000-01-08")), lambda f: 0 * f + 9999)
    status, report = check(tree, tmp_path)
    assert (status, report["files_bad"]) == (0, 0)
    assert "hold one value everywhere (9999 in 1;" in channel_of(report, "z_level_00")["remarks"][0]
    status, report = check(tree, tmp_path, "data.valid_range.z=[2e4, 5e5]")
    assert (status, report["bad_files"][0]["fault"]) == (1, "fill value")


def test_fills_that_were_standardised_with_the_data(tree, tmp_path: Path):
    """已标准化的树：填充值也许跟着标准化了，也许没有，都认得。"""
    standardize_files(tree)
    mean, std = (json.loads((tree.root / "t2m_npy/mean_std.json").read_text())[key][0] for key in ("mean", "std"))
    for i, value in enumerate((9.96921e36, -9999, (9.96921e36 - mean) / std, (-9999 - mean) / std)):
        rewrite(field_path(tree.root, "t2m", T0 + 12 * i), lambda f, value=value: 0 * f + np.float32(value))
    _, report = check(tree, tmp_path)
    assert [(b["hour"] - T0, b["fault"]) for b in report["bad_files"]] == [(12 * i, "fill value") for i in range(4)]
    hot = (400 - mean) / std
    rewrite(field_path(tree.root, "t2m", T0 + 18), lambda f: np.where(np.arange(4)[:, None] == 2, np.float32(hot), f))
    (far,) = channel_of(check(tree, tmp_path)[1], "t2m")["remarks"]
    assert far.startswith(f"1 files with 8 points outside {(150 - mean) / std:.4g} to ")


# ---- 命令行


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "dataset.py", "check", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_exit_status_of_the_command(tree, tmp_path: Path):
    config = str(write_run(tmp_path, tree, data={"splits": SPLITS}))
    good = run("--config", config, "--workers", "1")
    assert (good.returncode, "0 bad" in good.stdout) == (0, True), good.stderr
    damage(tree, "t2m", T0, "removed")
    bad = run("--config", config, "--workers", "1")
    assert (bad.returncode, "1 bad" in bad.stdout) == (1, True)
    wrong = run("--config", config, "data.intervall_hours=6")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines() == [
        f"error: {config}: unknown key data.intervall_hours = 6; nearest: data.interval_hours"
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data.root=nowhere"], "data.root nowhere is not a directory"),
        (["data.variables.tp=all"], "data.variables.tp = all: no levels in"),
        (["data.splits.val=[2000-01-01, 2000-01-02]"], "overlaps data.splits.train"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--out", "{folder}/run.yaml/x.json"], "--out {folder}/run.yaml/x.json: cannot be written"),
    ],
)
def test_user_mistakes(tree, tmp_path: Path, arguments: list[str], said: str):
    config = str(write_run(tmp_path, tree, data={"splits": SPLITS}))
    arguments = [a.format(folder=tmp_path) if a.startswith("{") else a for a in arguments]
    with pytest.raises(ValueError, match=re.escape(said.format(folder=tmp_path))):
        main(["--config", config, *arguments])


def test_needs_no_torch():
    """几小时的检查在没有显卡的机器上走，开着几个进程；不必各占 torch 的内存。"""
    code = "import sys, util.inspection.check; print({'torch', 'xarray', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr
