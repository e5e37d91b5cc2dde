"""几个进程一起训练时，层自己要合计的东西；一个进程时什么也不做。"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def several_ranks() -> bool:
    """是不是多进程的训练。"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def add_ranks(*values: Tensor) -> None:
    """各进程的同形张量就地相加，不求导。"""
    if several_ranks():
        for value in values:
            dist.all_reduce(value)


def mean_of_ranks(value: Tensor) -> Tensor:
    """各进程的同形张量的平均，可求导：各进程的损失都依赖它，梯度也各处合计。"""
    made: Any = _Mean.apply(value)
    return made


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _mean(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _mean(gradients[0])


def _mean(value: Tensor) -> Tensor:
    value = value.clone(memory_format=torch.contiguous_format)
    add_ranks(value)
    return value / (dist.get_world_size() if several_ranks() else 1)
