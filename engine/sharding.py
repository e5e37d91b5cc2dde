"""分片（FSDP2）：参数、梯度、优化器的状态各进程只存一份中自己的那一片，用到一块时才收齐。

`fully_shard` 的单位是模型声明的块（Stacked）；余下的参数合为一组，进出模型的时候收齐、放下。
"""

from __future__ import annotations

from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from models.interface import Stacked

ENTRIES = ("loss", "forecast", "accumulate", "observe_latents")  # 引擎由这几个方法走进模型


class Root(nn.Module):
    """模型的外壳：走进模型的哪一个方法都从它的 forward 过，余下的参数在那里收齐。

    不直接包模型自己：loss 里常再调模型的 forward，里面那一层出来时就把参数放下了。
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for name in ENTRIES:
            if hasattr(model, name):
                setattr(model, name, self._through(getattr(model, name)))

    def _through(self, method: Any) -> Any:
        def enter(*arguments: Any, **more: Any) -> Any:
            learning = torch.is_grad_enabled()
            with torch.inference_mode(False), torch.set_grad_enabled(learning):  # 收齐的参数训练时还要用
                return self(method, *arguments, **more)

        return enter

    def forward(self, method: Any, *arguments: Any, **more: Any) -> Any:
        return method(*arguments, **more)


def shard(model: nn.Module, mesh: DeviceMesh) -> Root:
    """就地分片；在造优化器之前：参数换成了 DTensor。"""
    mesh = mesh["data_parallel"]
    for block in model.blocks if isinstance(model, Stacked) else ():
        fully_shard(block, mesh=mesh)
    root = Root(model)
    fully_shard(root, mesh=mesh, reshard_after_forward=True)  # 出来时总是分片的样子，谁都可以存取
    return root


def sharded_strategy(processes: int) -> ModelParallelStrategy:
    """给 Fabric 的 strategy：全部进程一起分。"""
    return ModelParallelStrategy(shard, data_parallel_size=processes, tensor_parallel_size=1)


def is_sharded(fabric: Fabric) -> bool:
    """run.strategy 是不是 fsdp。"""
    return isinstance(fabric.strategy, ModelParallelStrategy)


def shard_as(fabric: Fabric, model: nn.Module) -> None:
    """EMA 的副本，与模型同样地分片；别的 strategy 不必。"""
    if isinstance(fabric.strategy, ModelParallelStrategy):
        shard(model, fabric.strategy.device_mesh)


def whole(value: Tensor) -> Tensor:
    """各进程合起来的那一个数；没有分片的原样。"""
    return value.full_tensor() if isinstance(value, DTensor) else value
