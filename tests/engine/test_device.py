"""设备。"""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from engine import device
from engine.device import kept_memory


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_memory_that_was_used_is_kept() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        blocks = [torch.ones(2**21) for _ in range(20)]  # 8 MB 一块，一共 160 MB
        del blocks
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    with kept_memory():
        least = min(faults() for _ in range(5))  # 头几遍堆还在长
    assert least < 40  # 160 MB 是 40,960 页，或 80 个大页


def test_limits_of_the_user_stay(monkeypatch) -> None:
    class Libc:
        @staticmethod
        def mallopt(*_: int) -> None:
            raise AssertionError

    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: Libc)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    with kept_memory():
        pass
