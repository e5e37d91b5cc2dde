"""先看一遍数据的模型（OnePass）怎样看；训练、基线共用。"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tqdm import tqdm

from models.interface import OnePass
from util.data.batches import all_starts, split_batches
from util.data.dataset import WeatherData
from util.data.feed import feed

Check = Callable[[], None]


def fit_one_pass(model: OnePass, data: WeatherData, batch_size: int, check: Check = lambda: None) -> None:
    """OnePass 模型看一遍步长 1 的训练窗口，再求解。"""
    batches = split_batches(all_starts(data.segments["train"], data.spec.window), batch_size)
    loader = feed(data, batches, torch.device("cpu"))  # 求解在处理器上，float64
    for batch in tqdm(loader, "one pass", len(batches), leave=False):
        check()
        model.accumulate(batch)
    model.solve()
