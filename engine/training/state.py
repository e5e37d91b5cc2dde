"""一次训练的全部状态：模型、优化器、学习率、EMA、进度；怎样造出来，怎样走一步。"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule, _FabricOptimizer
from torch import Tensor, nn, optim
from torch.distributed.tensor.experimental import implicit_replication
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from engine.blocks import checkpoint_blocks, compile_blocks
from engine.device import to_host
from engine.loading import Content, model_options
from engine.objective import Objective, check_objective, make_objective, objective_loss
from engine.optim import follow_step, make_optimizer, make_scheduler, set_weight_decay
from engine.parallel import reduce_tensor
from engine.progress import Progress
from engine.sharding import Root, shard_as, whole
from engine.training.start import Initial, first_stage_origin, start_from
from engine.training.validation import counted
from models import build_model
from models.interface import Autoencoder, ForecastModel, Learner, Network, Portable, Scheduled, is_codec
from util.batch import Batch, DataSpec, Predict
from util.config import RunConfig
from util.training_config import TrainConfig

CLIP_EPS = 1e-6  # 与 torch.nn.utils.clip_grad_norm_ 的相同
COUNT = "count"  # 模型的 loss 说它平均了几个数；没有说的是 counted


class NonFinite(ValueError):
    """损失或梯度不是有限值。"""


class Step(NamedTuple):
    """走过的一步。names 是 loss 给出的各项的名字与 grad_norm；values 等它们到主机。"""

    names: tuple[str, ...]
    values: Callable[[], list[float]]

    def terms(self) -> dict[str, float]:
        """各项（小批、各进程的平均）与裁剪之前的梯度范数：一次更新一个，与累积几个小批无关。

        Raises:
            NonFinite: 损失或梯度不是有限值；这一步与以后的各步没有动过权重与 buffer。
        """
        terms = dict(zip(self.names, self.values(), strict=True))
        for name, what in (("loss", "loss"), ("grad_norm", "gradient norm")):
            if not math.isfinite(terms[name]):
                raise NonFinite(f"{what} is not finite")
        return terms


@dataclass
class State:
    """model 是原样的模型，wrapped 是 Fabric 包好的同一个；没有可训练参数的模型没有优化器。

    init 是 train.init 那个文件的 sha256，first_stage 是阶段一的检查点（path、sha256），没有就是空的；都随检查点走。
    objective 见 engine/objective.py，权重由数据定的在第一步之前量。
    encodes 是阶段一编码的；buffers 是随权重存下的 buffer 的名字；bad 在设备上：坏了几步，见 train_step。
    parameters、scheduled 是 model 的，造的时候记下：每一步再遍历模块、再问 Protocol，各要十分之几毫秒。
    """

    model: Learner
    wrapped: _FabricModule | None
    optimizer: _FabricOptimizer | None
    scheduler: LRScheduler | None
    ema: AveragedModel | None
    progress: Progress
    init: str = ""
    first_stage: dict[str, str] = field(default_factory=dict)
    total_steps: int = 0
    encodes: Predict | None = None
    buffers: tuple[str, ...] = ()
    bad: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    objective: Objective = field(default_factory=Objective)
    parameters: tuple[nn.Parameter, ...] = ()
    scheduled: Scheduled | None = None

    @property
    def adam(self) -> optim.Optimizer | None:
        """Fabric 包过的优化器里原来的那个。"""
        return self.optimizer.optimizer if self.optimizer is not None else None

    def options(self, config: RunConfig) -> dict[str, Any]:
        """造出同样的模型而不必读文件的选项。"""
        return self.model.portable_options() if isinstance(self.model, Portable) else config.model

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
    check_objective(config.train.objective, model, config.model["name"])
    objective = make_objective(config.train.objective, spec, None, fabric.device)
    origin = saved.get("first_stage", {}) if saved else first_stage_origin(config.model)
    if not any(p.requires_grad for p in model.parameters()):
        if initial is not None:
            raise ValueError(f"train.init = {initial.path}: {config.model['name']} takes no gradient steps; remove it")
        prepare_blocks(model, config.train)
        model = model.to(fabric.device)
        return State(model, None, None, None, None, Progress(), first_stage=origin, objective=objective)
    if initial is not None:
        start_from(model, initial, spec, origin)  # 在 EMA 的副本之前：副本也从这里起步
    model = fabric.to_device(model)  # 分片的不动：一块块地搬
    ema = None
    if config.train.ema_decay is not None:
        ema = AveragedModel(model)
        ema.n_averaged = ema.n_averaged.to(fabric.device)
        shard_as(fabric, ema.module)
    wrapped = fabric.setup_module(Root(model))
    wrapped.mark_forward_method("enter")
    optimizer = make_optimizer(model, config.train)  # 分片之后：参数换过了
    scheduler = make_scheduler(optimizer, config.train.schedule, config.train.lr, total_steps)
    wrapped_optimizer = fabric.setup_optimizers(optimizer)
    assert isinstance(wrapped_optimizer, _FabricOptimizer)  # 给几个，回来的才是一组
    prepare_blocks(model, config.train)  # 在 EMA 的副本之后：副本不编译
    wrapped.train()  # 预训练的部分造出来时或许是 eval 的；以后由 train_step 看着
    sha256 = initial.sha256 if initial else ""
    bad = torch.zeros((), dtype=torch.int64, device=fabric.device)
    return State(
        model, wrapped, wrapped_optimizer, scheduler, ema, Progress(), sha256, origin, total_steps,
        model.encodes if is_codec(model) else None, saved_buffers(model), bad, objective,
        tuple(model.parameters()), model if isinstance(model, Scheduled) else None,
    )  # fmt: skip


def prepare_blocks(model: Learner, config: TrainConfig) -> None:
    """train.compile、train.activation_checkpointing。

    Raises:
        ValueError: 模型没有块；没有编译器。
    """
    if config.activation_checkpointing == "blocks":
        checkpoint_blocks(model)
    if config.compile:
        compile_blocks(model)


def train_step(fabric: Fabric, state: State, config: RunConfig, batches: Sequence[Batch]) -> Step:
    """一次参数更新：几个小批、几个进程的梯度按各自平均了几个场加权，与一整批相同。

    主机不等设备：损失是不是有限值，由 Step.terms 在以后说。坏的一步什么也不动；多过 train.skip_nonfinite 步之后，
    以后的各步也都不动，停下时正是那一步之前的状态。
    """
    wrapped = state.wrapped
    assert wrapped is not None
    model = state.model
    if not model.training:  # 验证、形状表之后；每一步都走遍各层要半毫秒
        wrapped.train()
    if state.scheduled is not None:
        with implicit_replication():  # 模型改自己的参数（换码）：分片时各进程各改自己的一片
            state.scheduled.at_step(state.progress.step, state.total_steps)
    before = [state.module.get_buffer(name).clone() for name in state.buffers]  # 前向就会改：BatchNorm 的平均、码本
    sums: dict[str, Tensor] = {}
    cut = len(batches) * fabric.world_size > 1  # 没有切开就不必加权
    for i, batch in enumerate(batches):
        with fabric.no_backward_sync(wrapped, enabled=i < len(batches) - 1):
            with fabric.autocast():  # 一个设备时 wrapped.enter 就是外壳自己的，Fabric 不替它换精度
                losses = dict(wrapped.enter(partial(objective_loss, model, objective=state.objective), batch))
            count = losses.pop(COUNT, None)
            if cut:
                weight = (counted(batch, state.encodes) if count is None else count).float()
                losses = {name: term * weight for name, term in losses.items()}
                losses[COUNT] = weight
            fabric.backward(losses["loss"])
        sums = {name: sums.get(name, 0) + term.detach().float() for name, term in losses.items()}
    found, total = sums, None
    norm = whole(get_total_norm([p.grad for p in state.parameters if p.grad is not None]))
    if cut:
        means = reduce_tensor(fabric, torch.stack(list(sums.values())), "mean")
        total = means[list(sums).index(COUNT)].clamp(min=1 / fabric.world_size)  # 一个有效的场也没有，梯度都是零
        norm = norm / total
        found = {name: mean / total for name, mean in zip(sums, means.unbind(), strict=True) if name != COUNT}
    found["grad_norm"] = norm
    bad = ~(found["loss"] + norm).isfinite()
    state.bad = state.bad + bad
    still = bad | (state.bad > config.train.skip_nonfinite)
    if state.objective.balance is not None:
        state.objective.balance.follow(found, still)
    update(state, config, norm, total, before, still)
    return Step(tuple(found), to_host(torch.stack([*found.values()])))


@torch.no_grad()
def update(
    state: State, config: RunConfig, norm: Tensor, total: Tensor | None, before: Sequence[Tensor], still: Tensor
) -> None:
    """梯度除以 total（None 不除）→ 权重、EMA、学习率；still 为真时权重与 EMA 不动，buffer 还原成 before，都在设备上定。

    除数（裁剪的在内）与跳不跳过由 fused 的优化器自己用，就是 GradScaler 给它的那两个属性。
    """
    optimizer, adam, scheduler = state.optimizer, state.adam, state.scheduler
    assert optimizer is not None and adam is not None and scheduler is not None
    for name, value in zip(state.buffers, before, strict=True):
        buffer = state.module.get_buffer(name)
        torch.where(still, value, buffer, out=buffer)
    limit = config.train.clip_norm
    scale = total
    if limit is not None:
        clip = ((norm + CLIP_EPS) / limit).clamp(min=1)
        scale = clip if total is None else total * clip
    vars(adam).update(grad_scale=scale, found_inf=still.float())
    set_weight_decay(adam, config.train, state.progress.step, state.total_steps)
    optimizer.step()
    optimizer.zero_grad()
    follow_step(scheduler, scheduler.last_epoch + 1)
    if state.ema is not None and config.train.ema_decay is not None:
        update_average(state.ema, state.module, state.buffers, config.train.ema_decay, ~still)


@torch.no_grad()
def update_average(ema: AveragedModel, model: nn.Module, buffers: Sequence[str], decay: float, moves: Tensor) -> None:
    """学得动的参数、buffers 的滑动平均走一步，moves 为假时不动。第一步照抄；整数的 buffer 也照抄，平均了会截断。

    不用 AveragedModel.update_parameters：它每步把 n_averaged 拿到主机上看。
    """
    weight = torch.where(ema.n_averaged == 0, 1.0, 1 - decay) * moves
    for mine, theirs in zip(moving(ema.module, buffers), moving(model, buffers), strict=True):
        if mine.is_floating_point():
            mine.lerp_(theirs, weight.to(mine.dtype))
        else:
            torch.where(moves, theirs, mine, out=mine)
    ema.n_averaged += moves


def moving(model: nn.Module, buffers: Sequence[str]) -> list[Tensor]:
    """训练会改的：学得动的参数，名字在 buffers 里的。"""
    return [p for p in model.parameters() if p.requires_grad] + [model.get_buffer(name) for name in buffers]


def saved_buffers(model: Network) -> tuple[str, ...]:
    """随权重存下的 buffer；位置编码之类不随权重存的从不改变。"""
    parameters = {name for name, _ in model.named_parameters()}
    return tuple(name for name in model.state_dict() if name not in parameters)
