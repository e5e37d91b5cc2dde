"""一轮训练的表：速度、等数据的时间；进度条、metrics.csv 的一组数、末了的一句日志都由它给出。

一步的数晚一步才读：设备算着下一步，主机不等它。
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm

from engine.progress import Progress
from engine.training.state import Step
from util.batch import Batch

log = logging.getLogger("ar_pred")


class Launched(NamedTuple):
    """走过而数还没有读的一步；starts 是全局批里窗口的起点，lr 是下一步的学习率，random 是走之前的 random_now。"""

    step: Step
    starts: Sequence[int]
    lr: float
    random: list[torch.Tensor]


class Meter:
    """从 progress 所在的地方数起，到这一轮末。用去的秒数与窗口数也累计进 progress：训练的代价由此来，续训接着数。"""

    def __init__(self, progress: Progress, epochs: int, batches: int, shown: bool) -> None:
        """batches 是这一轮的步数；shown 为假（不是零号进程）时没有进度条。"""
        self.progress = progress
        title = f"epoch {progress.epoch + 1}/{epochs}"
        self.bar = tqdm(
            total=batches, initial=progress.batches, desc=title, disable=not shown, leave=False, mininterval=1
        )
        self.begin = self.counted = time.perf_counter()  # counted：算进 progress.seconds 的到这时为止
        self.waited, self.samples = 0.0, 0
        self.launched: Launched | None = None

    def wait(self, loader: Iterator[Batch], count: int) -> list[Batch]:
        """要下一步的 count 个小批，等多久都算。"""
        asked = time.perf_counter()
        if self.launched is None:  # 一轮之始，或刚存过：存的时间不算
            self.counted = asked
        batches = [next(loader) for _ in range(count)]
        self.waited += time.perf_counter() - asked
        return batches

    def step(self, terms: Mapping[str, float], launched: Launched) -> dict[str, float]:
        """一步的数到了：进度条进一格；返回要记的一组数，从轮首平均的速度也在内。"""
        now, samples = time.perf_counter(), len(launched.starts)
        self.samples += samples
        self.progress.samples += samples
        self.progress.seconds += now - self.counted
        self.counted = now
        rate, share = self.rates()
        self.bar.set_postfix_str(
            f"loss={terms['loss']:.4f}, lr={launched.lr:.1e}, rate={rate:.1f}/s, step={self.progress.step}, "
            f"wait={share:.0%}",
            refresh=False,
        )
        self.bar.update()
        return {**terms, "lr": launched.lr, "samples_per_second": rate, "data_wait_share": share}

    def rates(self) -> tuple[float, float]:
        """每秒几个窗口；时间有几成在等数据。"""
        elapsed = time.perf_counter() - self.begin
        return self.samples / elapsed, self.waited / elapsed

    def close(self) -> None:
        """走完了一轮。"""
        self.bar.close()
        if self.samples:
            rate, share = self.rates()
            log.info(
                "epoch %d: %.1f windows/s, %.2f %% of the time waiting for data",
                self.progress.epoch + 1, rate, 100 * share,
            )  # fmt: skip
