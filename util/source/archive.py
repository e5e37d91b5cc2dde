"""ZIP：Climate Data Store 把几个 NetCDF 装成一个，名字可能是 .nc；取出来放进临时文件夹，用完由调用者删。"""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

MAGIC = b"PK"


def extract(archive: Path, folder: Path, name: str) -> list[str]:
    """把 archive 里的文件取到 folder 里，逐个流过，内存里只有一小段；修改时间是 archive 的；返回各文件的名字。

    name 写在报错里。

    Raises:
        ValueError: 不是 ZIP、损坏、加了密、有会写到 folder 之外的路径，或盘上放不下。
    """
    stamp = archive.stat().st_mtime_ns
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            for member in members:
                _refuse_unsafe(name, member)
            _refuse_full(name, folder, sum(member.file_size for member in members))
            for member in members:
                os.utime(opened.extract(member, folder), ns=(stamp, stamp))
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # 加了密的是末一种
        raise ValueError(f"{name}: a ZIP that cannot be read ({error})") from None
    return [member.filename for member in members]


def _refuse_unsafe(name: str, member: zipfile.ZipInfo) -> None:
    """绝对的、带 .. 的、带盘符的路径，和符号链接：不猜它想写到哪里。"""
    windows, posix = PureWindowsPath(member.filename), PurePosixPath(member.filename)
    outside = windows.is_absolute() or windows.drive or posix.is_absolute() or ".." in windows.parts
    if outside or stat.S_ISLNK(member.external_attr >> 16):
        raise ValueError(f"{name}: member {member.filename!r} points outside the archive, so nothing is taken from it")


def _refuse_full(name: str, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{name}: unpacking needs {needed / 1e9:.1f} GB in {folder.parent}, {free / 1e9:.1f} GB are free; "
            "set TMPDIR to a folder with room"
        )
