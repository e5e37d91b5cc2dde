"""SimVP：编码器逐帧看空间，翻译器把时间折进通道里混合，解码器逐帧还原；全是卷积，一次给出全部未来帧。

论文：Gao et al. 2022（CVPR），SimVP: Simpler yet Better Video Prediction；`translator: gsta` 取自
Tan et al. 2022，SimVP: Towards Simple yet Powerful Spatiotemporal Predictive Learning（v2）。
T_out = T_in 时 v1 与原版逐层相同，参数个数也相同。与原版不同之处：
* T_out ≠ T_in：翻译器最后一块给出 T_out·hid_S 个通道；第一层的跳接取输入的最后 T_out 帧，输出更长时余下的都接最后一帧。
* 原版在 hid_T/2 不是 8 的倍数时悄悄把 8 组改成 1 组，这里报错；N_T = 1 在原版里其实是 2 块，这里从 2 起。
* gsta 只换翻译器，编码器与解码器仍是 v1 的（v2 的上采样是 PixelShuffle，跳接是相加）；
  v2 的随机深度从 0.01 升到 drop_path，drop_path = 0 时前几块却还在丢，这里就是不丢。
* `padding: circular_lon` 时经度是一圈；原版四边补零。

字母：B 批，T_in / T_out 帧数，C 通道，H×W 网格，S = hid_S，h×w 编码后的网格。
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from models.layers.batch_norm import BatchNorm2d
from models.layers.forcings import Inputs
from models.layers.frames import partner_frames, to_state
from models.layers.halving import check_halvings
from models.layers.inception import GROUPS, KERNELS, SLOPE, Inception, InceptionTranslator
from models.layers.members import Generators
from models.layers.noise import Chain, NoiseOption, Noisy, condition_norms, forecast_members, normalise
from models.layers.padding import PaddedConv2d, Padding, check_padding
from util.batch import DataSpec, Predict
from util.strict import PositiveInt, Strict

SPATIAL_GROUPS = 2  # 编码器、解码器的 GroupNorm
MLP_RATIO = 8  # gSTA
LAYER_SCALE = 1e-2
NEAR, FAR, DILATION = 5, 7, 3  # 21 × 21 的大核拆成 5 × 5 与膨胀 3 的 7 × 7
Scale = Literal["same", "down", "up"]


class Config(Strict):
    """SimVP 的选项，名字与原版相同；帧数与通道数来自 data 段。"""

    translator: Literal["inception", "gsta"] = "inception"
    """inception: v1; gsta: the gated large kernels of v2"""
    hid_S: int = Field(32, ge=SPATIAL_GROUPS)
    """channels of encoder and decoder, even"""
    hid_T: PositiveInt = 256
    """channels of the translator"""
    N_S: PositiveInt = 2
    """layers of the encoder; sides halve every two"""
    N_T: int = Field(8, ge=2)
    """blocks of the translator"""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """gsta: chance that the last block's branches are left out, rising from 0.01"""
    padding: Padding = "zeros"
    predict: Predict = "state"
    noise: NoiseOption = None

    @field_validator("hid_S")
    @classmethod
    def _normalises(cls, width: int) -> int:
        if width % SPATIAL_GROUPS:
            raise ValueError(f"must be even ({SPATIAL_GROUPS} normalisation groups), e.g. {width + 1}")
        return width

    @field_validator("hid_T")
    @classmethod
    def _splits(cls, width: int, info: ValidationInfo) -> int:
        unit = 2 * GROUPS  # 块内是 hid_T / 2 个通道
        if info.data.get("translator") == "inception" and width % unit:
            near = max(unit, width // unit * unit)
            raise ValueError(f"the inception translator needs a multiple of {unit}, e.g. {near} or {near + unit}")
        return width

    @field_validator("drop_path")
    @classmethod
    def _has_paths(cls, rate: float, info: ValidationInfo) -> float:
        if rate and info.data.get("translator") == "inception":
            raise ValueError("only the gsta translator drops paths; leave it out or set model.translator = gsta")
        return rate


class UpConv(nn.ConvTranspose2d):
    """边长乘 2 的 3 × 3 转置卷积；第 2j + 1 列输出要看第 j 与 j + 1 列输入，circular_lon 时绕回第 0 列。"""

    def __init__(self, channels_in: int, channels_out: int, padding: Padding) -> None:
        super().__init__(channels_in, channels_out, 3, stride=2, padding=1, output_padding=1)
        self.circular = padding == "circular_lon"

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # (B, C, h, w) → (B, C, 2h, 2w)
        if not self.circular:
            return super().forward(input, output_size)
        return super().forward(F.pad(input, (1, 1, 0, 0), mode="circular"))[..., 2:-2]


class ConvSC(nn.Module):
    """3 × 3 卷积、GroupNorm、LeakyReLU；边长不变、减半或加倍。"""

    def __init__(self, channels_in: int, channels_out: int, scale: Scale, padding: Padding) -> None:
        super().__init__()
        if scale == "up":
            self.conv = UpConv(channels_in, channels_out, padding)
        else:
            stride = 2 if scale == "down" else 1
            self.conv = PaddedConv2d(channels_in, channels_out, 3, padding, stride=stride)
        self.norm = nn.GroupNorm(SPATIAL_GROUPS, channels_out)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        x = normalise(self.norm, self.conv(x), noise)
        return F.leaky_relu(x, SLOPE, inplace=True)  # 归一化的导数不看它自己的输出


class Encoder(nn.Module):
    """N_S 层，边长依次不变、减半、不变、减半……；第一层的输出另作跳接。"""

    def __init__(self, channels: int, width: int, depth: int, padding: Padding) -> None:
        super().__init__()
        scales: list[Scale] = ["down" if i % 2 else "same" for i in range(depth)]
        widths = [channels] + [width] * depth
        self.layers = nn.ModuleList(ConvSC(widths[i], width, scales[i], padding) for i in range(depth))

    def forward(self, frames: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) → (N, S, h, w)、跳接 (N, S, H, W)。"""
        first = x = self.layers[0](frames, noise)
        for layer in self.layers[1:]:
            x = layer(x, noise)
        return x, first


class Decoder(nn.Module):
    """编码器倒过来；最后一层另接跳接，再由 1 × 1 卷积读出。"""

    def __init__(self, channels: int, width: int, depth: int, padding: Padding) -> None:
        super().__init__()
        scales: list[Scale] = ["up" if i % 2 else "same" for i in reversed(range(depth))]
        widths = [width] * (depth - 1) + [2 * width]
        self.layers = nn.ModuleList(ConvSC(widths[i], width, scales[i], padding) for i in range(depth))
        self.readout = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor, first: Tensor, noise: Tensor | None = None) -> Tensor:
        """(N, S, h, w)、(N, S, H, W) → (N, C, H, W)。"""
        for layer in self.layers[:-1]:
            x = layer(x, noise)
        return self.readout(self.layers[-1](torch.cat([x, first], 1), noise))


class DropPath(nn.Module):
    """训练时整条残差支路按样本丢弃，留下的放大，期望不变（Huang et al. 2016，随机深度）。"""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.rate):
            return x
        kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.rate
        return x * kept / (1 - self.rate)


def depthwise(channels: int, kernel: int, padding: Padding, dilation: int = 1) -> PaddedConv2d:
    conv = PaddedConv2d(channels, channels, kernel, padding, groups=channels, dilation=dilation)
    conv.padding = (kernel // 2 * dilation, kernel // 2 * dilation)  # 膨胀之后才是 same
    return conv


class GatedAttention(nn.Module):
    """大核卷积得到的门控：f·sigmoid(g)，外加内部的捷径。"""

    def __init__(self, channels: int, padding: Padding) -> None:
        super().__init__()
        self.before = nn.Conv2d(channels, channels, 1)
        self.near = depthwise(channels, NEAR, padding)
        self.far = depthwise(channels, FAR, padding, DILATION)
        self.gate = nn.Conv2d(channels, 2 * channels, 1)
        self.after = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.gate(self.far(self.near(F.gelu(self.before(x))))).chunk(2, 1)
        return x + self.after(value * gate.sigmoid())


class GatedBlock(Noisy):
    """gSTA：BatchNorm、门控注意力、残差；BatchNorm、卷积 MLP、残差；支路都乘可学的、从 0.01 起的系数。"""

    def __init__(self, channels: int, drop_path: float, padding: Padding) -> None:
        super().__init__()
        hidden = MLP_RATIO * channels
        self.attention = Chain(BatchNorm2d(channels), GatedAttention(channels, padding))
        self.mlp = Chain(
            BatchNorm2d(channels),
            nn.Conv2d(channels, hidden, 1),
            depthwise(hidden, 3, padding),
            nn.GELU(),
            nn.Conv2d(hidden, channels, 1),
        )
        self.attention_scale = nn.Parameter(torch.full((channels, 1, 1), LAYER_SCALE))
        self.mlp_scale = nn.Parameter(torch.full((channels, 1, 1), LAYER_SCALE))
        self.drop_path = DropPath(drop_path)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.attention_scale * self.attention(x, noise))
        return x + self.drop_path(self.mlp_scale * self.mlp(x, noise))


class GatedTranslator(nn.Module):
    """N_T 个 gSTA 块一条线；第一块之后变为 hid_T 宽，最后一块之后变为输出的宽度，都由 1 × 1 卷积；宽度相同就不要它。"""

    def __init__(self, channels_in: int, channels_out: int, config: Config) -> None:
        super().__init__()
        widths = [channels_in] + [config.hid_T] * (config.N_T - 1) + [channels_out]
        rates = torch.linspace(min(0.01, config.drop_path), config.drop_path, config.N_T, device="cpu").tolist()
        layers: list[nn.Module] = []
        for before, after, rate in zip(widths[:-1], widths[1:], rates, strict=True):
            layers.append(GatedBlock(before, rate, config.padding))
            if before != after:
                layers.append(nn.Conv2d(before, after, 1))
        self.layers = Chain(*layers)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, T_in·S, h, w) → (B, T_out·S, h, w)。"""
        return self.layers(x, noise)


class Model(nn.Module):
    """编码器、翻译器、解码器。

    Raises:
        ValueError: 网格不能按 N_S 减半；T_out·hid_S 不能分 8 组；一圈的经度比核还窄。
    """

    can_forecast = True
    takes_forcings = True

    def __init__(self, config: Config, spec: DataSpec, first_stage: None = None) -> None:
        super().__init__()
        check_padding(config.padding, spec)
        check_halvings("N_S", config.N_S, (spec.height, spec.width), layers=2)  # 每两层减半一次
        _check_reach(config, spec)
        _check_groups(config, spec)
        self.predict: Predict = config.predict
        self.noise, self.probabilistic = config.noise, config.noise is not None
        self.skip_frames = partner_frames(spec.frames_in, spec.frames_out)
        sizes = spec.frames_in * config.hid_S, spec.frames_out * config.hid_S
        self.inputs = Inputs(spec)
        self.encoder = Encoder(self.inputs.channels, config.hid_S, config.N_S, config.padding)
        if config.translator == "inception":
            self.translator = InceptionTranslator(*sizes, config.hid_T, config.N_T, config.padding)
        else:
            self.translator = GatedTranslator(*sizes, config)
        self.decoder = Decoder(spec.num_channels, config.hid_S, config.N_S, config.padding)
        condition_norms(self, config.noise)
        convert_conv2d_weight_memory_format(self, torch.channels_last)  # 通道排在末尾，处理器上卷积快些

    @property
    def blocks(self) -> list[nn.Module]:
        """各层卷积，翻译器的各块。"""
        return [module for module in self.modules() if isinstance(module, ConvSC | Inception | GatedBlock)]

    def forward(self, history: Tensor, time: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """(B, T_in, C, H, W)、时刻 → (B, T_out, C, H, W)。"""
        count = len(history)
        frames = self.inputs(history, time).flatten(0, 1), frame_noise(noise, history.shape[1])
        latent, first = self.encoder(*frames)  # (B·T_in, S, h, w)、(B·T_in, S, H, W)
        latent = self.translator(latent.unflatten(0, (count, -1)).flatten(1, 2), noise)  # (B, T_out·S, h, w)
        latent = latent.unflatten(1, (len(self.skip_frames), -1)).flatten(0, 1)  # (B·T_out, S, h, w)
        first = first.unflatten(0, (count, -1))[:, self.skip_frames].flatten(0, 1)  # (B·T_out, S, H, W)
        made = self.decoder(latent, first, frame_noise(noise, len(self.skip_frames)))  # (B·T_out, C, H, W)
        return to_state(made.unflatten(0, (count, -1)), self.inputs.base(history), self.predict)

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generators | None = None
    ) -> Tensor:
        """(B, T_in, C, H, W) → (B, M, T_out, C, H, W)；没有噪声而 M > 1 是 ValueError。"""
        return forecast_members(self, "simvp", self.noise, history, time, num_members, generator)


def frame_noise(noise: Tensor | None, frames: int) -> Tensor | None:
    """(B, size) → (B·frames, size)：一个窗口的各帧用同一个向量。"""
    return None if noise is None else noise.repeat_interleave(frames, 0)


def _check_reach(config: Config, spec: DataSpec) -> None:
    """一圈的经度至少要有核伸出去的那么宽。"""
    reach = max(KERNELS) // 2 if config.translator == "inception" else FAR // 2 * DILATION
    if config.padding == "circular_lon" and spec.width // 2 ** (config.N_S // 2) < reach:
        works = [n for n in range(1, config.N_S) if spec.width // 2 ** (n // 2) >= reach]
        raise ValueError(
            f"model.padding = circular_lon: kernels of the {config.translator} translator reach {reach} columns, but "
            f"N_S = {config.N_S} leaves {spec.width // 2 ** (config.N_S // 2)} of {spec.width}; use zeros"
            + (f", or one of N_S = {works}" if works else "")
        )


def _check_groups(config: Config, spec: DataSpec) -> None:
    channels = spec.frames_out * config.hid_S
    if config.translator == "inception" and channels % GROUPS:
        step = math.lcm(SPATIAL_GROUPS, GROUPS // math.gcd(GROUPS, spec.frames_out))
        near = config.hid_S // step * step
        works = [n for n in (near, near + step) if n]
        raise ValueError(
            f"model.hid_S = {config.hid_S} with data.frames_out = {spec.frames_out}: {channels} channels leave the "
            f"inception translator, not a multiple of its {GROUPS} groups; hid_S that work: {works}, "
            "or model.translator = gsta"
        )
