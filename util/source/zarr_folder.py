"""Zarr 的文件夹，本机的：元数据、块的字节、哪些块有。远处的是 remote.RemoteZarr，两者一样用。"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from util.files.bounded import read_json


class Folder(Protocol):
    """键是相对于 Zarr 根的路径，如 t2m/0.0.0。读不到（不是没有）时报 ValueError。"""

    def metadata(self, key: str) -> dict[str, Any] | None:
        """一份 JSON；没有这个文件是 None。"""
        ...

    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        """有的一个文件，[start, end) 的字节；start 为负从末尾数。"""
        ...

    def present(self, name: str, keys: Sequence[str]) -> set[str]:
        """数组 name 的这些文件里有哪些。"""
        ...


class LocalZarr:
    """本机的文件夹。"""

    def __init__(self, path: Path) -> None:
        self.path = path

    def metadata(self, key: str) -> dict[str, Any] | None:
        path = self.path / key
        return read_json(path) if path.is_file() else None

    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        size = (self.path / key).stat().st_size
        first, stop, _ = slice(start, end).indices(size)
        with (self.path / key).open("rb") as file:
            file.seek(first)
            return file.read(stop - first)

    def present(self, name: str, keys: Sequence[str]) -> set[str]:
        """列一遍，不逐个文件问盘。"""
        there = {
            Path(above, file).relative_to(self.path).as_posix()
            for above, _, files in os.walk(self.path / name)
            for file in files
        }
        return there & set(keys)
