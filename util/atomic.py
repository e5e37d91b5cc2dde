"""写文件的规矩：先写临时名，写完才改名，中断或出错都不会留下半个文件；一个文件夹同时只由一个命令写。"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

LOCK = ".lock"
HELD = (errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # 有的网络盘
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp", re.DOTALL)  # replacing 起的名字
log = logging.getLogger("ar_pred")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`with replacing(path) as temporary:` 写 temporary，正常离开时它成为 path，出错时删去；文件、文件夹都行。"""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # 进程号不够：几台机器写同一个盘
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """folder 里（连同以下各层）replacing 写到一半被杀时留下的；只认它起的名字，别人的 .x.tmp 不动。"""
    for path in list(folder.rglob(".*.tmp")):
        if not TEMPORARY.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)  # 被杀的那一次，它的进程随后就退，也许正在自己删
        else:
            path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """内容落盘；改名之前做，断电之后才不会留下空的。"""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def reserved(folder: Path, advice: str = "wait for it to end, or give another --out") -> Iterator[None]:
    """块内 folder（不在时建立）由这个进程占着。

    用 lockf 而不是 flock：进程一死就放开，它的读取进程还没有退也一样。同一个进程里不要占两次，后一次离开就都放开了。

    Raises:
        ValueError: 别的进程占着（说出是哪一个，接着是 advice）；folder 是一个文件。
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor = _open_locked(path, advice)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%F %T}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # 先删名字再放开：别人锁上了也看得出是删去的
        os.close(descriptor)


def _open_locked(path: Path, advice: str) -> int:
    """打开并锁上的 path；打开之后它被前一个主人删去，就再来。"""
    while True:
        descriptor, ours = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), False
        try:
            _lock(descriptor, path, advice)
            with suppress(FileNotFoundError):
                ours = os.path.samestat(os.fstat(descriptor), path.stat())
        finally:
            if not ours:
                os.close(descriptor)
        if ours:
            return descriptor


def _lock(descriptor: int, path: Path, advice: str) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            owner = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            raise ValueError(f"{path.parent} is in use by {owner}; {advice}") from None
        if error.errno not in NO_LOCKS:
            raise
        log.warning(
            "%s: its disk has no file locks (%s), nothing keeps a second command out", path.parent, error.strerror
        )
