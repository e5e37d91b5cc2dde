"""数据层各测试共用的：与小树相配的配置，把文件弄坏的办法。"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from util.config import DataConfig
from util.data.tree_files import field_path

SHAPE = (4, 8)
SPLITS = {
    "train": ["2000-01-01", "2000-01-06"],
    "val": ["2000-01-07", "2000-01-09"],
    "test": ["2000-01-10", "2000-01-12"],
}
DAYS = {"first_day": "2000-01-01", "last_day": "2000-01-12", "shape": SHAPE}  # 6 小时时 24 + 12 + 12 个样本


def config_of(tree: Any, **changes: Any) -> DataConfig:
    """与 make_tree 写的树相配；容许缺得多，好专看一处。"""
    values = {**tree.data, "splits": SPLITS, "frames_in": 3, "max_missing": 0.5, "pressure_hpa": [50.0, 1000.0]}
    return DataConfig(**{**values, **changes})


def truth(tree: Any, channel: str, hour: int) -> np.ndarray:
    """写树时的真值 (H, W)，物理单位。"""
    return tree.fields[tree.hours.index(hour), tree.channels.index(channel)]


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(path, change(np.load(path)))


def _with(value: float) -> Callable[[Path], None]:
    def change(field: np.ndarray) -> np.ndarray:
        field[1, 2] = value
        return field

    return lambda path: rewrite(path, change)


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {  # 名字 → (弄坏的办法, 毛病, 说明里的一段)
    "removed": (lambda p: p.unlink(), "missing", "missing"),
    "empty": (lambda p: p.write_bytes(b""), "unreadable", "unreadable ("),
    "cut in the header": (lambda p: p.write_bytes(p.read_bytes()[:60]), "unreadable", "unreadable ("),
    "cut in the values": (lambda p: p.write_bytes(p.read_bytes()[:-40]), "unreadable", "unreadable ("),
    "text": (lambda p: p.write_text("hello"), "unreadable", "unreadable ("),
    "broken header": (
        lambda p: p.write_bytes(p.read_bytes().replace(b"'shape': (4,", b"'shape': ((,")),
        "unreadable",
        "(",
    ),
    "half a zip": (lambda p: p.write_bytes(b"PK\x03\x04" + p.read_bytes()), "unreadable", "unreadable ("),
    "pickle": (lambda p: np.save(p, np.array([{}], dtype=object)), "unreadable", "pickle"),
    "other shape": (lambda p: rewrite(p, lambda f: f[:, :-1]), "wrong shape", "shape (4, 7), expected (4, 8)"),
    "double": (lambda p: rewrite(p, lambda f: f.astype(np.float64)), "wrong dtype", "dtype float64, expected float32"),
    "not a number": (_with(np.nan), "non-finite", "1 non-finite values"),
    "infinite": (_with(np.inf), "non-finite", "1 non-finite values"),
    "a point never written": (_with(9.96921e36), "fill value", "1 of 32 values are 9.96921e+36"),
    "never written": (
        lambda p: rewrite(p, lambda f: 0 * f + np.float32(1e20)),
        "fill value",
        "32 of 32 values are 1e+20",
    ),
    "one code everywhere": (lambda p: rewrite(p, lambda f: 0 * f - 9999), "fill value", "32 of 32 values are -9999"),
}


def damage(tree: Any, channel: str, hour: int, how: str) -> Path:
    """把一个文件弄坏，返回它的路径。"""
    path = field_path(tree.root, channel, hour)
    DAMAGE[how][0](path)
    return path


def standardize_files(tree: Any, *channels: str) -> None:
    """把这些通道（默认全部）的文件改成标准化之后的，mean_std.json 不动。"""
    for c, channel in enumerate(tree.channels):
        if channel in (channels or tree.channels):
            values = tree.fields[:, c].astype(np.float64)
            for i, hour in enumerate(tree.hours):
                np.save(
                    field_path(tree.root, channel, hour),
                    ((values[i] - values.mean()) / values.std()).astype(np.float32),
                )
