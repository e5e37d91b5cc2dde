"""叶子层的独立对照：把权重抄进 torch.nn 的同名层（它们的 q、k、v 偏置置零）。"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention import CrossAttention, GroupAttention
from models.layers.transformer import DecoderLayer, EncoderLayer


def randomize(module: nn.Module) -> None:
    """偏置与归一化的初值是 0 与 1，抄漏了也看不出来。"""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)


def torch_attention(layer: GroupAttention | CrossAttention) -> nn.MultiheadAttention:
    """自注意力与交叉注意力都是 nn.MultiheadAttention。"""
    weight = layer.qkv.weight if isinstance(layer, GroupAttention) else torch.cat([layer.q.weight, layer.kv.weight])
    made = nn.MultiheadAttention(weight.shape[1], layer.heads, batch_first=True, dtype=weight.dtype)
    fill(made.in_proj_weight, weight)
    nn.init.zeros_(made.in_proj_bias)
    made.out_proj.load_state_dict(layer.out.state_dict())
    return made


def torch_encoder(layer: EncoderLayer) -> nn.TransformerEncoderLayer:
    first, last = layer.mlp[0], layer.mlp[3]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    made = nn.TransformerEncoderLayer(
        first.in_features, layer.attention.heads, first.out_features, 0.0, "gelu",
        batch_first=True, dtype=first.weight.dtype,
    )  # fmt: skip
    made.self_attn = torch_attention(layer.attention)
    made.linear1, made.linear2, made.norm1, made.norm2 = first, last, layer.norm1, layer.norm2
    return made


def torch_decoder(layer: DecoderLayer) -> nn.TransformerDecoderLayer:
    first, last = layer.mlp[0], layer.mlp[3]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    made = nn.TransformerDecoderLayer(
        first.in_features, layer.attention.heads, first.out_features, 0.0, "gelu",
        batch_first=True, dtype=first.weight.dtype,
    )  # fmt: skip
    made.self_attn, made.multihead_attn = torch_attention(layer.attention), torch_attention(layer.cross)
    made.linear1, made.linear2 = first, last
    made.norm1, made.norm2, made.norm3 = layer.norm1, layer.norm2, layer.norm3
    return made


def fill(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)
