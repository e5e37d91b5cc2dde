"""VAR 的网络：公开的参数个数；遮挡；键值缓存；注意力与整个块的 NumPy 写法；初值；条件。"""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.layers.var_blocks import (
    Condition,
    Decoder,
    DropPath,
    KeyValues,
    ScaleTransformer,
    UnitAttention,
    initialise,
)
from models.layers.var_condition import HistoryCondition, LabelCondition, month_of
from tests.models.layers.numpy_layers import conv, values

SQUARES = [n * n for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]
LENGTHS = [1, 2, 6]
PLACES = ((1, 1), (1, 2), (2, 4))  # 条件的例子里的尺度
DIM, LATENT, VOCABULARY = 16, 5, 11


def small_net(seed: int = 0, depth: int = 2, shared: bool = False) -> Any:
    """初值放大过：各层都真的起作用。"""
    torch.manual_seed(seed)
    net = ScaleTransformer(LENGTHS, LATENT, VOCABULARY, DIM, depth, heads=2, shared_adaln=shared)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


def given(context: int, count: int = 3, seed: int = 1) -> tuple[Condition, Tensor]:
    """条件与全部尺度的输入；有条件的 token 时，各处的输入也有条件。"""
    torch.manual_seed(seed)
    tokens, local = (torch.randn(count, n, DIM) if context else None for n in (context, 9))
    return Condition(torch.randn(count, DIM), torch.randn(count, DIM), tokens, local), torch.randn(count, 8, LATENT)


@pytest.mark.parametrize(("depth", "published"), [(8, 41_315_904), (12, 133_186_960), (16, 310_283_520)])
def test_parameters_are_the_published_ones(depth: int, published: int) -> None:
    """类别条件、正方形的尺度、1000 类、V = 4096、z = 32；公式里的 d + 14C + 18C² 是一层。"""
    width = 64 * depth
    with torch.device("meta"):
        net = ScaleTransformer(SQUARES, 32, 4096, width, depth, depth)
        label = LabelCondition(1000, width)
    blocks = depth * (18 * width**2 + 14 * width + depth)
    tables = 33 * width + 1001 * width + 680 * width + width + 10 * width
    total = blocks + tables + 2 * width**2 + 2 * width + (width + 1) * 4096
    assert sum(p.numel() for p in [*net.parameters(), *label.parameters()]) == total == published
    assert sum(p.numel() for p in net.blocks.parameters()) == blocks


def test_shared_modulation_has_one_linear_and_offsets() -> None:
    with torch.device("meta"):
        own, shared = (ScaleTransformer(SQUARES, 32, 4096, 512, 8, 8, shared_adaln=s) for s in (False, True))
    linear = 6 * 512 * 513
    counts = [sum(p.numel() for p in net.parameters()) for net in (own, shared)]
    assert counts[0] - counts[1] == 8 * linear - (linear + 8 * 6 * 512)


@pytest.mark.parametrize("context", [0, 4])
@pytest.mark.parametrize("shared", [False, True])
def test_a_scale_sees_no_finer_scale(context: int, shared: bool) -> None:
    """改掉更细的尺度的输入，更粗的 logits 逐位不变；自己尺度里的别的 token 看得见。"""
    net, (condition, inputs) = small_net(shared=shared), given(context)
    with torch.no_grad():
        before = net(condition, inputs)
        for k, first in ((1, 1), (2, 3)):
            changed = inputs.clone()
            changed[:, first - 1 :] += 10 * torch.randn_like(changed[:, first - 1 :])
            after = net(condition, changed)
            assert torch.equal(after[:, :first], before[:, :first]), f"scale {k}"
            assert not torch.isclose(after[:, first:], before[:, first:]).all(-1).any()
        one = inputs.clone()
        one[:, -1] += 10  # 末一个 token
        assert not torch.isclose(net(condition, one)[:, 3:], before[:, 3:]).all(-1).any()


def test_context_is_seen_by_all_and_sees_only_itself() -> None:
    net, (condition, inputs) = small_net(), given(4)
    assert condition.context is not None
    with torch.no_grad():
        before = net(condition, inputs)
        after = net(condition._replace(context=torch.randn_like(condition.context)), inputs)
        assert not torch.isclose(after, before).all(-1).any()
        hidden = []
        for shift in (0, 5):
            tokens = torch.cat([condition.context, net.later(condition, inputs, 1) + shift], 1)
            order = torch.cat([torch.full((4,), -1), net.scale_of[1:]])
            hidden.append(net.layers(tokens, condition, order[:, None] >= order)[:, :4])
    assert torch.equal(*hidden)


def test_fewer_scales_give_the_same_logits() -> None:
    """由粗到细地训练时序列短了，留下的不变。"""
    net, (condition, inputs) = small_net(), given(4)
    with torch.no_grad():
        whole = net(condition, inputs)
        for count in (1, 3):
            torch.testing.assert_close(net(condition, inputs[:, : count - 1]), whole[:, :count])


@pytest.mark.parametrize("context", [0, 4])
@pytest.mark.parametrize("cached", [True, False])
def test_decoding_scale_by_scale_equals_the_whole(context: int, cached: bool) -> None:
    net, (condition, inputs) = small_net(), given(context)
    with torch.no_grad():
        whole = net(condition, inputs)
        decoder = Decoder(net, condition, cached)
        parts = [decoder.logits(net.begin(condition))]
        parts += [decoder.logits(net.later(condition, inputs[:, a - 1 : b - 1], a)) for a, b in ((1, 3), (3, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_the_cache_holds_each_token_once() -> None:
    cache = KeyValues()
    parts = [torch.randn(1, 2, n, 4) for n in (1, 3)]
    cache.extend(parts[0], -parts[0])
    k, v = cache.extend(parts[1], -parts[1])
    assert torch.equal(k, torch.cat(parts, 2)) and torch.equal(v, -k)


def test_attention_equals_the_written_out_one() -> None:
    """单位长度的 q、k，各头的温度（截在 100），k 没有偏置。"""
    torch.manual_seed(0)
    layer = UnitAttention(8, heads=2).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer.log_temperature.data = torch.tensor([1.5, 9.0]).double()
    x, seen = torch.randn(2, 5, 8).double(), torch.rand(5, 5) > 0.4
    seen.fill_diagonal_(True)
    weight, q_bias, v_bias, out, out_bias = (
        values(p) for p in (layer.qkv.weight, layer.q_bias, layer.v_bias, layer.out.weight, layer.out.bias)
    )
    q, k, v = np.split(values(x) @ weight.T, 3, -1)
    q, v = q + q_bias, v + v_bias
    made = np.zeros((2, 5, 8))
    for head, temperature in enumerate((math.exp(1.5), 100.0)):
        part = slice(4 * head, 4 * head + 4)
        unit_q, unit_k = (a[..., part] / np.linalg.norm(a[..., part], axis=-1, keepdims=True) for a in (q, k))
        score = np.where(seen.numpy(), temperature * unit_q @ unit_k.swapaxes(1, 2), -np.inf)
        weights = np.exp(score - score.max(-1, keepdims=True))
        made[..., part] = weights / weights.sum(-1, keepdims=True) @ v[..., part]
    with torch.no_grad():
        np.testing.assert_allclose(values(layer(x, seen, None)), made @ out.T + out_bias, rtol=1e-9, atol=1e-9)


def test_block_and_head_equal_the_written_out_ones() -> None:
    net, (condition, inputs) = small_net(depth=1).double(), given(0)
    condition = Condition(condition.start.double(), condition.adaln.double(), None)
    block = net.blocks[0]

    def linear(x: np.ndarray, layer: torch.nn.Linear) -> np.ndarray:
        return x @ values(layer.weight).T + values(layer.bias)

    def norm(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    c = values(condition.adaln)
    silu = c / (1 + np.exp(-c))
    g1, g2, s1, s2, b1, b2 = np.split(linear(silu, block.modulation[-1])[:, None], 6, -1)
    mask = net.scale_of[:, None] >= net.scale_of
    with torch.no_grad():
        tokens = torch.cat([net.begin(condition), net.later(condition, inputs.double(), 1)], 1)
        x = values(tokens)
        attended = values(block.attention(torch.tensor(norm(x) * (1 + s1) + b1), mask, None))
        x = x + g1 * attended
        hidden = linear(norm(x) * (1 + s2) + b2, block.mlp[0])
        hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + g2 * linear(hidden, block.mlp[2])
        scale, shift = np.split(linear(silu, net.modulation[-1])[:, None], 2, -1)
        hidden = net.run(tokens, condition)
    np.testing.assert_allclose(values(hidden), x, rtol=1e-9, atol=1e-9)
    expected = linear(norm(x) * (1 + scale) + shift, net.head)
    with torch.no_grad():
        single = Condition(condition.start.float(), condition.adaln.float(), None)
        made = net.float().logits(torch.tensor(x).float(), single)
    np.testing.assert_allclose(values(made), expected, rtol=1e-4, atol=1e-4)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer, ones = DropPath(0.25), torch.ones(4000, 2, 3)
    made = layer.train()(ones)
    assert made.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (made == made[:, :1, :1]).all()
    assert made.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(layer.eval()(ones), ones)


def test_drop_path_grows_with_depth() -> None:
    with torch.device("meta"):
        net: Any = ScaleTransformer(LENGTHS, LATENT, VOCABULARY, DIM, 3, 2, drop_path=0.2)
    assert [block.drop.rate for block in net.blocks] == pytest.approx([0, 0.1, 0.2])


@pytest.mark.parametrize("shared", [False, True])
def test_initial_values(shared: bool) -> None:
    torch.manual_seed(0)
    dim, gain = 128, 1e-3
    net: Any = ScaleTransformer(LENGTHS, LATENT, 512, dim, 4, 2, shared_adaln=shared)
    label = LabelCondition(12, dim)
    initialise([net, label], net, gain)
    std = math.sqrt(1 / (3 * dim))

    def spread(value: Tensor) -> float:
        return value.std().item()

    def near(value: float) -> Any:
        return pytest.approx(value, rel=0.1)

    assert spread(label.table.weight) == near(std)
    assert spread(net.position) == near(std)
    assert spread(net.head.weight) == near(0.02 * std)
    assert spread(net.modulation[-1].weight) == near(0.5 * std)
    block = net.blocks[2]
    assert spread(block.attention.qkv.weight) == near(std)
    for linear in (block.attention.out, block.mlp[2]):
        assert spread(linear.weight) == near(std / math.sqrt(8))
    steering, unit = (block.modulation.weight, math.sqrt(1 / dim)) if shared else (block.modulation[-1].weight, std)
    assert spread(steering[: 2 * dim]) == near(gain * unit)
    assert spread(steering[2 * dim :]) == near(0.5 * unit)
    assert block.attention.log_temperature.exp().tolist() == pytest.approx([4, 4])
    assert not block.attention.q_bias.any() and not net.head.bias.any()


# ---- 条件 ----


def test_dropped_labels_are_the_last_row() -> None:
    condition = LabelCondition(12, DIM)
    start, adaln, context, local = condition(torch.tensor([3, 3]), torch.tensor([True, False]))
    assert torch.equal(start, condition.table.weight[[3, 12]]) and start is adaln
    assert context is None and local is None


@pytest.mark.parametrize("ways", [(True,) * 4, *((i == 0, i == 1, i == 2, i == 3) for i in range(4))])
def test_each_way_of_the_history_is_a_switch(ways: tuple[bool, bool, bool, bool]) -> None:
    torch.manual_seed(0)
    condition = HistoryCondition(2, (3, 2, 4), PLACES, DIM, *ways)
    if condition.position is not None:
        torch.nn.init.normal_(condition.position)
    latents, keep = torch.randn(2, 2, 3, 2, 4), torch.tensor([True, False])
    with torch.no_grad():
        made, other = condition(latents, keep), condition(torch.randn_like(latents), keep)
    (context, adaln, start, local) = ways
    assert (made.context is not None) == context and (made.local is not None) == local
    for vector, changed, on in ((made.start, other.start, start), (made.adaln, other.adaln, adaln)):
        assert torch.equal(vector[0], changed[0]) != on  # 留下的随历史而变
        assert torch.equal(vector[1], condition.base) and torch.equal(changed[1], condition.base)
    if made.context is not None and other.context is not None:
        assert made.context.shape == (2, 8, DIM)
        assert not torch.isclose(made.context[0], other.context[0]).all()
        assert torch.equal(made.context[1], other.context[1])
    if made.local is not None and other.local is not None:
        assert made.local.shape == (2, 1 + 2 + 8, DIM)
        assert not torch.isclose(made.local[0], other.local[0]).all() and not made.local[1].any()


def test_local_conditions_are_averaged_over_the_cells_of_each_scale() -> None:
    """卷积、GELU、面积平均、Linear 都写开。"""
    torch.manual_seed(0)
    condition = HistoryCondition(2, (3, 2, 4), PLACES, DIM, False, False, False, True)
    latents = torch.randn(2, 2, 3, 2, 4)
    with torch.no_grad():
        found = condition(latents, torch.ones(2, dtype=torch.bool)).local
        assert found is not None and condition.around is not None and condition.local is not None
        first: Any = condition.around[0]
        seen = torch.nn.functional.gelu(torch.from_numpy(conv(values(latents).reshape(2, 6, 2, 4), first)))
    fine, weight = seen.numpy(), values(condition.local.weight)
    cells = [fine.mean((2, 3)), fine[..., :2].mean((2, 3)), fine[..., 2:].mean((2, 3))]
    cells += [fine[..., y, z] for y, z in np.ndindex(2, 4)]
    np.testing.assert_allclose(values(found), np.stack(cells, 1) @ weight.T, atol=1e-5)


@pytest.mark.parametrize("padding", ["zeros", "circular_lon"])
def test_local_conditions_wrap_where_the_first_stage_does(padding: Any) -> None:
    torch.manual_seed(0)
    condition = HistoryCondition(2, (3, 2, 4), ((2, 4),), DIM, False, False, False, True, padding)
    latents, keep = torch.randn(1, 2, 3, 2, 4), torch.tensor([True])
    with torch.no_grad():
        made, turned = (condition(x, keep).local for x in (latents, latents.roll(1, -1)))
    assert made is not None and turned is not None
    back = turned.unflatten(1, (2, 4)).roll(-1, 2).flatten(1, 2)
    assert torch.allclose(back, made, atol=1e-5) == (padding == "circular_lon")


def test_history_tokens_keep_their_places() -> None:
    """改一个格点，只有那个位置的 token 变。"""
    condition = HistoryCondition(2, (3, 2, 4), PLACES, DIM, True, True, True, False)
    torch.nn.init.zeros_(condition.position)  # type: ignore[arg-type]
    latents, keep = torch.randn(1, 2, 3, 2, 4), torch.tensor([True])
    changed = latents.clone()
    changed[0, 1, 2, 1, 3] += 1
    with torch.no_grad():
        before, after = condition(latents, keep).context, condition(changed, keep).context
    assert before is not None and after is not None
    assert (before != after).any(-1)[0].nonzero().flatten().tolist() == [7]


def test_month_is_that_of_the_calendar() -> None:
    start = datetime(1970, 1, 1)
    moments = [start + timedelta(hours=h) for h in range(-900_000, 1_200_000, 677)]  # 1867 到 2106
    moments += [datetime(y, m, d) for y in (1900, 1999, 2000, 2024) for m, d in ((2, 28), (3, 1), (12, 31), (1, 1))]
    moments += [datetime(2000, 2, 29, 23), datetime(2000, 3, 1)]
    hours = torch.tensor([(moment - start) // timedelta(hours=1) for moment in moments])
    assert month_of(hours).tolist() == [moment.month - 1 for moment in moments]
