"""多头注意力的两条叶子层：按区块遮挡的自注意力、交叉注意力。"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

FLEX_BLOCK = 128  # FlexAttention 的块边长；一个区块正好是若干整块时，被遮的块才能整块跳过
FLEX_HEAD = 16  # FlexAttention 的 CUDA 核要求每个头至少这么宽


def check_heads(heads: int, width: int, key: str = "dim") -> int:
    """Config 的校验：头数须整除宽度。

    Raises:
        ValueError: 不能整除；说出哪些可以。
    """
    if width % heads:
        works = [n for n in range(1, min(width, 4 * heads) + 1) if width % n == 0]
        raise ValueError(f"does not divide model.{key} = {width}; heads that work: {works}")
    return heads


def token_mask(hidden: Tensor, size: int) -> Tensor:
    """区块间的遮挡 (G, G)（真 = 看不见）→ token 间的可见 (G·size, G·size)（真 = 看得见），供 SDPA 用。"""
    return ~hidden.repeat_interleave(size, 0).repeat_interleave(size, 1)


def block_mask(hidden: Tensor, size: int) -> BlockMask:
    """同一遮挡的 FlexAttention 写法：直接给出每行要算的块，不必逐 token 求值。size 须为 FLEX_BLOCK 的倍数。"""
    assert size % FLEX_BLOCK == 0, f"group of {size} tokens is not made of whole blocks of {FLEX_BLOCK}"
    blocks = size // FLEX_BLOCK
    seen = ~hidden.repeat_interleave(blocks, 0).repeat_interleave(blocks, 1)  # (Q 块, K 块)
    count = seen.sum(-1, dtype=torch.int32)[None, None]
    order = seen.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)[None, None]
    none = torch.zeros_like(count)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ~hidden[q // size, k // size]

    return BlockMask.from_kv_blocks(none, torch.zeros_like(order), count, order, FLEX_BLOCK, visible)


@cache
def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention 只有编译后才真的跳过块；每个进程编译一次。"""
    return torch.compile(flex_attention)


class GroupAttention(nn.Module):
    """逐区块遮挡的多头自注意力；mask 为 token_mask 或 block_mask 的结果，None 表示全部可见。"""

    def __init__(self, dim: int, heads: int, dropout: float, qkv_bias: bool = False) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
        """(B, N, D) → (B, N, D)。与 softmax(q·k/√d + (−1e9)·mask)·v 相同，只是不算看不见的部分。"""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if isinstance(mask, BlockMask):
            attend = flex_attention if torch.compiler.is_compiling() else compiled_flex()  # 整块编译时不必再编译它
            y = attend(q, k, v, block_mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=self.dropout if self.training else 0.0)
        return self.out(rearrange(y, "b h n d -> b n (h d)"))


class CrossAttention(nn.Module):
    """多头交叉注意力：query 问，memory 答；没有遮挡。"""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """query (B, N, D)，memory (B, M, D) → (B, N, D)。"""
        q = rearrange(self.q(query), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.kv(memory), "b m (two h d) -> two b h m d", two=2, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out(rearrange(y, "b h n d -> b n (h d)"))
