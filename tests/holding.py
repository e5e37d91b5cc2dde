"""另一个进程占着一个文件夹，两个进程同时做一件事；给测「谁在写」的测试用。"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys
from pathlib import Path
from util.atomic import reserved
with reserved(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """块内 folder 由一个子进程占着；离开时它正常放开（没有先被杀的话）。"""
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n", child.communicate()[1]
    try:
        yield child
    finally:
        child.communicate()


def two_at_once(work: Callable[[], object]) -> None:
    """两个 fork 出来的进程同时做 work，都要做成。"""
    context = multiprocessing.get_context("fork")
    both_are_there = context.Barrier(2)

    def one() -> None:
        both_are_there.wait()
        work()

    children = [context.Process(target=one) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
