"""统计量的命令与 NumPy 一次算的相同；几个进程都一样；已有的、已标准化的不写。"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.engine.runs import write_run
from tests.trees import DAYS, SPLITS, config_of, damage, standardize_files
from util.commands.statistics import main
from util.inspection import statistics
from util.inspection.statistics import channel_statistics

CHANNELS = ("t2m", "z_level_00")


@pytest.fixture
def tree(make_tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(statistics, "BLOCK_BYTES", 5 * 4 * 8 * 4)  # 每块 5 个场
    return make_tree(tmp_path / "tree", CHANNELS, **DAYS)


def command(tree: Any, tmp_path: Path, **changes: Any) -> list[str]:
    path = write_run(tmp_path, tree)
    values = yaml.safe_load(path.read_text())
    values["data"].update({"splits": SPLITS, "pressure_hpa": [50.0], **changes})
    path.write_text(yaml.safe_dump(values))
    return ["--config", str(path), "--workers", "1"]


def training(tree: Any, c: int, without: tuple[int, ...] = ()) -> np.ndarray:
    """前六天 24 个时刻，去掉几个。"""
    return np.delete(tree.fields[:24, c], without, axis=0).astype(np.float64)


def test_against_numpy(tree, tmp_path: Path):
    """缺的、坏的略去；别的划分不算；大的文件头、多个进程都一样。"""
    damage(tree, "t2m", tree.hours[3], "removed")
    damage(tree, "t2m", tree.hours[10], "not a number")
    damage(tree, "t2m", tree.hours[11], "text")
    config = config_of(tree)
    results = channel_statistics(config)
    for c, (channel, without) in enumerate(zip(CHANNELS, ((3, 10, 11), ()), strict=True)):
        moments, faults = results[channel]
        values = training(tree, c, without)
        assert moments.total == values.size
        np.testing.assert_allclose((moments.mean, moments.std), (values.mean(), values.std()), rtol=1e-12)
        assert (moments.low, moments.high) == (values.min(), values.max())
        assert faults.total() == len(without)
    assert results["t2m"].faults == {"missing": 1, "non-finite": 1, "unreadable": 1}
    assert channel_statistics(config, workers=3) == results  # 逐位


def test_write(tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = command(tree, tmp_path)
    with pytest.raises(ValueError, match=r"t2m_npy.mean_std.json exists already; give --overwrite"):
        main([*words, "--write"])
    for file in tree.root.rglob("*.json"):
        file.unlink()
    assert main(words) == 0  # 只印
    assert not list(tree.root.rglob("*.json"))
    assert main([*words, "--write"]) == 0
    out = capsys.readouterr().out
    assert "mean_std.json and min_max.json of 2 channels written to" in out
    for c, folder in enumerate(("t2m_npy", "z_npy/level_00")):
        values = training(tree, c)
        pair = json.loads((tree.root / folder / "mean_std.json").read_text())
        np.testing.assert_allclose((pair["mean"][0], pair["std"][0]), (values.mean(), values.std()), rtol=1e-12)
        limits = json.loads((tree.root / folder / "min_max.json").read_text())
        assert limits == {"min": [values.min()], "max": [values.max()]}
    main([*words, "--write", "--overwrite"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[0] == "t2m")
    mean, std = (f"{f(training(tree, 0)):.6g}" for f in (np.mean, np.std))
    assert line.split()[1:8] == ["24", "0", "0", mean, mean, std, std]
    assert line.split()[-1] == "raw"


def test_overwrite_without_write(tree, tmp_path: Path):
    with pytest.raises(ValueError, match="--overwrite needs --write; without it nothing is written"):
        main([*command(tree, tmp_path), "--overwrite"])


def test_standardised_files_keep_their_statistics(tree, tmp_path: Path):
    standardize_files(tree)
    before = (tree.root / "t2m_npy/mean_std.json").read_text()
    for value in ("auto", "no"):
        with pytest.raises(ValueError, match="t2m: the files are standardised already"):
            main([*command(tree, tmp_path, standardize=value), "--write", "--overwrite"])
    assert (tree.root / "t2m_npy/mean_std.json").read_text() == before


def test_what_cannot_be_measured(tree, tmp_path: Path):
    with pytest.raises(ValueError, match="data.source = store: the statistics are of the files in a tree"):
        main([*command(tree, tmp_path, source="store", store="s")])
    for hour in tree.hours[:24]:
        damage(tree, "t2m", hour, "removed")
    assert main(command(tree, tmp_path)) == 0
    with pytest.raises(ValueError, match="t2m: no finite field in the training dates 2000-01-01 to 2000-01-06"):
        main([*command(tree, tmp_path), "--write", "--overwrite"])
