"""统计量的命令与 NumPy 一次算的相同；几个进程都一样；已有的、已标准化的不写。"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import yaml

from tests.engine.runs import write_run
from tests.holding import held_elsewhere
from tests.trees import DAYS, SPLITS, config_of, damage, standardize_files
from tests.util.packing.stores import pack_small
from util.atomic import temporary_name
from util.commands.statistics import main
from util.data.tree_files import Tendency, read_mean_std, read_tendency
from util.exchange.export import export
from util.inspection import statistics
from util.inspection.statistics import channel_statistics
from util.packing.verify import verify

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
        moments, faults, _ = results[channel]
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
    with held_elsewhere(tree.root / "z_npy"):  # 一次导入正在写
        assert main(words) == 0  # 只印
        with pytest.raises(ValueError, match=r"z_npy is in use by process .*; wait for it to end"):
            main([*words, "--write"])
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
    left = [tree.root / folder / temporary_name("mean_std.json") for folder in ("t2m_npy", "z_npy/level_00")]
    for path in left:  # 上一次被杀时留下的
        path.touch()
    main([*words, "--write", "--overwrite"])
    assert not any(path.exists() for path in left)
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


def changes_of(tree: Any, c: int, lost: tuple[int, ...] = ()) -> np.ndarray:
    """写开的循环：前六天里相邻两刻、两个文件都好的差。"""
    fields = tree.fields[:24, c].astype(np.float64)
    return np.stack([fields[i + 1] - fields[i] for i in range(23) if not {i, i + 1} & set(lost)])


def tendency_of(tree: Any, folder: str) -> list[Any]:
    values = json.loads((tree.root / folder / "mean_std.json").read_text())
    return [values.get("tendency_std"), values.get("tendency_hours")]


def test_tendency_against_a_loop(tree, tmp_path: Path):
    """缺的、坏的文件两侧的差不算，恰在块的边上的也不算；别的统计量照旧。"""
    lost = (4, 5, 10, 23)  # 每块 5 个
    damage(tree, "t2m", tree.hours[4], "removed")
    damage(tree, "t2m", tree.hours[5], "not a number")
    damage(tree, "t2m", tree.hours[10], "text")
    damage(tree, "t2m", tree.hours[23], "removed")
    config = config_of(tree)
    found, plain = channel_statistics(config, tendency=True), channel_statistics(config)
    for c, (channel, without) in enumerate(zip(CHANNELS, (lost, ()), strict=True)):
        changes = changes_of(tree, c, without)
        assert found[channel].changes.total == changes.size
        np.testing.assert_allclose(found[channel].changes.std, changes.std(), rtol=1e-12)
        assert found[channel][:2] == plain[channel][:2]
        assert plain[channel].changes.total == 0
    assert channel_statistics(config, 3, tendency=True) == found  # 逐位


def test_tendency_is_written_beside_mean_and_std(tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """重算别的统计量时，已有的变化的标准差跟着重算：日期换了，不丢，也不留下旧的。"""
    words = [*command(tree, tmp_path), "--write", "--overwrite"]
    assert main(words) == 0
    assert tendency_of(tree, "t2m_npy") == [None, None]
    assert main([*words, "--tendency"]) == 0
    assert "std of 6 h change" in capsys.readouterr().out
    for c, folder in enumerate(("t2m_npy", "z_npy/level_00")):
        (std,), hours = tendency_of(tree, folder)
        np.testing.assert_allclose(std, changes_of(tree, c).std(), rtol=1e-12)
        assert hours == [6]
    words = command(tree, tmp_path, splits={**SPLITS, "train": ["2000-01-01", "2000-01-03"]})
    assert main([*words, "--write", "--overwrite"]) == 0
    fields = tree.fields[:12, 0].astype(np.float64)
    np.testing.assert_allclose(tendency_of(tree, "t2m_npy")[0], np.diff(fields, axis=0).std(), rtol=1e-12)


def test_tendency_of_standardised_files_is_physical(tree, tmp_path: Path):
    """文件已经标准化：均值、标准差只有 json 里有，照旧；变化的标准差乘回单位。"""
    before = [read_mean_std(tree.root, channel) for channel in CHANNELS]
    standardize_files(tree)
    assert main([*command(tree, tmp_path), "--tendency", "--write", "--overwrite"]) == 0
    assert [read_mean_std(tree.root, channel) for channel in CHANNELS] == before
    for c, channel in enumerate(CHANNELS):
        tendency = read_tendency(tree.root, channel)
        assert tendency is not None
        np.testing.assert_allclose(tendency.std, changes_of(tree, c).std(), rtol=1e-5)


def test_tendency_travels_through_a_store(tree, tmp_path: Path):
    """先打包，后来才算的：再打包一次就有，块不重做；导出写回，没有的通道仍没有。"""
    config = config_of(tree)
    pack_small(config, tmp_path / "store")
    chunk = tmp_path / "store/fields/0.0.0.0"
    packed = chunk.stat().st_mtime_ns
    values = json.loads((tree.root / "t2m_npy/mean_std.json").read_text())
    (tree.root / "t2m_npy/mean_std.json").write_text(
        json.dumps({**values, "tendency_std": [1.5], "tendency_hours": [6]})
    )
    pack_small(config, tmp_path / "store")
    assert chunk.stat().st_mtime_ns == packed
    assert not verify(tmp_path / "store", 1)
    with xr.open_zarr(tmp_path / "store") as store:
        np.testing.assert_array_equal(store.tendency_std, [1.5, np.nan])
    export(tmp_path / "store", tmp_path / "again", None)
    assert read_tendency(tmp_path / "again", "t2m") == Tendency(1.5, 6)
    assert read_tendency(tmp_path / "again", "z_level_00") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('"tendency_std": [2.0]', r"malformed \(KeyError: 'tendency_hours'\); expected"),
        ('"tendency_std": [0], "tendency_hours": [6]', "tendency_std 0.0, tendency_hours 6.0; expected"),
        ('"tendency_std": [1], "tendency_hours": [1.5]', "tendency_hours 1.5; expected"),
    ],
)
def test_malformed_tendency(tree, text: str, said: str):
    (tree.root / "t2m_npy/mean_std.json").write_text(f'{{"mean": [0], "std": [1], {text}}}')
    with pytest.raises(ValueError, match=said):
        read_tendency(tree.root, "t2m")


def test_nothing_changes(tree, tmp_path: Path):
    for hour in tree.hours[:24:2]:
        damage(tree, "t2m", hour, "removed")
    with pytest.raises(ValueError, match="t2m, change over 6 h: no finite field in the training dates"):
        main([*command(tree, tmp_path), "--tendency", "--write", "--overwrite"])
