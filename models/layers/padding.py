"""卷积的边界：经度是一圈，`circular_lon` 在经度上循环、纬度上补零；`zeros` 四边补零，如多数原版。"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from util.batch import DataSpec

Padding = Annotated[
    Literal["zeros", "circular_lon"],
    Field(description="edges of convolutions: zeros, or longitude as a circle with zeros at the poles"),
]


def check_padding(padding: Padding, spec: DataSpec) -> None:
    """Raises ValueError: circular_lon 而网格的东西两边不相邻（区域网格）。"""
    if padding == "circular_lon" and not spec.closes_circle:
        raise ValueError(
            f"model.padding = circular_lon needs longitudes that close the circle; these {spec.width} run from "
            f"{spec.longitudes[0]:g} to {spec.longitudes[-1]:g} degrees: use zeros"
        )


class PaddedConv2d(nn.Conv2d):
    """same 填充的卷积；参数与 nn.Conv2d 相同，只是边界可选。kernel 为奇数。"""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, padding: Padding, **options: Any) -> None:
        assert kernel % 2 == 1, f"kernel {kernel} is even"
        super().__init__(channels_in, channels_out, kernel, padding=kernel // 2, **options)
        self.circular = padding == "circular_lon"

    def forward(self, input: Tensor) -> Tensor:  # (B, C, H, W)
        if not self.circular:
            return super().forward(input)
        rows, columns = self.padding
        assert isinstance(rows, int) and isinstance(columns, int)
        wrapped = F.pad(input, (columns, columns, 0, 0), mode="circular")
        return F.conv2d(wrapped, self.weight, self.bias, self.stride, (rows, 0), self.dilation, self.groups)


class PaddedConvTranspose2d(nn.ConvTranspose2d):
    """边长恰好乘 stride 的转置卷积；kernel − stride 为偶数，如 4/2、2/2。"""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: int, padding: Padding, **options: Any
    ) -> None:
        assert (kernel - stride) % 2 == 0, f"kernel {kernel} and stride {stride} do not differ by an even number"
        super().__init__(channels_in, channels_out, kernel, stride, padding=(kernel - stride) // 2, **options)
        self.circular = padding == "circular_lon"

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # (B, C, H, W)
        if not self.circular:
            return super().forward(input, output_size)
        stride, reach = self.stride[1], -(-self.kernel_size[1] // self.stride[1])  # reach: 一个输出最远看到几列输入
        assert not isinstance(self.padding, str)
        wrapped = F.pad(input, (reach, reach, 0, 0), mode="circular")
        made = F.conv_transpose2d(
            wrapped, self.weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )
        return made[..., reach * stride : made.shape[-1] - reach * stride]
