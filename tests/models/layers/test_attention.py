"""注意力等于写开的 softmax(q·k/√d + (−1e9)·mask)·v：SDPA 的值与梯度，FlexAttention 的遮挡与值。"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import models.layers.attention as attention_module
from models.layers.attention import FLEX_BLOCK, CrossAttention, GroupAttention, block_mask, token_mask

TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-4, "atol": 3e-5},
    torch.float64: {"rtol": 1e-11, "atol": 1e-12},
}


def written_out(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor) -> Tensor:
    """一个头一个头地算；query (B, N, D)，key、value (B, M, D)，mask (N, M) 真 = 看不见。"""
    width = query.shape[-1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(width)
        weights = (scores + (-1e9) * mask.to(scores.dtype)).softmax(-1)
        outputs.append(weights @ value[..., part])
    return torch.cat(outputs, -1)


def written_out_group(layer: GroupAttention, x: Tensor, hidden: Tensor, size: int) -> Tensor:
    """hidden (G, G) 逐 token 展开；投影矩阵取自被测的层。"""
    dim, tokens = x.shape[-1], x.shape[1]
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i, j in torch.nonzero(hidden).tolist():
        mask[i * size : (i + 1) * size, j * size : (j + 1) * size] = True
    query, key, value = (x @ layer.qkv.weight[i * dim : (i + 1) * dim].T for i in range(3))
    return written_out(query, key, value, layer.heads, mask) @ layer.out.weight.T + layer.out.bias


def hidden_groups(groups: int, kind: str) -> Tensor:
    """causal 全遮更晚的；none 不遮；random 更晚的遮一部分。"""
    later = torch.ones(groups, groups, dtype=torch.bool).triu(1)
    return {
        "causal": later,
        "none": torch.zeros_like(later),
        "random": later & (torch.rand(groups, groups, generator=torch.Generator().manual_seed(3)) < 0.6),
    }[kind]


def layer_and_input(
    dtype: torch.dtype, groups: int, size: int, dim: int = 12, heads: int = 3
) -> tuple[GroupAttention, Tensor]:
    torch.manual_seed(0)
    layer = GroupAttention(dim, heads, 0.0).to(dtype)
    nn.init.normal_(layer.qkv.weight)  # 分数大到 softmax 有尖有平
    return layer, torch.randn(2, groups * size, dim, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["causal", "random", "none"])
def test_sdpa_equals_the_additive_mask_in_value_and_gradient(kind: str, dtype: torch.dtype) -> None:
    layer, x = layer_and_input(dtype, groups=4, size=3)
    hidden = hidden_groups(4, kind)
    inputs = [x, *layer.parameters()]
    weights = torch.randn(x.shape, dtype=dtype)
    found = layer(x, None if kind == "none" else token_mask(hidden, 3))
    expected = written_out_group(layer, x, hidden, 3)
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
    gradients = [torch.autograd.grad((y * weights).sum(), inputs) for y in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_attention_equals_the_written_out_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = CrossAttention(12, 3, 0.0).to(dtype)
    query = torch.randn(2, 5, 12, dtype=dtype, requires_grad=True)
    memory = torch.randn(2, 7, 12, dtype=dtype, requires_grad=True)
    key, value = memory @ layer.kv.weight[:12].T, memory @ layer.kv.weight[12:].T
    expected = written_out(query @ layer.q.weight.T, key, value, 3, torch.zeros(5, 7, dtype=torch.bool))
    expected = expected @ layer.out.weight.T + layer.out.bias
    found = layer(query, memory)
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
    inputs = [query, memory, *layer.parameters()]
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE[dtype])


def test_dropout_acts_on_the_weights_in_training_only() -> None:
    torch.manual_seed(0)
    layer, x = GroupAttention(12, 3, 0.5), torch.randn(2, 6, 12)
    mask = token_mask(hidden_groups(2, "causal"), 3)
    assert not torch.equal(layer(x, mask), layer(x, mask))
    layer.eval()
    assert torch.equal(layer(x, mask), layer(x, mask))


def test_token_mask_spreads_group_pairs_over_tokens() -> None:
    hidden = hidden_groups(3, "random")
    visible = token_mask(hidden, 2)
    assert visible.shape == (6, 6)
    for i in range(6):
        for j in range(6):
            assert visible[i, j] == (not hidden[i // 2, j // 2])


@pytest.mark.parametrize("kind", ["causal", "random", "none"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_block_mask_says_the_same_as_the_token_mask(blocks: int, kind: str) -> None:
    hidden, size = hidden_groups(3, kind), blocks * FLEX_BLOCK
    visible = token_mask(hidden, size)
    mask = block_mask(hidden, size)
    length = 3 * size
    by_block = visible[::FLEX_BLOCK, ::FLEX_BLOCK]
    assert mask.shape == (1, 1, length, length)
    assert torch.equal(mask.to_dense()[0, 0].bool(), by_block)
    rows, columns = torch.arange(length)[:, None], torch.arange(length)[None]
    assert torch.equal(mask.mask_mod(torch.tensor(0), torch.tensor(0), rows, columns), visible)
    assert int(mask.kv_num_blocks.sum()) == 0  # 没有要逐元素求值的块
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    assert mask.full_q_num_blocks is not None and mask.full_q_indices is not None  # 反向用的转置
    for i in range(3 * blocks):
        seen = mask.full_kv_indices[0, 0, i, : int(mask.full_kv_num_blocks[0, 0, i])]
        assert sorted(seen.tolist()) == by_block[i].nonzero().flatten().tolist()
        seen = mask.full_q_indices[0, 0, i, : int(mask.full_q_num_blocks[0, 0, i])]
        assert sorted(seen.tolist()) == by_block[:, i].nonzero().flatten().tolist()


def test_block_mask_refuses_groups_that_are_not_whole_blocks() -> None:
    with pytest.raises(AssertionError, match="whole blocks"):
        block_mask(hidden_groups(2, "causal"), FLEX_BLOCK + 1)


def test_flex_equals_the_written_out_one_and_a_new_mask_does_not_recompile(monkeypatch: pytest.MonkeyPatch) -> None:
    """遮挡每层每步都换，换一次编译一次就没法训练。后端取 aot_eager：生成 C++ 核要半分钟，这里验的是图和遮挡。"""
    compiled = torch.compile(flex_attention, dynamic=False, backend="aot_eager")
    monkeypatch.setattr(attention_module, "compiled_flex", lambda: compiled)
    layer, x = layer_and_input(torch.float32, groups=3, size=FLEX_BLOCK)
    with torch.inference_mode():
        for i, kind in enumerate(["causal", "random", "none"]):
            hidden = hidden_groups(3, kind)
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                found = layer(x, block_mask(hidden, FLEX_BLOCK))
            torch.testing.assert_close(found, written_out_group(layer, x, hidden, FLEX_BLOCK), rtol=1e-4, atol=1e-5)
