"""先看一遍数据的模型（OnePass）怎样看，看过的怎样存；训练、基线共用。"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.loading import load_weights
from engine.objective import measure_changes
from models.interface import LeadConditioned, Network, OnePass, Tuned
from util.batch import Batch
from util.checkpoint import load_checkpoint
from util.config import RunConfig, eval_batch_size
from util.data.batches import adjoining_starts, all_starts, split_batches
from util.data.dataset import WeatherData
from util.data.feed import feed

log = logging.getLogger("ar_pred")
Check = Callable[[], None]
SAMPLED = 2048  # 个窗口：标准差的误差约百分之一，不必读遍几十年
THREADS, FILES_AT_ONCE = 16, 4096  # 网络盘上查大小与时刻是等待，不是计算


def fit_one_pass(model: OnePass, data: WeatherData, batch_size: int, check: Check = lambda: None) -> None:
    """OnePass 模型看一遍步长 1 的训练窗口，求解；要在验证段上定的，再看一遍验证窗口。"""

    def windows(split: str) -> Iterator[Batch]:
        ahead = data.spec.ahead(1) if isinstance(model, LeadConditioned) else data.spec.frames_out
        batches = split_batches(all_starts(data.segments[split], data.spec.frames_in + ahead), batch_size)
        loader = feed(data, batches, torch.device("cpu"), ahead)  # 求解在处理器上，float64
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


def fit_cache(name: str, data: WeatherData) -> Path:
    """一个基线在这份训练数据上的拟合存在哪里。"""
    return Path(data.config.cache_dir) / f"{name}-{training_fingerprint(data)}.ckpt"


def has_fits(name: str, data: WeatherData) -> bool:
    """存着这个基线的拟合，不论是哪份数据的：一份也没有，就不必算指纹。"""
    return any(Path(data.config.cache_dir).glob(f"{name}-*.ckpt"))


def load_fit(model: Network, cache: Path) -> bool:
    """存着的拟合装进模型；没有、读不出、形状不符都是假：随时可以重新拟合。"""
    if not cache.is_file():
        return False
    try:
        load_weights(model, load_checkpoint(cache)["model"])
    except (ValueError, LookupError) as error:
        log.warning("cache %s cannot be used, fitted again: %s", cache, error)
        return False
    return True


def training_fingerprint(data: WeatherData) -> str:
    """训练数据的指纹：说明、训练窗口，和读它们用得到的每个文件的大小与修改时间（存档的是校验和）；改了一个就要重新拟合。"""
    began, reader = time.monotonic(), data.windows.reader
    starts = all_starts(data.segments["train"], data.spec.window)
    digest = hashlib.sha256(json.dumps([data.config.root, data.spec.bare.to_dict()]).encode())
    digest.update(starts.tobytes())
    files = np.argwhere(reader.files_of(np.concatenate(data.segments["train"])))  # (n, 2) 通道、位置
    files[:, 1] += reader.start

    def stamps(part: np.ndarray) -> bytes:
        return "\n".join(reader.origin.stamp(c, hour) for c, hour in part.tolist()).encode()

    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(stamps, np.array_split(files, -(-len(files) // FILES_AT_ONCE))):
            digest.update(found)
    log.info("training files unchanged since the last fit? %d checked in %.1f s", len(files), time.monotonic() - began)
    return digest.hexdigest()[:16]
