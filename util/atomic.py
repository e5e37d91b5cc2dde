"""写文件的规矩：先写临时名，写完才改名，中断或出错都不会留下半个文件；一个文件夹同时只由一个命令写，一份缓存只由一个造。"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path

LOCK = ".lock"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HELD = (errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # 有的网络盘
RETRY = 0.1  # 秒
WAITING = "waiting for it"
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp", re.DOTALL)  # replacing 起的名字
log = logging.getLogger("ar_pred")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`with replacing(path) as temporary:` 写 temporary，正常离开时它成为 path，出错时删去；文件、文件夹都行。

    Raises:
        OSError: 盘满了的，说出是哪个文件，写到多少、还有多少地方。
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.name))
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        written = sum(part.stat().st_blocks * 512 for part in (temporary, *temporary.rglob("*")) if part.is_file())
        _remove(temporary)
        raise no_room(path, error, written, "more than ") from error
    finally:
        _remove(temporary)


def no_room(path: Path, error: OSError, needed: int, more: str = "") -> OSError:
    """盘满了的 error，一行里说出 path 要多少字节、那里还有多少。"""
    free = shutil.disk_usage(path.parent).free
    said = f"{os.strerror(error.errno or 0)}, {more}{needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free"
    return OSError(error.errno, said, str(path))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def temporary_name(name: str) -> str:
    """写 name 时的临时名，每次不同；进程号不够：几台机器写同一个盘。"""
    return f".{name}.{secrets.token_hex(8)}.tmp"


def remove_leftovers(folder: Path, deep: bool = True) -> None:
    """folder 里（deep 时连同以下各层）写到一半被杀时留下的；只认 temporary_name 起的，另有主人的一层不看。"""
    for place, folders, files in os.walk(folder):
        if LOCK in files and Path(place) != folder:
            folders.clear()
            continue
        for name in filter(TEMPORARY.fullmatch, files):
            Path(place, name).unlink(missing_ok=True)
        for name in filter(TEMPORARY.fullmatch, [*folders]):
            folders.remove(name)
            shutil.rmtree(Path(place, name), ignore_errors=True)  # 被杀的那一次，它的进程随后就退，也许正在自己删
        if not deep:
            return


def flush(path: Path) -> None:
    """内容落盘；改名之前做，断电之后才不会留下空的。"""
    with path.open("rb") as file:
        os.fsync(file.fileno())


class InUse(ValueError):
    """别的进程占着；说出是哪一个。"""


@contextmanager
def reserved(
    folder: Path, advice: str = "wait for it to end, or give another --out", sweep: bool = True
) -> Iterator[None]:
    """块内 folder（不在时建立）由这个进程占着。

    Args:
        advice: 别的进程占着时怎么办。
        sweep: 先清掉从前的主人被杀时留下的；有百万个文件的（目录树）由命令自己挑着清。

    Raises:
        InUse: 别的进程占着。
        ValueError: folder 是一个文件。
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / LOCK, str(folder), advice):
        if sweep:
            remove_leftovers(folder)
        yield


@contextmanager
def making(path: Path, check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """块内只有这个进程在造缓存 path；别的进程正在造就等它，它被杀了就轮到这里。进来之后先看看是不是已经造好。"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with waiting(lambda: _locked(path.with_name(f".{path.name}{LOCK}"), str(path), WAITING), check):
        yield


@contextmanager
def waiting(lock: Callable[[], AbstractContextManager[None]], check: Callable[[], None]) -> Iterator[None]:
    """块内 lock() 占着；别的进程占着就等到它放开，其间不断地 check（要停就抛）。"""
    with ExitStack() as held:
        for tries in count():
            try:
                held.enter_context(lock())
                break
            except InUse as busy:
                if not tries:
                    log.info("%s", busy)
                check()
                time.sleep(RETRY)
        yield


@contextmanager
def _locked(path: Path, what: str, advice: str) -> Iterator[None]:
    """块内 path 锁着，里面写着是谁。

    用 lockf 而不是 flock：进程一死就放开，它的读取进程还没有退也一样。同一个进程里不要锁两次，后一次离开就都放开了。
    """
    descriptor = _open_locked(path, what, advice)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%F %T}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # 先删名字再放开：别人锁上了也看得出是删去的
        os.close(descriptor)


def _open_locked(path: Path, what: str, advice: str) -> int:
    """打开并锁上的 path；打开之后它被前一个主人删去，就再来。"""
    while True:
        descriptor, ours = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), False
        try:
            _lock(descriptor, what, advice)
            with suppress(FileNotFoundError):
                ours = os.path.samestat(os.fstat(descriptor), path.stat())
        finally:
            if not ours:
                os.close(descriptor)
        if ours:
            return descriptor


def _lock(descriptor: int, what: str, advice: str) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            owner = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            raise InUse(f"{what} is in use by {owner}; {advice}") from None
        if error.errno not in NO_LOCKS:
            raise
        log.warning("%s: its disk has no file locks (%s), nothing keeps a second command out", what, error.strerror)
