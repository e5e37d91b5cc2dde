"""一步比数据的间隔长（6 小时的数据、24 小时的步长）：每个时刻都起一个窗口，帧仍隔一天；逐项与写出来的相比。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.forecasting.inputs import open_tree, read_start
from engine.memory.fitting import epoch_windows
from engine.one_pass import fit_one_pass
from models import build_model
from models.interface import ForecastModel, OnePass
from tests.trees import DAYS, config_of, damage, truth
from tests.util.packing.stores import compare, from_store, pack_small
from util.calendar import parse_time
from util.config import DataConfig, RunConfig, Windows
from util.data.batches import adjoining_starts, all_starts, epoch_starts
from util.data.dataset import WeatherData, open_data
from util.data.index import SPLITS
from util.inspection.statistics import channel_statistics
from util.training_config import TrainConfig

T0 = parse_time("2000-01-01")
CHANNELS = ("t2m", "z_level_00")
DAILY = {"interval_hours": 24, "starts_every_hours": 6, "frames_in": 2}
SAME = {"starts_every_hours": 24}


@pytest.fixture
def tree(make_tree, tmp_path: Path):
    return make_tree(tmp_path / "tree", CHANNELS, **DAYS)


def daily(tree: Any, **changes: Any) -> DataConfig:
    return config_of(tree, **{**DAILY, **changes})


def starts_of(data: WeatherData, split: str) -> list[int]:
    return (all_starts(data.segments[split], data.spec.window) - T0).tolist()


def test_windows_start_at_every_time_and_hold_frames_a_day_apart(tree):
    data = open_data(daily(tree))
    # fmt: off
    assert starts_of(data, "train") == [0, 6, 12, 18, 24, 30, 36, 42, 48, 54, 60, 66, 72, 78, 84, 90]
    assert starts_of(data, "val") == [144, 150, 156, 162]
    assert starts_of(data, "test") == [216, 222, 228, 234]
    # fmt: on
    assert [data.samples(split) for split in SPLITS] == [24, 12, 12]
    batch = data.windows.__getitems__([T0 + 6, T0 + 90])
    assert (batch.time - T0).tolist() == [[6, 30, 54], [90, 114, 138]]
    fields = data.spec.to_physical(torch.cat([batch.history, batch.future], 1)).numpy()
    for b, start in enumerate((6, 90)):
        for i in range(3):
            for c, channel in enumerate(CHANNELS):
                np.testing.assert_allclose(fields[b, i, c], truth(tree, channel, T0 + start + 24 * i), rtol=3e-6)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("apart", [0, 6, 12, 18, 72, 78, 84, 90]),  # 每个钟点六天，两个三天的窗口
        ("all", [6 * i for i in range(16)]),
        ("random", None),
    ],
)
def test_an_epoch(tree, how: Windows, expected: list[int] | None):
    config = daily(tree, windows=how)
    segments = open_data(config).segments["train"]
    found = epoch_starts(segments, 3, how, 42, 0) - T0
    if expected is None:
        assert len(set(found.tolist())) == 24 // 3
        assert set(found.tolist()) <= {6 * i for i in range(16)}
    else:
        assert sorted(found.tolist()) == expected
    run = RunConfig(data=config, model={"name": "persistence"}, train=TrainConfig(epochs=1, batch_size=1, lr=1e-3))
    assert epoch_windows(run) == found.size  # --estimate、batch_size: auto 数的也是这些
    once = adjoining_starts(segments, 3)[:, None] + 24 * np.arange(3)
    assert sorted((once - T0).ravel().tolist()) == [6 * i for i in range(24)]  # 每个时刻恰好一次


def test_a_hole_ends_only_the_windows_that_would_hold_it(tree):
    damage(tree, "z_level_00", T0 + 54, "removed")
    data = open_data(daily(tree, max_gap_hours=6))
    assert starts_of(data, "train") == [h for h in range(0, 96, 6) if h not in (6, 30, 54)]


def test_without_the_key_nothing_changes(tree):
    """24 小时的步长照旧只从 00 时起；写明与步长相同的也一样。"""
    plain, same = (open_data(config_of(tree, interval_hours=24, frames_in=2, **more)) for more in ({}, SAME))
    assert starts_of(plain, "train") == starts_of(same, "train") == [0, 24, 48, 72]
    assert "starts_every_hours" not in plain.spec.to_dict()


def test_stores(tree, tmp_path: Path):
    """由它打的存档有每个时刻；从前打的 6 小时的存档也读得。"""
    damage(tree, "t2m", T0 + 60, "removed")
    compare(daily(tree), pack_small(daily(tree), tmp_path / "own"))
    packed = pack_small(config_of(tree), tmp_path / "plain")
    compare(daily(tree), from_store(packed, tmp_path / "plain", **DAILY))
    with pytest.raises(ValueError, match=r"data.starts_every_hours = 3: the store .* holds every 6 h"):
        open_data(from_store(packed, tmp_path / "plain", **DAILY | {"starts_every_hours": 3}))


def test_statistics_are_of_every_time_and_changes_of_a_day(tree, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("util.inspection.statistics.BLOCK_BYTES", 3 * 4 * 8 * 4)  # 一块三个场，一天四个
    damage(tree, "t2m", T0 + 30, "removed")
    found = channel_statistics(daily(tree), tendency=True)
    for c, channel in enumerate(CHANNELS):
        values = tree.fields[:24, c].astype(np.float64)
        gone = {5} if channel == "t2m" else set()
        kept = [i for i in range(24) if i not in gone]
        changes = np.stack([values[i + 4] - values[i] for i in range(20) if not {i, i + 4} & gone])
        moments = found[channel]
        for measured, expected in ((moments.moments, values[kept]), (moments.changes, changes)):
            np.testing.assert_allclose((measured.mean, measured.std), (expected.mean(), expected.std()))


def test_climatology_and_persistence_know_the_hour_of_the_day(tree):
    """不足一年：气候态是各钟点作过目标的时刻的平均；持续性预报是一天前的同一钟点。"""
    data = open_data(daily(tree))
    climatology, persistence = (build_model({"name": name}, data.spec) for name in ("climatology", "persistence"))
    assert isinstance(climatology, OnePass) and isinstance(climatology, ForecastModel)
    assert isinstance(persistence, ForecastModel)
    fit_one_pass(climatology, data, batch_size=3)
    hours = np.arange(144, 168, 6)  # 验证段头一天
    batch = data.windows.__getitems__((T0 + hours).tolist())
    made = data.spec.to_physical(climatology.forecast(batch.history, batch.time)[:, 0, 0]).numpy()
    held = data.spec.to_physical(persistence.forecast(batch.history, batch.time)[:, 0, 0]).numpy()
    for i, hour in enumerate(hours.tolist()):
        targets = [j for j in range(8, 24) if j % 4 == hour // 6 % 4]
        np.testing.assert_allclose(made[i], tree.fields[targets].mean(0), rtol=1e-5)
        np.testing.assert_allclose(held[i], tree.fields[tree.hours.index(T0 + hour + 24)], rtol=3e-6)


def test_a_forecast_starts_at_every_such_hour(tree):
    config = daily(tree)
    spec = open_data(config).spec
    for hour in (24, 30, 36, 42):
        start = read_start(open_tree(config, spec, [T0 + hour], 1), T0 + hour, 1)
        assert start.truth is not None
        fields = spec.to_physical(torch.cat([start.history, start.truth])).numpy()
        expected = [tree.fields[tree.hours.index(T0 + hour + ahead)] for ahead in (-24, 0, 24)]
        np.testing.assert_allclose(fields, expected, rtol=3e-6)
    with pytest.raises(ValueError, match=r"sampled every 6 h; the nearest are 2000-01-02T06 and 2000-01-02T12 UTC"):
        open_tree(config, spec, [T0 + 33], 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"starts_every_hours": 9}, "starts_every_hours = 9 does not divide interval_hours = 24"),
        ({"starts_every_hours": 48}, "starts_every_hours = 48 does not divide interval_hours = 24"),
        ({"first_hour": 6}, "first_hour = 6 is not the first of every 6 h; write 0, or another interval_hours"),
    ],
)
def test_mistakes(tree, changes: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        daily(tree, **changes)
