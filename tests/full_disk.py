"""磁盘满了：文件只许写到多大（同一个进程里），或一个真的小的盘（另一个进程，不许 unshare 的机器没有）。"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRIVATE = shutil.which("unshare") is not None and not subprocess.run(["unshare", "-m", "true"]).returncode
needs_a_small_disk = pytest.mark.skipif(not PRIVATE, reason="no private mounts here")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """文件只许写到 size 字节，如同磁盘满了。"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run_on_a_small_disk(folder: Path, megabytes: int, code: str) -> tuple[int, list[str], list[str]]:
    """folder 是一个这么大的 tmpfs，在那里跑 code；退出码、标准错误的各行、末了里面有什么（名字）。"""
    mount = (
        f'mount -t tmpfs -o size={megabytes}m tmpfs "{folder}" && "$0" -c "$1"; code=$?; ls -A "{folder}"; exit $code'
    )
    command = ["unshare", "-m", "bash", "-c", mount, sys.executable, code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr.splitlines(), done.stdout.split()
