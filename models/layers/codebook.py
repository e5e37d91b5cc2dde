"""几个尺度共用的一个码本：由梯度学，或由指数滑动平均跟着走；用了哪些码的直方图；没有用的码换成数据里的向量。

VAR（Tian et al. 2024）的码本由梯度学，滑动平均只用在直方图上：第一次抄下来，随后 100 次 0.9 / 0.1，此后 0.99 / 0.01。
`ema` 的走法与记忆库相同（models/layers/memory_bank.py），一次前向里各尺度的向量合在一起走一步。
换掉没有用的码是我们加的，原版没有。
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.layers.memory_bank import DECAY, MemoryBank, nearest_code, tally
from models.layers.ranks import add_ranks, several_ranks

Learned = Literal["gradient", "ema"]
USED = 0.08  # 份额不到均匀时的这么多，算没有用到（VAR 的门槛）
EARLY = 100  # 直方图头这么多次走得快


class Codebook(nn.Module):
    """vocabulary 个 width 维的码。

    Args:
        lengths: 各尺度的 token 数 (K,)。
        learned: gradient：码是参数；ema：码是 buffer，训练模式下每次 record 走一步。
        restart: 用到的份额（滑动平均）降到均匀时的这么多以下，就换成这一批里随机的一个向量；0 为不换。
            起步时人人都在这条线上：头一批没有用到的码随即换成数据里的向量，以后每 250 步左右没有用到才换一次。
    """

    def __init__(self, vocabulary: int, width: int, lengths: Sequence[int], learned: Learned, restart: float) -> None:
        super().__init__()
        self.restart = restart
        self.bank = MemoryBank(vocabulary, width) if learned == "ema" else None
        if self.bank is None:
            bound = width**-0.5 / 36
            self.weight = nn.Parameter(torch.empty(vocabulary, width).uniform_(-bound, bound))
        self.hits = nn.Buffer(torch.zeros(len(lengths), vocabulary))  # 各尺度上各码的份额
        self.records = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.weights = nn.Buffer(torch.tensor(lengths) / sum(lengths), persistent=False)  # 各尺度占 token 的几成
        self.alive = nn.Buffer(torch.full((vocabulary,), restart))  # 用到的份额，均匀为 1
        self.dead = nn.Buffer(torch.zeros(vocabulary, dtype=torch.bool))  # 下一次更新之前要换掉的
        self.replacements = nn.Buffer(torch.zeros(vocabulary, width) if restart else torch.zeros(0, width))

    @property
    def codes(self) -> Tensor:
        """(V, width)。"""
        return self.weight if self.bank is None else self.bank.codes

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """(n, width) → (n,) 最近的码。"""
        return nearest_code(vectors, self.codes)

    def counts(self, indices: Sequence[Tensor]) -> Tensor:
        """各尺度的编号 → 各码用了几次 (K, V)；整数的和，在显卡上也次次相同。"""
        zeros = torch.zeros_like(self.hits[0])
        flat = [index.flatten() for index in indices]
        return torch.stack([zeros.scatter_add(0, index, torch.ones_like(index, dtype=zeros.dtype)) for index in flat])

    @torch.no_grad()
    def record(self, vectors: Sequence[Tensor], indices: Sequence[Tensor], counts: Tensor) -> None:
        """训练时每次前向之后：记下用了哪些码，哪些没有用、该换成什么；ema 走一步。各进程合计，码本处处一样。

        Args:
            vectors, indices: 各尺度的 (n_k, width) 与 (n_k,)；counts: 它们的 (K, V)，见 counts。
        """
        counts = counts.clone()
        add_ranks(counts)
        rate = torch.where(self.records == 0, 1.0, torch.where(self.records < EARLY, 0.1, 0.01))
        self.hits.lerp_(counts / counts.sum(1, keepdim=True), rate.to(self.hits))
        self.records.add_(1)
        if self.bank is not None:
            sums = sum(tally(*pair, len(self.codes))[1] for pair in zip(vectors, indices, strict=True))
            assert isinstance(sums, Tensor)
            add_ranks(sums)
            self.bank.advance(counts.sum(0), sums)
        if self.restart:
            self._mark(counts.sum(0) / counts.sum(), torch.cat(list(vectors)))

    def _mark(self, shares: Tensor, vectors: Tensor) -> None:
        """没有用的码，下一次更新之前换成 vectors (n, width) 里随机的一个；抽的个数总是 V，随机数的次数与此无关。"""
        self.alive.lerp_(shares * len(shares), 1 - DECAY)
        drawn = vectors[torch.randint(len(vectors), (len(shares),), device=vectors.device)]  # (V, width)
        if several_ranks():
            dist.broadcast(drawn, 0)
        self.replacements.copy_(drawn)
        self.dead.copy_(self.alive < self.restart)
        self.alive.masked_fill_(self.dead, 1.0)

    @torch.no_grad()
    def revive(self) -> None:
        """每一次更新之前（VQVAE 的 at_step）：换掉上一步记下的。

        前向里只记下，记下的都是 buffer：那一步若不是有限值，引擎连同它们一起退回，坏的一批就换不进码本；
        累积的几个小批也用同一份码。
        """
        if not self.restart:
            return
        held = [self.codes.detach()] if self.bank is None else [self.bank.codes, self.bank.sums]
        for values in held:
            values.copy_(torch.where(self.dead[:, None], self.replacements, values))
        if self.bank is not None:
            self.bank.counts.masked_fill_(self.dead, 1.0)
        self.dead.fill_(False)

    def usage(self) -> Tensor:
        """用到的码占几成：各尺度的直方图按 token 数合起来，份额不小于均匀时的 USED。"""
        shares = self.weights @ self.hits
        return (shares >= USED / len(shares)).float().mean()
