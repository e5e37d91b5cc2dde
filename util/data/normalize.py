"""标准化：文件是否已经标准化，量一量再定；两头都不像就不猜。"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np

from util.config import DataConfig
from util.data.index import Index
from util.data.tree_files import Field, FieldError, channel_fills, field_path, read_field

FILES_PER_CHANNEL = 16
Verdict = Literal["raw", "standard", "both", "neither"]


def judge(mean: float, std: float, json_mean: float, json_std: float) -> Verdict:
    """量到的均值、标准差像物理单位（接近 json）还是像标准化过（接近 0 和 1）。

    容限宽到容得下季节与区域，又分得开两种情形；json 本来就接近 0 和 1 时两头都像。
    """
    as_standard = abs(mean) < 0.75 and 0.4 < std < 2.0
    as_raw = abs(mean - json_mean) < 0.75 * json_std and 0.4 < std / json_std < 2.0
    return "both" if as_standard and as_raw else "standard" if as_standard else "raw" if as_raw else "neither"


def decide_standardized(
    config: DataConfig,
    index: Index,
    hours: np.ndarray,
    shape: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    log: logging.Logger,
) -> bool:
    """磁盘上的文件是否已经标准化；`auto` 时每个通道抽样几个训练文件，和 0/1 与 json 各比一次。

    写死 yes / no 时每个通道也试读一个文件：网格写错了在这里就说清，而不是等训练时一个个报坏文件。

    Args:
        hours: 训练段的抽样小时。
        mean, std: 各通道 mean_std.json 的值。

    Raises:
        ValueError: 抽到的文件一个也读不了；两头都不像、或通道之间互相矛盾（说明量到的数，并提示写死 yes / no）。
    """
    rng = np.random.default_rng(0)
    chosen = [rng.permutation(hours[present[hours - index.start]])[:FILES_PER_CHANNEL] for present in index.present]
    samples = [_readable(config, channel, c, shape) for channel, c in zip(index.channels, chosen, strict=True)]
    with ThreadPoolExecutor(8) as pool:  # 网络盘上读文件的时间是等待，不是计算
        if config.standardize != "auto":
            list(pool.map(next, samples))
            return config.standardize == "no"  # yes：请标准化，即文件还是原始值
        measured = list(pool.map(_measure, samples))
    states: list[Verdict] = [judge(*found, m, s) for found, m, s in zip(measured, mean, std, strict=True)]
    answer = _agree(index.channels, states, measured, mean, std)
    word = "already standardised" if answer else "raw, will be standardised with mean_std.json"
    log.info("standardisation: files are %s (measured %d channels)", word, len(index.channels))
    return answer


def _agree(
    channels: Sequence[str],
    states: Sequence[Verdict],
    measured: Sequence[tuple[float, float]],
    mean: Sequence[float],
    std: Sequence[float],
) -> bool:
    """各通道的判断合成一个；本来就接近 0/1 的通道由别的通道决定。"""
    raw, standard, neither = ([c for c, s in enumerate(states) if s == w] for w in ("raw", "standard", "neither"))
    if neither or (raw and standard):
        details = "; ".join(
            f"{channels[c]}: {states[c] if states[c] != 'neither' else 'neither fits'} "
            f"(measured mean {measured[c][0]:.4g}, std {measured[c][1]:.4g}; mean_std.json {mean[c]:.4g}, {std[c]:.4g})"
            for c in (neither or [raw[0], standard[0]])[:3]
        )
        raise ValueError(
            f"data.standardize = auto cannot decide ({details}); set data.standardize to yes (files are raw) or no"
        )
    if not raw and not standard:
        raise ValueError(
            "data.standardize = auto cannot decide: mean_std.json holds about mean 0 and std 1 for every channel, "
            "so raw and standardised look alike; set data.standardize to yes (files are raw) or no"
        )
    return bool(standard)


def _measure(fields: Iterator[Field]) -> tuple[float, float]:
    values = np.stack(list(fields))
    return float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))


def _readable(config: DataConfig, channel: str, hours: np.ndarray, shape: tuple[int, int]) -> Iterator[Field]:
    """逐个读得了的场；坏文件由读取时统一记录和修补，这里跳过，一个也读不了才报错。"""
    fills = channel_fills(config, channel)
    found, last = 0, "no such file among the training hours"
    for hour in hours:
        try:
            field = read_field(field_path(config.root, channel, int(hour)), shape, fills)
        except FieldError as error:
            last = str(error)
            continue
        found += 1
        yield field
    if not found:
        raise ValueError(f"{channel}: none of the {len(hours)} files tried can be used ({last})")
