"""数据从哪里来的约定：目录树（tree_origin）与存档（store_origin）各实现一份，读取器只认它。"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from util.config import DataConfig
from util.data.index import Index
from util.data.tree_files import FieldError


class DataError(ValueError):
    """读取途中发现的坏数据。DataLoader 转述读取进程的异常时会裹上整段 traceback，这里只留原来那一句。"""

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition("DataError: ")[2].strip())


class Origin(Protocol):
    """数据从哪里来：目录树（Tree）或存档（util.data.store_origin.Store）。通道一律以 channels 里的序号指称。

    standardized：load 给的场已经标准化；dtype：它们存着的精度，插值得来的场也舍入到它。
    """

    config: DataConfig
    root: str
    channels: list[str]
    standardized: bool
    dtype: torch.dtype

    def years(self, wanted: Sequence[int]) -> list[int]: ...  # wanted 之中有数据的年份

    def index(self, years: list[int]) -> Index: ...

    def mean_std(self) -> list[tuple[float, float]]: ...  # 各通道的均值、标准差，物理单位

    def decide(self, index: Index, training: np.ndarray) -> bool: ...  # 树里的文件是否已经标准化

    def load(self, hours: Sequence[int], here: np.ndarray, out: np.ndarray) -> list[tuple[int, int, FieldError]]: ...

    def file(self, c: int, hour: int) -> Path: ...  # 这个场的文件，报错用

    def raw(self, c: int, hour: int) -> np.ndarray: ...  # 插值用的邻居 (H, W)，文件里的数；坏了是 FieldError

    def stamp(self, c: int, hour: int) -> str: ...  # 这个场换过没有，内容变了它就变


class DataSet(Origin, Protocol):
    """打开了的目录树、存档，或几个合成的一个：另有不随时间变的场。"""

    def static_names(self) -> list[str]: ...  # 有哪些

    def static(self, name: str) -> np.ndarray: ...  # 其中一个 (H, W)
