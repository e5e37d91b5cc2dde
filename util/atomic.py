"""写文件的规矩：先写临时名，写完才改名；中断或出错都不会留下半个文件。"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def flush(path: Path) -> None:
    """内容落盘；改名之前做，断电之后才不会留下空的。"""
    with path.open("rb") as file:
        os.fsync(file.fileno())
