"""C 个变量的场 ⇄ 三通道的图：为照片训练的编码器与解码器只认这样的图。"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

RGB = 3  # 图的通道数
Channels = Annotated[
    Literal["repeat", "adapter"],
    Field(description="repeat: an image of each channel; adapter: one of all, by a learned 1 x 1 convolution"),
]


class Adapter(nn.Module):
    """C 个变量 ⇄ 3 个图通道的 1 × 1 卷积；起步时第 i 个变量走第 i mod 3 个图通道，数值不出预训练认得的 [-1, 1]。"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.into = nn.Conv2d(channels, RGB, 1)
        self.out = nn.Conv2d(RGB, channels, 1)
        few = min(RGB, channels)
        same = (torch.arange(RGB)[:, None] % few == torch.arange(channels) % RGB % few).float()  # (3, C)
        with torch.no_grad():
            for layer, start in ((self.into, same), (self.out, same.T)):
                assert layer.bias is not None
                layer.weight.copy_((start / start.sum(1, keepdim=True))[..., None, None])
                layer.bias.zero_()


class FieldImages(nn.Module):
    """repeat：每个变量是一张图，重复成三个通道，出来取平均，一帧 C 张；adapter：学出来的 1 × 1 卷积，一帧一张。

    count: 一帧几张图；一帧的潜变量是它各张图的，叠在通道里。
    """

    def __init__(self, channels: int, how: Channels) -> None:
        super().__init__()
        self.adapter = Adapter(channels) if how == "adapter" else None
        self.count = 1 if self.adapter else channels

    def images(self, fields: Tensor) -> Tensor:
        """(N, C, H, W) → (n, 3, H, W)，n = N·count。"""
        if self.adapter:
            return self.adapter.into(fields)
        return fields.flatten(0, 1)[:, None].expand(-1, RGB, -1, -1)

    def fields(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) → (N, C, H, W)。"""
        return self.adapter.out(images) if self.adapter else images.mean(1).unflatten(0, (-1, self.count))

    def stack(self, latents: Tensor) -> Tensor:
        """(n, c, h, w) → (N, count·c, h, w)。"""
        return latents.unflatten(0, (-1, self.count)).flatten(1, 2)

    def unstack(self, latents: Tensor) -> Tensor:
        """stack 的逆。"""
        return latents.unflatten(1, (self.count, -1)).flatten(0, 1)
