"""分片（FSDP2）：参数、梯度、优化器的状态各进程只存一份中自己的那一片，用到一块时才收齐。

`fully_shard` 的单位是模型声明的块（Stacked）；余下的参数合为一组，进出模型的时候收齐、放下。
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from models.interface import Autoencoder, ForecastModel, Learner, OnePass, OwnObjective, Stacked

P = ParamSpec("P")
T = TypeVar("T")


class Root(nn.Module):
    """模型的外壳：训练的一步，不论叫模型几次，都是它的一次 forward。DDP 一步只许进出一次；分片的在那里收齐余下的参数。

    不直接包模型自己：loss 里常再调模型的 forward，里面那一层出来时就把参数放下了。
    """

    def __init__(self, model: Learner) -> None:
        super().__init__()
        self.model = model
        self.inside = False

    def enter(self, method: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """method 里叫的是这个模型；Fabric 把它转到包好的 forward。"""
        return self(method, *arguments, **named)

    def forward(self, method: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        inside, self.inside = self.inside, True
        try:
            return method(*arguments, **named)
        finally:
            self.inside = inside

    def lead(self) -> None:
        """分片的：引擎走进模型的那几个方法都从这里过；已经在里面的直接走。"""
        model = self.model
        if isinstance(model, OwnObjective):
            model.loss = self._through(model.loss)
        if isinstance(model, ForecastModel):
            model.forecast = self._through(model.forecast)
        if isinstance(model, OnePass):
            model.accumulate = self._through(model.accumulate)
        if isinstance(model, Autoencoder):
            model.loss = self._through(model.loss)
            model.observe_latents = self._through(model.observe_latents)

    def _through(self, method: Callable[P, T]) -> Callable[P, T]:
        def enter(*arguments: P.args, **named: P.kwargs) -> T:
            if self.inside:
                return method(*arguments, **named)
            learning = torch.is_grad_enabled()
            with torch.inference_mode(False), torch.set_grad_enabled(learning):  # 收齐的参数训练时还要用
                return self(method, *arguments, **named)

        return enter


def shard(root: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """就地分片；在造优化器之前：参数换成了 DTensor。"""
    assert isinstance(root, Root)
    mesh = mesh["data_parallel"]
    for parameter in root.parameters():  # FSDP2 只收连续的；有的卷积核通道排在末尾
        parameter.data = parameter.data.contiguous()
    for block in root.model.blocks if isinstance(root.model, Stacked) else ():
        fully_shard(block, mesh=mesh)
    root.lead()
    fully_shard(root, mesh=mesh, reshard_after_forward=True)  # 出来时总是分片的样子，谁都可以存取
    return root


def sharded_strategy(processes: int) -> ModelParallelStrategy:
    """给 Fabric 的 strategy：全部进程一起分。"""
    return ModelParallelStrategy(shard, data_parallel_size=processes, tensor_parallel_size=1)


def is_sharded(fabric: Fabric) -> bool:
    """run.strategy 是不是 fsdp。"""
    return isinstance(fabric.strategy, ModelParallelStrategy)


def shard_as(fabric: Fabric, module: nn.Module) -> None:
    """EMA 的副本，与模型同样地分片；别的 strategy 不必。"""
    if isinstance(fabric.strategy, ModelParallelStrategy):
        assert isinstance(module, ForecastModel | Autoencoder)
        shard(Root(module), fabric.strategy.device_mesh)


def whole(value: Tensor) -> Tensor:
    """各进程合起来的那一个数；没有分片的原样。"""
    return value.full_tensor() if isinstance(value, DTensor) else value
