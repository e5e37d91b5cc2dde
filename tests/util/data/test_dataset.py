"""打开数据：说明书、样本数、日志；坏输入一行说清。"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trees import DAYS, SHAPE, SPLITS, config_of, damage
from util.batch import DataSpec
from util.calendar import parse_time
from util.data.dataset import open_data
from util.data.origin import DataError
from util.data.tree_files import StaticField, field_path, read_mean_std, write_static

T0 = parse_time("2000-01-01")
CHANNELS = ("t2m", "z_level_00", "z_level_01")


@pytest.fixture
def tree(make_tree, tmp_path: Path):
    return make_tree(tmp_path / "tree", CHANNELS, **DAYS)


def refused(tree: Any, said: str, **changes: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        open_data(config_of(tree, **changes))


def test_spec(tree, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "ar_pred")
    data = open_data(config_of(tree, units={"z": "m"}))
    spec = data.spec
    assert spec.channels == CHANNELS
    assert spec.units == ("K", "m", "m")  # 配置里的盖过变量表
    assert spec.pressures == (None, 50.0, 1000.0)
    assert spec.latitudes == (67.5, 22.5, -22.5, -67.5)
    assert spec.longitudes == tuple(np.arange(0.0, 360.0, 45.0))
    assert (spec.height, spec.width, spec.window, spec.interval_hours) == (4, 8, 4, 6)
    assert list(zip(spec.mean, spec.std, strict=True)) == [read_mean_std(tree.root, c) for c in CHANNELS]
    assert {split: data.samples(split) for split in SPLITS} == {"train": 24, "val": 12, "test": 12}
    said = "samples: train 24 in 1 segment(s), val 12 in 1 segment(s), test 12 in 1 segment(s)"
    assert f"data: {tree.root}; 3 channels, 4 x 8; {said}" in caplog.text


def test_forcings_and_roles_in_the_spec(tree):
    """static/NAME 按自己的均值与标准差标准化；变量名管它的各层，通道名的先于它。"""
    field = np.random.default_rng(0).normal(500, 300, SHAPE).astype(np.float32)
    config = config_of(tree, forcings=["static/oro", "solar"], roles={"z": "diagnostic", "z_level_01": "prognostic"})
    write_static(tree.root, "oro", StaticField(field, "m"), config.latitude, config.longitude)
    spec = open_data(config).spec
    assert (spec.forcings, spec.diagnostic) == (("static/oro", "solar"), ("z_level_00",))
    expected = (field - field.mean(dtype=np.float64)) / field.std(dtype=np.float64)
    np.testing.assert_allclose(spec.static["static/oro"], expected, rtol=1e-5, atol=1e-6)
    assert DataSpec.from_dict(spec.to_dict()) == spec
    old = {key: value for key, value in spec.to_dict().items() if key not in ("forcings", "diagnostic")}
    assert DataSpec.from_dict(old) == spec.bare  # 从前的检查点没有这两项
    refused(tree, "data.forcings = static/or: not in", forcings=["static/or"])
    refused(tree, "nearest: static/oro (python dataset.py import --static adds one)", forcings=["static/or"])
    write_static(tree.root, "flat", StaticField(0 * field + 2, "m"), config.latitude, config.longitude)
    refused(tree, "data.forcings = static/flat: 2 everywhere in", forcings=["static/flat"])


@pytest.mark.parametrize("channels", [("t2m",), ("z_level_00",), ("v10", "t2m"), ("r_level_00", "u10")])
def test_any_channels_in_the_order_of_the_config(make_tree, tmp_path: Path, channels: tuple[str, ...]):
    tree = make_tree(tmp_path / "tree", channels, **DAYS)
    data = open_data(config_of(tree))
    assert data.spec.channels == channels
    assert data.windows[T0].history.shape == (1, 3, len(channels), 4, 8)


@pytest.mark.parametrize(("interval", "samples"), [(1, 144), (3, 48), (6, 24), (24, 6)])
def test_sampling_of_an_hourly_tree(make_tree, tmp_path: Path, interval: int, samples: int):
    tree = make_tree(tmp_path / "tree", ("t2m",), **DAYS, interval=1)
    data = open_data(config_of(tree, interval_hours=interval, frames_in=1))
    assert data.samples("train") == samples
    assert (np.diff(data.segments["train"][0]) == interval).all()


def test_years_follow_one_another(make_tree, tmp_path: Path):
    """窗口跨年（闰年的最后一个文件到下一年的第一个）。"""
    tree = make_tree(tmp_path / "tree", ("t2m",), shape=(4, 8), first_day="2000-12-28", last_day="2001-01-08")
    splits = {
        "train": ["2000-12-28", "2001-01-02"],
        "val": ["2001-01-03", "2001-01-05"],
        "test": ["2001-01-06", "2001-01-08"],
    }
    data = open_data(config_of(tree, splits=splits))
    assert [s.size for s in data.segments["train"]] == [24]
    start = parse_time("2000-12-31T12")
    assert field_path("r", "t2m", start + 6).name == "2000-8778.npy"
    fields = data.spec.to_physical(data.windows[start].history)[0, :, 0].numpy()
    i = tree.hours.index(start)
    np.testing.assert_allclose(fields, tree.fields[i : i + 3, 0], rtol=3e-6)


# ---- 空缺


def test_a_long_gap_is_logged_and_ends_a_segment(tree, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for h in range(48, 78, 6):
        damage(tree, "z_level_01", T0 + h, "removed")
    data = open_data(config_of(tree), tmp_path / "missing.csv")
    assert [s.size for s in data.segments["train"]] == [8, 11]
    said = "gap not bridged, train: 2000-01-03T00 to 2000-01-04T00 (5 samples), no file of z_level_01"
    assert said in caplog.text
    assert (tmp_path / "missing.csv").read_text() == "channel,time,path,reason\n"  # 段外的不算缺失


def test_many_gaps_become_a_summary(make_tree, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tree = make_tree(tmp_path / "tree", ("t2m",), shape=(4, 8), last_day="2000-02-12")
    for i in range(2, 122, 5):
        damage(tree, "t2m", tree.hours[i], "removed")
    splits = {
        "train": ["2000-01-01", "2000-01-31"],
        "val": ["2000-02-01", "2000-02-06"],
        "test": ["2000-02-07", "2000-02-12"],
    }
    open_data(config_of(tree, splits=splits, max_gap_hours=6))
    lines = [r.getMessage() for r in caplog.records if "bridged" in r.getMessage()]
    assert len(lines) == 21
    assert lines[-1] == "... and 4 more gaps not bridged"


def test_missing_files_above_the_default_limit_stop_at_once(tree):
    for h in (6, 18):
        damage(tree, "t2m", T0 + h, "removed")
    with pytest.raises(
        DataError, match=r"t2m: 2 of 48 files .*above data.max_missing = 0.01 .*2000-0006.npy, 2000-0018"
    ):
        open_data(config_of(tree, max_missing=0.01))


# ---- 坏输入


def test_empty_split(tree):
    for h in range(6 * 24, 9 * 24, 6):
        damage(tree, "t2m", T0 + h, "removed")
    refused(tree, f"data.splits.val = ['2000-01-07', '2000-01-09']: empty, no samples there (root {tree.root})")


def test_split_of_dates_without_files(tree):
    later = {**SPLITS, "test": ["2000-06-01", "2000-06-30"]}
    refused(tree, "data.splits.test = ['2000-06-01', '2000-06-30']: empty, no samples there", splits=later)


def test_split_of_another_year(tree):
    later = {**SPLITS, "test": ["2001", "2001"]}
    refused(tree, f"channel t2m: no year 2001 (looked for {tree.root}/t2m_npy/2001)", splits=later)


@pytest.mark.parametrize(("frames_in", "frames_out"), [(12, 1), (11, 2), (40, 1)])
def test_fewer_samples_than_a_window(tree, frames_in: int, frames_out: int):
    open_data(config_of(tree, frames_in=11))
    longest, split = (24, "train") if frames_in > 24 else (12, "val")
    refused(
        tree,
        f"data.splits.{split} = {SPLITS[split]}: the longest run without a gap has {longest} samples, "
        f"a window needs data.frames_in + data.frames_out = {frames_in + frames_out}",
        frames_in=frames_in,
        frames_out=frames_out,
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"pressure_hpa": [50.0]},
            "data.pressure_hpa has 1 entries, but z_level_01 needs entry 1: list the pressure of",
        ),
        (
            {"splits": {**SPLITS, "val": ["2000-01-06", "2000-01-07"]}},
            "data.splits.val = [2000-01-06, 2000-01-07] overlaps",
        ),
        ({"variables": {"t2n": "single"}}, "nearest: t2m"),
        ({"roles": {"tq": "diagnostic"}}, "data.roles has 'tq', which is no channel here; channels: t2m, z_level_00,"),
        ({"roles": {"t2m": "diagnostic", "z": "diagnostic"}}, "are all diagnostic, none is left to forecast from"),
    ],
)
def test_mistakes_in_the_config(tree, changes: dict[str, Any], said: str):
    refused(tree, said, **changes)


def test_variable_without_units(make_tree, tmp_path: Path):
    tree = make_tree(tmp_path / "tree", ("t2m",), **DAYS)
    (tree.root / "t2m_npy").rename(tree.root / "sst_npy")
    refused(tree, "data.units has no entry for 'sst'; add e.g. sst: K", variables={"sst": "single"})
    spec = open_data(config_of(tree, variables={"sst": "single"}, units={"sst": "K"})).spec
    assert (spec.channels, spec.units) == (("sst",), ("K",))


@pytest.mark.parametrize(("text", "said"), [(None, "missing; expected"), ("{", "malformed (JSONDecodeError")])
def test_statistics_not_usable(tree, text: str | None, said: str):
    path = tree.root / "z_npy/level_01/mean_std.json"
    path.unlink() if text is None else path.write_text(text)
    refused(tree, f"{path}: {said}")
