"""便宜的激活不留到反向：归一化、激活函数的结果由它们的输入重算，只有矩阵乘与注意力的留下。

一块 AR_pred 留的由 16 份 token 减到 10 份，重算的是逐元素的，一步只慢百分之一二；数逐位不变。
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_kept = False  # 外面整段都要重算（activation_checkpointing、rollout）：那时再留着输入，反而占内存


@contextmanager
def kept() -> Iterator[None]:
    """里面 through 不重算。"""
    global _kept
    before, _kept = _kept, True
    try:
        yield
    finally:
        _kept = before


def through(cheap: Callable[[Tensor], Tensor], costly: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """costly(cheap(x))；costly 要为反向留下 cheap(x) 时不留，用时再算一遍。

    cheap 不能有随机数，也不能改状态；编译时原样走，留什么由编译器自己选。
    """
    y = cheap(x)
    if _kept or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return costly(y)
    ours = weakref.ref(y.untyped_storage())  # 只认得它，不留着它

    def pack(saved: Tensor) -> Any:
        if saved.untyped_storage() is not ours():
            return saved.detach()  # 留下自己的输出会成一个环，垃圾回收之前内存不还
        return saved.shape, saved.stride(), saved.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return cheap(x).as_strided(*packed)

    with saved_tensors_hooks(pack, unpack):
        return costly(y)
