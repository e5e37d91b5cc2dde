"""标准的 Transformer 块，残差之后归一化（Vaswani et al. 2017 §3.1），与一维正余弦位置编码（同文 §3.5）。

与 torch.nn.TransformerEncoderLayer、TransformerDecoderLayer（activation="gelu"，batch_first）同一算式，
只是 q、k、v 没有偏置。不直接用它们：评测时它们改走融合的快路，运算次数数不到，编译与逐层形状也看不进去。
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention import CrossAttention, GroupAttention
from models.layers.noise import normalise
from models.layers.recompute import through

MAX_PERIOD = 10_000.0


def sinusoid(length: int, dim: int) -> Tensor:
    """(length, dim) float32：第 2i 维是 sin(t / 10000^(2i/dim))，第 2i+1 维是 cos。

    与 length 无关：更长的窗口，前面各步的编码不变。
    """
    rates = MAX_PERIOD ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates  # (length, ⌈dim/2⌉)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :dim].float()


class FeedForward(nn.Sequential):
    """逐 token 的两层感知机；激活函数的结果不留到反向。"""

    def __init__(self, dim: int, hidden: int, dropout: float, act: type[nn.Module] = nn.GELU) -> None:
        super().__init__(nn.Linear(dim, hidden), act(), nn.Dropout(dropout), nn.Linear(hidden, dim))

    def forward(self, input: Tensor) -> Tensor:
        """(B, N, D) → (B, N, D)。"""
        widen, act, drop, narrow = self
        return through(act, lambda x: narrow(drop(x)), widen(input))


class EncoderLayer(nn.Module):
    """自注意力、感知机，各自残差之后归一化。"""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = GroupAttention(dim, heads, dropout)
        self.mlp = FeedForward(dim, hidden, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) → (B, N, D)。"""
        x = self.norm1(x + self.drop(self.attention(x, None)))
        return self.norm2(x + self.drop(self.mlp(x)))


class DecoderLayer(nn.Module):
    """query 之间的自注意力、对 memory 的交叉注意力、感知机，各自残差之后归一化；没有遮挡。"""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = GroupAttention(dim, heads, dropout)
        self.cross = CrossAttention(dim, heads, dropout)
        self.mlp = FeedForward(dim, hidden, dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, query: Tensor, memory: Tensor, noise: Tensor | None = None) -> Tensor:
        """query (B, N, D)，memory (B, M, D) → (B, N, D)。"""
        query = normalise(self.norm1, query + self.drop(self.attention(query, None)), noise)
        query = normalise(self.norm2, query + self.drop(self.cross(query, memory)), noise)
        return normalise(self.norm3, query + self.drop(self.mlp(query)), noise)
