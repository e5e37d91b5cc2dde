"""DiT 的层与两种网络：整个前向与写开的 NumPy 循环相比；SwiGLU 的宽度、旋转编码、位置编码、初值。"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch import Tensor, nn

from models.dit import token_codes
from models.layers.dit_blocks import Block, FinalLayer, FourierTime, Patches, SinusoidTime, rotary_angles, rotate
from tests.models.dit_small import SMALL, SMALL_DH, randomize, small
from tests.models.small import small_batch, small_spec

Array = np.ndarray


def values(tensor: Tensor | None) -> Array:
    assert tensor is not None
    return tensor.detach().double().numpy()


def linear(x: Array, layer: Any) -> Array:
    return x @ values(layer.weight).T + values(layer.bias)


def silu(x: Array) -> Array:
    return x * expit(x)


def norm(x: Array, layer: nn.Module) -> Array:
    if isinstance(layer, nn.LayerNorm):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    assert isinstance(layer, nn.RMSNorm)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * values(layer.weight)


def turned(x: Array, row: int, column: int) -> Array:
    """一个 token 一个头的向量：前一半按行号、后一半按列号，逐对转过去（复数乘 e^{iθ}）。"""
    made, quarter = x.copy(), len(x) // 4
    for axis, place in enumerate((row, column)):
        for j in range(quarter):
            i = 2 * (axis * quarter + j)
            made_pair = complex(x[i], x[i + 1]) * np.exp(1j * place * 10_000 ** (-j / quarter))
            made[i], made[i + 1] = made_pair.real, made_pair.imag
    return made


def attention(x: Array, layer: Any, grid: tuple[int, int] | None) -> Array:
    """(B, N, D)：逐窗口、逐头、逐 query。"""
    count, tokens, dim = x.shape
    each = dim // layer.heads
    qkv = linear(x, layer.qkv)
    made = np.zeros_like(x)
    for b, h in np.ndindex(count, layer.heads):
        q, k, v = (qkv[b, :, part * dim + h * each : part * dim + (h + 1) * each].copy() for part in range(3))
        if grid is not None:
            for n in range(tokens):
                q[n], k[n] = (turned(part[n], *divmod(n, grid[1])) for part in (q, k))
        for n in range(tokens):
            scores = k @ q[n] / math.sqrt(each)
            weights = np.exp(scores - scores.max())
            made[b, n, h * each : (h + 1) * each] = weights @ v / weights.sum()
    return linear(made, layer.out)


def mlp(x: Array, layer: Any) -> Array:
    if isinstance(layer, nn.Sequential):  # 两层，tanh 近似的 GELU
        hidden = linear(x, layer[0])
        inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        return linear(0.5 * hidden * (1 + np.tanh(inner)), layer[2])
    both = linear(x, layer.gate_value)
    half = both.shape[-1] // 2
    return linear(silu(both[..., :half]) * both[..., half:], layer.out)


def block(x: Array, condition: Array, layer: Any, grid: tuple[int, int] | None) -> Array:
    """adaLN：条件过 SiLU、Linear，依次是注意力的平移、缩放、门，感知机的平移、缩放、门。"""
    shift1, scale1, gate1, shift2, scale2, gate2 = np.split(linear(silu(condition), layer.modulation[1]), 6, -1)
    x = x + gate1 * attention(norm(x, layer.norm1) * (1 + scale1) + shift1, layer.attention, grid)
    return x + gate2 * mlp(norm(x, layer.norm2) * (1 + scale2) + shift2, layer.mlp)


def final(x: Array, condition: Array, layer: Any) -> Array:
    shift, scale = np.split(linear(silu(condition), layer.modulation[1]), 2, -1)
    return linear(norm(x, layer.norm) * (1 + scale) + shift, layer.out)


def patches(x: Array, layer: nn.Conv2d) -> Array:
    """(B, c, h, w) → (B, N, D)：一块块地取出来，乘核。"""
    p = layer.kernel_size[0]
    corners = [(i, j) for i in range(0, x.shape[2], p) for j in range(0, x.shape[3], p)]
    cut = np.stack([x[:, :, i : i + p, j : j + p].reshape(len(x), -1) for i, j in corners], 1)
    return cut @ values(layer.weight).reshape(len(layer.weight), -1).T + values(layer.bias)


def time_code(t: Array, layer: Any) -> Array:
    """(B, 1, D)。"""
    if isinstance(layer, SinusoidTime):
        rates = [10_000 ** (-i / 128) for i in range(128)]
        np.testing.assert_allclose(values(layer.rates), rates, rtol=1e-6)
        angles = 1000 * t[:, None] * values(layer.rates)  # 表是 float32 的，乘 1000 之后差得出来
        parts = [np.cos(angles), np.sin(angles)]
    else:
        angles = 2 * math.pi * t[:, None] * values(layer.rates)
        parts = [np.sin(angles), np.cos(angles)]
    return linear(silu(linear(np.concatenate(parts, -1), layer.mlp[0])), layer.mlp[2])[:, None]


def network(net: Any, x: Array, t: Array, grid: tuple[int, int]) -> Array:
    """(B, c_in, h, w) → (B, N, values)，两种网络。"""
    time, tokens = time_code(t, net.time), patches(x, net.embed) + values(net.place)
    if isinstance(net.time, SinusoidTime):
        for layer in net.blocks:
            tokens = block(tokens, time, layer, None)
        return final(tokens, time, net.final)
    for layer in net.blocks:
        tokens = block(tokens, silu(time), layer, grid)
    condition = linear(silu(time + tokens), net.widen)
    tokens = patches(x, net.wide_embed)
    for layer in net.wide_blocks:
        tokens = block(tokens, condition, layer, grid)
    return final(tokens, condition, net.final)


@pytest.mark.parametrize("options", [SMALL, SMALL_DH], ids=["dit", "dit_dh"])
def test_the_network_equals_the_written_out_one(options: dict[str, Any]) -> None:
    spec = small_spec(channels=2, grid=(8, 12), frames_in=3, frames_out=2)
    model = small(spec, **options).double()
    randomize(model)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 8, 12, dtype=torch.float64, generator=generator)
    past = small_batch(spec, count=2).history.double()
    t = torch.tensor([0.1, 0.8], dtype=torch.float64)
    stacked = np.concatenate([values(noisy), values(past).reshape(2, 6, 8, 12)], 1)  # 未来在前，历史在后
    tokens = network(model.net, stacked, values(t), (2, 3))  # (2, 6, 4·4·4)
    expected = np.zeros((2, 4, 8, 12))
    for n, (row, column) in enumerate((i, j) for i in range(0, 8, 4) for j in range(0, 12, 4)):
        expected[:, :, row : row + 4, column : column + 4] = tokens[:, n].reshape(2, 4, 4, 4)
    with torch.no_grad():
        found = model.velocity(noisy, past, t)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)  # 位置与角度的表是 float32


@pytest.mark.parametrize(("dim", "hidden"), [(16, 42), (384, 1024), (2048, 5461)])
def test_the_hidden_width_of_swiglu_is_two_thirds_of_four_times(dim: int, hidden: int) -> None:
    with torch.device("meta"):
        layer: Any = Block(dim, 4, "dit_dh").mlp
    assert layer.out.in_features == hidden == math.floor(2 / 3 * 4 * dim)
    assert layer.gate_value.out_features == 2 * hidden


def test_rotary_scores_depend_on_the_displacement_only() -> None:
    angles = rotary_angles((5, 7), 8).unflatten(0, (5, 7))
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

    def score(one: tuple[int, int], two: tuple[int, int]) -> float:
        return float(rotate(q, angles[one]) @ rotate(k, angles[two]))

    assert score((1, 2), (3, 1)) == pytest.approx(score((2, 6), (4, 5)), abs=1e-5)
    assert abs(score((1, 2), (3, 1)) - score((1, 2), (1, 3))) > 1e-2  # 行与列不是一回事
    assert torch.equal(rotate(q, angles[0, 0]), q)


def test_fixed_positions_follow_the_formula_on_a_rectangle() -> None:
    expected = np.zeros((2 * 6, 16))
    for n in range(12):
        for axis, place, side in ((0, n // 6, 2), (1, n % 6, 6)):
            for i in range(4):
                angle = math.pi * place / (2 * side) ** (i / 3)  # 波长从 2 格到 4 倍边长
                expected[n, 8 * axis + i] = math.sqrt(2) * math.sin(angle)
                expected[n, 8 * axis + 4 + i] = math.sqrt(2) * math.cos(angle)
    np.testing.assert_allclose(token_codes((2, 6), 16).numpy(), expected, atol=1e-6)


def test_layers_the_original_zeroes_start_small() -> None:
    """各块几乎是恒等，输出几乎是零；而每个参数从第一步起有梯度（约定的测试守着后一半）。"""
    torch.manual_seed(0)
    x, condition = torch.randn(2, 6, 32), torch.randn(2, 1, 32)
    for variant in ("dit", "dit_dh"):
        moved = Block(32, 2, variant)(x, condition) - x
        assert 0 < moved.abs().max() < 0.1
        assert FinalLayer(32, 8, variant)(x, condition).abs().max() < 0.1
    for layer in (SinusoidTime(32), FourierTime(32)):
        assert [m.weight.std().item() for m in layer.mlp if isinstance(m, nn.Linear)] == pytest.approx([0.02] * 2, 0.1)
    bound = math.sqrt(6 / (3 * 4 * 4 + 32))  # 均匀的 xavier：按同样大小的 Linear 算扇入扇出
    assert bound * 0.98 < Patches(3, 32, 4).weight.abs().max() <= bound
