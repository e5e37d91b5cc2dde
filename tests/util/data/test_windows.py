"""窗口：取哪些起点、几个、什么次序，与写开的循环一致；一批里的内容与树上的真值一致；读取进程与设备怎么分都不变。"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trees import DAYS, config_of, damage, truth
from util.calendar import parse_time, time_text
from util.config import Windows
from util.data import tree_origin
from util.data.batches import Segments, all_starts, epoch_starts, share_batches, split_batches
from util.data.dataset import WeatherData, open_data
from util.data.feed import make_loader
from util.data.index import SPLITS

T0 = parse_time("2000-01-01")
CHANNELS = ("t2m", "z_level_00")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # 核少的机器上
LAYOUTS = [[24], [8], [7], [3, 25, 9], [8, 8, 8], [2, 31], [1, 2]]


@pytest.fixture
def tree(make_tree, tmp_path: Path):
    return make_tree(tmp_path / "tree", CHANNELS, **DAYS)


def make_segments(lengths: list[int], interval: int = 6) -> Segments:
    """长度依次为 lengths 的段，段与段之间隔一天多。"""
    segments, hour = [], 1000 * interval
    for length in lengths:
        segments.append(hour + interval * np.arange(length))
        hour += interval * (length + 5)
    return segments


def windows_by_loop(segments: Segments, window: int) -> list[int]:
    """每个起点，只要它之后的 window 个抽样小时都在同一段里。"""
    return [int(s[i]) for s in segments for i in range(len(s)) if i + window <= len(s)]


# ---- 起点


@pytest.mark.parametrize("lengths", LAYOUTS, ids=str)
@pytest.mark.parametrize("window", [2, 3, 8])
def test_every_start(lengths: list[int], window: int):
    segments = make_segments(lengths)
    expected = windows_by_loop(segments, window)
    assert all_starts(segments, window).tolist() == expected
    for stride in (1, 2, 4, 100):
        assert all_starts(segments, window, stride).tolist() == expected[::stride]


@pytest.mark.parametrize("lengths", LAYOUTS, ids=str)
@pytest.mark.parametrize("window", [2, 3, 8])
def test_not_shuffled(lengths: list[int], window: int):
    """依次取不重叠的窗口；不能整除时丢掉时间最靠前的样本。"""
    segments = make_segments(lengths)
    if max(lengths) < window:
        return
    expected = []
    for segment in segments:
        hours = segment.tolist()
        while len(hours) % window:
            hours.pop(0)
        expected += hours[::window]
    found = epoch_starts(segments, window, how="apart", seed=42, epoch=3)
    assert found.tolist() == expected
    used = [h + 6 * i for h in expected for i in range(window)]
    assert len(used) == len(set(used)) == sum(n - n % window for n in lengths)
    for segment in segments:  # 段尾一个不丢
        assert len(segment) < window or int(segment[-1]) in used


@pytest.mark.parametrize("lengths", LAYOUTS, ids=str)
@pytest.mark.parametrize("window", [2, 3, 8])
def test_shuffled(lengths: list[int], window: int):
    """随机、不放回、个数与不打乱时相同；一段时就是 N // t。"""
    segments = make_segments(lengths)
    possible = set(windows_by_loop(segments, window))
    if not possible:
        return
    found = epoch_starts(segments, window, how="random", seed=42, epoch=0).tolist()
    assert len(found) == len(set(found)) == sum(n // window for n in lengths)
    assert set(found) <= possible
    assert len(found) == len(epoch_starts(segments, window, how="apart", seed=42, epoch=0))


def test_shuffled_depends_on_seed_and_epoch_alone():
    segments = make_segments([400])
    draw = {(s, e): epoch_starts(segments, 8, "random", s, e).tolist() for s in (1, 42) for e in (0, 1, 2)}
    assert len(set(map(tuple, draw.values()))) == 6
    np.random.seed(7)  # noqa: NPY002  全局随机数不该有影响
    torch.manual_seed(7)
    assert all(epoch_starts(segments, 8, "random", s, e).tolist() == v for (s, e), v in draw.items())
    assert draw[42, 0] != sorted(draw[42, 0])


def test_shuffled_epochs_reach_every_start_evenly():
    segments = make_segments([40])
    possible = windows_by_loop(segments, 8)
    counts = dict.fromkeys(possible, 0)
    for epoch in range(660):
        for start in epoch_starts(segments, 8, "random", 42, epoch).tolist():
            counts[start] += 1
    # 每轮 33 个里取 5 个：期望 100，标准差 √(660·5/33·28/33) ≈ 9.2
    assert min(counts.values()) > 100 - 5 * 9.2
    assert max(counts.values()) < 100 + 5 * 9.2


@pytest.mark.parametrize("lengths", LAYOUTS, ids=str)
def test_all_is_every_start_in_another_order_each_epoch(lengths: list[int]):
    segments = make_segments(lengths)
    draws = [epoch_starts(segments, 3, "all", 42, epoch).tolist() for epoch in range(3)]
    for drawn in draws:
        assert sorted(drawn) == windows_by_loop(segments, 3)
    assert len(draws[0]) < 8 or draws[0] != draws[1] != draws[2]


@pytest.mark.parametrize("lengths", LAYOUTS, ids=str)
@pytest.mark.parametrize("how", ["random", "apart", "all"])
def test_longer_targets_keep_the_number_of_windows_where_they_fit(lengths: list[int], how: Windows):
    """目标更长：起点仍隔一个窗口，只是段尾读不满的不要。"""
    segments = make_segments(lengths)
    plain, long = (epoch_starts(segments, 3, how, 42, 1, reach).tolist() for reach in (None, 5))
    fit = windows_by_loop(segments, 5)
    assert set(long) <= set(fit)
    if how == "random":
        assert len(long) == min(len(plain), len(fit))
    else:
        assert sorted(long) == sorted(set(plain) & set(fit))


def test_counts_at_the_requirements_size():
    """51136 个训练样本、t = 8：6392 个窗口；一年 1460 个样本：每个起点，1453 个。"""
    train, year = make_segments([51136]), make_segments([1460])
    for how in ("random", "apart"):
        assert epoch_starts(train, 8, how, 42, 0).size == 51136 // 8 == 6392
    assert epoch_starts(make_segments([51139]), 8, "apart", 42, 0)[0] == 6000 + 3 * 6
    assert all_starts(year, 8).size == 1460 - 7


# ---- 与真的树在一起：不跨划分，不跨长空缺


def hours_of(data: WeatherData, start: int) -> list[int]:
    return [start + data.spec.interval_hours * i for i in range(data.spec.window)]


def test_windows_cross_neither_splits_nor_long_gaps(tree):
    for h in range(48, 96, 6):
        damage(tree, "z_level_00", T0 + h, "removed")  # 两侧相距 54 小时
    data = open_data(config_of(tree, frames_in=3, frames_out=1))
    days = {
        "train": ("2000-01-01T00", "2000-01-06T18"),
        "val": ("2000-01-07T00", "2000-01-09T18"),
        "test": ("2000-01-10T00", "2000-01-12T18"),
    }
    found = {split: all_starts(data.segments[split], data.spec.window).tolist() for split in SPLITS}
    for split, (first, last) in days.items():
        whole = [h for h in tree.hours if parse_time(first) <= h <= parse_time(last)]
        good = {h for h in whole if not T0 + 48 <= h < T0 + 96}
        assert found[split] == [h for h in whole if set(hours_of(data, h)) <= good]
    assert {k: len(v) for k, v in found.items()} == {"train": 5 + 5, "val": 9, "test": 9}
    ways: tuple[Windows, ...] = ("random", "apart")
    for epoch, how in itertools.product(range(5), ways):
        starts = epoch_starts(data.segments["train"], data.spec.window, how, 42, epoch).tolist()
        assert len(starts) == 4
        assert set(starts) <= set(found["train"])


# ---- 一批的内容


def check_batch(data: WeatherData, tree: Any, starts: list[int], frames_out: int = 1) -> None:
    """逐个窗口、逐帧、逐通道与真值比。"""
    windows = data.windows.with_future(frames_out) if frames_out != data.spec.frames_out else data.windows
    batch, spec = windows.__getitems__(starts), data.spec
    t_in, total = spec.frames_in, spec.frames_in + frames_out
    assert batch.history.shape == (len(starts), t_in, len(CHANNELS), spec.height, spec.width)
    assert batch.future.shape == (len(starts), frames_out, len(CHANNELS), spec.height, spec.width)
    assert (batch.time.dtype, batch.valid.dtype, batch.history.dtype) == (torch.int64, torch.bool, torch.float32)
    assert batch.valid.shape == (len(starts), total, len(CHANNELS))
    fields = spec.to_physical(torch.cat([batch.history, batch.future], 1)).numpy()
    for b, start in enumerate(starts):
        for i in range(total):
            hour = start + spec.interval_hours * i
            assert int(batch.time[b, i]) == hour - data.config.utc_offset_hours
            for c, channel in enumerate(CHANNELS):
                np.testing.assert_allclose(fields[b, i, c], truth(tree, channel, hour), rtol=3e-6)


@pytest.mark.parametrize(("frames_in", "frames_out"), [(1, 1), (3, 1), (7, 1), (2, 3)])
def test_batch_holds_the_right_fields_at_the_right_times(tree, frames_in: int, frames_out: int):
    data = open_data(config_of(tree, frames_in=frames_in, frames_out=frames_out))
    starts = all_starts(data.segments["train"], data.spec.window).tolist()
    check_batch(data, tree, starts[::3], frames_out)
    assert data.windows.__getitems__(starts).valid.all()


def test_with_future_reads_further(tree):
    data = open_data(config_of(tree))
    check_batch(data, tree, [T0, T0 + 30], frames_out=5)
    assert data.windows.window == 4  # 原来的不变


@pytest.mark.parametrize("offset", [0, 8, -5])
def test_time_is_utc(tree, offset: int):
    data = open_data(config_of(tree, utc_offset_hours=offset))
    check_batch(data, tree, [T0, T0 + 6])
    first = int(data.windows[T0].time[0, 0])
    assert time_text(first + offset) == "2000-01-01T00"


def test_single_item_is_a_batch_of_one(tree):
    data = open_data(config_of(tree))
    one, two = data.windows[T0 + 6], data.windows.__getitems__([T0, T0 + 6])
    for single, double in zip(one.tensors, two.tensors, strict=True):
        assert torch.equal(single[0], double[1])


def test_an_hour_shared_by_windows_is_read_once(tree, monkeypatch: pytest.MonkeyPatch):
    data = open_data(config_of(tree))
    paths: list[str] = []
    real = tree_origin.read_into
    monkeypatch.setattr(tree_origin, "read_into", lambda path, *rest: (paths.append(path), real(path, *rest))[1])
    data.windows.__getitems__([T0, T0 + 6, T0 + 12])
    assert len(paths) == len(set(paths)) == 6 * len(CHANNELS)


# ---- valid：插值得来的，和被同一窗口用作来源的


def valid_of(data: WeatherData, start: int) -> dict[str, list[bool]]:
    valid = data.windows[start].valid[0]
    return {channel: valid[:, c].tolist() for c, channel in enumerate(CHANNELS)}


def test_interpolated_fields_are_not_valid(tree):
    damage(tree, "t2m", T0 + 60, "removed")
    damage(tree, "z_level_00", T0 + 12, "not a number")
    data = open_data(config_of(tree))
    assert valid_of(data, T0 + 72) == {"t2m": [True] * 4, "z_level_00": [True] * 4}
    assert valid_of(data, T0 + 60)["t2m"] == [False, False, True, True]  # 60 时插值；66 时是它的来源
    assert valid_of(data, T0 + 60)["z_level_00"] == [True] * 4


def test_target_used_as_a_source_is_not_valid(tree):
    """最后一帧历史缺了，后一个邻居就是目标：不用它，沿用前一帧，答案不在输入里，目标照常。"""
    damage(tree, "t2m", T0 + 12, "removed")
    data = open_data(config_of(tree))
    batch = data.windows[T0]  # 0、6、12 时 → 18 时
    assert valid_of(data, T0)["t2m"] == [True, False, False, True]
    assert valid_of(data, T0)["z_level_00"] == [True] * 4
    fields = torch.cat([batch.history, batch.future], 1)[0, :, 0]
    torch.testing.assert_close(fields[2], fields[1])
    assert valid_of(data, T0 + 6)["t2m"] == [False, False, False, True]  # 插值与两个来源都在历史里
    later = data.windows[T0 + 6].history[0, :, 0]
    torch.testing.assert_close(later[1], (later[0] + later[2]) / 2)  # 不是最后一帧，两边都用


def test_target_interpolated_is_not_valid(tree):
    damage(tree, "t2m", T0 + 18, "text")
    data = open_data(config_of(tree))
    assert valid_of(data, T0)["t2m"] == [True, True, False, False]


def test_history_is_held_rather_than_filled_from_later_hours(make_tree, tmp_path: Path):
    tree = make_tree(tmp_path / "tree", CHANNELS, **DAYS, interval=1)
    damage(tree, "t2m", T0 + 12, "removed")
    data = open_data(config_of(tree, interval_hours=6))
    assert valid_of(data, T0)["t2m"] == [True, True, False, True]
    past = open_data(config_of(tree, interval_hours=1)).windows[T0 + 9].history[0, 2, 0]  # 11 时
    torch.testing.assert_close(data.windows[T0].history[0, 2, 0], past)  # 13 时在初始时刻之后，沿用 11 时


def test_future_that_cannot_be_avoided_invalidates_the_target(tree):
    """序列开头缺到最后一帧历史为止：只能取后面的，那个通道就不计分。"""
    for hour in (0, 6, 12):
        damage(tree, "t2m", T0 + hour, "removed")
    assert valid_of(open_data(config_of(tree, max_missing=0.1)), T0)["t2m"] == [False] * 4


def test_every_interpolated_or_source_field_by_brute_force(tree):
    """随机缺十几个文件，每个起点、每个通道与写开的定义比。"""
    rng = np.random.default_rng(3)
    gone = {(c, h) for c in CHANNELS for h in rng.choice(tree.hours[1:-1], 7, replace=False).tolist()}
    for channel, hour in gone:
        damage(tree, channel, hour, "removed")
    data = open_data(config_of(tree, max_gap_hours=100))
    for split in SPLITS:
        for start in all_starts(data.segments[split], 4).tolist():
            hours = hours_of(data, start)
            for channel in CHANNELS:
                last = hours[2]
                there = [h for h in tree.hours if (channel, h) not in gone]
                sources = set()
                for h in hours:
                    if (channel, h) in gone:
                        after = min(x for x in there if x > h)
                        sources |= {max(x for x in there if x < h)} | ({after} if h > last or after <= last else set())
                expected = [(channel, h) not in gone and h not in sources for h in hours]
                assert valid_of(data, start)[channel] == expected


# ---- 读取进程与设备


def test_workers_do_not_change_a_bit(make_tree, tmp_path: Path):
    """0、1、4 个读取进程：每一批逐位相同，坏文件也一样；全局随机数不动。"""
    runs = []
    for workers in (0, 1, 4):
        tree = make_tree(tmp_path / f"tree{workers}", CHANNELS, **DAYS)
        for hour, how in ((12, "removed"), (42, "cut in the values"), (48, "not a number"), (90, "other shape")):
            damage(tree, "t2m", T0 + hour, how)
        data = open_data(config_of(tree))
        batches = [
            b for e in range(2) for b in split_batches(epoch_starts(data.segments["train"], 4, "random", 42, e), 2)
        ]
        torch.manual_seed(0)
        state = torch.get_rng_state()
        runs.append(list(make_loader(data.windows, batches, workers, pin=False)))
        assert torch.equal(torch.get_rng_state(), state)
        assert len(runs[-1]) == len(batches) == 6
    assert not all(batch.valid.all() for batch in runs[0])
    for first, *others in zip(*runs, strict=True):
        for other in others:
            for a, b in zip(first.tensors, other.tensors, strict=True):
                assert torch.equal(a, b)


def test_batches_keep_the_order():
    starts = np.arange(11)
    assert split_batches(starts, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert split_batches(starts[:0], 4) == []


@pytest.mark.parametrize(("world", "parts"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (2, 4)])
def test_shares_cover_each_batch_exactly_once(world: int, parts: int):
    batches = split_batches(np.arange(43), 16)  # 16、16、11
    shares = [list(share_batches(batches, rank, world, parts)) for rank in range(world)]
    assert len({len(s) for s in shares}) == 1  # 各进程步数相同，否则会互相等死
    position = 0
    for batch in batches:
        size = len(batch) // (world * parts)
        seen = []
        for part in range(parts):
            for rank in range(world):
                piece = shares[rank][position + part]
                assert len(piece) == size
                seen += piece
        assert seen == batch[: size * world * parts]  # 零头只在最后一批
        assert len(batch) == 16 or len(batch) - len(seen) < world * parts
        position += parts
    assert position == len(shares[0])


def test_a_last_batch_too_small_for_all_is_left_out():
    assert list(share_batches([[0, 1, 2, 3], [4, 5]], 0, 4)) == [[0]]
