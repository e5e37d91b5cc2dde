"""一轮训练的表：速度、等数据的时间；进度条、metrics.csv 的一组数、末了的一句日志都由它给出。"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping

from tqdm import tqdm

from engine.progress import Progress
from util.batch import Batch

log = logging.getLogger("ar_pred")


class Meter:
    """从 progress 所在的地方数起，到这一轮末。用去的秒数与窗口数也累计进 progress：训练的代价由此来，续训接着数。"""

    def __init__(self, progress: Progress, epochs: int, batches: int, shown: bool) -> None:
        """batches 是这一轮的步数；shown 为假（不是零号进程）时没有进度条。"""
        self.progress = progress
        title = f"epoch {progress.epoch + 1}/{epochs}"
        self.bar = tqdm(total=batches, initial=progress.batches, desc=title, disable=not shown, leave=False)
        self.begin = self.asked = time.perf_counter()
        self.waited, self.samples = 0.0, 0

    def wait(self, loader: Iterator[Batch], count: int) -> list[Batch]:
        """要下一步的 count 个小批，等多久都算。"""
        self.asked = time.perf_counter()
        batches = [next(loader) for _ in range(count)]
        self.waited += time.perf_counter() - self.asked
        return batches

    def step(self, terms: Mapping[str, float], lr: float, samples: int) -> dict[str, float]:
        """走完了一步（各进程合计 samples 个窗口）：进度条进一格；返回要记的一组数，从轮首平均的速度也在内。"""
        self.samples += samples
        self.progress.samples += samples
        self.progress.seconds += time.perf_counter() - self.asked
        rate, share = self.rates()
        self.bar.set_postfix(
            step=self.progress.step,
            loss=f"{terms['loss']:.4f}",
            lr=f"{lr:.1e}",
            rate=f"{rate:.1f}/s",
            wait=f"{share:.0%}",
            refresh=False,
        )
        self.bar.update()
        return {**terms, "lr": lr, "samples_per_second": rate, "data_wait_share": share}

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
