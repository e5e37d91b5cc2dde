"""训练日期的气候：每个格点距平的分位数，降水的干湿。由抽出的一些训练时刻估计，存在 tmp/，同样的数据上不再看。

距平相对气候态（那个钟点、那个时节），所以事件在每个季节、每个格点都一样稀少：赤道的暖、冬天的冷不会只因时节而「报得准」
（Hamill & Juras 2006）。
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine.one_pass import Check, fit_cache
from engine.verification.settings import Events
from models.interface import ForecastModel
from util.atomic import making
from util.batch import DataSpec
from util.checkpoint import load_checkpoint, save_checkpoint
from util.data.batches import all_starts, split_batches
from util.data.dataset import WeatherData
from util.data.feed import feed
from util.variables import variable_info
from util.verification.precipitation import LIGHT

log = logging.getLogger("ar_pred")
MOST_BYTES = 2**30  # 估计分位数时留在内存里的
MOST_PASSES = 8  # 网格大，一遍放不下时分几遍看，每遍几行纬圈；再多就少用些时刻
MILLIMETRES = {"m": 1000.0, "mm": 1.0, "kg m-2": 1.0}  # 一个单位的水是几毫米


class Climate(NamedTuple):
    """标准化单位：quantiles (Q, C, H, W)；降水的通道 (R, H, W)：dry 是干的份额，heavy 是大雨的界。times：几个时刻。"""

    quantiles: Tensor
    dry: Tensor
    heavy: Tensor
    times: int


def rain_channels(spec: DataSpec) -> list[int]:
    """能算 SEEPS 的通道的序号；单位换不成毫米的说一声，不算。"""
    rain = [i for i, channel in enumerate(spec.channels) if variable_info(channel).kind == "rain"]
    for i in rain:
        if spec.units[i] not in MILLIMETRES:
            log.warning(
                "no SEEPS for %s: its unit %s is not one of %s", spec.channels[i], spec.units[i], [*MILLIMETRES]
            )
    return [i for i in rain if spec.units[i] in MILLIMETRES]


def dry_limits(spec: DataSpec, channels: list[int], dry_mm: float) -> list[float]:
    """干与湿的界，标准化单位。"""
    return [(dry_mm / MILLIMETRES[spec.units[i]] - spec.mean[i]) / spec.std[i] for i in channels]


def climate_cache(data: WeatherData, climatology: ForecastModel, events: Events, batch: int, check: Check) -> Path:
    """这份数据、这些分位数的气候存在哪里；还没有的由一个进程估计，同时起的别的命令等它。"""
    asked = [events.quantiles, events.training_times, events.dry_mm]
    cache = fit_cache(f"events-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]}", data)
    if not usable(cache):
        with making(cache, check):
            if not usable(cache):
                save_checkpoint(cache, {"climate": fit_climate(data, climatology, events, batch, check)._asdict()})
    return cache


def usable(cache: Path) -> bool:
    """存着的读不读得出；坏了的说一声，重新估计（同 load_fit）。"""
    if not cache.is_file():
        return False
    try:
        load_climate(cache)
    except (ValueError, LookupError, TypeError) as error:
        log.warning("cache %s cannot be used, estimated again: %s", cache, error)
        return False
    return True


def load_climate(cache: Path) -> Climate:
    return Climate(**load_checkpoint(cache)["climate"])


def fit_climate(data: WeatherData, climatology: ForecastModel, events: Events, batch: int, check: Check) -> Climate:
    """看抽出的训练时刻（种子固定，各钟点、各时节都有），一遍几行纬圈，内存不过 MOST_BYTES。

    Raises:
        ValueError: 训练的时刻太少，估计不出这样的分位数。
    """
    spec, rain = data.spec, rain_channels(data.spec)
    starts = all_starts(data.segments["train"], spec.window)
    count, rows = affordable(spec, len(rain), events, len(starts))
    batches = split_batches(np.sort(np.random.default_rng(0).choice(starts, count, replace=False)), batch)
    firsts = range(0, spec.height, rows)
    log.info("climate of the events: %d of %d training times, passes: %d", count, len(starts), len(firsts))

    def look(first: int) -> tuple[Tensor, Tensor, Tensor]:
        tails, wet, part = Tails(events.quantiles, count), [], slice(first, first + rows)
        for one in tqdm(feed(data, batches, torch.device("cpu")), "climate of events", len(batches), leave=False):
            check()
            normal = climatology.forecast(one.history, one.time)[:, 0, -1].cpu()  # (B, C, H, W)
            truth = one.future[:, -1].masked_fill(~one.valid[:, -1, :, None, None], float("nan"))[..., part, :]
            tails.add(truth - normal[..., part, :])
            wet.append(truth[:, rain])
        return tails.quantiles(), *wet_climate(torch.cat(wet), dry_limits(spec, rain, events.dry_mm))

    parts = zip(*map(look, firsts), strict=True)
    quantiles, dry, heavy = (torch.cat(part, -2) for part in parts)
    return Climate(quantiles, dry, heavy, count)


def affordable(spec: DataSpec, rain: int, events: Events, times: int) -> tuple[int, int]:
    """用几个时刻（有的、要的、MOST_PASSES 遍看得完的，取最少，但够最极端的分位数），一遍看几行纬圈。

    Raises:
        ValueError: 有的或要的少于最极端的分位数要的。
    """
    count, needed = min(times, events.training_times), fewest(events.quantiles)
    if count < needed:
        rarest = min(events.quantiles, key=lambda q: min(q, 1 - q))
        least = math.ceil(1e4 / count) / 1e4
        works = f"quantiles from {least:g} to {1 - least:g}" if least < 0.5 else "quantiles: []"
        works = f"training_times: {needed} or more, or {works}" if needed <= times else works
        raise ValueError(f"--events: training_times = {count} cannot tell the quantile {rarest:g}; what works: {works}")

    def rows(count: int) -> int:
        row = 4 * spec.width * (4 * spec.num_channels * tail_size(events.quantiles, count) + rain * count)
        return max(1, min(spec.height, MOST_BYTES // row))

    while count > needed and -(-spec.height // rows(count)) > MOST_PASSES:
        count = max(needed, int(count * 0.95))
    return count, rows(count)


def fewest(quantiles: list[float]) -> int:
    """要有几个时刻，最极端的分位数以外才有一个。"""
    rarest = min((min(q, 1 - q) for q in quantiles), default=1.0)
    return math.ceil(1 / rarest - 1e-9)


def tail_size(quantiles: list[float], count: int) -> int:
    """最大、最小的几个里就有全部的分位数。"""
    return int(max((min(q, 1 - q) for q in quantiles), default=0) * (count - 1)) + 2


class Tails:
    """一批批来的场里，每个格点最小、最大的几个：两端的分位数由它们精确地得来，内存是全部的百分之几。"""

    def __init__(self, quantiles: list[float], count: int) -> None:
        self.wanted, self.size = quantiles, tail_size(quantiles, count)
        self.ends: list[Tensor] = []  # 从小到大的最小的几个；取负之后最小的（即最大的）几个
        self.seen: Tensor | None = None  # (C,) 有效的个数

    def add(self, fields: Tensor) -> None:
        """(B, C, H, W)，无效的是 NaN。"""
        broken = fields.isnan()
        seen = (~broken[..., 0, 0]).sum(0)
        self.seen = seen if self.seen is None else self.seen + seen
        for i, signed in enumerate((fields, -fields)):
            given = signed.masked_fill(broken, torch.inf)
            held = torch.cat([self.ends[i], given]) if len(self.ends) > i else given
            kept = held.sort(0).values[: self.size]
            self.ends[i : i + 1] = [kept.clone()]

    def quantiles(self) -> Tensor:
        """(Q, C, H, W)，与 np.quantile 的缺省（线性内插）相同；一个时刻也没有的通道是 NaN。"""
        assert self.seen is not None, "quantiles() before any add()"
        found = []
        for q in self.wanted:
            end, sign = (self.ends[0], 1) if q < 0.5 else (self.ends[1], -1)
            place = (min(q, 1 - q) * (self.seen - 1).clamp(min=0).double())[:, None, None]  # (C, 1, 1)
            low = place.long().expand(end.shape[1:])[None]
            part = (place - place.floor()).float()
            first, second = (end.gather(0, (low + i).clamp(max=len(end) - 1))[0] for i in (0, 1))
            value = torch.where(part > 0, first + part * (second - first), first)
            found.append(sign * value.masked_fill(self.seen[:, None, None] < 1, torch.nan))
        return torch.stack(found) if found else self.ends[0].new_empty(0, *self.ends[0].shape[1:])


def wet_climate(fields: Tensor, limits: list[float]) -> tuple[Tensor, Tensor]:
    """(N, R, H, W)，无效的是 NaN → 干的份额、大雨的界，各 (R, H, W)；从不湿的格点，大雨的界就是干湿的界。"""
    dry, heavy = [], []
    for channel, limit in zip(fields.unbind(1), limits, strict=True):
        known, wet = ~channel.isnan(), channel > limit
        dry.append(1 - wet.sum(0) / known.sum(0))
        amount = channel.where(wet, torch.nan).nanquantile(LIGHT, 0)
        heavy.append(amount.nan_to_num(limit))
    shape = (0, *fields.shape[2:])
    return (torch.stack(dry), torch.stack(heavy)) if dry else (fields.new_empty(shape), fields.new_empty(shape))
