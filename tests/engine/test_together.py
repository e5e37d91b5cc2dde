"""几个进程一起停：谁的信号都算，大家停在同一处；没有信号就一直走。"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.parallel import together
from util.signals import Interrupted, StopFlag

STEPS = 12


def walk(rank: int, folder: Path, signals: dict[int, int]) -> None:
    """走 STEPS 步；signals: 第几步 → 这个进程收到的信号。停在第几步、为什么，写进 folder。"""
    torch.distributed.init_process_group("gloo", f"file://{folder / 'meet'}", rank=rank, world_size=2)
    flag = StopFlag()
    check = together(SimpleNamespace(world_size=2, device=torch.device("cpu")), flag.check)  # type: ignore[arg-type]
    found: Any = None
    for step in range(STEPS):
        flag.signum = flag.signum or signals.get(step, 0)
        try:
            check()
        except Interrupted as stop:
            found = [step, stop.signum]
            break
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)


@pytest.mark.parametrize(
    ("signals", "expected"),
    [
        (({5: signal.SIGTERM}, {}), [6, signal.SIGTERM]),
        (({}, {0: signal.SIGUSR1}), [1, signal.SIGUSR1]),
        (({3: signal.SIGINT}, {3: signal.SIGTERM}), [4, signal.SIGTERM]),
        (({2: signal.SIGTERM}, {3: signal.SIGINT}), [3, signal.SIGTERM]),
        (({STEPS - 1: signal.SIGTERM}, {}), None),  # 来得太晚：标志还在，下一段循环再停
        (({}, {}), None),
    ],
)
def test_both_stop_at_the_same_step(tmp_path: Path, signals: Any, expected: Any) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=walk, args=(rank, tmp_path, signals[rank])) for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)] == [expected] * 2


def test_one_process_asks_itself() -> None:
    flag = StopFlag()
    assert together(SimpleNamespace(world_size=1), flag.check) == flag.check  # type: ignore[arg-type]
