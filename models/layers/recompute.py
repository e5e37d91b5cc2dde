"""便宜的激活不留到反向：归一化、激活函数的结果由它们的输入重算，只有矩阵乘与注意力的留下。

一块 AR_pred 留的由 16 份 token 减到 10 份，重算的是逐元素的；LayerNorm、激活函数的数逐位不变，RMSNorm 的到舍入为止。
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import saved_tensors_hooks


class _Held(torch.autograd.Function):
    """原样过去；x 由 autograd 留着：外面整段都要重算时（checkpoint），它也照那边的留法。"""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


def as_now(kind: str) -> Callable[[], AbstractContextManager[Any]]:
    """眼下的自动半精度，以后再来一遍；没有这回事的设备（meta）什么也不做。"""
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    return partial(torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))


def through(cheap: Callable[[Tensor], Tensor], costly: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """costly(cheap(x))；costly 要为反向留下 cheap(x) 时不留，用时再算一遍。

    cheap 不能有随机数，也不能改状态；编译时原样走，留什么由编译器自己选。
    """
    if torch.compiler.is_compiling():
        return costly(cheap(x))
    held: Any = _Held.apply(x)
    node, y = held.grad_fn, cheap(held)
    if node is None:  # 没有梯度要走
        return costly(y)
    precision = as_now(x.device.type)
    ours = weakref.ref(y.untyped_storage())  # 只认得它，不留着它

    def pack(saved: Tensor) -> Any:
        if saved.untyped_storage() is not ours():
            return saved.detach()  # 留下自己的输出会成一个环，垃圾回收之前内存不还
        return saved.shape, saved.stride(), saved.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad(), precision():
            return cheap(node.saved_tensors[0]).as_strided(*packed)

    with saved_tensors_hooks(pack, unpack):
        return costly(y)
