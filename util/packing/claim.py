"""写一个存档之前占下它的文件夹：里面没有别的东西，放得下，同时只有一个命令写，写满了是一行。"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from util.atomic import DISK_FULL, remove_leftovers, reserved


def refuse_other(store: Path) -> None:
    if store.exists() and not (store / "pack").is_dir() and any(store.iterdir()):
        raise ValueError(f"{store} is a folder with other things in it; give a new one")


def check_space(store: Path, needed: int) -> None:
    free = shutil.disk_usage(store).free
    if needed > free:
        raise ValueError(f"{store} needs {needed / 1e9:.2f} GB more, its disk has {free / 1e9:.2f} GB free")


@contextmanager
def claimed(store: Path) -> Iterator[None]:
    """同一个存档同时只由一个命令写；顺便扫掉上一次被杀时写到一半的临时文件，存档里的也算。

    Raises:
        ValueError: 别的进程正在写；磁盘满了。
    """
    with reserved(store / "pack", "another packing is at work there, wait for it or give another --out"):
        remove_leftovers(store)
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise ValueError(
                f"{store}: {error.strerror}; the store is not complete, make room and run the same command again"
            ) from None
