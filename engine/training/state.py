"""一次训练的全部状态：模型、优化器、学习率、EMA、进度；怎样造出来，怎样走一步。"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import PARAM_LIST, AveragedModel, get_ema_multi_avg_fn

from engine.loading import Content, model_options
from engine.parallel import reduce_tensor
from engine.progress import Progress
from engine.training.optim import make_optimizer, make_scheduler
from engine.training.start import Initial, first_stage_origin, start_from
from models import build_model
from models.interface import Autoencoder, ForecastModel, Learner, Network, Scheduled
from util.batch import Batch, DataSpec
from util.config import RunConfig


class NonFinite(ValueError):
    """损失或梯度不是有限值。"""


@dataclass
class State:
    """model 是原样的模型，wrapped 是 Fabric 包好的同一个；没有可训练参数的模型没有优化器。

    init 是 train.init 那个文件的 sha256，first_stage 是阶段一的检查点（path、sha256），没有就是空的；都随检查点走。
    """

    model: Learner
    wrapped: _FabricModule | None
    optimizer: optim.Optimizer | None
    scheduler: LRScheduler | None
    ema: AveragedModel | None
    progress: Progress
    init: str = ""
    first_stage: dict[str, str] = field(default_factory=dict)
    total_steps: int = 0

    @property
    def module(self) -> nn.Module:
        """model，给要真的 nn.Module 的库。"""
        assert isinstance(self.model, nn.Module)
        return self.model

    @property
    def best_model(self) -> Learner:
        """拿去验证和预报的权重：有 EMA 用 EMA。"""
        if self.ema is None:
            return self.model
        assert isinstance(self.ema.module, ForecastModel | Autoencoder)
        return self.ema.module


def build_state(
    fabric: Fabric,
    config: RunConfig,
    spec: DataSpec,
    total_steps: int,
    initial: Initial | None = None,
    saved: Content | None = None,
) -> State:
    """按配置造出训练的起点；初始化的随机数取自全局发生器，initial 有的张量再从那里抄来。

    saved 是要续训的检查点：模型按它记着的选项造，阶段一的检查点、预训练的文件夹都不必还在。

    Raises:
        ValueError: initial 与模型对不上，或模型没有梯度步，谈不上起步；阶段一的检查点不对。
    """
    model = build_model(model_options(saved) if saved else config.model, spec)
    origin = saved.get("first_stage", {}) if saved else first_stage_origin(config.model)
    if not any(p.requires_grad for p in model.parameters()):
        if initial is not None:
            raise ValueError(f"train.init = {initial.path}: {config.model['name']} takes no gradient steps; remove it")
        return State(fabric.to_device(model), None, None, None, None, Progress(), first_stage=origin)
    if initial is not None:
        start_from(model, initial, spec, origin)  # 在 EMA 的副本之前：副本也从这里起步
    model = fabric.to_device(model)
    ema = None
    if config.train.ema_decay is not None:
        ema = AveragedModel(model, multi_avg_fn=ema_average(config.train.ema_decay), use_buffers=True)
    optimizer = make_optimizer(model, config.train)
    scheduler = make_scheduler(optimizer, config.train.schedule, config.train.lr, total_steps)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    wrapped.mark_forward_method("loss")
    sha256 = initial.sha256 if initial else ""
    return State(model, wrapped, wrapped_optimizer, scheduler, ema, Progress(), sha256, origin, total_steps)


def ema_average(decay: float) -> Callable[[PARAM_LIST, PARAM_LIST, Tensor | int], None]:
    """滑动平均；整数的 buffer（位置的编号、计数）照抄，平均了会截断。同一次调用里的张量类型相同。"""
    average = get_ema_multi_avg_fn(decay)

    def update(averaged: PARAM_LIST, current: PARAM_LIST, count: Tensor | int) -> None:
        (average if averaged[0].is_floating_point() else copy_all)(averaged, current, count)

    return update


def copy_all(averaged: PARAM_LIST, current: PARAM_LIST, _: Tensor | int) -> None:
    for mine, theirs in zip(averaged, current, strict=True):
        mine.copy_(theirs)


def train_step(fabric: Fabric, state: State, config: RunConfig, batches: Sequence[Batch]) -> dict[str, float]:
    """一次参数更新：几个小批的梯度取平均；返回模型的 loss 给出的各项（小批、各进程的平均）与梯度的范数。

    Raises:
        NonFinite: 损失或梯度不是有限值；权重与 buffer 都和这一步之前一样。
    """
    wrapped, optimizer, scheduler = state.wrapped, state.optimizer, state.scheduler
    assert wrapped is not None and optimizer is not None and scheduler is not None
    wrapped.train()
    model = state.model
    if isinstance(model, Scheduled):
        model.at_step(state.progress.step, state.total_steps)
    buffers = running_buffers(state.model)
    before = [buffer.clone() for buffer in buffers]  # 前向就会改它们：BatchNorm 的平均、码本
    sums: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        with fabric.no_backward_sync(wrapped, enabled=i < len(batches) - 1):
            with fabric.autocast():  # 一个设备时 wrapped.loss 就是模型自己的，Fabric 不替它换精度
                losses = wrapped.loss(batch)
            terms = {name: term / len(batches) for name, term in losses.items()}
            fabric.backward(terms["loss"])
        sums = {name: sums.get(name, 0) + term.detach().float() for name, term in terms.items()}
    means = reduce_tensor(fabric, torch.stack(list(sums.values())), "mean").tolist()
    logged: dict[str, float] = dict(zip(sums, means, strict=True))
    limit = config.train.clip_norm or math.inf  # 不裁剪时也要梯度的范数：坏梯度不能进参数
    norm = fabric.clip_gradients(wrapped, optimizer, max_norm=limit, error_if_nonfinite=False)
    assert norm is not None
    if not (math.isfinite(logged["loss"]) and math.isfinite(float(norm))):
        optimizer.zero_grad()
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        raise NonFinite("loss" if not math.isfinite(logged["loss"]) else "gradient norm")
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    if state.ema is not None:
        state.ema.update_parameters(state.module)
    return {**logged, "grad_norm": float(norm)}  # 裁剪之前的；一次更新一个，与累积几个小批无关


def running_buffers(model: Network) -> list[Tensor]:
    """随权重存下的 buffer；位置编码之类不随权重存的从不改变。"""
    parameters = {name for name, _ in model.named_parameters()}
    return [value for name, value in model.state_dict().items() if name not in parameters]
