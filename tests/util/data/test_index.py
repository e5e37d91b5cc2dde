"""索引与划分：样本数、文件数、通道数与需求一致；空缺、报错。独立的来源是 datetime、NumPy 的日期和写开的循环。"""

from __future__ import annotations

import calendar
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from util.calendar import hour_of, hours_in_year, moment_of, parse_time, time_text, year_start, years_text
from util.config import DataConfig
from util.data.index import (
    SPLITS,
    Index,
    bridgeable,
    describe_gaps,
    find_segments,
    neighbours,
    sampled_hours,
    split_hours,
    split_years,
)
from util.data.tree_files import field_path, select_channels
from util.variables import PRESSURE_LEVEL, SINGLE_LEVEL, channel_folder, split_channel, variable_info

REQUIREMENT = {"train": ["1979", "2013"], "test": ["2014", "2014"], "val": ["2015", "2015"]}
SHORT = {
    "train": ["2000-01-01", "2000-01-06"],
    "val": ["2000-01-07", "2000-01-08"],
    "test": ["2000-01-09", "2000-01-10"],
}


def make_config(root: Path | str = "tree", splits: dict[str, list[str]] | None = None, **more: Any) -> DataConfig:
    values: dict[str, Any] = {
        "root": str(root),
        "variables": {"t2m": "single"},
        "latitude": {"first": 89.0, "step": -2.0, "count": 4},
        "longitude": {"first": 0.0, "step": 5.0, "count": 8},
        "splits": splits or SHORT,
        "frames_in": 3,
        "cache_dir": str(Path(root).with_name("cache")),
    }
    return DataConfig(**{**values, **more})


def full_index(config: DataConfig, channels: tuple[str, ...] = ("t2m",)) -> Index:
    """一个文件也不缺的索引，不碰磁盘。"""
    years = split_years(config)
    hours = year_start(years[-1] + 1) - year_start(years[0])
    return Index(channels, year_start(years[0]), np.ones((len(channels), hours), dtype=bool))


def drop(index: Index, channel: int, *times: str) -> None:
    for time in times:
        index.present[channel, parse_time(time) - index.start] = False


# ---- 需求里的数


def test_counts_of_the_requirement():
    """1979—2015 年 6 小时：54056 个样本，1–51136 训练，51137–52596 测试，52597–54056 验证。"""
    config = make_config(splits=REQUIREMENT)
    segments = find_segments(full_index(config), config)
    every = np.arange(np.datetime64("1979-01-01T00"), np.datetime64("2016-01-01T00"), np.timedelta64(6, "h"))
    numbers = {h: i + 1 for i, h in enumerate(every.astype(int).tolist())}  # 样本编号，从 1 起
    assert len(numbers) == 54056
    found = {}
    for split in SPLITS:
        (segment,) = segments[split]
        found[split] = (segment.size, numbers[int(segment[0])], numbers[int(segment[-1])])
        assert (np.diff(segment) == 6).all()
    assert found == {
        "train": (51136, 1, 51136),
        "test": (1460, 51137, 52596),
        "val": (1460, 52597, 54056),
    }


def test_hourly_counts():
    config = make_config(splits=REQUIREMENT, interval_hours=1)
    segments = find_segments(full_index(config), config)
    assert [segments[s][0].size for s in SPLITS] == [51136 * 6, 8760, 8760]


@pytest.mark.parametrize("year", [1979, 1980, 1900, 2000, 2015, 2016])
def test_files_of_a_year(year: int):
    files = 8784 if calendar.isleap(year) else 8760
    assert hours_in_year(year) == files
    last = field_path("r", "t2m", year_start(year) + files - 1)
    assert last == Path(f"r/t2m_npy/{year}/{year}-{files - 1}.npy")
    assert field_path("r", "z_level_07", year_start(year)) == Path(f"r/z_npy/level_07/{year}/{year}-0000.npy")
    assert field_path("r", "t2m", year_start(year) + files).parent.name == str(year + 1)


def test_all_69_channels_of_the_requirement(tmp_path: Path):
    for variable in SINGLE_LEVEL:
        (tmp_path / f"{variable}_npy").mkdir()
    for variable in PRESSURE_LEVEL:
        for level in range(13):
            (tmp_path / f"{variable}_npy" / f"level_{level:02d}").mkdir(parents=True)
    choice: dict[str, Any] = dict.fromkeys(SINGLE_LEVEL, "single")
    config = make_config(tmp_path, variables={**choice, **dict.fromkeys(PRESSURE_LEVEL, "all")})
    channels = select_channels(config)
    assert len(channels) == len(set(channels)) == 69
    assert channels[:5] == ["t2m", "tp", "u10", "v10", "r_level_00"]
    assert channels[-1] == "z_level_12"
    smallest = make_config(tmp_path, variables={**choice, **{v: ["level_00"] for v in PRESSURE_LEVEL}})
    assert len(select_channels(smallest)) == 9
    assert select_channels(make_config(tmp_path, variables={"z": ["level_05"]})) == ["z_level_05"]  # k = 1
    for channel in channels:
        assert (tmp_path / channel_folder(channel)).is_dir()
        assert variable_info(channel).units
        assert split_channel(channel)[0] in (*SINGLE_LEVEL, *PRESSURE_LEVEL)


# ---- 历法


def test_hours_and_moments_agree_with_datetime():
    rng = np.random.default_rng(0)
    for hour in rng.integers(-200_000, 800_000, 200).tolist():
        moment = datetime(1970, 1, 1) + timedelta(hours=hour)
        assert moment_of(hour) == moment
        assert hour_of(moment) == hour
        assert parse_time(time_text(hour)) == hour
    assert parse_time("2015-06-01") == parse_time("2015-06-01T00:00Z") == parse_time(" 2015-06-01 00:00 ")
    assert parse_time("2015-06-01T08:00+08:00") == parse_time("2015-06-01T00")


@pytest.mark.parametrize("text", ["2015-06-01T00:30", "yesterday", "2015-02-30", ""])
def test_bad_times(text: str):
    with pytest.raises(ValueError, match="not a full hour|is not understood; write it like 2015-06-01T00"):
        parse_time(text)


def test_years_in_runs():
    assert years_text([1979]) == "1979"
    assert years_text([1979, 1980, 1981]) == "1979 to 1981"
    assert years_text([1979, 1981, 1982, 1984]) == "1979, 1981 to 1982, 1984"


@pytest.mark.parametrize(("interval", "first"), [(1, 0), (2, 1), (3, 0), (4, 3), (6, 0), (6, 3), (8, 7), (24, 12)])
def test_sampled_hours_lie_on_the_numbers_of_the_year(interval: int, first: int):
    span = range(parse_time("2003-12-30"), parse_time("2004-03-02"))
    found = sampled_hours(span, interval, first)
    assert found.tolist() == [h for h in span if (h - year_start(moment_of(h).year)) % interval == first]


def test_splits_include_their_last_day():
    spans = split_hours(
        make_config(
            splits={"train": ["1999", "2000"], "val": ["2001-01-01", "2001-02-28"], "test": ["2001-03-01", "2001"]}
        )
    )
    assert {k: (time_text(v.start), time_text(v.stop - 1)) for k, v in spans.items()} == {
        "train": ("1999-01-01T00", "2000-12-31T23"),
        "val": ("2001-01-01T00", "2001-02-28T23"),
        "test": ("2001-03-01T00", "2001-12-31T23"),
    }


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        (
            {"val": ["2000-01-05", "2000-01-08"]},
            r"data.splits.val = \[2000-01-05, 2000-01-08\] overlaps data.splits.train",
        ),
        ({"test": ["2000-01-08", "2000-01-09"]}, "data.splits.test = .* overlaps data.splits.val"),
        ({"test": ["1999", "2001"]}, "data.splits.test = .* overlaps data.splits.train"),
        ({"train": ["2000-01-06", "2000-01-01"]}, "data.splits.train = .* the end lies before the start"),
    ],
)
def test_bad_splits(splits: dict[str, list[str]], said: str):
    with pytest.raises(ValueError, match=said):
        split_hours(make_config(splits={**SHORT, **splits}))


# ---- 空缺


def bridgeable_by_loop(present: list[bool], max_gap: int) -> list[bool]:
    """写开的定义：有文件；或两侧最近的文件相距不超过 max_gap；只有一侧时看到它的距离。"""
    result = []
    for i, there in enumerate(present):
        before = [j for j in range(i) if present[j]]
        after = [j for j in range(i + 1, len(present)) if present[j]]
        if there:
            result.append(True)
        elif before and after:
            result.append(after[0] - before[-1] <= max_gap)
        elif before or after:
            result.append(min(abs(j - i) for j in before + after) <= max_gap)
        else:
            result.append(False)
    return result


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("max_gap", [1, 3, 24])
def test_bridgeable_equals_the_written_out_loop(share: float, max_gap: int):
    for seed in range(10):
        present = np.random.default_rng(seed).random(60) < share
        assert bridgeable(present, max_gap).tolist() == bridgeable_by_loop(present.tolist(), max_gap)


def test_neighbours():
    present = np.array([0, 1, 0, 0, 1, 1, 0], dtype=bool)
    assert [neighbours(present, i) for i in range(7)] == [[1], [4], [1, 4], [1, 4], [1, 5], [4], [5]]
    assert neighbours(np.zeros(3, dtype=bool), 1) == []


def test_short_gap_is_bridged_and_long_gap_ends_a_segment():
    config = make_config(max_gap_hours=12)
    index = full_index(config, ("t2m", "tp"))
    index.present[:] = np.arange(index.present.shape[1]) % 6 == 0  # 只有 6 小时的文件
    drop(index, 0, "2000-01-02T06")  # 两侧相距 12 小时：补
    drop(index, 1, "2000-01-04T06", "2000-01-04T12")  # 相距 18 小时：断
    segments = find_segments(index, config)
    assert [(time_text(s[0]), time_text(s[-1])) for s in segments["train"]] == [
        ("2000-01-01T00", "2000-01-04T00"),
        ("2000-01-04T18", "2000-01-06T18"),
    ]
    assert [s.size for s in segments["train"]] == [13, 9]
    assert [len(segments[s]) for s in ("val", "test")] == [1, 1]
    assert describe_gaps(index, config, segments) == [
        "train: 2000-01-04T06 to 2000-01-04T12 (2 samples), no file of tp"
    ]
    hourly = make_config(max_gap_hours=18)
    assert [s.size for s in find_segments(index, hourly)["train"]] == [24]


def test_hourly_neighbours_bridge_a_gap_of_the_sampled_hours():
    config = make_config(max_gap_hours=6)
    index = full_index(config)
    drop(index, 0, *(f"2000-01-03T{h:02d}" for h in (0, 6, 12, 18)))  # 逐小时的文件还在旁边
    assert [s.size for s in find_segments(index, config)["train"]] == [24]


def test_a_gap_is_listed_with_at_most_five_channels():
    config = make_config()
    index = full_index(config, tuple(f"c{i}" for i in range(8)))
    index.present[1:, :72] = False  # 三天
    (line,) = describe_gaps(index, config, find_segments(index, config))
    assert line == "train: 2000-01-01T00 to 2000-01-02T18 (8 samples), no file of c1, c2, c3, c4, c5 and 2 more"


def test_gap_lines_cover_a_split_without_any_file():
    config = make_config()
    index = full_index(config)
    index.present[:] = False
    segments = find_segments(index, config)
    assert segments == {"train": [], "val": [], "test": []}
    assert [line.split(",")[0] for line in describe_gaps(index, config, segments)] == [
        "train: 2000-01-01T00 to 2000-01-06T18 (24 samples)",
        "val: 2000-01-07T00 to 2000-01-08T18 (8 samples)",
        "test: 2000-01-09T00 to 2000-01-10T18 (8 samples)",
    ]
