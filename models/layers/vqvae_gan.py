"""VQGAN 的编码器与解码器：逐级减半的残差卷积网络，最深一级与中间有自注意力。

论文：Esser et al. 2021（CVPR），Taming Transformers for High-Resolution Image Synthesis。
VAR（Tian et al. 2024）的阶段一就是它。编码器每级 blocks 个残差块，解码器每级 blocks + 1 个，补偿信息的损失；
解码器的中间层在最深一级，放大之前。
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.padding import PaddedConv2d, Padding

EPS = 1e-6


class Shape(NamedTuple):
    """编码器与解码器的尺寸。

    width: 最浅一级的通道数；multipliers: 各级是它的几倍，由浅到深，相邻两级边长减半；blocks: 编码器每级几个残差块；
    groups: GroupNorm 的组数，整除各级的通道数；attention: 最深一级每个残差块之后有没有自注意力；
    middle_attention: 中间两个残差块之间有没有。
    """

    width: int
    multipliers: tuple[int, ...]
    blocks: int
    groups: int
    attention: bool
    middle_attention: bool
    dropout: float
    padding: Padding

    @property
    def widths(self) -> list[int]:
        """各级的通道数，由浅到深。"""
        return [self.width * multiplier for multiplier in self.multipliers]


class ResBlock(nn.Module):
    """[GroupNorm、SiLU、3 × 3] 两遍，加回；通道数变了，捷径是 1 × 1 卷积。"""

    def __init__(self, channels_in: int, channels_out: int, shape: Shape) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.GroupNorm(shape.groups, channels_in, EPS),
            nn.SiLU(),
            PaddedConv2d(channels_in, channels_out, 3, shape.padding),
            nn.GroupNorm(shape.groups, channels_out, EPS),
            nn.SiLU(),
            nn.Dropout(shape.dropout),
            PaddedConv2d(channels_out, channels_out, 3, shape.padding),
        )
        self.shortcut = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.block(x)


class SelfAttention(nn.Module):
    """格点之间的单头自注意力，加回。"""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, EPS)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w)
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, -1)  # (N, 1, h·w, C)
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)  # (N, C, h·w)
        return x + self.out(mixed.unflatten(2, x.shape[-2:]))


class Halve(nn.Conv2d):
    """右、下各补一行再做 3 × 3、步长 2 的卷积，边长恰好减半；circular_lon 时右边补的是最西的一列。"""

    def __init__(self, width: int, padding: Padding) -> None:
        super().__init__(width, width, 3, stride=2)
        self.mode = "circular" if padding == "circular_lon" else "constant"

    def forward(self, input: Tensor) -> Tensor:  # (N, C, 2h, 2w) → (N, C, h, w)
        wider = F.pad(input, (0, 1, 0, 0), mode=self.mode)
        return super().forward(F.pad(wider, (0, 0, 0, 1)))


def double(width: int, padding: Padding) -> nn.Sequential:
    """(N, C, h, w) → (N, C, 2h, 2w)：每点重复成四点，再 3 × 3 卷积。"""
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), PaddedConv2d(width, width, 3, padding))


def make_encoder(channels: int, latent_dim: int, shape: Shape) -> nn.Sequential:
    """(N, channels, H, W) → (N, latent_dim, h, w)。"""
    layers: list[nn.Module] = [PaddedConv2d(channels, shape.width, 3, shape.padding)]
    before = shape.width
    for level, width in enumerate(shape.widths):
        deepest = level == len(shape.widths) - 1
        layers += stage(before, width, shape.blocks, shape, deepest)
        layers += [] if deepest else [Halve(width, shape.padding)]
        before = width
    return nn.Sequential(*layers, *middle(before, shape), *head(before, latent_dim, shape))


def make_decoder(latent_dim: int, channels: int, shape: Shape) -> nn.Sequential:
    """(N, latent_dim, h, w) → (N, channels, H, W)，没有激活。"""
    before = shape.widths[-1]
    layers: list[nn.Module] = [PaddedConv2d(latent_dim, before, 3, shape.padding), *middle(before, shape)]
    for level, width in reversed(list(enumerate(shape.widths))):
        layers += stage(before, width, shape.blocks + 1, shape, level == len(shape.widths) - 1)
        layers += [double(width, shape.padding)] if level else []
        before = width
    return nn.Sequential(*layers, *head(before, channels, shape))


def stage(channels_in: int, width: int, blocks: int, shape: Shape, deepest: bool) -> list[nn.Module]:
    """一级：残差块，头一个变通道数；最深一级每个之后有自注意力。"""
    layers: list[nn.Module] = []
    for i in range(blocks):
        layers.append(ResBlock(width if i else channels_in, width, shape))
        if deepest and shape.attention:
            layers.append(SelfAttention(width, shape.groups))
    return layers


def middle(width: int, shape: Shape) -> list[nn.Module]:
    """残差、自注意力、残差，大小不变。"""
    between = [SelfAttention(width, shape.groups)] if shape.middle_attention else []
    return [ResBlock(width, width, shape), *between, ResBlock(width, width, shape)]


def head(width: int, channels: int, shape: Shape) -> list[nn.Module]:
    """GroupNorm、SiLU、3 × 3 卷积。"""
    return [nn.GroupNorm(shape.groups, width, EPS), nn.SiLU(), PaddedConv2d(width, channels, 3, shape.padding)]
