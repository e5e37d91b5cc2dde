"""AR_pred 的 token：场切成 token，加上位置编码，拿掉一个区块，再拼回场。字母见 models/ar_pred_video_vanilla.py。"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from models.layers.position import spatial_codes


class Tokenize(nn.Module):
    """(B, H, W, k·t) → (B, N, P)：每个 token 是一帧里 p×q 的一块，次序由 grouping.order 定。"""

    def __init__(self, size: list[int], channels: int, order: str) -> None:
        super().__init__()
        self.size, self.channels, self.order = size, channels, order

    def forward(self, fields: Tensor) -> Tensor:
        p, q = self.size
        pattern = f"b (h p) (w q) (t k) -> b ({self.order}) (p q k)"
        return rearrange(fields, pattern, p=p, q=q, k=self.channels)


class PositionCodes(nn.Module):
    """给每个区块加它自己的可学习编码，给每个 token 加它的空间编码。"""

    def __init__(self, groups: int, places: Tensor, dim: int, spatial: str) -> None:
        """places 见 Model：区块是一帧时 (1, n, 2)，各块共用；否则 (G, n, 3)。"""
        super().__init__()
        self.group = nn.Parameter(torch.empty(groups, dim))
        self.spatial = spatial_codes(places, dim, spatial)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N', D) → (B, N', D)；推理时只有前 G-1 个区块，N' = (G-1)·n。"""
        blocks = tokens.unflatten(1, (-1, self.spatial.shape[1]))  # (B, G', n, D)
        count = blocks.shape[1]
        return (blocks + self.group[:count, None] + self.spatial[:count]).flatten(1, 2)

    def of(self, which: Tensor) -> Tensor:
        """(B,) 的区块序号 → (B, n, D)：那些区块的 token 本来会得到的编码，用来引导解码器。"""
        return self.group[which][:, None] + self.spatial[which % len(self.spatial)]  # 各块共用一份时总是第 0 份


class RemoveGroup(nn.Module):
    """random_patchify 的裁去：每个窗口去掉各自的一个区块，其余按原次序。"""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, tokens: Tensor, removed: Tensor) -> Tensor:
        """(B, G·n, D)、(B,) → (B, (G-1)·n, D)。"""
        blocks = rearrange(tokens, "b (g n) d -> b g n d", n=self.size)
        keep = torch.arange(blocks.shape[1] - 1, device=removed.device)[None]
        keep = keep + (keep >= removed[:, None])  # (B, G-1)
        return blocks[torch.arange(len(removed), device=removed.device)[:, None], keep].flatten(1, 2)


class ToFrame(nn.Module):
    """(B, n, P) → (B, H, W, k)：区块就是一帧时，把 token 拼回场；否则只分出通道，(B, n, p·q, k)。"""

    def __init__(self, size: list[int], rows: int, channels: int, order: str, whole: bool) -> None:
        super().__init__()
        inside = " ".join(axis for axis in order.split() if axis != "t")
        self.pattern = f"b ({inside}) (p q k) -> b (h p) (w q) k" if whole else "b n (p q k) -> b n (p q) k"
        self.sizes = {"p": size[0], "q": size[1], "k": channels} | ({"h": rows} if whole else {})

    def forward(self, tokens: Tensor) -> Tensor:
        return rearrange(tokens, self.pattern, **self.sizes)
