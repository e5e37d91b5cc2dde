"""Inception 翻译器：时间折进通道，四种大小的核在不变的网格上混合；SimVP 的翻译器，也是 PastNet 的传播。

论文：Gao et al. 2022（CVPR），SimVP: Simpler yet Better Video Prediction，§3.2。
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.noise import Chain
from models.layers.padding import PaddedConv2d, Padding

GROUPS = 8  # 分组卷积与 GroupNorm
KERNELS = (3, 5, 7, 11)
SLOPE = 0.2  # LeakyReLU


class Inception(nn.Module):
    """1 × 1 卷积之后，四种核的分组卷积并排，结果相加（不是拼接）。"""

    def __init__(self, channels_in: int, hidden: int, channels_out: int, padding: Padding) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels_in, hidden, 1)
        self.branches = nn.ModuleList(
            Chain(
                PaddedConv2d(hidden, channels_out, kernel, padding, groups=GROUPS),
                nn.GroupNorm(GROUPS, channels_out),
                nn.LeakyReLU(SLOPE, inplace=True),  # 归一化的导数不看它自己的输出
            )
            for kernel in KERNELS
        )

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        x = self.squeeze(x)
        total = self.branches[0](x, noise)
        for branch in self.branches[1:]:
            total = total + branch(x, noise)
        return total


class InceptionTranslator(nn.Module):
    """depth 块下去，depth 块上来，像 U-Net 而不改变分辨率；上来的第 i 块（i ≥ 2）拼上倒数第 i 块下去的输出。

    width 与两端的通道数都要能分成 GROUPS 组，width / 2 也是。
    """

    def __init__(self, channels_in: int, channels_out: int, width: int, depth: int, padding: Padding) -> None:
        super().__init__()
        half = width // 2
        ins, outs = [channels_in] + [width] * (depth - 1), [width] * (depth - 1) + [channels_out]
        skips = [0] + [width] * (depth - 1)
        self.down = nn.ModuleList(Inception(ins[i], half, width, padding) for i in range(depth))
        self.up = nn.ModuleList(Inception(width + skips[i], half, outs[i], padding) for i in range(depth))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, T_in·S, h, w) → (B, T_out·S, h, w)。"""
        passed = []
        for block in self.down:
            x = block(x, noise)
            passed.append(x)
        x = self.up[0](x, noise)
        for block, skip in zip(self.up[1:], reversed(passed[:-1]), strict=True):
            x = block(torch.cat([x, skip], 1), noise)
        return x
