"""U-Net 的主干：像素 U-Net 与潜空间 U-Net 共用。

论文：Ronneberger et al. 2015（MICCAI），U-Net: Convolutional Networks for Biomedical Image Segmentation。
与原版不同之处：补零而不裁边；Conv – GroupNorm(8) – SiLU 代替 Conv – ReLU。第一个 ConvBlock 就是输入卷积。
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from models.layers.noise import Chain
from models.layers.padding import PaddedConv2d, Padding

GROUPS = 8


def _normalises(width: int) -> int:
    if width % GROUPS:
        near = width // GROUPS * GROUPS
        raise ValueError(f"must be a multiple of the {GROUPS} normalisation groups, e.g. {near} or {near + GROUPS}")
    return width


Width = Annotated[
    int,
    Field(ge=GROUPS, description=f"channels of the finest level, a multiple of {GROUPS}"),
    AfterValidator(_normalises),
]


class ConvBlock(Chain):
    """3 × 3 卷积、GroupNorm、SiLU，两遍。"""

    def __init__(self, channels_in: int, channels_out: int, padding: Padding) -> None:
        super().__init__(
            PaddedConv2d(channels_in, channels_out, 3, padding),
            nn.GroupNorm(GROUPS, channels_out),
            nn.SiLU(),
            PaddedConv2d(channels_out, channels_out, 3, padding),
            nn.GroupNorm(GROUPS, channels_out),
            nn.SiLU(),
        )


class UNet(nn.Module):
    """下去每层通道加倍、边长减半，上来反之，拼上同一层下去时的输出；边长须能整除 2^depth（check_halvings）。"""

    def __init__(self, channels_in: int, channels_out: int, base: int, depth: int, padding: Padding) -> None:
        super().__init__()
        widths = [base * 2**i for i in range(depth)]  # 各层的通道数，由浅到深
        ins = [channels_in, *widths]
        self.down = nn.ModuleList(ConvBlock(ins[i], widths[i], padding) for i in range(depth))
        self.pool = nn.MaxPool2d(2)
        self.bottleneck = ConvBlock(widths[-1], 2 * widths[-1], padding)
        # 2 × 2、步长 2：每个输出只看一个输入，没有边界
        self.grow = nn.ModuleList(nn.ConvTranspose2d(2 * width, width, 2, stride=2) for width in reversed(widths))
        self.up = nn.ModuleList(ConvBlock(2 * width, width, padding) for width in reversed(widths))
        self.out = nn.Conv2d(base, channels_out, 1)

    @property
    def blocks(self) -> list[nn.Module]:
        """各个 ConvBlock。"""
        return [*self.down, self.bottleneck, *self.up]

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, channels_in, H, W) → (B, channels_out, H, W)。"""
        passed = []
        for block in self.down:
            x = block(x, noise)  # (B, b·2^i, H / 2^i, W / 2^i)
            passed.append(x)
            x = self.pool(x)
        x = self.bottleneck(x, noise)  # (B, b·2^depth, H / 2^depth, W / 2^depth)
        for grow, block, skip in zip(self.grow, self.up, reversed(passed), strict=True):
            x = block(torch.cat([grow(x), skip], 1), noise)
        return self.out(x)
