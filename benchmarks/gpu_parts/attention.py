"""FlexAttention 等于 SDPA：值、全部梯度；bf16 的误差不大于 SDPA 自己的 bf16 的两倍。"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.gpu_parts.scene import Found, Scene
from models.layers import attention
from models.layers.attention import FLEX_BLOCK, GroupAttention, block_mask, token_mask

GROUPS, DIM, HEADS, BATCH = 7, 768, 12, 4  # AR_pred 的
SMALL = 3, 32, 2, 2
TOLERANCE = 1e-2  # float32；torch 允许 TF32 时核里用它
SLACK = 2.0


def equal_to_sdpa(scene: Scene) -> Found:
    """各项是与 float64 的 SDPA 之差，以它的最大值为单位；第一项说在不在容差之内。"""
    groups, dim, heads, batch = SMALL if scene.small else (GROUPS, DIM, HEADS, BATCH)
    torch.manual_seed(0)
    layer = GroupAttention(dim, heads, 0.0).to(scene.device)
    x = torch.randn(batch, groups * FLEX_BLOCK, dim, device=scene.device)
    hidden = torch.rand(groups, groups, device=scene.device).lt(0.8).triu(1)
    masks = {"flex": block_mask(hidden, FLEX_BLOCK), "sdpa": token_mask(hidden, FLEX_BLOCK)}
    exact = outcome(layer.double(), x.double(), masks["sdpa"])
    layer.float()
    found, fits = Found(), True
    with graph_only(scene.small):
        for name, kind in (("float32", torch.float32), ("bf16", torch.bfloat16)):
            errors: dict[str, list[float]] = {}
            for way, mask in masks.items():
                with torch.autocast(scene.device.type, torch.bfloat16, enabled=kind == torch.bfloat16):
                    mine = outcome(layer, x, mask)
                errors[way] = [distance(one, other) for one, other in zip(mine, exact, strict=True)]
                parts = zip(("values", "gradients"), errors[way], strict=False)  # 处理器上没有梯度
                found |= {f"{way} {name}, {what}": error for what, error in parts}
            least = TOLERANCE if kind == torch.float32 else 0.0
            fits &= all(mine <= max(least, SLACK * theirs) for mine, theirs in zip(*errors.values(), strict=True))
    return {"equal within the tolerance": "yes" if fits else "NO", **found}


def outcome(layer: GroupAttention, x: Tensor, mask: Tensor | BlockMask) -> list[list[Tensor]]:
    """[值]、[输入与各参数的梯度]；处理器上 FlexAttention 没有反向，只有值。"""
    if x.device.type == "cpu":
        with torch.no_grad():
            return [[layer(x, mask)]]
    x = x.clone().requires_grad_()
    y = layer(x, mask)
    return [[y], list(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))]


@contextmanager
def graph_only(small: bool) -> Iterator[None]:
    """small 时不生成核（C++ 的要半分钟），只验图与遮挡。"""
    compiled = torch.compile(flex_attention, dynamic=False, backend="aot_eager") if small else attention.compiled_flex()
    with patch.object(attention, "compiled_flex", lambda: compiled):
        yield


def distance(mine: list[Tensor], exact: list[Tensor]) -> float:
    """最大的差，以那一个张量的最大值为单位。"""
    pairs = zip(mine, exact, strict=True)
    return max(float((one.double() - other).abs().max() / other.abs().max()) for one, other in pairs)
