"""VAR 的采样：逐个尺度抽编号，f̂ 累加；无分类器引导随尺度加强，top-k、top-p，可以用 Gumbel 软化。

每个样本（一个窗口的一个成员）有自己的发生器：成员与怎样分批无关；在 CPU 上抽，换了设备也是同样的数。

字母：N 样本数，n 一个尺度的 token 数，V 码数，K 尺度数。
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from models.layers.multiscale import Scales
from models.layers.var_blocks import Decoder, ScaleTransformer
from util.strict import PositiveInt, Strict

SMOOTH_START, SMOOTH_FALL, SMOOTH_LEAST = 0.27, 0.95, 0.005  # Gumbel-softmax 的温度随尺度降


class Sampling(Strict):
    """采样的选项；smooth 即原版的 more_smooth。"""

    cfg: float = Field(default=1.5, ge=0)
    """strength of guidance, growing with the scales; 0: none"""
    top_k: PositiveInt | None = 900
    """draw from the likeliest codes only; null: from all"""
    top_p: float = Field(default=0.96, gt=0, le=1)
    """draw from the likeliest with this probability together; 1: from all"""
    smooth: bool = False
    """average the codes instead of drawing: for pictures, members become alike"""


class ScaleCodes(Protocol):
    """采样用到的码本：编号换成码，逐个尺度累加；各个的意思见 MultiScaleQuantizer。"""

    scales: Scales
    width: int

    @property
    def codes(self) -> Tensor: ...

    def lookup(self, indices_k: Tensor, k: int) -> Tensor: ...

    def add_scale(self, f_hat: Tensor, codes_k: Tensor, k: int) -> Tensor: ...

    def next_input(self, f_hat: Tensor, k: int) -> Tensor: ...


def sample(
    net: ScaleTransformer,
    quantizer: ScaleCodes,
    condition: nn.Module,
    given: Tensor,
    options: Sampling,
    generators: Sequence[Generator],
    cached: bool = True,
) -> Tensor:
    """给定的条件 → 生成的 f̂ (N, z, h, w)。

    Args:
        quantizer: 码本，如 MultiScaleQuantizer。
        condition: LabelCondition 或 HistoryCondition，given 是它要的。
        generators: N 个。
        cached: 为假时每个尺度都从头重算，见 Decoder。
    """
    count, last = len(given), len(quantizer.scales) - 1
    everyone = torch.ones(count, dtype=torch.bool, device=given.device)
    steering = condition(given, everyone)
    if options.cfg:
        steering = steering.joined(condition(given, ~everyone))  # 后一半没有条件
    decoder = Decoder(net, steering, cached)
    tokens = net.begin(steering)
    f_hat = torch.zeros(count, quantizer.width, *quantizer.scales[-1], device=given.device)
    done = 0
    for k in range(last + 1):
        ratio = k / max(1, last)
        logits = decoder.logits(tokens)
        if options.cfg:
            logits = guided(*logits.chunk(2), options.cfg * ratio)
        logits = keep_likely(logits, options.top_k, options.top_p)
        if options.smooth:
            codes = smooth_codes(logits, ratio, quantizer.codes, generators).mT.unflatten(2, quantizer.scales[k])
        else:
            codes = quantizer.lookup(draw(logits, generators), k)
        f_hat = quantizer.add_scale(f_hat, codes, k)
        if k < last:
            done += logits.shape[1]
            inputs = quantizer.next_input(f_hat, k).flatten(2).mT  # (N, n, z)
            tokens = net.later(steering, torch.cat([inputs, inputs]) if options.cfg else inputs, done)
    return f_hat


def guided(conditional: Tensor, unconditional: Tensor, strength: float) -> Tensor:
    """(1 + t)·有条件 − t·无条件（Ho & Salimans 2022）。"""
    return (1 + strength) * conditional - strength * unconditional


def keep_likely(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """(..., V) → 留下的原样，其余为 −∞：先 top_k 个最大的，再其中概率之和达到 top_p 的最小的一组（至少一个）。"""
    if (top_k is None or top_k >= logits.shape[-1]) and top_p == 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[..., top_k:] = -torch.inf
    chances = ordered.softmax(-1)
    before = chances.cumsum(-1) - chances  # 比它更可能的码合计的概率
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def draw(logits: Tensor, generators: Sequence[Generator]) -> Tensor:
    """(N, n, V) → 按概率抽到的编号 (N, n)；每个 token 用一个均匀的随机数，查累积的概率。"""
    uniform = torch.stack([torch.rand(logits.shape[1], 1, generator=g) for g in generators]).to(logits.device)
    total = logits.double().softmax(-1).cumsum(-1)  # (N, n, V)
    wanted = uniform.double() * total[..., -1:]  # float64 里一定小于末一个，查到的码概率因此不为零
    return torch.searchsorted(total, wanted, right=True)[..., 0]


def smooth_codes(logits: Tensor, ratio: float, codes: Tensor, generators: Sequence[Generator]) -> Tensor:
    """(N, n, V) → 码按 Gumbel-softmax（Jang et al. 2017）的权重平均 (N, n, z)；尺度越细越接近抽到的那一个。"""
    shape = logits.shape[1:]
    waits = torch.stack([torch.empty(shape).exponential_(generator=g) for g in generators]).to(logits.device)
    temperature = max(SMOOTH_START * (1 - SMOOTH_FALL * ratio), SMOOTH_LEAST)
    return ((logits * (1 + ratio) - waits.log()) / temperature).softmax(-1) @ codes
