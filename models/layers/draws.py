"""损失里的随机数：每个窗口一个发生器，全局批共用一个；怎样切成小批、分给几个进程，抽的都是同样的数。"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Generator, Tensor

from util.batch import Batch, Seeds

BITS = 2**62


class Draws:
    """一批 B 个窗口的；发生器在批所在的设备上，同一个设备上同样的种子给出同样的数。"""

    def __init__(self, batch: Batch) -> None:
        self.device, self.count = batch.history.device, len(batch.history)
        self._given = batch.seeds

    @cached_property
    def seeds(self) -> Seeds:
        """引擎给的；没有给的（测试、预检的随机批次）取自全局发生器，用到才取。"""
        if self._given is not None:
            return self._given
        *windows, step = torch.randint(BITS, (self.count + 1,)).tolist()
        return Seeds(tuple(windows), tuple(i / self.count for i in range(self.count)), step)

    @cached_property
    def windows(self) -> list[Generator]:
        """B 个，各窗口自己的；接着取的：同一个次序取，才是同样的数。"""
        return [self._generator(seed) for seed in self.seeds.windows]

    @cached_property
    def step(self) -> Generator:
        """全局批共用的，也是接着取的。"""
        return self._generator(self.seeds.step)

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape)，[0, 1) 上均匀。"""
        return torch.stack([torch.rand(shape, generator=g, device=self.device) for g in self.windows])

    def integers(self, high: int) -> Tensor:
        """(B,) int64，0 … high − 1。"""
        return torch.cat([torch.randint(high, (1,), generator=g, device=self.device) for g in self.windows])

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape)，标准正态。"""
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in self.windows])

    def normal_like(self, fields: Tensor) -> Tensor:
        """与 fields (B·n, …) 同形同精度的标准正态；窗口在前，一个窗口的 n 份都取自它自己的发生器。"""
        each = (len(fields) // self.count, *fields.shape[1:])
        drawn = [torch.randn(each, generator=g, device=self.device, dtype=fields.dtype) for g in self.windows]
        return torch.cat(drawn)

    def spread(self) -> Tensor:
        """(B,) 一批里错开的均匀数，u_i = (u₀ + 位置_i) mod 1，u₀ 全局批共用（Kingma et al. 2021, VDM §I.1）。

        每一个都是均匀的，合起来各段都有：扩散的时间这样抽，梯度的噪声小。
        """
        shift = torch.rand((), generator=self.step, device=self.device, dtype=torch.float64)
        places = torch.tensor(self.seeds.places, dtype=torch.float64).to(self.device, non_blocking=True)
        return ((shift + places) % 1).float()

    def _generator(self, seed: int) -> Generator:
        return Generator(self.device).manual_seed(seed)
