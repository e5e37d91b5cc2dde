"""种子：随机数属于谁，就由谁的名字定；与怎样分批、切成几个小批、分给几个进程无关。"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256

from util.batch import Seeds

GOLDEN = (5**0.5 - 1) / 2  # i·GOLDEN mod 1：不论取连着的哪一段，都铺得均匀（Weyl 序列）


def seed_of(*owner: object) -> int:
    """64 位的种子（torch 的 CPU 发生器只看低 32 位）。"""
    return int.from_bytes(sha256(" ".join(map(str, owner)).encode()).digest()[:8], "little")


def training_seeds(seed: int, epoch: int, step: int, starts: Sequence[int], mine: Sequence[int]) -> Seeds:
    """一个小批 mine（全局批 starts 里连着的一段窗口）的；seed 是运行的种子。"""
    first = starts.index(mine[0])
    places = tuple((first + i) / len(starts) for i in range(len(mine)))
    return Seeds(tuple(seed_of(seed, "epoch", epoch, start) for start in mine), places, seed_of(seed, "step", step))


def validation_seeds(seed: int, starts: Sequence[int], batches: Iterable[Sequence[int]]) -> Iterator[Seeds]:
    """验证的各批的（starts 是全部窗口，批里是本进程的那些）：每一次验证都相同，各次才比得了。"""
    places = {start: i * GOLDEN % 1 for i, start in enumerate(starts)}
    for mine in batches:
        windows = tuple(seed_of(seed, "validation", start) for start in mine)
        yield Seeds(windows, tuple(places[start] for start in mine), seed_of(seed, "validation"))
