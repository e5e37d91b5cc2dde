"""先看一遍数据的模型（OnePass）怎样看；训练、基线共用。"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from tqdm import tqdm

from engine.objective import measure_changes
from models.interface import OnePass, Tuned
from util.batch import Batch
from util.config import RunConfig, eval_batch_size
from util.data.batches import adjoining_starts, all_starts, split_batches
from util.data.dataset import WeatherData
from util.data.feed import feed

Check = Callable[[], None]
SAMPLED = 2048  # 个窗口：标准差的误差约百分之一，不必读遍几十年


def fit_one_pass(model: OnePass, data: WeatherData, batch_size: int, check: Check = lambda: None) -> None:
    """OnePass 模型看一遍步长 1 的训练窗口，求解；要在验证段上定的，再看一遍验证窗口。"""

    def windows(split: str) -> Iterator[Batch]:
        batches = split_batches(all_starts(data.segments[split], data.spec.window), batch_size)
        loader = feed(data, batches, torch.device("cpu"))  # 求解在处理器上，float64
        for batch in tqdm(loader, f"one pass, {split}", len(batches), leave=False):
            check()
            yield batch

    solve_one_pass(model, windows("train"), windows("val"))


def measured_changes(data: WeatherData, config: RunConfig, check: Check) -> list[float]:
    """各通道一步的变化的标准差，标准化单位：训练段里均匀取的至多 SAMPLED 个窗口。"""
    window, size = data.spec.window, eval_batch_size(config)
    starts = adjoining_starts(data.segments["train"], window, shared=1)
    chosen = starts[np.unique(np.linspace(0, len(starts) - 1, min(SAMPLED, len(starts))).round().astype(int))]

    def windows() -> Iterator[Batch]:
        for batch in feed(data, split_batches(chosen, size), torch.device("cpu")):
            check()
            yield batch

    return measure_changes(windows(), data.spec.channels)


def solve_one_pass(model: OnePass, train: Iterable[Batch], val: Iterable[Batch]) -> None:
    """看 train，求解；要在 val 上定的，再看 val。"""
    for batch in train:
        model.accumulate(batch)
    model.solve()
    if isinstance(model, Tuned) and model.tunes:
        for batch in val:
            model.judge(batch)
        model.choose()
