"""让 HDF5 写的文件，写不下时是一行错误。

HDF5 自己写盘的话，盘满了抛的是它的 RuntimeError；没有写成的块还在它的缓存里，关文件、解释器退出时再写一遍，
进程便死于信号 11。所以让它写进一个 Python 的文件对象：写不下的记着，对 HDF5 说写好了，由我们在一批之后、关上之后抛。
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path


class Sink(FileIO):
    """h5py.File、h5netcdf.File 收的文件对象，不缓存。"""

    error: OSError | None = None

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "r+b")
        self.held: list[tuple[int, bytes]] = []  # 写不下的 (在哪里, 什么)：HDF5 还要读回去，读到别的会死

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        place, rest = self.tell(), memoryview(data).cast("B")
        while rest and self.error is None:
            try:
                count = super().write(rest)
                place, rest = place + count, rest[count:]
            except OSError as error:
                self.error = error
        if rest:
            self.held.append((place, bytes(rest)))
        return len(data)

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if self.error is None:
            return super().readinto(buffer)
        view, first = memoryview(buffer).cast("B"), self.tell()
        count = super().readinto(view)
        view[count:] = bytes(len(view) - count)
        for place, block in self.held:
            start, stop = max(first, place), min(first + len(view), place + len(block))
            if start < stop:
                view[start - first : stop - first] = block[start - place : stop - place]
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def check(self) -> None:
        """
        Raises:
            OSError: 写到现在，有写不下的。
        """
        if self.error is not None:
            raise self.error


@contextmanager
def hdf5_sink(path: Path) -> Iterator[Sink]:
    """`with hdf5_sink(path) as sink, h5py.File(sink, "w") as file:`，新的文件；离开时查有没有写不下的。

    Raises:
        OSError: 见 Sink.check。
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    with Sink(descriptor) as sink:
        try:
            yield sink
        finally:  # 没有写成的读不回来，HDF5 便抛别的：原因是这一个
            sink.check()
