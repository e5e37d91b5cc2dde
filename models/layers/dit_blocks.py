"""扩散 Transformer 的层：随条件缩放平移的归一化（adaLN-Zero）、二维旋转位置编码、SwiGLU、两种时间编码。

来源：DiT（Peebles & Xie 2023 §3.2、附录 A）；DiT-DH（Zheng et al. 2025，RAE）用的 RMSNorm、SwiGLU（Shazeer 2020）、
旋转编码（Su et al. 2021，行、列各占每个头的一半）与高斯傅里叶时间编码（Tancik et al. 2020）。

条件 c 是 (B, 1, D)（整帧一个）或 (B, N, D)（每个 token 一个），同一算式。

初值：原版把 adaLN 与输出层置零，各块一开始就是恒等；置零的层后面的参数头一步没有梯度。这里取标准差 0.001：
与置零几乎相同（时间编码的初值也小，开头的门在 1e-3 以下），而每个参数从第一步起都有梯度（docs/LOG.md 的输出层 0.001）。
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Variant = Literal["dit", "dit_dh"]
SMALL_START = 0.001  # 原版为 0，见文件开头
TIME_START = 0.02  # 时间编码两个 Linear 的初值
MAX_PERIOD = 10_000.0
FREQUENCIES = 256  # 时间编码：DiT 的正余弦共 256 维；DiT-DH 是 256 个频率，共 512 维
EPS = 1e-6


class SinusoidTime(nn.Module):
    """(B,) 的 t ∈ [0, 1] → (B, 1, D)：1000·t 的 256 维 cos | sin → Linear – SiLU – Linear。

    频率从 1 到 1/10000，是给 0…999 的扩散步数定的，所以 t 先乘 1000。
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(MAX_PERIOD) / half * torch.arange(half))
        self.rates = nn.Buffer(rates, persistent=False)
        self.mlp = time_mlp(FREQUENCIES, dim)

    def forward(self, t: Tensor) -> Tensor:
        angles = 1000 * t[:, None] * self.rates  # (B, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))[:, None]


class FourierTime(nn.Module):
    """(B,) 的 t → (B, 1, D)：256 个不学的高斯频率 w，sin | cos (2π·w·t) → Linear – SiLU – Linear。"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.rates = nn.Buffer(torch.randn(FREQUENCIES))  # 随检查点存：不学，但是抽出来的
        self.mlp = time_mlp(2 * FREQUENCIES, dim)

    def forward(self, t: Tensor) -> Tensor:
        angles = 2 * torch.pi * t[:, None] * self.rates  # (B, 256)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], -1))[:, None]


def time_mlp(inputs: int, dim: int) -> nn.Sequential:
    """两个 Linear 夹一个 SiLU，初值 N(0, 0.02)。"""
    first, last = nn.Linear(inputs, dim), nn.Linear(dim, dim)
    nn.init.normal_(first.weight, std=TIME_START)
    nn.init.normal_(last.weight, std=TIME_START)
    return nn.Sequential(first, nn.SiLU(), last)


def rotary_angles(grid: tuple[int, int], head_dim: int) -> Tensor:
    """(N, head_dim / 2) 各 token、各对分量转的角度：前一半是行号、后一半是列号乘 10000^(−4j / head_dim)。"""
    quarter = head_dim // 4
    rates = MAX_PERIOD ** (-torch.arange(quarter) / quarter)
    rows, columns = torch.cartesian_prod(*(torch.arange(n) for n in grid)).unbind(1)  # (N,)
    return torch.cat([rows[:, None] * rates, columns[:, None] * rates], 1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """(…, N, d) 的第 2i、2i + 1 个分量一起转过 angles[:, i]；q·k 于是只看两个 token 相差几行几列。"""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # (…, N, d / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)


class Patches(nn.Conv2d):
    """(B, c, h, w) → (B, N, D)，与权重同精度，一块一个 token，按行排；初值与同样大小的 Linear 的 xavier 相同。"""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__(channels, dim, patch, stride=patch)
        nn.init.xavier_uniform_(self.weight.view(dim, -1))
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).flatten(2).mT.to(self.weight.dtype)  # 半精度时，残差仍在 float32 里累加


class Attention(nn.Module):
    """多头自注意力，q、k、v 有偏置；给了 angles 就先转 q 与 k。"""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        """(B, N, D) → (B, N, D)。"""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        return self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class GeluMlp(nn.Sequential):
    """4 倍宽、tanh 近似的 GELU（DiT）。"""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))


class SwiGlu(nn.Module):
    """out(SiLU(gate(x)) ⊙ value(x))，隐层 ⌊2/3·4D⌋ 宽，参数与 4 倍宽的两层感知机相当（DiT-DH）。"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 2 * 4 * dim // 3
        self.gate_value = nn.Linear(dim, 2 * hidden)
        self.out = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_value(x).chunk(2, -1)
        return self.out(F.silu(gate) * value)


def modulation(dim: int, parts: int) -> nn.Sequential:
    """条件 → parts 份调制，各 dim 维；近零起步。"""
    linear = nn.Linear(dim, parts * dim)
    small_start(linear)
    return nn.Sequential(nn.SiLU(), linear)


def small_start(linear: nn.Linear) -> None:
    """原版置零的层；为什么不置零，见文件开头。"""
    nn.init.normal_(linear.weight, std=SMALL_START)
    nn.init.zeros_(linear.bias)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Block(nn.Module):
    """x += g₁·注意力(调制(归一化 x))；x += g₂·感知机(调制(归一化 x))；平移、缩放、门都由条件给出。

    dit：LayerNorm 没有仿射，GELU，xavier 初值；dit_dh：RMSNorm 带权重，SwiGLU。
    """

    def __init__(self, dim: int, heads: int, variant: Variant) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(dim, variant), norm(dim, variant)
        self.attention = Attention(dim, heads)
        self.mlp = GeluMlp(dim) if variant == "dit" else SwiGlu(dim)
        if variant == "dit":  # DiT-DH 的这些 Linear 是 PyTorch 的默认初值
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
        self.modulation = modulation(dim, 6)

    def forward(self, x: Tensor, condition: Tensor, angles: Tensor | None = None) -> Tensor:
        """x (B, N, D)，condition (B, 1 或 N, D) → (B, N, D)。"""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, -1)
        x = x + gate1 * self.attention(modulate(self.norm1(x), shift1, scale1), angles)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """归一化、调制、Linear 出一块的数；近零起步。"""

    def __init__(self, dim: int, values: int, variant: Variant) -> None:
        super().__init__()
        self.norm = norm(dim, variant)
        self.modulation = modulation(dim, 2)
        self.out = nn.Linear(dim, values)
        small_start(self.out)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, N, D)，condition (B, 1 或 N, D) → (B, N, values)。"""
        shift, scale = self.modulation(condition).chunk(2, -1)
        return self.out(modulate(self.norm(x), shift, scale))


def norm(dim: int, variant: Variant) -> nn.Module:
    if variant == "dit":
        return nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
    return nn.RMSNorm(dim, eps=EPS)
