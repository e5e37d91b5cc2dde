"""卷积网络：历史各帧叠成通道，一次给出全部预报帧；没有显式的时间建模。

cnn：3×3 卷积 → w → 2w，步长 2 → 2w → 4w，转置卷积 4×4/2 回到原网格 → 2w，→ w → T_out·C；w = width，原版 64。
deep：输入投影 → 若干残差块 → 输出投影，全在原网格上；块即 He et al. 2016 §3.3 的两层 3×3：
Conv–BN–ReLU–Conv–BN，加回，ReLU。
与原版不同：BN 之前的卷积没有偏置（BN 会把它减掉）；边界可选经度循环；奇数网格在构造时就拒绝，不靠裁剪。

字母：B 批，T_in、T_out 帧数，C 通道，H×W 网格，w 基础宽度。
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from models.layers.batch_norm import BatchNorm2d
from models.layers.forcings import Inputs
from models.layers.frames import to_state
from models.layers.members import Generators
from models.layers.noise import Chain, NoiseOption, Noisy, condition_norms, forecast_members, normalise
from models.layers.padding import PaddedConv2d, PaddedConvTranspose2d, Padding, check_padding
from util.batch import DataSpec, Predict
from util.strict import PositiveInt, Strict

BLOCKS = 3  # deep 的残差块数，原版的默认值


class Config(Strict):
    """各键的意思写在键下面；variant 见文件开头。"""

    variant: Literal["cnn", "deep"] = "cnn"
    """cnn: one halving and back; deep: residual blocks on the grid"""
    width: PositiveInt = 64
    """base width w"""
    blocks: PositiveInt | None = None
    """residual blocks of deep; null: the original's 3"""
    padding: Padding = "zeros"
    predict: Predict = "state"
    noise: NoiseOption = None

    @field_validator("blocks")
    @classmethod
    def _only_deep(cls, blocks: int | None, info: ValidationInfo) -> int | None:
        if blocks is not None and info.data.get("variant") == "cnn":
            raise ValueError("has no meaning for model.variant = cnn; leave it out, or choose variant: deep")
        return blocks


class ConvBlock(Chain):
    """Conv 3×3 – BN – ReLU。"""

    def __init__(self, channels_in: int, channels_out: int, padding: Padding, stride: int = 1) -> None:
        conv = PaddedConv2d(channels_in, channels_out, 3, padding, stride=stride, bias=False)
        super().__init__(conv, BatchNorm2d(channels_out), nn.ReLU())


class ResidualBlock(Noisy):
    """ReLU(x + BN(Conv(ReLU(BN(Conv(x))))))，宽度不变。"""

    def __init__(self, width: int, padding: Padding) -> None:
        super().__init__()
        self.first = ConvBlock(width, width, padding)
        self.second = PaddedConv2d(width, width, 3, padding, bias=False)
        self.norm = BatchNorm2d(width)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:  # (B, w, H, W)
        return (x + normalise(self.norm, self.second(self.first(x, noise)), noise)).relu()


def encoder_decoder(channels_in: int, channels_out: int, width: int, padding: Padding) -> Chain:
    """variant: cnn。(B, T_in·C, H, W) → (B, T_out·C, H, W)。"""
    up = PaddedConvTranspose2d(4 * width, 2 * width, 4, 2, padding, bias=False)
    return Chain(
        ConvBlock(channels_in, width, padding),
        ConvBlock(width, 2 * width, padding),
        ConvBlock(2 * width, 2 * width, padding, stride=2),  # (B, 2w, H/2, W/2)
        ConvBlock(2 * width, 4 * width, padding),
        Chain(up, BatchNorm2d(2 * width), nn.ReLU()),  # (B, 2w, H, W)
        ConvBlock(2 * width, width, padding),
        PaddedConv2d(width, channels_out, 3, padding),
    )


def residual(channels_in: int, channels_out: int, width: int, padding: Padding, blocks: int) -> Chain:
    """variant: deep。(B, T_in·C, H, W) → (B, T_out·C, H, W)。"""
    return Chain(
        ConvBlock(channels_in, width, padding),
        *(ResidualBlock(width, padding) for _ in range(blocks)),
        PaddedConv2d(width, channels_out, 3, padding),
    )


class Model(nn.Module):
    """两种网络共用的外壳：时间与通道的叠放、损失、预报。"""

    can_forecast = True
    takes_forcings = True

    def __init__(self, config: Config, spec: DataSpec, first_stage: None = None) -> None:
        super().__init__()
        check_padding(config.padding, spec)
        self.config, self.spec, self.noise = config, spec, config.noise
        self.probabilistic = config.noise is not None
        self.inputs = Inputs(spec)
        sizes = spec.frames_in * self.inputs.channels, spec.frames_out * spec.num_channels, config.width
        if config.variant == "deep":
            self.network = residual(*sizes, config.padding, config.blocks or BLOCKS)
        else:
            _check_grid(config, spec)
            self.network = encoder_decoder(*sizes, config.padding)
        condition_norms(self, config.noise)
        convert_conv2d_weight_memory_format(self, torch.channels_last)  # 通道排在末尾，处理器上卷积快些

    @property
    def blocks(self) -> list[nn.Module]:
        """最外的各块。"""
        return [module for module in self.network if isinstance(module, ConvBlock | ResidualBlock)]

    def forward(self, history: Tensor, time: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """(B, T_in, C, H, W)、时刻 → (B, T_out, C, H, W)。"""
        seen = self.inputs(history, time).flatten(1, 2)
        made = self.network(seen, noise).unflatten(1, (self.spec.frames_out, -1))
        return to_state(made, self.inputs.base(history), self.config.predict)

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generators | None = None
    ) -> Tensor:
        """(B, T_in, C, H, W) → (B, M, T_out, C, H, W)；没有噪声而 M > 1 是 ValueError。"""
        return forecast_members(self, "cnn", self.noise, history, time, num_members, generator)


def _check_grid(config: Config, spec: DataSpec) -> None:
    """variant: cnn 减半一次，又绕经度。"""
    for length, name in ((spec.height, "latitude"), (spec.width, "longitude")):
        if length % 2:
            raise ValueError(
                f"model.variant = cnn halves the grid, which is odd in {name} ({spec.height} x {spec.width}); "
                "even numbers of latitudes and longitudes work, and variant deep works on every grid"
            )
    if config.padding == "circular_lon" and spec.width < 4:
        raise ValueError(
            f"model.padding = circular_lon with variant cnn needs 4 longitudes, found {spec.width}: use zeros"
        )
