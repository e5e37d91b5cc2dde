"""Ctrl-C、SIGTERM、SIGUSR1（SLURM 到时之前送的）：先记下，由循环在安全的地方停；过一会儿再按一次 Ctrl-C 则立刻停。"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PARENT_DIES = 1  # prctl 的 PR_SET_PDEATHSIG


def die_with_parent() -> None:
    """起这个进程的一死，它也当即走：听不见别的信号的也走。只有 Linux 有；exec 之后还在。"""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DIES, signal.SIGKILL)


class Interrupted(Exception):
    """循环在安全处停下了；退出码为 128 + signum（130、143、138）。进程之间送得过去：参数就是 signum。"""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    def __str__(self) -> str:
        return signal.Signals(self.signum).name


class StopFlag:
    """收到的头一个信号，0 表示没有；只由信号来写，写上就不再变。"""

    def __init__(self) -> None:
        self.signum = 0
        self.since = 0.0

    def check(self) -> None:
        """收到过信号就抛 Interrupted。"""
        if self.signum:
            raise Interrupted(self.signum)


@contextmanager
def catch_signals() -> Iterator[StopFlag]:
    """块内的 STOPS 只置标志；离开时恢复原来的处理。"""
    flag = StopFlag()

    def handle(signum: int, frame: FrameType | None) -> None:
        if not flag.signum:
            flag.signum, flag.since = signum, time.monotonic()
            os.write(2, b"\nstopping at the next safe point; Ctrl-C again stops at once\n")  # 信号里不宜用 logging
        elif signum == signal.SIGINT and time.monotonic() - flag.since > 1:  # 作业系统常把同一个信号送两遍，那不算
            raise KeyboardInterrupt

    old = {s: signal.signal(s, handle) for s in STOPS}
    try:
        yield flag
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
