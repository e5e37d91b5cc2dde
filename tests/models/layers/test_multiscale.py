"""多尺度的残差量化：与写开的循环（NumPy）相比；f = f̂ + r；编号来回逐位相同；教师输入等于逐个尺度造的；φ 怎样共用。"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.layers.multiscale import (
    BLEND,
    MultiScaleQuantizer,
    check_scales,
    phi_of_scales,
    rectangular_scales,
    shrink,
)
from tests.models.layers.numpy_layers import Array, conv, values

SCALES = ((1, 1), (1, 2), (2, 3), (4, 6))
V, WIDTH = 11, 3


def make(scales: Any = SCALES, seed: int = 0, **options: Any) -> MultiScaleQuantizer:
    """码铺开了的、不训练的。"""
    torch.manual_seed(seed)
    quantizer = MultiScaleQuantizer(V, WIDTH, scales, **options)
    with torch.no_grad():
        quantizer.codes.normal_()
    return quantizer.eval()


def latents(seed: int = 1, count: int = 2, grid: tuple[int, int] = (4, 6)) -> Tensor:
    return torch.randn(count, WIDTH, *grid, generator=torch.Generator().manual_seed(seed))


def area(x: Array, size: tuple[int, int]) -> Array:
    """面积平均：每个输出点是它盖住的输入点的平均；除不尽时两边各取整到多盖一点（adaptive）。"""
    height, width = x.shape[-2:]
    made = np.zeros((*x.shape[:2], *size))
    for i, j in np.ndindex(*size):
        rows = slice(i * height // size[0], -(-(i + 1) * height // size[0]))
        columns = slice(j * width // size[1], -(-(j + 1) * width // size[1]))
        made[..., i, j] = x[..., rows, columns].mean((-2, -1))
    return made


def cubic(distance: float) -> float:
    """Keys 的三次卷积核，a = −0.75。"""
    t, a = abs(distance), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def cubic_matrix(size: int, larger: int) -> Array:
    """(larger, size)：各输出点由哪几个输入点合成，边上照边上的值延伸。"""
    weights = np.zeros((larger, size))
    for i in range(larger):
        at = (i + 0.5) * size / larger - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            weights[i, min(max(j, 0), size - 1)] += cubic(at - j)
    return weights


def written_out(quantizer: MultiScaleQuantizer, f: Tensor) -> tuple[Array, list[Array], list[Array], float]:
    """VAR 的算法 1、2，逐个尺度、逐个向量：f̂、编号、各尺度之后的 f̂、损失。"""
    truth, codes = values(f), values(quantizer.codes)
    f_hat, rest = np.zeros_like(truth), truth.copy()
    indices, cumulative = [], []
    for k, (h, w) in enumerate(quantizer.scales):
        z = area(rest, (h, w))
        index = np.zeros((len(z), h * w), dtype=int)
        found = np.zeros_like(z)
        for n, i, j in np.ndindex(len(z), h, w):
            nearest = int(((codes - z[n, :, i, j]) ** 2).sum(1).argmin())
            index[n, i * w + j] = nearest
            found[n, :, i, j] = codes[nearest]
        height, width = truth.shape[-2:]
        large = cubic_matrix(h, height) @ found @ cubic_matrix(w, width).T
        layer = quantizer.phi[quantizer.phi_index[k]]
        assert isinstance(layer, torch.nn.Conv2d)
        added = (1 - BLEND) * large + BLEND * conv(large, layer)
        f_hat, rest = f_hat + added, rest - added
        indices.append(index)
        cumulative.append(f_hat)
    loss = np.mean([(1 + quantizer.beta) * ((c - truth) ** 2).mean() for c in cumulative])
    return f_hat, indices, cumulative, float(loss)


@pytest.mark.parametrize("scales", [SCALES, ((2, 3), (3, 4), (4, 6)), ((4, 6),)], ids=["even", "uneven", "one"])
def test_quantising_is_the_written_out_loop(scales: Any) -> None:
    quantizer, f = make(scales, phi=0, beta=0.4), latents()
    made = quantizer(f)
    f_hat, indices, cumulative, loss = written_out(quantizer, f)
    for index, expected in zip(made.indices, indices, strict=True):
        assert index.dtype == torch.int64
        np.testing.assert_array_equal(index.numpy(), expected)
    np.testing.assert_allclose(values(made.f_hat), f_hat, atol=1e-5)
    assert made.loss.item() == pytest.approx(loss, rel=1e-5)
    errors = [((c - values(f)) ** 2).mean() for c in cumulative]
    np.testing.assert_allclose(values(made.errors), errors, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 3), (4, 6), (3, 4)])
def test_shrinking_is_the_area_mean(size: tuple[int, int]) -> None:
    fields = latents()
    np.testing.assert_allclose(values(shrink(fields, size)), area(values(fields), size), atol=1e-6)
    assert size != (4, 6) or shrink(fields, size) is fields


def test_each_scale_quantises_what_the_earlier_ones_left() -> None:
    """第 k 个尺度量化的向量是 f − f̂ 的面积平均，f̂ 由前面的编号重建（另一条路）：f = f̂ + r 在每个尺度上都成立。"""
    quantizer, f = make(), latents()
    indices = quantizer.indices(f)
    for k, (_, vectors, _) in enumerate(quantizer._walk(f)):
        made = values(quantizer.reconstruct(indices[:k])) if k else np.zeros_like(values(f))
        rest = area(values(f) - made, SCALES[k])  # (N, c, h, w)
        expected = rest.reshape(2, WIDTH, -1).transpose(0, 2, 1).reshape(-1, WIDTH)
        np.testing.assert_allclose(values(vectors), expected, atol=1e-5)


def test_adding_up_is_exact_where_arithmetic_is() -> None:
    """码、φ、f 都是 2 的负整数幂的小倍数，float32 里没有舍入：逐次相减剩下的与 f̂ 加起来逐位等于 f。"""
    quantizer = make(((2, 3), (4, 6)), phi=2)
    with torch.no_grad():
        quantizer.codes.copy_((quantizer.codes * 2).round().clamp(-3, 3) / 2)
        for p in quantizer.phi.parameters():
            p.copy_((p * 8).round().clamp(-1, 1) / 2)
    f = (latents() * 4).round() / 4
    rest, total = f.clone(), torch.zeros_like(f)
    for k, index in enumerate(quantizer.indices(f)):
        added = quantizer.add_scale(torch.zeros_like(f), quantizer.lookup(index, k), k).detach()
        rest, total = rest - added, total + added
        assert torch.equal(total + rest, f) and bool((rest != 0).any())
    assert torch.equal(quantizer(f).f_hat, total)


def test_indices_make_the_forward_f_hat_bit_for_bit() -> None:
    quantizer, f = make(), latents().requires_grad_()
    made = quantizer(f)
    indices = quantizer.indices(f)
    assert all(torch.equal(a, b) for a, b in zip(indices, made.indices, strict=True))
    assert torch.equal(quantizer.reconstruct(indices), made.f_hat) and torch.equal(quantizer.quantize(f), made.f_hat)
    assert torch.equal(made.f_hat, made.f_hat.detach()) and made.f_hat.requires_grad


def test_teacher_inputs_are_what_a_sampler_builds_from_the_same_indices() -> None:
    quantizer, f = make(), latents()
    indices = quantizer.indices(f)
    f_hat, steps = torch.zeros_like(f), []
    for k, index in enumerate(indices):
        f_hat = quantizer.add_scale(f_hat, quantizer.lookup(index, k), k)
        if k + 1 < len(SCALES):
            steps.append(quantizer.next_input(f_hat, k))
            assert steps[-1].shape == (2, WIDTH, *SCALES[k + 1])
    inputs = quantizer.teacher_inputs(indices)
    tokens = torch.cat([step.permute(0, 2, 3, 1).reshape(2, -1, WIDTH) for step in steps], 1)
    assert torch.equal(inputs, tokens) and inputs.shape == (2, sum(quantizer.lengths) - 1, WIDTH)
    assert torch.equal(f_hat, quantizer.reconstruct(indices))
    _, _, cumulative, _ = written_out(quantizer, f)
    expected = [area(c, s).reshape(2, WIDTH, -1) for c, s in zip(cumulative, SCALES[1:], strict=False)]
    np.testing.assert_allclose(values(inputs), np.concatenate(expected, 2).transpose(0, 2, 1), atol=1e-5)


def test_the_first_scales_alone_are_the_beginning_of_all() -> None:
    """渐进训练：只给头几个尺度。"""
    quantizer = make()
    indices = quantizer.indices(latents())
    whole = quantizer.teacher_inputs(indices)
    for count in range(1, len(SCALES) + 1):
        length = sum(quantizer.lengths[1:count])
        part = quantizer.teacher_inputs(indices[:count])
        assert part.shape == (2, length, WIDTH) and torch.equal(part, whole[:, :length])
    for k, (_, _, f_hat) in enumerate(quantizer._walk(latents())):
        assert torch.equal(quantizer.reconstruct(indices[: k + 1]), f_hat)


def test_gradients_go_straight_through_and_by_the_two_losses() -> None:
    quantizer, f = make(beta=0.3), latents().requires_grad_()
    made = quantizer(f)
    weight = torch.randn_like(f)
    (straight,) = torch.autograd.grad((made.f_hat * weight).sum(), f, retain_graph=True)
    assert torch.equal(straight, weight)
    pull, *learned = torch.autograd.grad(made.loss, [f, *quantizer.parameters()], retain_graph=True)
    _, _, cumulative, _ = written_out(quantizer, f)
    expected = np.mean([0.3 * 2 * (values(f) - c) / f.numel() for c in cumulative], axis=0)
    np.testing.assert_allclose(values(pull), expected, atol=1e-7)
    assert all(gradient.any() for gradient in learned)  # 码与 φ
    none = torch.autograd.grad(made.f_hat.sum(), list(quantizer.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in none)


@pytest.mark.parametrize(
    ("count", "phi", "expected"),
    [
        (10, 4, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),  # VAR 在 256 像素上的十个尺度
        (14, 4, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
        (10, 0, list(range(10))),
        (10, 1, [0] * 10),
        (10, 2, [0] * 5 + [1] * 5),
        (3, 2, [0, 1, 1]),  # 正中的一个与两个刻度一样近：后一个，从前训练的权重是这样的
        (1, 1, [0]),
    ],
)
def test_phi_is_shared_by_the_nearest_tick(count: int, phi: int, expected: list[int]) -> None:
    assert phi_of_scales(count, phi) == expected


@pytest.mark.parametrize("phi", [2, 3, 5, 6])
def test_ticks_of_other_numbers_of_phi(phi: int) -> None:
    """刻度由 1/2K 到 1 − 1/2K；13 个尺度里没有两个刻度一样近的。"""
    ticks = np.linspace(1 / 2 / phi, 1 - 1 / 2 / phi, phi)
    places = np.arange(14) / 13
    nearest = [int(np.abs(ticks - at).argmin()) for at in places if np.unique(np.abs(ticks - at).round(9)).size == phi]
    clear = [k for k, at in enumerate(places) if np.unique(np.abs(ticks - at).round(9)).size == phi]
    found = phi_of_scales(14, phi)
    assert [found[k] for k in clear] == nearest and len(clear) >= 7
    assert max(found) == phi - 1 and found == sorted(found)


def test_a_phi_without_a_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.phi = 4: 3 scales use only \[0, 2, 3\]"):
        make(((1, 1), (2, 3), (4, 6)), phi=4)


def test_shared_phi_are_as_many_as_said() -> None:
    squares = tuple((n, n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    with torch.device("meta"):
        quantizer = MultiScaleQuantizer(4096, 32, squares)
        assert sum(p.numel() for p in quantizer.phi.parameters()) == 36_992
        assert quantizer.codes.numel() == 131_072 and sum(quantizer.lengths) == 680
        assert len(MultiScaleQuantizer(4096, 32, squares, phi=0).phi) == 10


@pytest.mark.parametrize(("h", "w", "count"), [(8, 16, 6), (8, 16, 16), (8, 16, 2), (16, 16, 10), (4, 3, 3), (5, 1, 4)])
def test_rectangular_scales_grow_to_the_grid(h: int, w: int, count: int) -> None:
    scales = rectangular_scales(h, w, count)
    assert len(scales) == count and scales[0] == (1, 1) and scales[-1] == (h, w)
    assert all(a[0] * a[1] < b[0] * b[1] for a, b in pairwise(scales))
    assert all(abs(a * w - b * h) <= max(h, w) / 2 or min(a, b) == 1 for a, b in scales)  # 长宽比，四舍五入
    check_scales(scales, h, w)


def test_rectangular_scales_in_words() -> None:
    assert rectangular_scales(8, 16, 6) == ((1, 1), (1, 2), (2, 3), (3, 5), (5, 9), (8, 16))
    with pytest.raises(ValueError, match=r"model\.scales = 17: .* 8 x 16 has room for 2 to 16 scales"):
        rectangular_scales(8, 16, 17)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (((1, 1), (4, 4)), r"model\.scales = \(1, 1\) \(4, 4\): the last one must be the latent grid \(4, 6\)"),
        (((2, 2), (1, 5), (4, 6)), r"\(1, 5\) does not grow from \(2, 2\)"),
        (((2, 2), (2, 2), (4, 6)), r"\(2, 2\) does not grow"),
    ],
)
def test_scales_that_do_not_grow_are_refused(scales: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_scales(scales, 4, 6)


def test_half_precision_chooses_the_same_codes() -> None:
    quantizer, f = make(), latents().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        half = quantizer(f)
        inputs = quantizer.teacher_inputs(half.indices)
        assert torch.equal(quantizer.reconstruct(quantizer.indices(f)), half.f_hat)
        assert torch.equal(quantizer.quantize(f), half.f_hat)
    whole = quantizer(f.float())
    assert half.f_hat.dtype == inputs.dtype == torch.float32
    assert torch.equal(half.f_hat, whole.f_hat) and torch.equal(half.loss, whole.loss)
    assert torch.equal(inputs, quantizer.teacher_inputs(whole.indices))


def test_circular_phi_turns_with_the_globe() -> None:
    quantizer, f = make(((4, 6),), phi=1, padding="circular_lon"), latents()
    turned = quantizer(f.roll(2, -1)).f_hat
    torch.testing.assert_close(turned, quantizer(f).f_hat.roll(2, -1))
    zeros = make(((4, 6),), phi=1)
    assert not zeros(f.roll(2, -1)).f_hat.allclose(zeros(f).f_hat.roll(2, -1), atol=1e-3)
