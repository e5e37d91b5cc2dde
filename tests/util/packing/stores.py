"""存档各测试共用的：在本进程里打包，从树与从存档各读一遍来比。"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.trees import DAMAGE, damage
from util.batch import Batch
from util.config import DataConfig
from util.data.batches import all_starts, split_batches
from util.data.dataset import WeatherData, open_data
from util.data.index import SPLITS
from util.data.origin import DataError
from util.packing import pack as pack_module

ROWS = 5  # 测试里一块的行数


def pack_small(
    config: DataConfig, store: Path, dtype: str = "float32", workers: int = 1, rows: int = ROWS
) -> DataConfig:
    """打成每块 rows 行的存档；返回从它读的配置。"""
    row = 2 if dtype != "float32" else 4
    channels = sum(1 if levels == "single" else len(levels) for levels in config.variables.values())
    size = pack_module.CHUNK_BYTES
    pack_module.CHUNK_BYTES = rows * row * channels * config.latitude.count * config.longitude.count
    try:
        pack_module.pack(config, store, dtype, workers, "python dataset.py pack ...")
    finally:
        pack_module.CHUNK_BYTES = size
    return from_store(config, store)


def from_store(config: DataConfig, store: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{**config.model_dump(), "source": "store", "store": str(store), **changes})


def outcomes(data: WeatherData, windows: list[list[int]]) -> list[Batch | str]:
    """逐批读；读不成的留下报错的那一行。"""
    results: list[Batch | str] = []
    for starts in windows:
        try:
            results.append(data.windows.__getitems__(starts))
        except DataError as error:
            results.append(str(error))
    return results


def assert_same(found: Sequence[Batch | str], expected: Sequence[Batch | str]) -> None:
    """逐位相同。"""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, str) or isinstance(other, str):
            assert one == other
            continue
        for a, b in zip(one.tensors, other.tensors, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def contents(store: Path) -> dict[str, str]:
    """每个文件的校验和。"""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def shuffled_windows(data: WeatherData, seed: int = 0) -> list[list[int]]:
    """三个划分的每一个起点，打乱，三个一批。"""
    starts = np.concatenate([all_starts(data.segments[split], data.spec.window) for split in SPLITS])
    return split_batches(np.random.default_rng(seed).permutation(starts), 3)


def compare(config: DataConfig, packed: DataConfig, seed: int = 0) -> tuple[WeatherData, WeatherData]:
    """各自打开，比说明、段和全部窗口。"""
    tree, store = open_data(config), open_data(packed)
    assert store.spec == tree.spec
    for split in SPLITS:
        assert [s.tolist() for s in store.segments[split]] == [s.tolist() for s in tree.segments[split]]
    windows = shuffled_windows(tree, seed)
    assert windows
    windows += [[start] for batch in windows for start in batch]  # 一批里重复的时刻只读一次，单独的一个全读
    assert_same(outcomes(store, windows), outcomes(tree, windows))
    return tree, store


def spoil(tree: Any, seed: int, files: int) -> None:
    """随机弄坏一些文件，各种坏法；边上的、成串的都有。"""
    rng, ways = np.random.default_rng(seed), list(DAMAGE)
    for channel in tree.channels:
        for hour in rng.choice(tree.hours, files, replace=False).tolist():
            damage(tree, channel, hour, ways[int(rng.integers(len(ways)))] if rng.random() < 0.6 else "removed")
