"""取哪些起点、按什么次序、怎样切成批：窗口以起始小时为名，次序只由种子和轮次决定。"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from util.config import Windows

Segments = list[np.ndarray]  # 每段是隔一个步长的抽样小时；几段可以交错（data.starts_every_hours）


def all_starts(segments: Segments, window: int, stride: int = 1) -> np.ndarray:
    """每个可能的起点（步长 stride），不跨段，升序。"""
    starts = [s[: s.size - window + 1] for s in segments if s.size >= window] or [np.empty(0, np.int64)]
    return np.sort(np.concatenate(starts))[::stride]


def epoch_starts(
    segments: Segments, window: int, how: Windows, seed: int, epoch: int, reach: int | None = None
) -> np.ndarray:
    """一轮训练的起点。

    random：从所有起点里不放回地随机取，个数与 apart 的相同（一段时即 N // t）；
    apart：互不重叠，依次取，段长不能整除时丢掉段首最早的几个样本；all：每个起点，打乱。
    reach: 从起点起要读几帧，默认一个窗口；滚动训练的目标更长，读不满的起点不要，个数除此之外不变。
    """
    every = all_starts(segments, reach or window)
    if how == "apart":
        starts = adjoining_starts(segments, window)
        return starts[np.isin(starts, every)]
    drawn = np.random.default_rng([seed, epoch]).permutation(every)
    return drawn if how == "all" else drawn[: sum(s.size // window for s in segments)]


def adjoining_starts(segments: Segments, window: int, shared: int = 0) -> np.ndarray:
    """首尾相接的窗口的起点，升序，相邻的共用 shared 帧；段长不合时丢掉段首最早的几个样本。"""
    ahead = window - shared
    return np.sort(np.concatenate([s[(s.size - shared) % ahead : max(0, s.size - shared) : ahead] for s in segments]))


def every_frame(
    segments: Segments, window: int, batch_size: int, stride: int = 1, changes: bool = False
) -> list[list[int]]:
    """首尾相接的窗口，每帧恰好一次（段首不足一个窗口的不要）；stride：每几个窗口取一个。

    changes: 看的是相邻两帧之差，相邻的窗口共用一帧，每个差恰好一次。
    """
    starts = adjoining_starts(segments, window, shared=int(changes))
    return split_batches(starts[::stride], batch_size)


def split_batches(starts: np.ndarray, batch_size: int) -> list[list[int]]:
    """起点依次切成批，最后一批可以小。"""
    return [starts[i : i + batch_size].tolist() for i in range(0, len(starts), batch_size)]


def share_batches(batches: list[list[int]], rank: int, world: int, parts: int = 1) -> Iterator[list[int]]:
    """每个全局批 → 本进程的 parts 个小批；不能整除的零头去掉（只可能在最后一批）。"""
    for batch in batches:
        size = len(batch) // (world * parts)
        if size:
            for part in range(parts):
                first = (part * world + rank) * size
                yield batch[first : first + size]
