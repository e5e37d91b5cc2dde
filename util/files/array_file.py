"""逐批写的大 `.npy`：总的形状事先知道，内存里只有一批。"""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from util.atomic import replacing


class ArrayFile:
    """(N, ...) float32 的 `.npy`，各行次序不拘地写；用作上下文管理器，正常离开时才有正式的名字。

    不用内存映射：磁盘满时映射的写入以 SIGBUS 杀死进程，这里是一个 OSError。
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.shape, self.missing = shape, np.ones(shape[0], dtype=bool)
        header = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": shape}
        with ExitStack() as stack:
            self.file = stack.enter_context(stack.enter_context(replacing(path)).open("wb"))
            np.lib.format.write_array_header_1_0(self.file, header)
            self.start = self.file.tell()
            stack.push(self._check)
            self._closing = stack.pop_all()

    def write(self, row: int, fields: np.ndarray) -> None:
        """fields (B, ...) 写进第 row … row + B - 1 行。"""
        rows = slice(row, row + len(fields))
        assert fields.shape[1:] == self.shape[1:], f"rows of shape {fields.shape[1:]}, the file has {self.shape[1:]}"
        assert rows.stop <= self.shape[0], f"rows {row} to {rows.stop}, the file has {self.shape[0]}"
        self.file.seek(self.start + row * 4 * math.prod(self.shape[1:]))
        self.file.write(np.ascontiguousarray(fields, dtype=np.float32).data)
        self.missing[rows] = False

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._closing.__exit__(*error)

    def _check(self, kind: type[BaseException] | None, *_: object) -> None:
        assert kind is not None or not self.missing.any(), f"{int(self.missing.sum())} rows were never written"
