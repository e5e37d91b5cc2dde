"""读帧：坏文件各种坏法都补得上、记得下；插值与手算的一致；坏得太多就停。"""

from __future__ import annotations

import csv
import errno
import json
import logging
import math
import multiprocessing
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.trees import DAMAGE, DAYS, SHAPE, config_of, damage, truth
from util.calendar import parse_time, time_text
from util.config import DataConfig
from util.data import reader as reader_module
from util.data import tree_files, tree_origin
from util.data.dataset import open_data
from util.data.feed import make_loader
from util.data.origin import DataError
from util.data.reader import LINES_SHOWN, FieldReader
from util.data.tree_files import FieldError, field_path, read_extremes, read_field, read_into, read_mean_std
from util.files.bounded import open_regular

T0 = parse_time("2000-01-01")
CHANNELS = ("t2m", "z_level_00")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # 核少的机器上


@pytest.fixture
def tree(make_tree, tmp_path: Path):
    return make_tree(tmp_path / "tree", CHANNELS, **DAYS)


def open_reader(tree: Any, report: Path | None = None, **changes: Any) -> FieldReader:
    return open_data(config_of(tree, **changes), report).windows.reader


def physical(reader: FieldReader, hour: int, channel: str = "t2m") -> np.ndarray:
    """读出的场还原成物理单位。"""
    c = reader.spec.channels.index(channel)
    return reader.frame(hour).fields[c].astype(np.float64) * reader.spec.std[c] + reader.spec.mean[c]


def same(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=3e-6, atol=1e-6)  # 单精度的舍入


# ---- 一个文件


@pytest.mark.parametrize("how", list(DAMAGE))
def test_each_damage_is_named(tree, how: str):
    path = damage(tree, "t2m", T0, how)
    _, fault, words = DAMAGE[how]
    with pytest.raises(FieldError, match=re.escape(words)) as caught:
        read_field(path, SHAPE)
    assert caught.value.fault == fault
    assert str(caught.value) == f"{path}: {caught.value.detail}"
    assert "\n" not in str(caught.value)


def test_folder_in_place_of_a_file(tree):
    path = damage(tree, "t2m", T0, "removed")
    path.mkdir()
    with pytest.raises(FieldError, match="unreadable"):
        read_field(path, SHAPE)


class Malicious:
    """读入即执行的 pickle。"""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickle_with_code_is_not_executed(tmp_path: Path):
    np.save(tmp_path / "x.npy", np.array([Malicious(tmp_path / "executed")], dtype=object))
    with pytest.raises(FieldError, match="unreadable"):
        read_field(tmp_path / "x.npy", SHAPE)
    assert not (tmp_path / "executed").exists()


def test_any_corruption_of_the_header_is_a_field_error(tree):
    """改坏文件头的任意字节：或照样读得出，或是 FieldError，没有别的异常。"""
    path = field_path(tree.root, "t2m", T0)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    likely = b"0123456789()[]{},:'\" <>fOiLe*\n"
    for _ in range(600):
        raw = bytearray(whole)
        for place in rng.integers(128, size=rng.choice([1, 2, 4])):
            raw[place] = rng.integers(256) if rng.random() < 0.1 else likely[rng.integers(len(likely))]
        path.write_bytes(raw)
        try:
            read_field(path, SHAPE)
        except FieldError:
            refused += 1
    assert refused > 300


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "missing; expected"),
        ("", "malformed (JSONDecodeError"),
        ("[1, 2]", "malformed (TypeError"),
        ("3", "malformed (TypeError"),
        ('{"mean": [1.0]}', "malformed (KeyError: 'std')"),
        ('{"mean": [], "std": [1.0]}', "malformed (IndexError"),
        ('{"mean": ["warm"], "std": [1.0]}', "malformed (ValueError"),
        ('{"mean": [null], "std": [1.0]}', "malformed (TypeError"),
        ('{"mean": [1.0], "std": [0.0]}', "std 0.0; expected"),
        ('{"mean": [1.0], "std": [-2.0]}', "std -2.0; expected"),
        ('{"mean": [NaN], "std": [1.0]}', "mean nan, std 1.0; expected"),
        ('{"mean": [1e999], "std": [1.0]}', "mean inf"),
        ('{"mean": [1' + "0" * 400 + '], "std": [1.0]}', "malformed (OverflowError"),
    ],
)
def test_bad_statistics(tree, text: str | None, said: str):
    path = tree.root / "z_npy/level_00/mean_std.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read_mean_std(tree.root, "z_level_00")
    assert str(path) in str(caught.value)
    assert '{"mean": [number], "std": [positive number]}' in str(caught.value)


def test_good_statistics(tree):
    values = json.loads((tree.root / "t2m_npy/mean_std.json").read_text())
    assert read_mean_std(tree.root, "t2m") == (values["mean"][0], values["std"][0])
    (tree.root / "t2m_npy/mean_std.json").write_text('{"mean": 278.5, "std": 21}')
    assert read_mean_std(tree.root, "t2m") == (278.5, 21.0)
    assert read_extremes(tree.root, "t2m") == (tree.fields[:, 0].min(), tree.fields[:, 0].max())
    (tree.root / "t2m_npy/min_max.json").write_text('{"min": [3], "max": [2]}')
    with pytest.raises(ValueError, match=r"min 3.0, max 2.0; expected"):
        read_extremes(tree.root, "t2m")
    (tree.root / "t2m_npy/min_max.json").unlink()
    assert read_extremes(tree.root, "t2m") is None


# ---- 一帧


def test_frame_is_standardized_with_the_json(tree):
    reader = open_reader(tree)
    for i in (0, 7, 47):
        frame = reader.frame(tree.hours[i])
        assert frame.fields.dtype == np.float32
        assert frame.valid.tolist() == [True, True]
        assert not frame.sources
        for c, channel in enumerate(CHANNELS):
            mean, std = read_mean_std(tree.root, channel)
            same(frame.fields[c], (tree.fields[i, c].astype(np.float64) - mean) / std)


def test_files_declared_standardized_pass_through(tree):
    frame = open_reader(tree, standardize="no").frame(T0)
    assert np.array_equal(frame.fields, tree.fields[0])


def test_available(tree):
    damage(tree, "z_level_00", T0 + 12, "removed")
    reader = open_reader(tree)
    assert [reader.available(T0 + h) for h in (0, 12, 1, -6, 24 * 400)] == [True, False, False, False, False]


# ---- 插值：与手算的一致


def test_interpolation_of_one_field(tree):
    damage(tree, "t2m", T0 + 30, "removed")
    reader = open_reader(tree)
    same(physical(reader, T0 + 30), (truth(tree, "t2m", T0 + 24) + truth(tree, "t2m", T0 + 36).astype(np.float64)) / 2)
    frame = reader.frame(T0 + 30)
    assert frame.valid.tolist() == [False, True]
    assert frame.sources == [(0, T0 + 24), (0, T0 + 36)]
    same(physical(reader, T0 + 30, "z_level_00"), truth(tree, "z_level_00", T0 + 30))


def test_weights_go_by_distance(tree):
    for h in (30, 36, 42):
        damage(tree, "t2m", T0 + h, "removed")
    reader = open_reader(tree)
    left, right = (truth(tree, "t2m", T0 + h).astype(np.float64) for h in (24, 48))
    for h, share in ((30, 0.25), (36, 0.5), (42, 0.75)):
        same(physical(reader, T0 + h), (1 - share) * left + share * right)
        assert reader.frame(T0 + h).sources == [(0, T0 + 24), (0, T0 + 48)]


def test_hourly_neighbours_count_when_sampling_six_hourly(make_tree, tmp_path: Path):
    tree = make_tree(tmp_path / "tree", CHANNELS, **DAYS, interval=1)
    for h in (30, 31, 29):
        damage(tree, "t2m", T0 + h, "removed")
    damage(tree, "t2m", T0 + 28, "cut in the values")
    reader = open_reader(tree, interval_hours=6, max_gap_hours=6)
    left, right = (truth(tree, "t2m", T0 + h).astype(np.float64) for h in (27, 32))
    same(physical(reader, T0 + 30), left + (right - left) * 3 / 5)
    assert reader.frame(T0 + 30).sources == [(0, T0 + 27), (0, T0 + 32)]


def test_edges_are_held(tree):
    last = tree.hours[-1]
    for hour in (T0, T0 + 6, last):
        damage(tree, "t2m", hour, "removed")
    reader = open_reader(tree)
    for hour, held in ((T0, T0 + 12), (T0 + 6, T0 + 12), (last, last - 6)):
        same(physical(reader, hour), truth(tree, "t2m", held))
        frame = reader.frame(hour)
        assert not frame.valid[0]
        assert frame.sources == [(0, held)]


def test_edges_farther_than_max_gap_are_not_held(tree):
    for h in range(0, 30, 6):
        damage(tree, "t2m", T0 + h, "removed")
    data = open_data(config_of(tree))  # 最早的文件在 30 时：0 时离它超过一天，6 时正好一天
    assert int(data.segments["train"][0][0]) == T0 + 6


def test_the_nearest_files_are_no_farther_than_the_limit(tree):
    for h in (24, 30, 36):
        damage(tree, "t2m", T0 + h, "removed")
    reader = open_reader(tree)
    assert [*reader.near(0, T0 + 30, 12)] == [T0 + 18, T0 + 42]  # 正好 12 小时
    assert [*reader.near(0, T0 + 24, 12)] == [T0 + 18]
    assert reader.near(0, T0 + 30, 11) == {}


def test_what_is_missing_is_announced_once(tree, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    damage(tree, "t2m", T0 + 30, "removed")
    open_data(config_of(tree), tmp_path / "quiet.csv", announce=False)
    assert "interpolated" not in caplog.text and not (tmp_path / "quiet.csv").exists()
    open_data(config_of(tree), tmp_path / "missing.csv")
    assert caplog.text.count("interpolated") == 1
    lines = (tmp_path / "missing.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and lines[1].startswith("t2m,2000-01-02T06")


def test_the_history_may_use_the_initial_time_itself(tree):
    damage(tree, "t2m", T0 + 30, "removed")
    reader = open_reader(tree)
    for until, sources in ((T0 + 36, [T0 + 24, T0 + 36]), (T0 + 35, [T0 + 24])):
        assert reader.frame(T0 + 30, until).sources == [(0, hour) for hour in sources]


def test_which_of_several_hours_is_broken(tree):
    damage(tree, "t2m", T0 + 12, "cut in the values")
    for standardize in ("yes", "no"):  # 一个个读，几个一起读
        reader = open_reader(tree, standardize=standardize)
        frames = reader.frames([T0, T0 + 6, T0 + 12, T0 + 18], np.empty((4, 2, *SHAPE), np.float32))
        assert [frame.valid.tolist() for frame in frames] == [[True] * 2] * 2 + [[False, True]] + [[True] * 2]
        assert [*reader.faults] == [(0, T0 + 12)] and frames[2].sources == [(0, T0 + 6), (0, T0 + 18)]
        assert not reader.raw and reader.wire().raw is (standardize == "yes")


@pytest.mark.parametrize("how", [h for h in DAMAGE if h != "removed"])
def test_bad_file_is_interpolated_and_logged(tree, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str):
    path = damage(tree, "z_level_00", T0 + 30, how)
    reader = open_reader(tree, tmp_path / "missing.csv")
    caplog.clear()
    for _ in range(2):  # 第二次读不再报告
        left, right = (truth(tree, "z_level_00", T0 + h).astype(np.float64) for h in (24, 36))
        same(physical(reader, T0 + 30, "z_level_00"), (left + right) / 2)
        assert reader.frame(T0 + 30).valid.tolist() == [True, False]
    (record,) = caplog.records
    for part in ("z_level_00", "2000-01-02T06", str(path), DAMAGE[how][2]):
        assert part in record.getMessage()
    with (tmp_path / "missing.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["channel"], r["time"], r["path"]) for r in rows] == [("z_level_00", "2000-01-02T06", str(path))]
    assert DAMAGE[how][2] in rows[0]["reason"]


def test_bad_neighbours_are_passed_over(tree):
    damage(tree, "t2m", T0 + 30, "removed")
    damage(tree, "t2m", T0 + 36, "text")
    reader = open_reader(tree)
    left, right = (truth(tree, "t2m", T0 + h).astype(np.float64) for h in (24, 42))
    same(physical(reader, T0 + 30), left + (right - left) / 3)
    assert reader.frame(T0 + 30).sources == [(0, T0 + 24), (0, T0 + 42)]


# ---- 太多、太长


def test_missing_by_name_is_logged_at_once(tree, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = damage(tree, "t2m", T0 + 30, "removed")
    open_reader(tree, tmp_path / "missing.csv")
    (line,) = (r.getMessage() for r in caplog.records if str(path) in r.getMessage())
    assert "t2m at 2000-01-02T06: missing" in line
    assert (tmp_path / "missing.csv").read_text().splitlines() == [
        "channel,time,path,reason",
        f"t2m,2000-01-02T06,{path},missing",
    ]


def test_more_than_twenty_become_a_summary(tree, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    gone = tree.hours[1:46:2]
    assert len(gone) > LINES_SHOWN
    for hour in gone:
        damage(tree, "t2m", hour, "removed")
    open_reader(tree, tmp_path / "log" / "missing.csv")
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(lines) == LINES_SHOWN + 1
    assert lines[-1] == f"more than 20 fields missing; the full list is in {tmp_path}/log/missing.csv"
    with (tmp_path / "log/missing.csv").open(newline="") as file:
        assert [row["time"] for row in csv.DictReader(file)] == [time_text(h) for h in gone]


def test_missing_above_max_missing_by_name(tree, tmp_path: Path):
    gone = [T0 + 6 * i for i in range(1, 13, 2)]
    for hour in gone:
        damage(tree, "z_level_00", hour, "removed")
    open_reader(tree, max_missing=6 / 48)
    said = (
        "z_level_00: 6 of 48 files are missing or unreadable (12.5 %), above data.max_missing = 0.12 (2000-0006.npy, "
        f"2000-0018.npy, 2000-0030.npy, 2000-0042.npy, 2000-0054.npy and 1 more; full list: {tmp_path}/missing.csv)"
    )
    with pytest.raises(DataError, match=re.escape(said)):
        open_reader(tree, tmp_path / "missing.csv", max_missing=0.12)
    assert len((tmp_path / "missing.csv").read_text().splitlines()) == 7


@pytest.mark.parametrize("how", ["cut in the values", "other shape", "double", "not a number"])
def test_failing_reads_above_max_missing(tree, how: str):
    for i in (3, 9, 15):
        damage(tree, "t2m", T0 + 6 * i, how)
    reader = open_reader(tree, max_missing=2 / 48)
    reader.frame(T0 + 18)
    reader.frame(T0 + 54)
    with pytest.raises(DataError, match=r"t2m: 3 of 48 files .* \(2000-0018.npy, 2000-0054.npy, 2000-0090.npy\)"):
        reader.frame(T0 + 90)


def test_missing_outside_the_segments_does_not_count(tree):
    """补不上的长空缺已经出了段，不算在百分比里。"""
    for h in range(24, 96, 6):
        damage(tree, "t2m", T0 + h, "removed")
    reader = open_reader(tree, max_missing=0.0)
    assert reader.used.numel() == 48 - 12


def test_unreadable_files_in_a_row_are_not_bridged(tree):
    for h in range(30, 54, 6):
        damage(tree, "t2m", T0 + h, "text")
    reader = open_reader(tree, max_gap_hours=24)
    with pytest.raises(DataError, match="t2m at 2000-01-02T12: unreadable files leave a gap of more than .* = 24"):
        reader.frame(T0 + 36)


def test_a_far_neighbour_is_not_taken_for_the_end_of_the_series(tree):
    """右边一天多都坏了，但再往右还有：那是空缺，不是序列的末端，不能沿用左边的。"""
    for h in range(30, 66, 6):
        damage(tree, "t2m", T0 + h, "text")
    reader = open_reader(tree)
    with pytest.raises(DataError, match="leave a gap"):
        reader.frame(T0 + 30)


def test_unreadable_to_the_end_of_the_series_is_held(tree):
    last = tree.hours[-1]
    for back in (0, 6, 12):
        damage(tree, "t2m", last - back, "text")
    reader = open_reader(tree)
    same(physical(reader, last), truth(tree, "t2m", last - 18))


class Disk:
    """时钟是假的；fails 里的文件读不出（EIO），直到 back 这一刻。"""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.back, self.fails, self.waits = 1000.0, math.inf, set[str](), list[float]()
        patch.setattr(reader_module, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))
        patch.setattr(tree_origin, "read_into", lambda path, *rest: self.readable(path) and read_into(path, *rest))
        patch.setattr(tree_files, "open_regular", self.open)

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def readable(self, path: str) -> bool:
        return self.now >= self.back or Path(path).name not in self.fails

    def open(self, path: Path) -> Any:
        if not self.readable(str(path)):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return open_regular(path)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_a_disk_that_comes_back_changes_nothing(tree, tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture):
    report = tmp_path / "missing.csv"
    reader = open_reader(tree, report)
    expected = [reader.frame(T0 + h).fields.copy() for h in (6, 12)]
    disk.fails, disk.back = {"2000-0006.npy", "2000-0012.npy"}, disk.now + 5
    caplog.clear()
    frames = [reader.frame(T0 + h) for h in (6, 12)]
    assert all(np.array_equal(frame.fields, other) for frame, other in zip(frames, expected, strict=True))
    assert all(frame.valid.all() for frame in frames) and reader.try_again() == 0
    assert disk.waits[:5] == [0, 0.1, 0.2, 0.4, 0.8] and 5 < sum(disk.waits) < 10
    assert len(caplog.messages) == 2 and "reading it again for up to 30 s" in caplog.messages[0]
    assert "2000-0006.npy: read now, after 6.3 s" in caplog.messages[1]
    assert report.read_text().count("\n") == 1  # 只有标题


def test_what_stays_away_is_given_up_and_read_in_the_next_epoch(tree, disk: Disk):
    """等够了才放过，一次断线只等一次；下一轮各读一次，还不行的不再等，行的就用。"""
    reader = open_reader(tree, max_missing=0.5)
    expected = reader.frame(T0 + 12).fields.copy()
    disk.fails = {"2000-0006.npy", "2000-0012.npy"}
    assert [reader.frame(T0 + h).valid.any() for h in (6, 12)] == [False, False]
    assert sum(disk.waits) == pytest.approx(30) and reader.try_again() == 4
    disk.fails.remove("2000-0012.npy")
    frame = reader.frame(T0 + 12)
    assert np.array_equal(frame.fields, expected) and frame.valid.all()
    assert not reader.frame(T0 + 6).valid.any() and sum(disk.waits) == pytest.approx(30)
    assert reader.try_again() == 2


def test_what_will_not_change_is_not_waited_for(tree, disk: Disk):
    """删去的、坏了的；连文件夹也没有了的，是盘不在。"""
    reader = open_reader(tree, max_missing=0.5)
    damage(tree, "t2m", T0 + 6, "removed")
    damage(tree, "t2m", T0 + 12, "cut in the values")
    assert [reader.frame(T0 + h).valid.tolist() for h in (6, 12)] == [[False, True]] * 2
    assert not disk.waits and reader.try_again() == 0
    year = tree.root / "z_npy/level_00/2000"
    year.rename(year.with_name("away"))
    with pytest.raises(DataError):
        reader.frame(T0 + 18)
    assert sum(disk.waits) == pytest.approx(30)


@pytest.mark.parametrize("workers", [0, 2])
def test_error_from_a_reading_process_is_one_line(tree, workers: int):
    for i in range(1, 20, 2):
        damage(tree, "t2m", T0 + 6 * i, "not a number")
    config = config_of(tree, max_missing=0.05)
    data = open_data(DataConfig(**config.model_dump()))
    loader = make_loader(data.windows, [[T0 + 6 * i] for i in range(20)], workers, pin=False)
    before = multiprocessing.active_children()
    with pytest.raises(ValueError, match=r"^t2m: \d+ of 48 files are missing or unreadable \([^\n]*\)$"):
        list(loader)
    assert set(multiprocessing.active_children()) <= set(before)  # 读取进程当场收场，命令不会迟迟不退


def test_processes_share_what_they_found(tree, tmp_path: Path):
    """同一个坏文件被两个读取进程先后碰到，只记一次。"""
    damage(tree, "t2m", T0 + 30, "text")
    data = open_data(config_of(tree), tmp_path / "missing.csv")
    batches = [[T0 + 24], [T0 + 30], [T0 + 18], [T0 + 30], [T0 + 24], [T0 + 18]] * 4
    for batch in make_loader(data.windows, batches, 2, pin=False):
        assert not batch.valid.all()
    assert not data.windows.reader.present[0, T0 + 30 - data.windows.reader.start]
    assert 2 <= len((tmp_path / "missing.csv").read_text().splitlines()) <= 3  # 同时碰到时可能各记一次
