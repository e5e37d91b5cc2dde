"""--source 写着的 → 一个个来源：文件、文件夹、通配、ZIP、地址随意混着写；地址上的 Zarr 原样，别的文件下载了再认。"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from util.source import archive
from util.source.axes import listed
from util.source.opening import KINDS, is_store, start_of
from util.source.remote import connect, download, is_address
from util.source.remote_zarr import address_stamp, find_zarr

SUFFIXES = {".nc", ".nc3", ".nc4", ".netcdf", ".cdf", ".h5", ".hdf5", ".zarr", ".zip"}
SUFFIXES |= {".grib", ".grib1", ".grib2", ".grb", ".grb1", ".grb2"}


class Source(NamedTuple):
    """一个打得开的来源：path 在哪里；name 是报错与摘要里的名字，ZIP 里的写成 a.zip/b.nc；address 是下载自哪里。"""

    path: Path | str
    name: str
    address: str = ""


def find_sources(texts: Sequence[str], stack: ExitStack) -> list[Source]:
    """--source 的全部文字 → 来源，次序照写的，文件夹、通配、ZIP 里的按名字；同一个只算一次。

    下载的、ZIP 里取出来的在临时文件夹里（TMPDIR），由 stack 删。

    Raises:
        ValueError: 哪一个不在、是空的，是坏了的 ZIP，或是地址上的文件夹、通配；地址读不到。
    """
    found: dict[str, Source] = {}
    for text in dict.fromkeys(texts):
        for source in _expand(text, stack):
            found.setdefault(os.path.realpath(source.path) if isinstance(source.path, Path) else source.path, source)
    return list(found.values())


def file_stamps(source: Source) -> list[Any]:
    """来源换过没有：各文件的名字、大小、时刻；Zarr 的文件夹逐个文件看，远处的只看元数据。"""
    if isinstance(source.path, str):
        return address_stamp(source.path)
    if source.address:
        return [source.name, *address_stamp(source.address)]
    files = sorted(p for p in source.path.rglob("*") if p.is_file()) if source.path.is_dir() else [source.path]
    name = Path(source.name).absolute()
    return [[str(name / p.relative_to(source.path)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def _expand(text: str, stack: ExitStack) -> list[Source]:
    """一段 --source 是哪几个来源。"""
    if is_address(text):
        return _at_address(text, stack)
    there = [text] if Path(text).exists() else sorted(glob.glob(text, recursive=True))
    if not there:
        raise ValueError(f"{text}: no such file or folder")
    return [source for path in there for source in _inside(Path(path), path, stack)]


def _at_address(address: str, stack: ExitStack) -> list[Source]:
    """一个地址上的来源：Zarr 是它自己（名字叫 .zarr 的不必先问）；文件下载，也许是 ZIP。"""
    advice = "folders and patterns are not expanded at addresses; list the files"
    path = urlsplit(address).path
    if "*" in path:
        raise ValueError(f"{address}: {advice}")
    if path.rstrip("/").endswith(".zarr") or find_zarr(remote := connect(address)):
        return [Source(address, address)]
    if path.endswith("/"):
        raise ValueError(f"{address}: {advice}")
    file = download(remote, Path(stack.enter_context(TemporaryDirectory(prefix="ar_pred_"))))
    if start_of(file).startswith(b"<"):
        raise ValueError(f"{address}: a web page; {advice}")
    return [source._replace(address=address) for source in _inside(file, address, stack)]


def _inside(path: Path, name: str, stack: ExitStack) -> list[Source]:
    """一个路径里的来源：文件、Zarr 是它自己，ZIP 与文件夹是里面的。"""
    if path.is_dir() and not is_store(path):
        found = [s for inner in _files(path) for s in _inside(inner, f"{name}/{inner.relative_to(path)}", stack)]
        if not found:
            raise ValueError(f"{name}: neither a Zarr store (no .zgroup, no zarr.json) nor a folder with data files")
        return found
    if start_of(path).startswith(archive.MAGIC):
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="ar_pred_")))
        members = archive.extract(path, folder, name)
        if not is_store(folder) and not any(_files(folder)):
            raise ValueError(f"{name}: a ZIP without data files ({listed(members) or 'empty'})")
        return _inside(folder, name, stack)
    return [Source(path, name)]


def _files(folder: Path) -> Iterator[Path]:
    """文件夹里像数据的：按名字或文件头；Zarr 不再往里看，隐藏的、指到别的文件夹去的不看。"""
    for root, folders, names in os.walk(folder):
        stores = [name for name in folders if is_store(Path(root) / name) or name.endswith(".zarr")]
        folders[:] = sorted(name for name in folders if name not in stores and not name.startswith("."))
        for path in (Path(root) / name for name in sorted([*names, *stores]) if not name.startswith(".")):
            if path.suffix.lower() in SUFFIXES or is_store(path) or start_of(path).startswith((*KINDS, archive.MAGIC)):
                yield path
