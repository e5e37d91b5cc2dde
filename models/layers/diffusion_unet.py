"""带时间嵌入的 U-Net（Dhariwal & Nichol 2021 的 ADM 一类）：扩散模型的去噪网络。

与 ADM 不同之处：GroupNorm 8 组；下采样是步长 2 的卷积；每个残差块的末一个卷积、注意力与整个网络的输出层从 0.001 起步
而不是零（零的那一层之前收不到梯度）；卷积的边界可选经度循环；注意力用 layers/attention.py 的那一层。
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention import GroupAttention
from models.layers.padding import PaddedConv2d, Padding
from models.layers.unet import GROUPS

LONGEST = 1e4  # 时间嵌入最长的波长 / 2π，与 Transformer 相同
EXPANSION = 4  # 时间嵌入的 MLP 宽几倍
Layer = TypeVar("Layer", nn.Conv2d, nn.Linear, PaddedConv2d)


def quiet(layer: Layer) -> Layer:
    """输出近零的层。"""
    nn.init.normal_(layer.weight, std=0.001)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def time_codes(t: Tensor, dim: int) -> Tensor:
    """(N,) 的步序 → (N, dim) float32：正弦一半、余弦一半，波长等比（Vaswani et al. 2017 §3.5）。"""
    rates = torch.exp(-math.log(LONGEST) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


class Attention(nn.Module):
    """每个格点一个 token 的自注意力，加回输入。"""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.mix = GroupAttention(width, heads, dropout=0.0)
        quiet(self.mix.out)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w)
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (N, h·w, C)
        return x + self.mix(tokens, None).transpose(1, 2).unflatten(2, x.shape[-2:])


class ResBlock(nn.Module):
    """GroupNorm–SiLU–卷积两遍，加回输入；时间嵌入给第二个 GroupNorm 之后的伸缩与平移。heads 为 0 时后面没有注意力。"""

    def __init__(self, width_in: int, width_out: int, embedding: int, heads: int, padding: Padding) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, width_in)
        self.conv1 = PaddedConv2d(width_in, width_out, 3, padding)
        self.time = nn.Linear(embedding, 2 * width_out)
        self.norm2 = nn.GroupNorm(GROUPS, width_out)
        self.conv2 = quiet(PaddedConv2d(width_out, width_out, 3, padding))
        self.skip = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()
        self.attention = Attention(width_out, heads) if heads else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(N, width_in, h, w)、(N, embedding) → (N, width_out, h, w)。"""
        made = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(embedding)[..., None, None].chunk(2, 1)  # (N, width_out, 1, 1)
        made = self.conv2(F.silu(self.norm2(made) * (1 + scale) + shift))
        return self.attention(self.skip(x) + made)


class TimeUNet(nn.Module):
    """每层 depth 个残差块，层间边长减半；上来每层 depth + 1 个，逐个拼上下去时的输出。

    Args:
        widths: 各层的通道数，由浅到深，都是 GROUPS 的倍数；网格两边须能整除 2^(层数 − 1)。
        attention: 哪几层有注意力（0 是原网格）；最深处的两块之间总有。
        heads: 须整除各层的通道数。
        leads: 另有几种时效作条件，各有一个向量加在时间嵌入上。
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        widths: list[int],
        depth: int,
        attention: list[int],
        heads: int,
        padding: Padding,
        leads: int = 0,
    ) -> None:
        super().__init__()
        self.base = widths[0]
        embedding = EXPANSION * self.base
        self.embed = nn.Sequential(nn.Linear(self.base, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.lead = quiet(nn.Linear(leads, embedding, bias=False)) if leads else None
        self.stem = PaddedConv2d(channels_in, self.base, 3, padding)
        self.down, self.shrink, self.up, self.grow = (nn.ModuleList() for _ in range(4))

        def block(width_in: int, level: int) -> ResBlock:
            return ResBlock(width_in, widths[level], embedding, heads if level in attention else 0, padding)

        width, passed = self.base, [self.base]  # 下去时留下的各个输出的通道数
        for level, wider in enumerate(widths):
            if level:
                self.shrink.append(PaddedConv2d(width, width, 3, padding, stride=2))
                passed.append(width)
            self.down.append(nn.ModuleList(block(width if i == 0 else wider, level) for i in range(depth)))
            passed += [wider] * depth
            width = wider
        self.middle = nn.ModuleList(ResBlock(width, width, embedding, count, padding) for count in (heads, 0))
        for level, narrower in reversed(list(enumerate(widths))):
            if level < len(widths) - 1:
                self.grow.append(PaddedConv2d(width, width, 3, padding))
            ins = [width if i == 0 else narrower for i in range(depth + 1)]
            self.up.append(nn.ModuleList(block(one + passed.pop(), level) for one in ins))
            width = narrower
        self.norm = nn.GroupNorm(GROUPS, width)
        self.out = quiet(PaddedConv2d(width, channels_out, 3, padding))

    def forward(self, x: Tensor, t: Tensor, lead: Tensor | None = None) -> Tensor:
        """(N, channels_in, H, W)、(N,) 的步序、时效的码 (N, leads) → (N, channels_out, H, W)。"""
        embedding = self.embed(time_codes(t, self.base))
        embedding = F.silu(embedding if self.lead is None else embedding + self.lead(lead))
        x = self.stem(x)
        passed = [x]
        for level, blocks in enumerate(self.down):
            if level:
                x = self.shrink[level - 1](x)  # 边长减半
                passed.append(x)
            for block in blocks:  # pyright: ignore
                x = block(x, embedding)
                passed.append(x)
        for block in self.middle:
            x = block(x, embedding)
        for level, blocks in enumerate(self.up):
            if level:
                x = self.grow[level - 1](F.interpolate(x, scale_factor=2.0, mode="nearest"))
            for block in blocks:  # pyright: ignore
                x = block(torch.cat([x, passed.pop()], 1), embedding)
        return self.out(F.silu(self.norm(x)))
