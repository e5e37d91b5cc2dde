"""AR_pred 的参照：同一个模型，注意力换成写开的 softmax(q·k/√d + (−1e9)·mask)·v，什么也不融合、不跳过、不重算。"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from models import ar_pred_video_vanilla
from models.layers import transformer
from models.layers.attention import CrossAttention, GroupAttention
from util.config import RunConfig

AR_PRED = "ar_pred_video_vanilla"


class WrittenGroup(GroupAttention):
    """参数与 GroupAttention 的相同。"""

    def forward(self, x: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
        """(B, N, D) → (B, N, D)；mask 为 token_mask 的结果。"""
        assert not isinstance(mask, BlockMask)
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.out(rearrange(written_out(q, k, v, mask), "b h n d -> b n (h d)"))


class WrittenCross(CrossAttention):
    """参数与 CrossAttention 的相同。"""

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        """query (B, N, D)，memory (B, M, D) → (B, N, D)。"""
        q = rearrange(self.q(query), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.kv(memory), "b m (two h d) -> two b h m d", two=2, h=self.heads)
        return self.out(rearrange(written_out(q, k, v, None), "b h n d -> b n (h d)"))


def written_out(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """q (B, h, N, d)，k、v (B, h, M, d)，visible (N, M) → (B, h, N, d)。"""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = scores + (-1e9) * (~visible).to(scores.dtype)
    return scores.softmax(-1) @ v


def reference_config(config: RunConfig) -> RunConfig:
    """同一份配置，注意力取 token 间的遮挡，不编译。

    Raises:
        ValueError: 不是 AR_pred，或有 dropout。
    """
    if config.model["name"] != AR_PRED:
        raise ValueError(
            f"--against reference: {config.model['name']} has no written-out reference, only {AR_PRED} has"
        )
    if config.model.get("dropout"):
        raise ValueError("--against reference: the reference has no dropout; set model.dropout=0")
    plain = config.train.model_copy(update={"compile": False})
    return config.model_copy(update={"model": {**config.model, "attention": "sdpa"}, "train": plain})


@contextmanager
def as_written() -> Iterator[None]:
    """在这里面造、在这里面走的 AR_pred 是参照。"""
    with (
        patch.object(ar_pred_video_vanilla, "GroupAttention", WrittenGroup),
        patch.object(ar_pred_video_vanilla, "CrossAttention", WrittenCross),
        patch.object(ar_pred_video_vanilla, "through", kept),
        patch.object(transformer, "through", kept),
    ):
        yield


def kept(cheap: Callable[[Tensor], Tensor], costly: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """什么都留到反向的 through。"""
    return costly(cheap(x))
