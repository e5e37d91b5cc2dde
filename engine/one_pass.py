"""先看一遍数据的模型（OnePass）怎样看；训练、基线共用。"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from tqdm import tqdm

from models.interface import OnePass, Tuned
from util.batch import Batch
from util.data.batches import all_starts, split_batches
from util.data.dataset import WeatherData
from util.data.feed import feed

Check = Callable[[], None]


def fit_one_pass(model: OnePass, data: WeatherData, batch_size: int, check: Check = lambda: None) -> None:
    """OnePass 模型看一遍步长 1 的训练窗口，求解；要在验证段上定的，再看一遍验证窗口。"""

    def windows(split: str) -> Iterator[Batch]:
        batches = split_batches(all_starts(data.segments[split], data.spec.window), batch_size)
        loader = feed(data, batches, torch.device("cpu"))  # 求解在处理器上，float64
        for batch in tqdm(loader, f"one pass, {split}", len(batches), leave=False):
            check()
            yield batch

    solve_one_pass(model, windows("train"), windows("val"))


def solve_one_pass(model: OnePass, train: Iterable[Batch], val: Iterable[Batch]) -> None:
    """看 train，求解；要在 val 上定的，再看 val。"""
    for batch in train:
        model.accumulate(batch)
    model.solve()
    if isinstance(model, Tuned) and model.tunes:
        for batch in val:
            model.judge(batch)
        model.choose()
