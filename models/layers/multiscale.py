"""多尺度的残差量化（VAR 的阶段一）：潜变量 f 由粗到细逐个尺度换成码，f̂ 累加，余下的 r = f − f̂ 交给下一个尺度。

论文：Tian et al. 2024（NeurIPS），Visual Autoregressive Modeling，算法 1、2。第 k 个尺度：
    r 面积平均到 (h_k, w_k) → 最近的码 → 双三次放大回潜变量的网格 → φ_k → 加到 f̂ 上
最后一个尺度就是潜变量的网格，不缩放。φ(h) = h/2 + conv(h)/2，几个尺度共用一个。
与公开的代码不同之处：
* 尺度是长方形 (h, w)，不限于正方形。
* r 总是重新算 f − f̂，不逐次相减：f = f̂ + r 在每个尺度上都只差一次舍入。
* 直通的一步写成 f̂ + (f − f)：数值与 f̂ 逐位相同，所以由编号重建出来的就是前向的 f̂。
* 一个进程时不碰 torch.distributed。
总以 float32 算；padding 只管 φ，双三次在经度的两端照边上的值延伸，不循环。

字母：N 样本数，K 尺度数，V 码数，h×w 潜变量的网格，L = Σ h_k·w_k。
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.codebook import Codebook, Learned
from models.layers.padding import PaddedConv2d, Padding
from util.scores.metrics import perplexity

Scales = tuple[tuple[int, int], ...]
BLEND = 0.5  # φ 里卷积的份额（VAR 的 quant_resi）


class Quantized(NamedTuple):
    """量化的结果；errors 各尺度之后 f 与 f̂ 的均方误差，perplexity 这一批各尺度合计的困惑度，usage 用到的码占几成。"""

    f_hat: Tensor  # (N, width, h, w)，梯度直通到 f
    indices: list[Tensor]  # 各尺度 (N, h_k·w_k) int64
    loss: Tensor
    errors: Tensor  # (K,)
    perplexity: Tensor
    usage: Tensor


def rectangular_scales(height: int, width: int, count: int) -> Scales:
    """潜变量 height × width 的 count 个尺度，由 (1, 1) 到 (height, width)，面积递增，长宽比不变（四舍五入）。

    长边按等比数列由 1 到底，四舍五入，至少比前一个大 1：8 × 16、6 个尺度是 (1,1) (1,2) (2,3) (3,5) (5,9) (8,16)。

    Raises:
        ValueError: 长边没有这么多个整数。
    """
    longer = max(height, width)
    if not 2 <= count <= longer:
        raise ValueError(
            f"model.scales = {count}: a latent grid of {height} x {width} has room for 2 to {longer} scales"
        )
    sides: list[int] = []
    for k in range(count):
        ideal = int(longer ** (k / (count - 1)) + 0.5)
        least = sides[-1] + 1 if sides else 1
        sides.append(min(max(ideal, least), longer - (count - 1 - k)))
    return tuple(
        (max(1, (2 * side * height + longer) // (2 * longer)), max(1, (2 * side * width + longer) // (2 * longer)))
        for side in sides
    )


def check_scales(scales: Scales, height: int, width: int) -> None:
    """给定的尺度要一个比一个大，都在潜变量的网格之内，最后一个就是它。

    Raises:
        ValueError: 头一处不合。
    """
    listed = " ".join(f"({h}, {w})" for h, w in scales)
    if scales[-1] != (height, width):
        raise ValueError(f"model.scales = {listed}: the last one must be the latent grid ({height}, {width})")
    for (h, w), (taller, wider) in pairwise(scales):
        if h > taller or w > wider or (h, w) == (taller, wider):
            raise ValueError(f"model.scales = {listed}: ({taller}, {wider}) does not grow from ({h}, {w})")


def phi_of_scales(num_scales: int, phi: int) -> list[int]:
    """各尺度用第几个 φ：尺度在 [0, 1] 上均匀排开，用最近的刻度，一样近时用后一个（原版用前一个）。

    Args:
        phi: φ 的个数；0：每个尺度一个。刻度由 1/(2φ) 到 1 − 1/(2φ) 均匀排开，4 个时两端是 1/12 与 11/12，如原版。

    Raises:
        ValueError: 有的 φ 没有尺度用到。
    """
    if phi == 0:
        return list(range(num_scales))
    edge = Fraction(1, 12) if phi == 4 else Fraction(1, 2 * phi)
    ticks = [edge + (1 - 2 * edge) * Fraction(i, max(1, phi - 1)) for i in range(phi)]
    places = [Fraction(k, max(1, num_scales - 1)) for k in range(num_scales)]
    chosen = [min(range(phi), key=lambda i, at=at: (abs(ticks[i] - at), -i)) for at in places]
    if len(set(chosen)) < phi:
        raise ValueError(
            f"model.phi = {phi}: {num_scales} scales use only {sorted(set(chosen))} of them; "
            "take fewer, or 0 for one per scale"
        )
    return chosen


class MultiScaleQuantizer(nn.Module):
    """f ⇄ 各尺度的编号。训练模式下每次前向之后记下用了哪些码（见 Codebook），评测模式下码本不动。

    损失是各尺度的平均：β·MSE(f, sg[f̂_k]) + MSE(sg[f], f̂_k)，f̂_k 是累加到第 k 个尺度的。

    Raises:
        ValueError: 有的 φ 没有尺度用到。
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        scales: Scales,
        phi: int = 4,
        beta: float = 0.25,
        codebook: Learned = "gradient",
        restart: float = 0.0,
        padding: Padding = "zeros",
    ) -> None:
        super().__init__()
        self.vocabulary, self.width, self.scales, self.beta = vocabulary, width, scales, beta
        self.padding: Padding = padding
        self.lengths = [h * w for h, w in scales]  # 各尺度的 token 数
        self.codebook = Codebook(vocabulary, width, self.lengths, codebook, restart)
        self.phi_index = phi_of_scales(len(scales), phi)
        self.phi = nn.ModuleList(PaddedConv2d(width, width, 3, padding) for _ in range(max(self.phi_index) + 1))

    @property
    def codes(self) -> Tensor:
        """码本 (V, width)。"""
        return self.codebook.codes

    def forward(self, f: Tensor) -> Quantized:
        """(N, width, h, w) 连续的潜变量 → 量化的结果，float32。"""
        with torch.autocast(f.device.type, enabled=False):
            f = f.float()
            f_hat, indices, vectors, errors = f, [], [], []
            loss = f.new_zeros(())
            for index, z, f_hat in self._walk(f):
                indices.append(index)
                vectors.append(z)
                attract = F.mse_loss(f_hat, f.detach())
                loss = loss + attract + self.beta * F.mse_loss(f, f_hat.detach())
                errors.append(attract.detach())
            counts = self.codebook.counts(indices)  # (K, V)
            if self.training:
                self.codebook.record(vectors, [index.flatten() for index in indices], counts)
            return Quantized(
                f_hat=straight_through(f_hat, f),
                indices=indices,
                loss=loss / len(self.scales),
                errors=torch.stack(errors),
                perplexity=perplexity(counts.sum(0) / counts.sum()),
                usage=self.codebook.usage(),
            )

    def _walk(self, f: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """逐个尺度：编号 (N, h_k·w_k)、它们量化的向量 (N·h_k·w_k, width)、累加之后的 f̂。"""
        f_hat = torch.zeros_like(f)
        for k, scale in enumerate(self.scales):
            rest = shrink(f.detach() - f_hat.detach(), scale)
            vectors = rest.flatten(2).transpose(1, 2).flatten(0, 1)
            index = self.codebook.nearest(vectors).unflatten(0, (len(f), -1))
            f_hat = self.add_scale(f_hat, self.lookup(index, k), k)
            yield index, vectors, f_hat

    @torch.no_grad()
    def indices(self, f: Tensor) -> list[Tensor]:
        """(N, width, h, w) → 各尺度的编号 (N, h_k·w_k)，与 forward 的相同；码本不动。"""
        with torch.autocast(f.device.type, enabled=False):
            return [index for index, _, _ in self._walk(f.float())]

    def quantize(self, f: Tensor) -> Tensor:
        """(N, width, h, w) → f̂，与 forward 的相同，梯度直通到 f；码本不动，也不算损失。"""
        with torch.autocast(f.device.type, enabled=False):
            f = f.float()
            *_, (_, _, f_hat) = self._walk(f)
            return straight_through(f_hat, f)

    def lookup(self, indices_k: Tensor, k: int) -> Tensor:
        """第 k 个尺度（从 0 数）的编号 (N, h_k·w_k) → 码 (N, width, h_k, w_k)。"""
        return F.embedding(indices_k, self.codes).transpose(1, 2).unflatten(2, self.scales[k])

    def add_scale(self, f_hat: Tensor, codes_k: Tensor, k: int) -> Tensor:
        """f̂ (N, width, h, w) 加上第 k 个尺度的码 (N, width, h_k, w_k)：forward 走的也是这一步。"""
        with torch.autocast(f_hat.device.type, enabled=False):
            enlarged = codes_k.float()
            if self.scales[k] != self.scales[-1]:
                enlarged = F.interpolate(enlarged, self.scales[-1], mode="bicubic")
            conv = self.phi[self.phi_index[k]]
            return f_hat.float() + torch.lerp(enlarged, conv(enlarged), BLEND)

    def next_input(self, f_hat: Tensor, k: int) -> Tensor:
        """累加到第 k 个尺度的 f̂ → 第 k + 1 个尺度的输入 (N, width, h_{k+1}, w_{k+1})。"""
        return shrink(f_hat, self.scales[k + 1])

    def teacher_inputs(self, indices: Sequence[Tensor]) -> Tensor:
        """头几个（或全部 K 个）尺度的编号 → 其中第 2 个起各尺度的输入，按 token 的次序 (N, L − h_1·w_1, width)。

        与采样时逐个尺度 add_scale、next_input 的逐位相同；最后一个尺度的编号用不到。
        """
        inputs = [torch.zeros(len(indices[0]), 0, self.width, device=indices[0].device)]
        for k, f_hat in enumerate(self._cumulative(indices, len(indices) - 1)):
            inputs.append(self.next_input(f_hat, k).flatten(2).transpose(1, 2))
        return torch.cat(inputs, 1)

    def reconstruct(self, indices: Sequence[Tensor]) -> Tensor:
        """头几个（或全部 K 个）尺度的编号 → 累加的 f̂ (N, width, h, w)；全部时与 forward 的 f_hat 逐位相同。"""
        *_, f_hat = self._cumulative(indices, len(indices))
        return f_hat

    def _cumulative(self, indices: Sequence[Tensor], count: int) -> Iterator[Tensor]:
        """头 count 个尺度，逐个累加的 f̂。"""
        first = indices[0]
        f_hat = torch.zeros(len(first), self.width, *self.scales[-1], device=first.device)
        for k in range(count):
            f_hat = self.add_scale(f_hat, self.lookup(indices[k], k), k)
            yield f_hat


def shrink(fields: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, h, w) → (N, C, *size)，面积平均；大小相同时原样。"""
    return fields if tuple(fields.shape[-2:]) == size else F.interpolate(fields, size, mode="area")


def straight_through(f_hat: Tensor, f: Tensor) -> Tensor:
    """数值是 f̂，逐位相同；梯度原样到 f，不到码。"""
    return f_hat.detach() + (f - f.detach())
