"""从存档读与从目录树读：窗口、段、日志、报错逐位相同；存档没有的，一行说清；xarray 打得开。"""

from __future__ import annotations

import json
import logging
import os
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from engine.forecasting.inputs import read_tree
from engine.one_pass import training_fingerprint
from tests.engine.runs import write_run
from tests.trees import DAYS, config_of, damage, standardize_files
from tests.util.packing.stores import assert_same, compare, from_store, outcomes, pack_small, shuffled_windows, spoil
from util.calendar import moment_of, parse_time
from util.data import resident as residency
from util.data.dataset import open_data
from util.data.feed import make_loader
from util.data.tree_files import field_path, read_mean_std

T0 = parse_time("2000-01-01")
CHANNELS = ("t2m", "z_level_00", "z_level_01")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # 核少的机器上


@pytest.fixture
def tree(make_tree, tmp_path: Path):
    return make_tree(tmp_path / "tree", CHANNELS, **DAYS)


# ---- 与目录树逐位相同


def test_a_whole_tree(tree, tmp_path: Path):
    config = config_of(tree)
    _, store = compare(config, pack_small(config, tmp_path / "store"))
    batch = store.windows.__getitems__([T0 + 6])
    mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (store.spec.mean, store.spec.std))
    expected = (torch.from_numpy(tree.fields[1:4]) - mean) / std  # 独立于读取器写一遍
    assert torch.equal(batch.history[0], expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("interval", [1, 6])
def test_gaps_and_broken_files(make_tree, tmp_path: Path, seed: int, interval: int):
    """随机的缺与坏，逐小时的邻居；成串的坏文件使插值报错时，报的也是同一句。"""
    days = {**DAYS, "last_day": "2000-01-12"}
    tree = make_tree(tmp_path / "tree", CHANNELS[:2], **days, interval=interval, seed=seed)
    spoil(tree, seed, len(tree.hours) // 6)
    config = config_of(tree, interval_hours=6, max_gap_hours=[4, 12, 24][seed % 3], frames_in=1 + seed % 3)
    compare(config, pack_small(config, tmp_path / "store"), seed)


def test_history_does_not_see_the_future(make_tree, tmp_path: Path):
    """最后一帧历史缺了、逐小时的邻居在初始时刻之后；序列开头缺到历史末尾。"""
    tree = make_tree(tmp_path / "tree", CHANNELS[:2], **DAYS, interval=1)
    for hour in (12, 30, 31, 42):
        damage(tree, "t2m", T0 + hour, "removed")
    for hour in range(13):
        damage(tree, "z_level_00", T0 + hour, "removed")
    config = config_of(tree, interval_hours=6)
    _, store = compare(config, pack_small(config, tmp_path / "store"))
    assert store.windows[T0].valid[0].tolist() == [[True, False], [True, False], [False, False], [True, False]]


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_processes(tree, tmp_path: Path, workers: int):
    spoil(tree, 1, 4)
    config = config_of(tree)
    results = []
    for source in (config, pack_small(config, tmp_path / "store")):
        data = open_data(source)
        results.append(list(make_loader(data.windows, shuffled_windows(data), workers, pin=False)))
    assert_same(*results)


def test_the_log_and_missing_csv_are_the_same(tree, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for h in range(48, 90, 6):
        damage(tree, "z_level_01", T0 + h, "removed")  # 补不上的空缺
    for hour, how in ((12, "removed"), (30, "text"), (36, "not a number"), (150, "double")):
        damage(tree, "t2m", T0 + hour, how)
    config = config_of(tree)
    packed = pack_small(config, tmp_path / "store")
    said, reports = [], []
    for source in (config, packed):
        caplog.clear()
        caplog.set_level(logging.INFO, "ar_pred")
        report = tmp_path / "missing.csv"
        data = open_data(source, report)
        outcomes(data, shuffled_windows(data))
        said.append([record.getMessage() for record in caplog.records])
        reports.append(report.read_text())
    store_line = f"store: {tmp_path}/store, float32, 2000, packed from {tree.root}"
    assert said[1] == [store_line, *said[0]]
    assert reports[0] == reports[1]
    assert sum("interpolated where needed" in line for line in said[0]) == 4


def test_too_many_broken_files_stop_in_the_same_words(tree, tmp_path: Path):
    for i in range(2, 40, 3):
        damage(tree, "t2m", T0 + 6 * i, "text")
    config = config_of(tree)
    packed = pack_small(config, tmp_path / "store")
    strict = {"max_missing": 0.1}
    tree_data, store_data = (open_data(c.model_copy(update=strict)) for c in (config, packed))
    windows = shuffled_windows(tree_data)
    found, expected = outcomes(store_data, windows), outcomes(tree_data, windows)
    assert any(isinstance(result, str) and "above data.max_missing = 0.1" in result for result in expected)
    assert_same(found, expected)


def test_files_already_standardised(tree, tmp_path: Path):
    standardize_files(tree)
    damage(tree, "t2m", T0 + 12, "removed")
    config = config_of(tree)
    _, store = compare(config, pack_small(config, tmp_path / "store"))
    assert store.spec.standardized


def test_local_time(tree, tmp_path: Path):
    config = config_of(tree, utc_offset_hours=8)
    packed = pack_small(config, tmp_path / "store")
    compare(config, packed)
    with xr.open_zarr(tmp_path / "store", chunks=None) as dataset:
        assert dataset.time.values[0] == np.datetime64("1999-12-31T16")


@pytest.mark.parametrize("workers", [0, 1])
def test_in_memory(tree, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch):
    """同样的窗口；先读进来的恰好是所选通道、三个划分的字节；放不下就不开始。"""
    config = config_of(tree, variables={"z": ["level_01"], "t2m": "single"})
    pack_small(config_of(tree), tmp_path / "store")
    packed = from_store(config, tmp_path / "store", residency="memory")
    read: list[int] = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *a: (read.append(a[1]), real(*a))[1])
    results = []
    for source in (config, packed):
        data = open_data(source, device=torch.device("cpu"))
        results.append(list(make_loader(data.windows, shuffled_windows(data), workers, pin=False)))
    assert_same(*results)
    kept = sum(data.samples(split) for split in ("train", "val"))
    assert read == [4 * 8 * 4] * 2 * kept
    open_data(packed)  # 只读一遍的用途不必
    assert len(read) == 2 * kept
    pack_small(from_store(config_of(tree), tmp_path / "store", residency="memory"), tmp_path / "store")  # 打包只看树
    (tmp_path / "meminfo").write_text("MemTotal:  99 kB\nMemAvailable:      8 kB\n")
    monkeypatch.setattr(residency, "MEMINFO", tmp_path / "meminfo")
    with pytest.raises(ValueError, match=r"residency = memory needs 0.00 GB, 0.00 GB of memory are available"):
        open_data(packed, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="residency = memory needs source = store"):
        config_of(tree, residency="memory")


# ---- 训练与预报用它


def test_forecasts_start_from_it(tree, tmp_path: Path):
    """inference --time：历史、真值、valid 与从目录树读的相同，空缺与树的末端也一样。"""
    damage(tree, "t2m", T0 + 60, "removed")
    damage(tree, "z_level_00", T0 + 72, "text")
    config = config_of(tree)
    packed = pack_small(config, tmp_path / "store")
    spec = open_data(config).spec
    for init in (T0 + 12, T0 + 60, T0 + 66, T0 + 72, tree.hours[-1]):
        found, expected = (read_tree(source, spec, init, 2) for source in (packed, config))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) if a is not None and b is not None else a is b
    for init, said in ((T0 - 24 * 40, "lacks history at"), (T0 + 1, "is sampled every 6 h")):
        with pytest.raises(ValueError, match=said):
            read_tree(packed, spec, init, 2)


def test_baselines_notice_another_store(tree, tmp_path: Path):
    """气候态的缓存以训练数据的指纹为名：存档的内容变了，指纹就变。"""
    config = config_of(tree)
    packed = pack_small(config, tmp_path / "store")
    first = training_fingerprint(open_data(packed))
    assert training_fingerprint(open_data(packed)) == first
    np.save(field_path(tree.root, "t2m", T0 + 12), tree.fields[0, 0])
    shutil.rmtree(tmp_path / "store")
    pack_small(config, tmp_path / "store")
    assert training_fingerprint(open_data(packed)) != first


# ---- 别的工具


def test_xarray_opens_it(tree, tmp_path: Path):
    damage(tree, "t2m", T0 + 30, "removed")
    for h in range(96, 126, 6):
        damage(tree, "z_level_01", T0 + h, "text")
    pack_small(config_of(tree), tmp_path / "store")
    with xr.open_zarr(tmp_path / "store", chunks=None) as dataset:
        assert dataset.fields.dims == ("time", "channel", "latitude", "longitude")
        assert dataset.fields.dtype == np.float32
        assert dataset.channel.values.tolist() == list(CHANNELS)
        assert dataset.units.values.tolist() == ["K", "m2 s-2", "m2 s-2"]
        assert np.array_equal(dataset.pressure, [np.nan, 50.0, 1000.0], equal_nan=True)
        assert dataset.latitude.values.tolist() == [67.5, 22.5, -22.5, -67.5]
        assert (dataset.latitude.units, dataset.longitude.units) == ("degrees_north", "degrees_east")
        assert [*zip(dataset["mean"].values, dataset["std"].values, strict=True)] == [
            read_mean_std(tree.root, c) for c in CHANNELS
        ]
        assert dataset.attrs["source"] == str(tree.root)
        assert dataset.attrs["history"] == "python dataset.py pack ..."
        assert dataset.attrs["interval_hours"] == 6
        there = dataset.sel(time=[np.datetime64(moment_of(h)) for h in tree.hours])
        physical = (there.fields * there["std"] + there["mean"]).transpose(*dataset.fields.dims).values
        valid = there.valid.values
    expected_valid = np.ones((len(tree.hours), 3), dtype=bool)
    expected_valid[5, 0] = False
    expected_valid[16:21, 2] = False
    assert np.array_equal(valid, expected_valid)
    np.testing.assert_allclose(physical[valid], tree.fields[valid], rtol=3e-6)
    np.testing.assert_allclose(physical[5, 0], tree.fields[[4, 6], 0].mean(axis=0), rtol=3e-6)
    assert np.isnan(physical[16:21, 2]).all()  # 两侧相距超过 max_gap_hours，补不上
    gaps = json.loads((tmp_path / "store/store.json").read_text())["gaps"]
    assert [0, T0 + 30, [T0 + 24, T0 + 36]] in gaps
    assert [2, T0 + 96, []] in gaps


# ---- 半精度


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_half_precision(tree, tmp_path: Path, dtype: str, bits: int, caplog: pytest.LogCaptureFixture):
    """窗口恰好是目录树的窗口舍入到 dtype；误差如实报告，不超过有效位数给的界。"""
    damage(tree, "t2m", T0 + 30, "removed")
    caplog.set_level(logging.INFO, "ar_pred")
    config = config_of(tree)
    packed = pack_small(config, tmp_path / "store", dtype)
    tree_data, store_data = open_data(config), open_data(packed)
    kind = getattr(torch, dtype)
    for found, expected in zip(
        *(outcomes(d, shuffled_windows(tree_data)) for d in (store_data, tree_data)), strict=True
    ):
        assert not isinstance(found, str)
        assert not isinstance(expected, str)
        assert torch.equal(found.history, expected.history.to(kind).float())
        assert torch.equal(found.future, expected.future.to(kind).float())
        assert torch.equal(found.valid, expected.valid)
    attributes = json.loads((tmp_path / "store/fields/.zattrs").read_text())
    exact = torch.stack([torch.from_numpy(tree_data.windows.reader.frame(h).fields) for h in tree.hours])
    error = (exact.to(kind).double() - exact.double()).abs()
    for c, channel in enumerate(CHANNELS):
        largest, rms = (attributes[f"rounding_error_{k}"][c] for k in ("max", "rms"))
        assert 0 < rms < largest <= 2.0**-bits * float(exact[:, c].abs().max())
        if c:  # t2m 的两端还有沿用的几行
            assert largest == float(error[:, c].max())
        assert f"{channel}: rounding to {dtype}, max {largest:.3g}, rms {rms:.3g} standard deviations" in caplog.text
    with xr.open_zarr(tmp_path / "store", chunks=None) as dataset:
        first = dataset.fields.sel(time=np.datetime64(moment_of(T0))).values
    if dtype == "bfloat16":  # 属性里说明的读法
        first = (first.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(first.astype(np.float32), exact[0].to(kind).float().numpy())


def test_a_value_too_large_for_half_precision(tree, tmp_path: Path):
    (tree.root / "t2m_npy/mean_std.json").write_text('{"mean": [0.0], "std": [1e-3]}')
    assert field_path(tree.root, "t2m", T0).is_file()
    config = config_of(tree, standardize="yes")
    with pytest.raises(ValueError, match=r"t2m: a standardised value of \d.* does not fit into float16; pack with"):
        pack_small(config, tmp_path / "store", "float16")
    with pytest.raises(ValueError, match="is not complete"):
        open_data(from_store(config, tmp_path / "store"))


def test_the_benchmark_runs(tree, tmp_path: Path, monkeypatch, capsys):
    """各种读法都在，比值与速度对得上。"""
    config = write_run(tmp_path, tree, data={**config_of(tree).model_dump(), "store": str(tmp_path / "store")})
    pack_small(config_of(tree), tmp_path / "store")
    options = ["--config", str(config), "--windows", "6", "--rounds", "1", "--batch", "4", "--cold"]
    monkeypatch.setattr("sys.argv", ["loader", *options])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("benchmarks.loader", run_name="__main__")
    rows = {line.split()[0]: [float(v) for v in line.split()[1:5]] for line in capsys.readouterr().out.splitlines()[2:]}
    assert list(rows) == ["plain", "tree", "scaled", "store", "new", "memcpy", "device", "disk"]
    for rate, _, to_plain, to_memcpy in rows.values():
        assert abs(to_plain - rate / rows["plain"][0]) < 0.02 * (1 + to_plain)
        assert abs(to_memcpy - rate / rows["memcpy"][0]) < 0.02
