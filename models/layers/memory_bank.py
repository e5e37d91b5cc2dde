"""记忆库（向量量化的码本）：每个向量换成最近的码；码不求导，由指数滑动平均跟着归到它的向量走。

论文：van den Oord et al. 2017，Neural Discrete Representation Learning，式 (3) 与附录 A.1。
与通行的实现不同：
* 码从 ±1/size 的均匀分布起步（不带滑动平均的那一种的初值），不从 N(0, 1)：64 维里 N(0, 1) 的码彼此相距 11，
  刚起步的编码都归到最近的几个，示例数据上 512 个码只用到 5 个，这样起步用到 20 个。
* 计数与和从「每个码出现过一次」起步，不从零起步，否则没有用到的码第一步就被除得飞走。
* 没有 Laplace 平滑：计数降到 EPSILON 以下的码（一千多步没有用到）留在原处。平滑会把它们都拉向原点。
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.ranks import add_ranks
from util.scores.metrics import perplexity

DECAY = 0.99
EPSILON = 1e-5  # 计数小于它就不再相除


class MemoryBank(nn.Module):
    """size 个 dim 维的码。训练模式下每次 forward 之后码本走一步，评测模式下不动。

    三个 buffer 都在 state_dict 里，续训与没中断时相同；多进程时各进程的计数与和相加，码本处处一样。
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.codes = nn.Buffer(torch.empty(size, dim).uniform_(-1 / size, 1 / size))
        self.counts = nn.Buffer(torch.ones(size))
        self.sums = nn.Buffer(self.codes.clone())

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, D, h, w) → 同形的最近的码（梯度直通）、commitment、困惑度（这一批实际用到几个码），都是 float32。"""
        with torch.autocast(latent.device.type, enabled=False):  # 半精度的距离会挑错码
            latent = latent.float()
            vectors = latent.detach().movedim(1, -1).flatten(0, -2)  # (n, D)
            index = self.nearest(vectors)
            codes = self.codes[index].unflatten(0, (len(latent), *latent.shape[2:])).movedim(-1, 1)
            if self.training:
                self.follow(vectors, index)
            commitment = F.mse_loss(latent, codes)
            return latent + (codes - latent).detach(), commitment, perplexity(self.shares(index))

    def nearest(self, vectors: Tensor) -> Tensor:
        """见 nearest_code。"""
        return nearest_code(vectors, self.codes)

    @torch.no_grad()
    def follow(self, vectors: Tensor, index: Tensor) -> None:
        """码本走一步：vectors (n, D)，index (n,) 各向量用了哪个码。"""
        counts, sums = tally(vectors, index, len(self.codes))
        add_ranks(counts, sums)
        self.advance(counts, sums)

    @torch.no_grad()
    def advance(self, counts: Tensor, sums: Tensor) -> None:
        """码本走一步，由各码这一次的个数 (K,) 与向量和 (K, D)，各进程已合计。"""
        self.counts.lerp_(counts, 1 - DECAY)
        self.sums.lerp_(sums, 1 - DECAY)
        alive = (self.counts > EPSILON)[:, None]
        self.codes.copy_(torch.where(alive, self.sums / self.counts.clamp(min=EPSILON)[:, None], self.codes))

    def shares(self, index: Tensor) -> Tensor:
        """(n,) 用了哪些码 → 各码所占的份额 (K,)；整数的和，在显卡上也次次相同。"""
        ones = torch.ones_like(index, dtype=self.codes.dtype)
        return torch.zeros_like(self.codes[:, 0]).scatter_add_(0, index, ones) / len(index)


def nearest_code(vectors: Tensor, codes: Tensor) -> Tensor:
    """(n, D) 的向量、(K, D) 的码 → (n,) 欧氏距离最近的码；‖v‖² 对各码相同，不必算。"""
    return (codes.square().sum(1) - 2 * vectors @ codes.T).argmin(1)


def tally(vectors: Tensor, index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(n, D) 的向量各用了哪个码 (n,) → 各码的个数 (K,)、向量和 (K, D)；one-hot 的矩阵乘在显卡上也次次相同。"""
    used = vectors.new_zeros(len(vectors), size).scatter_(1, index[:, None], 1.0)  # (n, K)
    return used.sum(0), used.T @ vectors
