"""别人的小文件怎样读：只读普通文件（管道打开就会一直等），文件头、JSON 有界，字节数对得上才要内存；一律 ValueError。"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MOST_JSON = 2**28  # 字节；最大的是存档的 store.json，几 MB
LONGEST_HEADER = 10_000  # 字节，与 NumPy 的上限相同
LASTING = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP)  # 再读也一样：不是普通文件、不让读
MAGIC = b"\x93NUMPY"
SIZES = {1: 2, 2: 4, 3: 4}  # `.npy` 的版本 → 文件头的长度占几个字节
ENTRY = re.compile(
    r"""\s*['"](descr|fortran_order|shape)['"]\s*:\s*(?:['"]([^'"]{1,16})['"]|(True|False)|\(([0-9L,\s]*)\))\s*,?\s*"""
)
PLAIN = re.compile(r"[<>|=]?([biufc][0-9]{1,2}|[SU][0-9]{1,6}|\?)")  # 别的是对象（pickle）、结构


class NpyHeader(NamedTuple):
    """`.npy` 的文件头；start 是数从第几个字节起。"""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def passing(error: Exception) -> bool:
    """盘一时读不出，过一会儿也许读得出。"""
    return isinstance(error, OSError) and error.errno not in LASTING


def open_regular(path: str | Path) -> BufferedReader:
    """打开一个普通文件来读；管道、设备不等。

    Raises:
        OSError: 不在、不让读、不是普通文件。
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_npy_header(file: BufferedReader) -> NpyHeader:
    """自己认，不用 NumPy 的：它以 ast 解析，4,000 位的形状、几千层的括号各有各的异常，几个线程一起还会互相弄乱。

    Raises:
        ValueError: 不是 `.npy`、断在文件头里、不是数的数组。
    """
    start = file.read(8)
    if start[:6] != MAGIC or len(start) < 8 or start[6] not in SIZES:
        raise ValueError("not a .npy file")
    size = int.from_bytes(file.read(SIZES[start[6]]), "little")
    if size > LONGEST_HEADER:
        raise ValueError(f"a header of {size} bytes")
    raw = file.read(size)
    if len(raw) < size:
        raise ValueError("cut off in the header")
    text, found, place = raw.decode("latin1").strip(), {}, 1
    while entry := ENTRY.match(text, place):
        found[entry[1]], place = entry, entry.end()
    if not text.startswith("{") or text[place:] != "}" or len(found) != 3:
        raise ValueError("a header that is not {'descr': ..., 'fortran_order': ..., 'shape': (...)}")
    return NpyHeader(
        _shape(found["shape"][4]), _dtype(found["descr"][2]), _flag(found["fortran_order"][3]), file.tell()
    )


def _shape(text: str | None) -> tuple[int, ...]:
    sizes = [] if text is None else [size.strip().removesuffix("L") for size in text.removesuffix(",").split(",")]
    if text is not None and not text.strip():
        return ()
    if not 0 < len(sizes) <= 32 or not all(size.isdecimal() and len(size) <= 18 for size in sizes):
        raise ValueError("a shape that is not a few whole numbers")
    return tuple(map(int, sizes))


def _dtype(text: str | None) -> np.dtype[Any]:
    if text is None or not PLAIN.fullmatch(text):
        raise ValueError(f"values of type {text!r}, not plain numbers; objects (pickle) are not read")
    try:
        return np.dtype(text)
    except TypeError:
        raise ValueError(f"values of type {text!r}") from None


def _flag(text: str | None) -> bool:
    if text is None:
        raise ValueError("a header without fortran_order: True or False")
    return text == "True"


def read_npy_values(file: BufferedReader, header: NpyHeader) -> np.ndarray:
    """文件头之后的数。

    Raises:
        ValueError: 字节不够；这时没有要过内存。
    """
    there = os.fstat(file.fileno()).st_size - header.start
    if there < header.nbytes:
        raise ValueError(f"cut off: {there} bytes of values, {header.nbytes} expected")
    values = np.frombuffer(bytearray(header.nbytes), header.dtype) if header.nbytes else np.empty(0, header.dtype)
    file.seek(header.start)
    file.readinto(values.view(np.uint8).data)
    if header.fortran_order:
        return values.reshape(header.shape[::-1]).transpose()
    return values.reshape(header.shape)


def parse_json(text: str | bytes) -> Any:
    """Raises ValueError: 不是 JSON；太深。"""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json(path: str | Path) -> Any:
    """一份 JSON。

    Raises:
        OSError: 见 open_regular。
        ValueError: 太大；不是 UTF-8 的 JSON；太深。
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_JSON:
            raise ValueError(f"{size} bytes of JSON, at most {MOST_JSON} are read")
        return parse_json(file.read())
