"""像素 U-Net：把历史的时间叠进通道，一个 U-Net 直接给出全部未来帧。

论文：Ronneberger et al. 2015（MICCAI），U-Net: Convolutional Networks for Biomedical Image Segmentation。
与原版不同之处：补零而不裁边；Conv – GroupNorm(8) – SiLU 代替 Conv – ReLU。第一个 ConvBlock 就是输入卷积。
`scaling: minmax`（默认）按训练日期上各通道的极值缩到 [-1, 1] 再进网络，出来时还原；输出不截断。
损失在标准化空间里算，各通道的分量与别的模型相同，不因某一通道有极端值（降水）而变轻。

字母：B 批，T_in / T_out 帧数，C 通道，H×W 网格，b = base_channels。
"""

from __future__ import annotations

import torch
from pydantic import Field, field_validator
from torch import Generator, Tensor, nn

from models.layers.losses import Predict, refuse_members, target_mse, to_state
from models.layers.padding import PaddedConv2d, Padding, check_padding
from models.layers.scaling import ChannelScaling, Scaling
from util.batch import Batch, DataSpec
from util.config import PositiveInt, Strict

GROUPS = 8


class Config(Strict):
    """像素 U-Net 的选项；帧数与通道数来自 data 段。"""

    base_channels: int = Field(64, ge=GROUPS)
    depth: PositiveInt = 4
    scaling: Scaling = "minmax"
    padding: Padding = "zeros"
    predict: Predict = "state"

    @field_validator("base_channels")
    @classmethod
    def _normalises(cls, width: int) -> int:
        if width % GROUPS:
            near = width // GROUPS * GROUPS
            raise ValueError(f"must be a multiple of the {GROUPS} normalisation groups, e.g. {near} or {near + GROUPS}")
        return width


class ConvBlock(nn.Sequential):
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
    """下去每层通道加倍、边长减半，上来反之，拼上同一层下去时的输出；边长须能整除 2^depth。"""

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

    def forward(self, x: Tensor) -> Tensor:
        """(B, T_in·C, H, W) → (B, T_out·C, H, W)。"""
        passed = []
        for block in self.down:
            x = block(x)  # (B, b·2^i, H / 2^i, W / 2^i)
            passed.append(x)
            x = self.pool(x)
        x = self.bottleneck(x)  # (B, b·2^depth, H / 2^depth, W / 2^depth)
        for grow, block, skip in zip(self.grow, self.up, reversed(passed), strict=True):
            x = block(torch.cat([grow(x), skip], 1))
        return self.out(x)


class Model(nn.Module):
    """缩放、U-Net、还原。OnePass：minmax 的极值要先看一遍训练窗口。

    Raises:
        ValueError: 网格不能整除 2^depth。
    """

    probabilistic = False
    can_forecast = True

    def __init__(self, config: Config, spec: DataSpec, first_stage: None = None) -> None:
        super().__init__()
        check_padding(config.padding, spec)
        _check_grid(config, spec)
        self.predict: Predict = config.predict
        self.channels = spec.channels
        self.frames_out = spec.frames_out
        self.scaling = ChannelScaling(spec.num_channels, config.scaling)
        self.needs_pass = self.scaling.active
        frame = spec.num_channels
        self.net = UNet(
            spec.frames_in * frame, spec.frames_out * frame, config.base_channels, config.depth, config.padding
        )

    def accumulate(self, batch: Batch) -> None:
        """记下一批训练窗口里各通道的极值；zscore 时不必。"""
        self.scaling.observe(batch)

    def solve(self) -> None:
        """极值边看边记，这里只查它们分得开。

        Raises:
            ValueError: 某个通道在训练日期上没有变化，或没有一个有效的场。
        """
        low, high = self.scaling.low.tolist(), self.scaling.high.tolist()
        for channel, least, most in zip(self.channels, low, high, strict=True):
            if not least < most:
                raise ValueError(
                    f"model.scaling = minmax: {channel} has no range in the training windows (minimum {least:g}, "
                    f"maximum {most:g}, standardised); leave it out of data.variables or use zscore"
                )

    def forward(self, history: Tensor) -> Tensor:
        """(B, T_in, C, H, W) → (B, T_out, C, H, W)，标准化空间。"""
        scaled = self.scaling(history)
        made = self.net(scaled.flatten(1, 2)).unflatten(1, (self.frames_out, -1))  # (B, T_out, C, H, W)
        return self.scaling.inverse(to_state(made, scaled, self.predict))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """有效目标场的均方误差（标准化空间）。"""
        return {"loss": target_mse(self(batch.history), batch)}

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generator | None = None
    ) -> Tensor:
        """(B, T_in, C, H, W) → (B, 1, T_out, C, H, W)；num_members > 1 是 ValueError。"""
        refuse_members("pixel_unet", num_members)
        return self(history)[:, None]


def _check_grid(config: Config, spec: DataSpec) -> None:
    sides = {"latitude": spec.height, "longitude": spec.width}
    for name, length in sides.items():
        if length % 2**config.depth:
            works = [n for n in range(1, config.depth) if all(side % 2**n == 0 for side in sides.values())]
            raise ValueError(
                f"model.depth = {config.depth} halves the grid {spec.height} x {spec.width} {config.depth} times, "
                f"which {length} in {name} does not allow; depths that work: "
                f"{works or 'none, both sides must be even'}"
            )
