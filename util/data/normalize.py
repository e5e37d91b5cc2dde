"""标准化：文件是否已经标准化，量一量再定；两头都不像就不猜。"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from util.config import DataConfig
from util.data.index import Index
from util.data.tree import field_path, read_field

FILES_PER_CHANNEL = 16


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

    Args:
        hours: 训练段的抽样小时。
        mean, std: 各通道 mean_std.json 的值。

    Raises:
        ValueError: 抽到的文件两头都不像、或通道之间互相矛盾；说明量到的数，并提示写死 yes / no。
    """
    if config.standardize != "auto":
        return config.standardize == "no"  # yes：请标准化，即文件还是原始值
    rng = np.random.default_rng(0)
    verdicts: dict[str, str] = {}
    for c, channel in enumerate(index.channels):
        there = hours[index.present[c, hours - index.start]]
        chosen = rng.choice(there, min(FILES_PER_CHANNEL, there.size), replace=False)
        fields = _readable(config, channel, chosen, shape)
        if not fields.size:
            raise ValueError(f"data.standardize = auto: none of {chosen.size} files tried for {channel} can be read")
        verdicts[channel] = _verdict(float(fields.mean()), float(fields.std()), mean[c], std[c])
    raw, standard, neither = ([n for n, v in verdicts.items() if v.startswith(w)] for w in ("raw", "standard", "neither"))
    if neither or (raw and standard):
        shown = neither or [raw[0], standard[0]]
        details = "; ".join(f"{name}: {verdicts[name]}" for name in shown[:3])
        raise ValueError(f"data.standardize = auto cannot decide ({details}); set data.standardize to yes (files are raw) or no")
    answer = bool(standard)
    if not raw and not standard:
        raise ValueError(
            "data.standardize = auto cannot decide: mean_std.json holds mean 0 and std 1 for every channel, "
            "so raw and standardised look alike; set data.standardize to yes or no"
        )
    word = "already standardised" if answer else "raw, will be standardised with mean_std.json"
    log.info("standardisation: files are %s (measured %d channels)", word, len(index.channels))
    return answer


def _readable(config: DataConfig, channel: str, hours: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    fields = []
    for hour in hours:
        try:
            fields.append(read_field(field_path(config.root, channel, int(hour)), shape))
        except ValueError:  # 坏文件由读取时统一记录和修补，这里只是抽样
            continue
    return np.stack(fields).astype(np.float64) if fields else np.empty(0)


def _verdict(mean: float, std: float, json_mean: float, json_std: float) -> str:
    """量到的均值、标准差更像哪一种；容限宽到容得下季节与区域，又分得开两种情形。"""
    as_standard = abs(mean) < 0.75 and 0.4 < std < 2.0
    as_raw = abs(mean - json_mean) < 0.75 * json_std and 0.4 < std / json_std < 2.0
    found = f"measured mean {mean:.4g}, std {std:.4g}; mean_std.json {json_mean:.4g}, {json_std:.4g}"
    if as_standard and as_raw:
        return f"both fit ({found})"  # 该通道本来就接近 0/1，由别的通道决定
    return f"{'standard' if as_standard else 'raw' if as_raw else 'neither fits'} ({found})"
