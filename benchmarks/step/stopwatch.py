"""引擎的训练循环原样走，各部分的时间由挂在它的函数上的秒表来记。"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, TypeVar
from unittest.mock import patch

import torch

from engine.training import state as training_state
from engine.training.meter import Meter
from engine.training.run import Run

T = TypeVar("T")
PARTS = ("data", "forward", "backward", "optimizer", "device")  # device：主机等设备把上一步的数算出来
ON_DEVICE = ("forward", "backward", "optimizer")


class Mark(NamedTuple):
    """一个时刻：主机的秒数，主线程的处理器秒数，设备流上的记号。"""

    host: float
    processor: float
    event: torch.cuda.Event | None


class Span(NamedTuple):
    part: str
    begin: Mark
    end: Mark


class Stopwatch:
    """device 是显卡时，每段另有设备自己的时间：主机只管排队，它的时间说明不了设备忙多久。"""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spans: list[Span] = []

    def mark(self) -> Mark:
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
        return Mark(time.perf_counter(), time.thread_time(), event)

    def timed(self, part: str, function: Callable[..., T]) -> Callable[..., T]:
        """同一个函数，每次调用记一段。"""

        def call(*args: object, **kwargs: object) -> T:
            begin = self.mark()
            try:
                return function(*args, **kwargs)
            finally:
                self.spans.append(Span(part, begin, self.mark()))

        return call

    def step_begins(self) -> list[Mark]:
        """每一步由等数据开始。"""
        return [span.begin for span in self.spans if span.part == "data"]

    def host_seconds(self, part: str, since: Mark) -> float:
        return sum(s.end.host - s.begin.host for s in self.spans if s.part == part and s.begin.host >= since.host)

    def processor_seconds(self, since: Mark) -> float:
        """各部分合起来，主线程的处理器时间。"""
        return sum(s.end.processor - s.begin.processor for s in self.spans if s.begin.host >= since.host)

    def device_seconds(self, part: str, since: Mark) -> float:
        """要等设备做完了才能问；设备就是处理器时，是主机的时间。"""
        if self.device.type != "cuda":
            return self.host_seconds(part, since)
        spans = [s for s in self.spans if s.part == part and s.begin.host >= since.host]
        return sum(elapsed(span.begin, span.end) for span in spans)


@contextmanager
def watching(run: Run) -> Iterator[Stopwatch]:
    """训练的循环（engine/training/loop.py）在这里面走，各部分都记下；一个设备。"""
    watch, step = Stopwatch(run.fabric.device), training_state.Step
    with ExitStack() as stack:
        for owner, name, part in (
            (Meter, "wait", "data"),
            (training_state, "objective_loss", "forward"),
            (run.fabric, "backward", "backward"),
            (training_state, "get_total_norm", "optimizer"),
            (training_state, "update", "optimizer"),
            (step, "terms", "device"),
        ):
            stack.enter_context(patch.object(owner, name, watch.timed(part, getattr(owner, name))))
        yield watch


def elapsed(begin: Mark, end: Mark) -> float:
    """设备上两个记号之间的秒数。"""
    assert begin.event is not None and end.event is not None
    return begin.event.elapsed_time(end.event) / 1000
