"""VAR 的 Transformer：一个尺度的 token 一起预报，只看得见不比自己细的尺度。

论文：Tian et al. 2024（NeurIPS），Visual Autoregressive Modeling；自适应归一化来自 DiT（Peebles & Xie 2023），
单位长度的 q、k 来自 Henry et al. 2020。参数个数与公开的逐个相同（tests/models/layers/test_var_blocks.py）。

次序：[条件的 token（可以没有）] [尺度 1] [尺度 2] …… [尺度 K]。尺度 1 的输入是起始向量，尺度 k ≥ 2 的输入是累加到
k − 1 的 f̂ 缩到 (h_k, w_k)；尺度 k 的输出给出它自己的编号。条件的 token 排在最前，谁都看得见，它们只看得见彼此。

字母：N 样本数，K 尺度数，L = Σ h_k·w_k，P 条件的 token 数，D 宽度，V 码数，z 码的宽度。
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

EPS = 1e-6
MLP_RATIO = 4
FIRST_TEMPERATURE = 4.0  # q·k 起步时乘的数，各头自己学，至多 100
LARGEST_TEMPERATURE = 100.0
GAIN_PARTS = 2  # 调制的六份里头两份是残差的增益
SMALL_HEAD = 0.02  # 输出层初值再乘的数：起步时各码几乎等概率


class Condition(NamedTuple):
    """条件在网络里的四个入口。"""

    start: Tensor  # (N, D) 尺度 1 的输入
    adaln: Tensor  # (N, D) 调制各层的归一化
    context: Tensor | None = None  # (N, P, D) 总看得见的 token
    local: Tensor | None = None  # (N, L, D) 加到各尺度同一位置的输入上

    def joined(self, other: Condition) -> Condition:
        """两批样本接成一批。"""

        def both(one: Tensor | None, two: Tensor | None) -> Tensor | None:
            return None if one is None or two is None else torch.cat([one, two])

        start, adaln = torch.cat([self.start, other.start]), torch.cat([self.adaln, other.adaln])
        return Condition(start, adaln, both(self.context, other.context), both(self.local, other.local))


class KeyValues:
    """一层里已经走过的 token 的 k 与 v，采样时不再重算。"""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """接上新的 (N, 头, n, d)，返回全部的。"""
        if self.held is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(self.held, (k, v), strict=True))
        self.held = k, v
        return k, v


class UnitAttention(nn.Module):
    """多头自注意力：q、k 先化为单位长度，每个头学一个温度；q、v 有偏置，k 没有（加给所有 k 的常数 softmax 看不见）。"""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.log_temperature = nn.Parameter(torch.full((heads,), math.log(FIRST_TEMPERATURE)))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KeyValues | None) -> Tensor:
        """x (N, n, D)；mask (n, n)，真为看得见；cache 里已有的 token 全都看得见 → (N, n, D)。"""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        temperature = self.log_temperature.clamp(max=math.log(LARGEST_TEMPERATURE)).exp()
        q = F.normalize(q, dim=-1) * temperature[:, None, None]
        k = F.normalize(k, dim=-1)
        q, k = q.to(v.dtype), k.to(v.dtype)  # 半精度时归一化在 float32 里算
        if cache is not None:
            k, v = cache.extend(k, v)
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
        return self.out(rearrange(y, "b h n d -> b n (h d)"))


class DropPath(nn.Module):
    """训练时以这个概率整条丢掉一个样本的残差支路，留下的放大到期望不变（Huang et al. 2016）。"""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """(N, n, D) → (N, n, D)。"""
        if not self.training or not self.rate:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.rate
        return branch * kept / (1 - self.rate)


class Offset(nn.Module):
    """共用的调制加上这一层自己学的 (6·D)。"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6 * dim))

    def forward(self, shared: Tensor) -> Tensor:
        return shared + self.weight


class Block(nn.Module):
    """x += γ₁·注意力(LN(x)(1 + s₁) + b₁)；x += γ₂·感知机(LN(x)(1 + s₂) + b₂)；六份都由条件给出。

    shared：条件到六份的 Linear 全模型共用，各层只加自己的偏移（VAR 最大的一档）。
    """

    def __init__(self, dim: int, heads: int, drop_path: float, shared: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.attention = UnitAttention(dim, heads)
        hidden = MLP_RATIO * dim
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, dim))
        self.drop = DropPath(drop_path)
        self.modulation = Offset(dim) if shared else modulation(dim, 6)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None, cache: KeyValues | None) -> Tensor:
        """x (N, n, D)，condition (N, D)，共用时 (N, 6·D) → (N, n, D)。"""
        parts = self.modulation(condition)[:, None].chunk(6, -1)  # 各 (N, 1, D)
        gain1, gain2, scale1, scale2, shift1, shift2 = parts
        x = x + self.drop(gain1 * self.attention(self.norm(x) * (1 + scale1) + shift1, mask, cache))
        return x + self.drop(gain2 * self.mlp(self.norm(x) * (1 + scale2) + shift2))


def modulation(dim: int, parts: int) -> nn.Sequential:
    """(N, D) 的条件 → (N, parts·D)。"""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


class ScaleTransformer(nn.Module):
    """各尺度的输入与条件 → 各 token 的码的 logits。

    Args:
        lengths: 各尺度的 token 数。
        latent: 输入的宽度 z。
    """

    def __init__(
        self,
        lengths: Sequence[int],
        latent: int,
        vocabulary: int,
        dim: int,
        depth: int,
        heads: int,
        drop_path: float = 0.0,
        shared_adaln: bool = False,
    ) -> None:
        super().__init__()
        self.lengths = list(lengths)
        self.embed = nn.Linear(latent, dim)
        self.start_position = nn.Parameter(torch.empty(self.lengths[0], dim))
        self.position = nn.Parameter(torch.empty(sum(self.lengths), dim))
        self.level = nn.Parameter(torch.empty(len(self.lengths), dim))
        self.shared = modulation(dim, 6) if shared_adaln else None
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]  # 越深丢得越多
        self.blocks = nn.ModuleList(Block(dim, heads, rate, shared_adaln) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.modulation = modulation(dim, 2)
        self.head = nn.Linear(dim, vocabulary)
        scale_of = torch.tensor([k for k, length in enumerate(self.lengths) for _ in range(length)])
        self.scale_of = nn.Buffer(scale_of, persistent=False)  # (L,) 各 token 属于哪个尺度

    def forward(self, condition: Condition, inputs: Tensor) -> Tensor:
        """训练：头几个尺度一次走完。

        Args:
            inputs: (N, n − h_1·w_1, z)，第 2 个尺度起的输入；n 个 token 恰好是头几个尺度。

        Returns:
            logits (N, n, V) float32，不含条件的 token。
        """
        tokens = torch.cat([self.begin(condition), self.later(condition, inputs, self.lengths[0])], 1)
        hidden = self.run(tokens, condition)
        return self.logits(hidden, condition)

    def begin(self, condition: Condition) -> Tensor:
        """尺度 1 的输入 (N, h_1·w_1, D)。"""
        first = self.lengths[0]
        tokens = condition.start[:, None] + self.start_position + self.position[:first] + self.level[0]
        return tokens if condition.local is None else tokens + condition.local[:, :first]

    def later(self, condition: Condition, inputs: Tensor, first: int) -> Tensor:
        """从第 first 个 token 起的输入 (N, n, z) → (N, n, D)：嵌入，加位置与尺度的编码、那里的条件。"""
        here = slice(first, first + inputs.shape[1])
        tokens = self.embed(inputs) + self.position[here] + self.level[self.scale_of[here]]
        return tokens if condition.local is None else tokens + condition.local[:, here]

    def run(self, tokens: Tensor, condition: Condition) -> Tensor:
        """头几个尺度的输入 (N, n, D)，带遮挡走过各层 → (N, n, D)。"""
        count = tokens.shape[1]
        order = self.scale_of[:count]
        if condition.context is not None:
            tokens = torch.cat([condition.context, tokens], 1)
            order = torch.cat([order.new_full((condition.context.shape[1],), -1), order])
        return self.layers(tokens, condition, order[:, None] >= order)[:, -count:]

    def layers(
        self, tokens: Tensor, condition: Condition, mask: Tensor | None, caches: Sequence[KeyValues] | None = None
    ) -> Tensor:
        """各层；caches 每层一个。"""
        steering = condition.adaln if self.shared is None else self.shared(condition.adaln)
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, steering, mask, None if caches is None else caches[i])
        return tokens

    def logits(self, hidden: Tensor, condition: Condition) -> Tensor:
        """(N, n, D) → (N, n, V)，总以 float32 算。"""
        with torch.autocast(hidden.device.type, enabled=False):
            scale, shift = self.modulation(condition.adaln.float())[:, None].chunk(2, -1)
            return self.head(self.norm(hidden.float()) * (1 + scale) + shift)


class Decoder:
    """采样时逐个尺度地走。cached 为假时每次从头重算全部 token：只供核对，与量缓存省下多少。"""

    def __init__(self, net: ScaleTransformer, condition: Condition, cached: bool = True) -> None:
        self.net, self.condition = net, condition
        self.caches = [KeyValues() for _ in net.blocks] if cached else None
        self.seen: list[Tensor] = []
        if cached and condition.context is not None:
            net.layers(condition.context, condition, None, self.caches)

    def logits(self, tokens: Tensor) -> Tensor:
        """下一个尺度的输入 (N, n, D) → 它的 logits (N, n, V)。"""
        if self.caches is not None:
            hidden = self.net.layers(tokens, self.condition, None, self.caches)
        else:
            self.seen.append(tokens)
            hidden = self.net.run(torch.cat(self.seen, 1), self.condition)[:, -tokens.shape[1] :]
        return self.net.logits(hidden, self.condition)


def initialise(modules: Sequence[nn.Module], net: Any, gain: float) -> None:
    """VAR 的初值，作用于条件与网络（modules），net 是其中的 ScaleTransformer：

    * Linear、Embedding 与各张编码表：截断正态，标准差 √(1 / 3D)；偏置为零。
    * 输出层再乘 0.02；调制乘 1/2，其中残差的增益乘 gain：各层起步时近乎恒等，而每个参数从第一步起都有梯度。
    * 共用的调制也一并缩小；公开的只缩小各层的偏移，共用的不动，起步时各层就不近乎恒等。
    * 残差支路末了的 Linear 除以 √(2·层数)：残差越加越多，总的方差不随深度涨。
    """
    dim = net.embed.out_features
    std = math.sqrt(1 / (3 * dim))
    for module in modules:
        for layer in module.modules():
            for name, parameter in layer.named_parameters(recurse=False):
                if parameter.ndim >= 2:
                    nn.init.trunc_normal_(parameter, std=std)
                elif name == "bias":
                    nn.init.zeros_(parameter)
    steering = [net.shared] if net.shared is not None else [block.modulation for block in net.blocks]
    with torch.no_grad():
        net.head.weight.mul_(SMALL_HEAD)
        net.modulation[-1].weight.mul_(0.5)
        for linear in (layers[-1] for layers in steering):
            linear.weight.mul_(0.5)
            linear.weight[: GAIN_PARTS * dim].mul_(gain / 0.5)
        for block in net.blocks:
            if isinstance(block.modulation, Offset):  # 与公开的相同：N(0, 1/D)，再照样缩小
                nn.init.normal_(block.modulation.weight, std=math.sqrt(1 / dim))
                block.modulation.weight.mul_(0.5)
                block.modulation.weight[: GAIN_PARTS * dim].mul_(gain / 0.5)
            for linear in (block.attention.out, block.mlp[-1]):
                linear.weight.div_(math.sqrt(2 * len(net.blocks)))
