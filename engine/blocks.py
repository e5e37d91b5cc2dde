"""以块为单位：编译、丢弃激活。块由模型自己说（Stacked）；都就地改，权重的名字不变。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.interface import Learner, Stacked

SHAPES = 8  # 一块至多编译几份：训练、验证，末一批的大小，各一份静态的、一份任意大小的


def blocks_of(model: Learner, key: str) -> Sequence[nn.Module]:
    """模型的块；key 是要它们的那个选项。

    Raises:
        ValueError: 模型没有块。
    """
    if not isinstance(model, Stacked):
        name = type(model).__module__.rpartition(".")[2]
        raise ValueError(f"{key} works block by block, and {name} has no repeated blocks; leave it out")
    return model.blocks


def compile_blocks(model: Learner, key: str = "train.compile = true") -> None:
    """逐块编译：同样的块只编译一份，开头几步等它；块的输入（如每步新抽的遮挡）是张量，变了也不重新编译。

    key: 要它的那个选项。

    Raises:
        ValueError: 没有块；没有编译器。
    """
    blocks = blocks_of(model, key)
    check_compiler(next(blocks[0].parameters()).device, key)
    for block in blocks:
        block.compile(recompile_limit=SHAPES * len(blocks))


def check_compiler(device: torch.device, key: str) -> None:
    """编译要用的：处理器上是 C++ 编译器，显卡上是 Triton。

    Raises:
        ValueError: 没有。
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type == "cuda":
        if not has_triton():
            raise ValueError(f"{key} needs Triton, which this PyTorch or this GPU does not have")
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError(f"{key} needs a C++ compiler here; install g++, or leave it out") from None


def checkpoint_blocks(model: Learner) -> None:
    """前向只留下块的输入，块里的激活在反向时重算：内存少，计算多一遍前向。随机数（dropout）重算时相同。

    Raises:
        ValueError: 没有块。
    """
    for block in blocks_of(model, "train.activation_checkpointing = blocks"):
        block.forward = partial(recomputed, block.forward)


def recomputed(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """forward 的结果，反向时重算它；自己的一个函数：torch 的 checkpoint 编译器跳过，连里面的也不编译。"""
    return checkpoint(forward, *arguments, use_reentrant=False, **named)
