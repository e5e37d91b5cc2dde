"""成员的噪声：每个成员一个高斯向量，调制各归一化层的尺度与平移，确定性的网络由此成为集合，一个成员一次网络调用。

做法取自 FGN（Alet et al. 2025, arXiv:2506.10772）：向量对全球是同一个、维数又低，成员之差因此在空间上是协调的。
没有归一化层的网络（ConvLSTM）里，它是常数的输入通道。从近零起步：训练从确定性的网络开始。

向量是各层的输入，不存在模块里：丢弃激活时前向在反向里重算，存着的那时已是下一步的了。
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from models.layers.losses import refuse_members
from models.layers.members import Generators, sample_generators
from util.strict import PositiveInt, Strict

START = 0.01  # 起步时 scale、shift 的标准差，与噪声的维数无关
CHANNELS_LAST = nn.LayerNorm | nn.RMSNorm  # 通道在末一维的；其余的在第一维（批之后）
NORMS = CHANNELS_LAST | nn.GroupNorm | nn.BatchNorm2d


class Noise(Strict):
    """成员的噪声的选项。"""

    size: PositiveInt = 32
    """numbers drawn for each member"""


NoiseOption = Annotated[
    Noise | None,
    Field(description="makes the model an ensemble (--members); train it with the distance crps or energy"),
]


class Noisy(nn.Module):
    """前向另收各样本的噪声 (B, size) 的层；没有噪声的网络里总是 None。"""


class NoiseNorm(Noisy):
    """norm(x) · (1 + scale) + shift；scale、shift 是噪声的线性函数，各通道一个。"""

    def __init__(self, norm: nn.Module, size: int) -> None:
        super().__init__()
        assert isinstance(norm, NORMS) and norm.weight is not None
        self.norm, self.last = norm, isinstance(norm, CHANNELS_LAST)
        self.modulate = modulation(size, 2 * norm.weight.numel())

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """(B, C, H, W) 或 (B, …, C)，noise (B, size) → 同形。"""
        values = self.modulate(noise)  # (B, 2·C)
        ones = [1] * (x.ndim - 2)
        values = values.view(len(x), *ones, -1) if self.last else values.view(len(x), -1, *ones)
        scale, shift = values.chunk(2, -1 if self.last else 1)
        return self.norm(x) * (1 + scale) + shift


class Chain(Noisy, nn.Sequential):
    """各层依次走，收噪声的另给它噪声。自己有前向：nn.Sequential 的编译器跳过，里面各层就合不到一起。"""

    def forward(self, input: Tensor, noise: Tensor | None = None) -> Tensor:
        for layer in self:
            input = layer(input) if noise is None or not isinstance(layer, Noisy) else layer(input, noise)
        return input


def modulation(size: int, values: int) -> nn.Linear:
    """噪声 (B, size) → (B, values)。"""
    layer = nn.Linear(size, values, bias=False)
    nn.init.normal_(layer.weight, std=START / math.sqrt(size))
    return layer


def condition_norms(module: nn.Module, noise: Noise | None) -> None:
    """里面的归一化层都换成受噪声调制的；没有噪声时一个也不换。"""
    if noise is None:
        return
    for name, child in [*module.named_children()]:
        if isinstance(child, NORMS):
            setattr(module, name, NoiseNorm(child, noise.size))
        else:
            condition_norms(child, noise)


def normalise(norm: nn.Module, x: Tensor, noise: Tensor | None) -> Tensor:
    """norm 受不受调制，看有没有噪声。"""
    return norm(x) if noise is None else norm(x, noise)


def forecast_members(
    network: Callable[..., Tensor],
    name: str,
    noise: Noise | None,
    history: Tensor,
    time: Tensor | None,
    num_members: int,
    generator: Generators | None,
) -> Tensor:
    """network(history, time, noise=…) → (B, M, T_out, C, H, W)：成员并进批里，各成员的向量取自自己的发生器。

    Raises:
        ValueError: 没有噪声而 num_members > 1。
    """
    if noise is None:
        refuse_members(name, num_members)
        return network(history, time)[:, None]
    generators = sample_generators(len(history) * num_members, generator)
    drawn = torch.stack([torch.randn(noise.size, generator=g) for g in generators]).to(history)  # (B·M, size)
    time = None if time is None else time.repeat_interleave(num_members, 0)
    return network(history.repeat_interleave(num_members, 0), time, noise=drawn).unflatten(0, (-1, num_members))
