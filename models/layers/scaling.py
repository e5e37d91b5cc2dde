"""模型自己的缩放：z-score 原样，或按训练日期上各通道的极值缩到 [-1, 1]。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from util.batch import Batch

Scaling = Annotated[
    Literal["zscore", "minmax"],
    Field(description="what the network sees: standardised fields, or each channel within [-1, 1] by its extremes"),
]


class ChannelScaling(nn.Module):
    """minmax 的极值由 observe 在训练窗口上看一遍得到，存为 buffer；没有看过时按 ±1 处理，即原样。"""

    def __init__(self, num_channels: int, scaling: Scaling) -> None:
        super().__init__()
        self.active = scaling == "minmax"
        self.low = nn.Buffer(torch.full((num_channels,), -1.0))
        self.high = nn.Buffer(torch.full((num_channels,), 1.0))
        self.seen = False

    def observe(self, batch: Batch) -> None:
        """记下有效场的极值；zscore 时什么也不做。"""
        if not self.active:
            return
        fields = torch.cat([batch.history, batch.future], 1)  # (B, t, C, H, W)
        invalid = ~batch.valid[..., None, None]
        low = fields.masked_fill(invalid, torch.inf).amin((0, 1, 3, 4)).to(self.low)
        high = fields.masked_fill(invalid, -torch.inf).amax((0, 1, 3, 4)).to(self.high)
        self.low.copy_(torch.minimum(self.low, low) if self.seen else low)
        self.high.copy_(torch.maximum(self.high, high) if self.seen else high)
        self.seen = True

    def check(self, channels: Sequence[str]) -> None:
        """看完之后，极值要分得开。

        Raises:
            ValueError: 某个通道在训练日期上没有变化，或没有一个有效的场。
        """
        for channel, least, most in zip(channels, self.low.tolist(), self.high.tolist(), strict=True):
            if not least < most:
                raise ValueError(
                    f"model.scaling = minmax: {channel} has no range in the training windows (minimum {least:g}, "
                    f"maximum {most:g}, standardised); leave it out of data.variables or use zscore"
                )

    def forward(self, fields: Tensor) -> Tensor:
        """(..., C, H, W) 标准化 → 模型里的尺度。"""
        if not self.active:
            return fields
        low, high = self.low[:, None, None], self.high[:, None, None]
        return (fields - low) / (high - low) * 2 - 1

    def inverse(self, fields: Tensor) -> Tensor:
        """forward 的逆。"""
        if not self.active:
            return fields
        low, high = self.low[:, None, None], self.high[:, None, None]
        return (fields.float() + 1) / 2 * (high - low) + low  # bf16 加 1 会丢掉小数
