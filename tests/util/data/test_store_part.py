"""存档的一部分：几个通道、隔几个时刻、另分的划分、其中几年；存档没有的，一行说清。"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trees import DAYS, config_of, damage
from tests.util.packing.stores import ROWS, compare, from_store, pack_small, spoil
from util.calendar import parse_time
from util.data.dataset import open_data

T0 = parse_time("2000-01-01")
CHANNELS = ("t2m", "z_level_00", "z_level_01")
OTHER_SPLITS = {
    "train": ["2000-01-05", "2000-01-08"],
    "val": ["2000-01-02", "2000-01-04"],
    "test": ["2000-01-09", "2000-01-12"],
}


@pytest.fixture
def tree(make_tree, tmp_path: Path):
    return make_tree(tmp_path / "tree", CHANNELS, **DAYS)


# ---- 存档的一部分


@pytest.mark.parametrize(
    "changes",
    [
        {"variables": {"t2m": "single"}},
        {"variables": {"z": ["level_01"], "t2m": "single"}},
        {"variables": {"z": ["level_01", "level_00"]}},
        {"variables": {"z": "all"}},
        {"interval_hours": 12},
        {"interval_hours": 24, "frames_in": 1},
        {"max_gap_hours": 6},
        {"splits": OTHER_SPLITS},
        {"frames_in": 5, "frames_out": 2},
    ],
    ids=str,
)  # fmt: skip
def test_a_part_of_the_store(tree, tmp_path: Path, changes: dict[str, Any]):
    spoil(tree, 5, 5)
    packed = pack_small(config_of(tree), tmp_path / "store")
    config = config_of(tree, **changes)
    compare(config, from_store(config, Path(packed.store or "")))


def test_rows_that_are_not_evenly_spaced(tree, tmp_path: Path):
    """有几天只有 0 时的文件：存档里那几天的行少，隔一天读一次时，行与行的间隔不一样。"""
    for day in (2, 3, 4, 8):
        for hour in (6, 12, 18):
            for channel in CHANNELS:
                damage(tree, channel, T0 + 24 * day + hour, "removed")
    config = config_of(tree, max_gap_hours=5)
    packed = pack_small(config, tmp_path / "store", rows=40)
    daily = {"interval_hours": 24, "frames_in": 2}
    compare(config_of(tree, max_gap_hours=5, **daily), from_store(packed, tmp_path / "store", **daily))


def test_a_subset_of_channels_copies_only_their_bytes(tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    packed = pack_small(config_of(tree), tmp_path / "store")
    data = open_data(from_store(packed, tmp_path / "store", variables={"z": ["level_01"], "t2m": "single"}))
    copied: list[int] = []
    real = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, what: (copied.append(what.numel()), real(to, what))[1])
    data.windows.reader.frame(T0)
    assert copied == [4 * 8, 4 * 8]


def test_some_years_of_the_store(make_tree, tmp_path: Path):
    """只要后一年：目录树不看前一年的文件，岁首的空缺只有一侧；从两年的存档读也必须如此。"""
    tree = make_tree(tmp_path / "tree", CHANNELS[:2], (4, 8), "2000-12-20", "2001-01-20")
    new_year = parse_time("2001-01-01")
    for h in range(-30, 1, 6):
        damage(tree, "t2m", new_year + h, "removed")  # 跨年的长空缺
        damage(tree, "z_level_00", new_year + h, "removed")
    damage(tree, "z_level_00", new_year + 6, "text")
    whole = {
        "train": ["2000-12-20", "2001-01-05"],
        "val": ["2001-01-06", "2001-01-10"],
        "test": ["2001-01-11", "2001-01-20"],
    }
    later = {**whole, "train": ["2001-01-01", "2001-01-05"]}
    packed = pack_small(config_of(tree, splits=whole), tmp_path / "store")
    compare(config_of(tree, splits=whole), packed)
    tree_data, _ = compare(config_of(tree, splits=later), from_store(packed, tmp_path / "store", splits=later))
    assert int(tree_data.segments["train"][0][0]) == new_year


# ---- 存档没有的


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variables": {"u10": "single"}}, "data.variables.u10 = single: not in the store {store}; it holds t2m, z"),
        ({"variables": {"z": "single"}}, "data.variables.z = single: not in the store"),
        ({"variables": {"t2m": "all"}}, "data.variables.t2m = all: not in the store"),
        ({"variables": {"z": ["level_07"]}}, "data.variables.z = ['level_07']: not in the store"),
        ({"variables": {"z": ["level_00", "level_00"]}}, "choose at least one channel, and none twice"),
        ({"interval_hours": 3}, "data.interval_hours = 3: the store {store} holds every 6 h; multiples of 6"),
        ({"interval_hours": 8}, "data.interval_hours = 8"),
        ({"max_gap_hours": 30}, "data.max_gap_hours = 30: the store {store} holds what bridges gaps of up to 24 h"),
        ({"standardize": "no"}, "data.standardize = no: the store {store} was packed from files that are raw"),
        ({"utc_offset_hours": 8}, "data.utc_offset_hours = 8: the store {store} was packed with 0"),
        ({"latitude": {"first": -67.5, "step": 45.0, "count": 4}}, "data.latitude has 4 values from -67.5 to 67.5"),
        (
            {"splits": {"train": ["1999", "1999"], "val": ["2000", "2000"], "test": ["2001", "2001"]}},
            "data.splits need 1999, 2001, the store {store} holds 2000; later years are appended by",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_store_lacks(tree, tmp_path: Path, changes: dict[str, Any], said: str):
    packed = pack_small(config_of(tree), tmp_path / "store")
    with pytest.raises(ValueError, match=re.escape(said.format(store=tmp_path / "store"))) as caught:
        open_data(from_store(packed, tmp_path / "store", **changes))
    assert "\n" not in str(caught.value)


def test_not_a_store(tree, tmp_path: Path):
    for path, said in ((tmp_path / "nowhere", "is not a store"), (tree.root, "is not a store")):
        with pytest.raises(ValueError, match=said):
            open_data(from_store(config_of(tree), path))
    packed = pack_small(config_of(tree), tmp_path / "store")
    mark = tmp_path / "store" / "store.json"
    text = mark.read_text()
    mark.write_text(text.replace('"interval_hours": 6', '"interval_hours": 3'))
    with pytest.raises(ValueError, match="store.json is damaged"):
        open_data(packed)
    mark.write_text(text)
    chunk = tmp_path / "store/fields/1.0.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-4])
    with pytest.raises(
        ValueError, match=rf"1\.0\.0\.0: {ROWS * 3 * 32 * 4 - 4} bytes, expected {ROWS * 3 * 32 * 4}; .*verify --out"
    ):
        open_data(packed)
    mark.unlink()
    with pytest.raises(ValueError, match="is not complete; run .* again"):
        open_data(packed)


@pytest.mark.parametrize("name", ["time/0", "present.npy"])
def test_a_flipped_byte_in_what_decides_everything(tree, tmp_path: Path, name: str):
    """时刻与「有哪些文件」错了，窗口就全错：打开时就查。"""
    packed = pack_small(config_of(tree), tmp_path / "store")
    path = tmp_path / "store" / name
    values = bytearray(path.read_bytes())
    values[-3] ^= 1
    path.write_bytes(values)
    with pytest.raises(ValueError, match=rf"^{path}: checksum differs; .* verify --out {tmp_path}/store .*$"):
        open_data(packed)
    path.unlink()
    with pytest.raises(ValueError, match=rf"^{path}: missing; .* verify"):
        open_data(packed)


def test_source_needs_a_store(tree):
    with pytest.raises(ValueError, match="source = store needs store, the folder"):
        config_of(tree, source="store")
