"""直接读进缓冲区的快路：认得的逐位等于 NumPy 读出的，凡有一点不同都交给 read_field；目录树用它，窗口不变。"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trees import DAMAGE, DAYS, SHAPE, config_of, damage
from util.calendar import parse_time
from util.data import tree_origin
from util.data.batches import all_starts
from util.data.dataset import open_data
from util.data.tree_files import FieldError, field_path, plain_header, read_field, read_into, usual_header

T0 = parse_time("2000-01-01")
CHANNELS = ("t2m", "z_level_00")
HEADER = usual_header(SHAPE)


@pytest.fixture
def tree(make_tree, tmp_path: Path):
    return make_tree(tmp_path / "tree", CHANNELS, **DAYS)


def empty() -> np.ndarray:
    return np.full(SHAPE, 7, dtype=np.float32)


def with_header(field: np.ndarray, version: tuple[int, int] = (1, 0), align: int = 64, fortran: bool = False) -> bytes:
    """照 NumPy 文档（lib.format）手写的 .npy；1.14 以前的 NumPy 把文件头补到 16 的倍数。"""
    text = repr({"descr": "<f4", "fortran_order": fortran, "shape": field.shape}).replace(")}", "), }")
    size = {1: 2, 2: 4}[version[0]]
    pad = -(8 + size + len(text) + 1) % align
    length = (len(text) + pad + 1).to_bytes(size, "little")
    values = field.astype("<f4").tobytes("F" if fortran else "C")
    return b"\x93NUMPY" + bytes(version) + length + text.encode() + b" " * pad + b"\n" + values


UNUSUAL: dict[str, dict[str, Any]] = {
    "old padding": {"align": 16},
    "version 2": {"version": (2, 0)},
    "column by column": {"fortran": True},
}


def test_the_usual_header_is_what_numpy_writes():
    for shape in (SHAPE, (128, 256), (721, 1440), (1, 1)):
        file = io.BytesIO()
        np.save(file, np.zeros(shape, dtype=np.float32))
        assert file.getvalue()[: -4 * shape[0] * shape[1]] == usual_header(shape)


def test_reads_the_same_bits(tree, tmp_path: Path):
    values = np.array([[-0.0, 1e-45, 3e14, -3e14], [1, 2, 3, 4]], dtype=np.float32)  # 负零、次正规数、很大的
    (tmp_path / "x.npy").write_bytes(with_header(values) + b"more behind is not looked at")
    out = np.empty_like(values)
    assert read_into(str(tmp_path / "x.npy"), usual_header(values.shape), out)
    assert out.tobytes() == values.tobytes() == read_field(tmp_path / "x.npy", values.shape).tobytes()
    for i, hour in enumerate(tree.hours[:5]):
        found = empty()
        assert read_into(str(field_path(tree.root, "t2m", hour)), HEADER, found)
        assert np.array_equal(found, tree.fields[i, 0])


@pytest.mark.parametrize("how", list(DAMAGE))
def test_no_damage_gets_through(tree, how: str):
    assert not read_into(str(damage(tree, "t2m", T0, how)), HEADER, empty())


def test_a_folder_does_not_get_through(tmp_path: Path):
    assert not read_into(str(tmp_path), HEADER, empty())


def test_any_changed_byte_is_seen_alike(tree):
    """文件头的每个字节、各种值：快路认的，read_field 也认，逐位相同；其余由 read_field 决定。"""
    path = field_path(tree.root, "t2m", T0)
    whole = path.read_bytes()
    assert len(whole) == len(HEADER) + 4 * SHAPE[0] * SHAPE[1]
    for place in range(len(HEADER)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert not read_into(str(path), HEADER, empty())
    rng = np.random.default_rng(0)
    for _ in range(200):
        raw = bytearray(whole)
        raw[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(raw)
        found = empty()
        if read_into(str(path), HEADER, found):
            assert np.array_equal(found, read_field(path, SHAPE))
        elif raw.startswith(HEADER):
            values = np.frombuffer(raw[len(HEADER) :], np.float32)
            if np.isfinite(values).all():  # 大得说不准，却不是填充值
                assert np.abs(values).max() > 1e14
                assert read_field(path, SHAPE).tobytes() == values.tobytes()
                continue
            with pytest.raises(FieldError, match="non-finite"):
                read_field(path, SHAPE)


@pytest.mark.parametrize("size", range(0, 256, 17))
def test_any_cut_is_seen(tree, size: int):
    path = field_path(tree.root, "t2m", T0)
    path.write_bytes(path.read_bytes()[:size])
    assert not read_into(str(path), HEADER, empty())
    with pytest.raises(FieldError, match="unreadable"):
        read_field(path, SHAPE)


# ---- 目录树


def windows(tree: Any) -> torch.Tensor:
    data = open_data(config_of(tree, standardize="yes"))
    batch = data.windows.__getitems__(all_starts(data.segments["train"], data.spec.window).tolist())
    assert batch.valid.all()
    return torch.cat([batch.history, batch.future], 1)


@pytest.mark.parametrize(("how", "slow"), [("old padding", 1), ("version 2", 48), ("column by column", 48)])
def test_files_written_in_another_way(tree, how: str, slow: int, monkeypatch: pytest.MonkeyPatch):
    """窗口逐位相同；旧 NumPy 的文件头见过一次就认得，布局不同的每次都走 read_field。"""
    expected = windows(tree)
    for hour in tree.hours:
        for c, channel in enumerate(CHANNELS):
            field = tree.fields[tree.hours.index(hour), c]
            field_path(tree.root, channel, hour).write_bytes(with_header(field, **UNUSUAL[how]))
    path = field_path(tree.root, "t2m", T0)
    assert np.array_equal(np.load(path), tree.fields[0, 0])
    known = plain_header(path, SHAPE)
    assert known == (path.read_bytes()[:80] if how == "old padding" else None)
    calls = []
    real = tree_origin.read_field
    monkeypatch.setattr(tree_origin, "read_field", lambda *a: (calls.append(a), real(*a))[1])
    assert torch.equal(windows(tree), expected)
    assert len(calls) == slow  # 训练段 24 个时刻、两个通道


def test_a_file_deleted_after_the_index(make_tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """索引之后删去的（也有刚读完、还没看文件头就删去的）：前者照缺失插值，后者照样是那些数。"""
    tree = make_tree(tmp_path / "tree", ("t2m",), **DAYS)
    windows = open_data(config_of(tree)).windows
    damage(tree, "t2m", tree.hours[5], "removed")
    frame = windows.reader.frame(tree.hours[5])
    assert not frame.valid.any()
    assert frame.sources == [(0, tree.hours[4]), (0, tree.hours[6])]
    assert (0, tree.hours[5]) in windows.reader.faults
    path = field_path(tree.root, "t2m", tree.hours[9])
    path.unlink()
    assert plain_header(path, SHAPE) is None


def test_paths_are_those_of_the_tree(make_tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """跨年；root 写得不规整也一样。"""
    days = {**DAYS, "first_day": "1999-12-30"}
    tree = make_tree(tmp_path / "tree", CHANNELS, **days)
    monkeypatch.chdir(tmp_path)
    config = config_of(
        tree, root="./tree/", splits={**config_of(tree).splits.model_dump(), "train": ["1999-12-30", "2000-01-06"]}
    )
    reader = open_data(config).windows.reader
    for i in (0, 7, 8, 9):
        frame = reader.frame(tree.hours[i])
        assert frame.valid.all()
        for c in range(2):
            mean, std = reader.mean[c], reader.std[c]
            assert np.array_equal(frame.fields[c], (tree.fields[i, c] - mean) / std)
