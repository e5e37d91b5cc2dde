"""一次训练的全部状态：模型、优化器、学习率、EMA、进度；怎样走一步，怎样存成检查点、怎样读回。"""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models import build_model, change_options, check_weights, first_stage_file
from models.interface import Portable, Scheduled
from models.layers.codebook import Codebook
from models.layers.latents import LatentScaling
from util.batch import Batch, DataSpec
from util.checkpoint import file_sha256, forecast_weights, load_checkpoint, random_state, set_random_state
from util.config import RunConfig
from util.optim import make_optimizer, make_scheduler

log = logging.getLogger("ar_pred")
FIRST_STAGE = "first_stage."  # 阶段一在阶段二里的名字
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)  # 单进程、DDP、FSDP2 存出同样的文件
Content = dict[str, Any]


@dataclass
class Progress:
    """循环走到哪里；batches 是本轮已用掉的全局批数，loss_sum / loss_count 是本轮训练损失的累计。

    seconds、samples 是训练循环（含等数据，不含验证）用去的时间与窗口数，peak_memory 是峰值内存（字节），续训时累计。
    """

    epoch: int = 0
    step: int = 0
    batches: int = 0
    best: float | None = None
    best_step: int = -1
    stale: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    seconds: float = 0.0
    samples: int = 0
    peak_memory: int = 0
    device: str = ""


class NonFinite(ValueError):
    """损失或梯度不是有限值。"""


class Initial(NamedTuple):
    """train.init 的检查点：路径、文件的 sha256、拿去预报的那份权重、它的数据、它的阶段一从哪里来。"""

    path: str
    sha256: str
    weights: dict[str, torch.Tensor]
    spec: DataSpec
    first_stage: dict[str, str]


@dataclass
class State:
    """model 是原样的模型，wrapped 是 Fabric 包好的同一个；没有可训练参数的模型没有优化器。

    init 是 train.init 那个文件的 sha256，first_stage 是阶段一的检查点（path、sha256），没有就是空的；都随检查点走。
    """

    model: Any
    wrapped: Any
    optimizer: optim.Optimizer | None
    scheduler: LRScheduler | None
    ema: AveragedModel | None
    progress: Progress
    init: str = ""
    first_stage: dict[str, str] = field(default_factory=dict)
    total_steps: int = 0

    @property
    def best_model(self) -> Any:
        """拿去验证和预报的权重：有 EMA 用 EMA。"""
        return self.ema.module if self.ema is not None else self.model


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


def ema_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """滑动平均；整数的 buffer（位置的编号、计数）照抄，平均了会截断。同一次调用里的张量类型相同。"""
    average = get_ema_multi_avg_fn(decay)

    def update(averaged: Any, current: Any, count: Any) -> None:
        (average if averaged[0].is_floating_point() else copy_all)(averaged, current, count)

    return update


def copy_all(averaged: Sequence[torch.Tensor], current: Sequence[torch.Tensor], _: Any) -> None:
    for mine, theirs in zip(averaged, current, strict=True):
        mine.copy_(theirs)


def model_options(content: Content) -> dict[str, Any]:
    """检查点 → 造模型的选项，不必再读别的文件；从前的检查点只有配置。"""
    return content.get("model_options") or content["config"]["model"]


def first_stage_origin(options: Mapping[str, Any]) -> dict[str, str]:
    """阶段一从哪个检查点来；不是检查点时为空。"""
    path = first_stage_file(options)
    return {"path": path, "sha256": file_sha256(path)} if path else {}


def check_start(state: State, options: Mapping[str, Any], initial: Initial | None) -> None:
    """新的运行里，学不动的参数不能是随机的。

    Raises:
        ValueError: 阶段一不是检查点；冻结的参数没有来处。
    """
    source = options.get("first_stage")
    if source is not None and not state.first_stage:
        written = source if isinstance(source, str) else "{...}"
        raise ValueError(
            f"model.first_stage = {written}: random weights, for --smoke and tests only; train the first stage and "
            "give its checkpoints/RUN/best.ckpt"
        )
    frozen = sum(p.numel() for p in state.model.parameters() if not p.requires_grad)
    from_files = state.first_stage or getattr(state.model, "frozen_are_trained", False)
    if frozen and initial is None and not from_files:
        raise ValueError(
            f"{frozen} parameters of {options['name']} are frozen at their random start; "
            "give train.init=checkpoints/RUN/best.ckpt that holds them, or do not freeze them"
        )


def read_initial(path: str) -> Initial:
    """读 train.init 的检查点；有 EMA 就用 EMA，与预报时相同。

    Raises:
        ValueError: 文件不在、坏了、不是本程序的检查点。
    """
    content = load_checkpoint(path)
    if "progress" not in content:  # 如 tmp/ 里缓存的气候态
        raise ValueError(f"train.init = {path} holds a baseline, not a training; name a checkpoints/RUN/best.ckpt")
    spec = DataSpec.from_dict(content["spec"])
    return Initial(path, file_sha256(path), forecast_weights(content), spec, content.get("first_stage", {}))


def start_from(model: nn.Module, initial: Initial, spec: DataSpec, first_stage: dict[str, str]) -> None:
    """名字相同的张量抄进模型，并在日志里说抄了几个；数据不同（可以是有意的）时警告。

    不抄的：潜变量的统计量（权重接着学，它就过时了，引擎会重新看一遍）；码本上一步记下要换的（那里的数据）；
    阶段一不是同一个文件时，阶段一的权重。

    Raises:
        ValueError: 同名的张量形状不同；没有一个同名。
    """
    own = model.state_dict()
    scalings = (name for name, module in model.named_modules() if isinstance(module, LatentScaling))
    anew = tuple(f"{name}." for name in scalings if not name.startswith(FIRST_STAGE))
    codebooks = (name for name, module in model.named_modules() if isinstance(module, Codebook))
    anew += tuple(f"{name}.{part}" for name in codebooks for part in ("dead", "replacements"))
    if first_stage.get("sha256") != initial.first_stage.get("sha256"):
        anew += (FIRST_STAGE,)
    taken = {name: value for name, value in initial.weights.items() if name in own and not name.startswith(anew)}
    for name, value in taken.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"train.init = {initial.path}: {name} is {tuple(value.shape)} there, {tuple(own[name].shape)} here"
            )
    if not taken:
        raise ValueError(f"train.init = {initial.path}: none of its {len(initial.weights)} tensors is in this model")
    model.load_state_dict(taken, strict=False)
    theirs, ours = initial.spec.to_dict(), spec.to_dict()
    for key in ("channels", "latitudes", "longitudes", "interval_hours", "mean", "std"):
        if theirs[key] != ours[key]:
            log.warning(
                "train.init %s was trained with other %s: %s, here %s", initial.path, key, theirs[key], ours[key]
            )
    log.info(
        "train.init %s (sha256 %s): %d tensors taken, %d of the model start anew",
        initial.path, initial.sha256, len(taken), len(own) - len(taken),
    )  # fmt: skip


def train_step(fabric: Fabric, state: State, config: RunConfig, batches: Sequence[Batch]) -> dict[str, float]:
    """一次参数更新：几个小批的梯度取平均；返回模型的 loss 给出的各项（小批、各进程的平均）与梯度的范数。

    Raises:
        NonFinite: 损失或梯度不是有限值；权重与 buffer 都和这一步之前一样。
    """
    assert state.optimizer is not None and state.scheduler is not None
    state.wrapped.train()
    model = state.model
    if isinstance(model, Scheduled):
        model.at_step(state.progress.step, state.total_steps)
    buffers = running_buffers(state.model)
    before = [buffer.clone() for buffer in buffers]  # 前向就会改它们：BatchNorm 的平均、码本
    sums: dict[str, torch.Tensor] = {}
    for i, batch in enumerate(batches):
        with fabric.no_backward_sync(state.wrapped, enabled=i < len(batches) - 1):
            terms = {name: term / len(batches) for name, term in state.wrapped.loss(batch).items()}
            fabric.backward(terms["loss"])
        sums = {name: sums.get(name, 0) + term.detach().float() for name, term in terms.items()}
    means = reduce_tensor(fabric, torch.stack(list(sums.values())), "mean").tolist()
    logged: dict[str, float] = dict(zip(sums, means, strict=True))
    limit = config.train.clip_norm or math.inf  # 不裁剪时也要梯度的范数：坏梯度不能进参数
    norm = fabric.clip_gradients(state.wrapped, state.optimizer, max_norm=limit, error_if_nonfinite=False)
    assert norm is not None
    if not (math.isfinite(logged["loss"]) and math.isfinite(float(norm))):
        state.optimizer.zero_grad()
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        raise NonFinite("loss" if not math.isfinite(logged["loss"]) else "gradient norm")
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.scheduler.step()
    if state.ema is not None:
        state.ema.update_parameters(state.model)
    return {**logged, "grad_norm": float(norm)}  # 裁剪之前的；一次更新一个，与累积几个小批无关


def running_buffers(model: nn.Module) -> list[torch.Tensor]:
    """随权重存下的 buffer；位置编码之类不随权重存的从不改变。"""
    parameters = {name for name, _ in model.named_parameters()}
    return [value for name, value in model.state_dict().items() if name not in parameters]


def reduce_tensor(fabric: Fabric, value: torch.Tensor, how: str) -> torch.Tensor:
    """各进程的同形张量合成一个（mean、sum、max）；一个进程时原样。"""
    reduced = fabric.all_reduce(value.to(fabric.device), reduce_op=how)
    assert isinstance(reduced, torch.Tensor)
    return reduced


def snapshot(fabric: Fabric, state: State, config: RunConfig, spec: DataSpec, run_name: str) -> Content:
    """状态 → 张量与普通值；每个进程都要调用（聚合权重与各自的随机状态）。"""
    ranks: list[Any] = [random_state()]
    if fabric.world_size > 1:
        ranks = [None] * fabric.world_size
        torch.distributed.all_gather_object(ranks, random_state())
    optimizer = None
    if (
        state.optimizer is not None and _raw(state.optimizer).state
    ):  # 一步没走时取状态会偷偷走一步空的，Adam 的步数就错了
        optimizer = get_optimizer_state_dict(state.model, _raw(state.optimizer), options=FULL)
    return {
        "run": run_name,
        "model": get_model_state_dict(state.model, options=FULL),
        "optimizer": optimizer,
        "scheduler": state.scheduler.state_dict() if state.scheduler else None,
        "ema": state.ema.state_dict() if state.ema else None,
        "progress": asdict(state.progress),
        "init": state.init,
        "first_stage": state.first_stage,
        "model_options": state.model.portable_options() if isinstance(state.model, Portable) else config.model,
        "random": ranks,
        "config": config.model_dump(),
        "spec": spec.to_dict(),
        "versions": versions(),
    }


def restore(fabric: Fabric, state: State, content: Content) -> None:
    """snapshot 的逆；进程数变了时随机状态对不上，只恢复其余的。

    Raises:
        ValueError: 检查点的权重与模型对不上。
    """
    load_weights(state.model, content["model"])
    if state.optimizer is not None and state.scheduler is not None:
        if content["optimizer"] is not None:
            set_optimizer_state_dict(state.model, _raw(state.optimizer), content["optimizer"], options=FULL)
        state.scheduler.load_state_dict(content["scheduler"])
    if state.ema is not None:
        state.ema.load_state_dict(content["ema"])
    state.progress = Progress(**content["progress"])
    state.init = content.get("init", "")  # 有 train.init 之前的检查点没有这一项
    if len(content["random"]) == fabric.world_size:
        set_random_state(content["random"][fabric.global_rank])


def load_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """把检查点的权重装进模型。

    Raises:
        ValueError: 名字或形状不符（检查点属于另一个网格、通道组或另一种大小的模型）。
    """
    check_weights(model, weights, "checkpoint does not fit this model")
    set_model_state_dict(model, weights, options=FULL)


def load_forecaster(content: Content, device: torch.device, changes: Sequence[str] = ()) -> tuple[Any, DataSpec]:
    """检查点 → 可以预报的模型（eval，训练时有 EMA 就用 EMA）和它的 DataSpec；changes 见 change_options。"""
    spec = DataSpec.from_dict(content["spec"])
    model = build_model(change_options(model_options(content), changes), spec)
    load_weights(model, forecast_weights(content))
    return model.to(device).eval(), spec


def versions() -> dict[str, str]:
    """复现要用的版本。"""
    packages = ("torch", "lightning", "numpy", "xarray", "pydantic", "einops", "wandb")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _raw(optimizer: Any) -> optim.Optimizer:
    """Fabric 包过的优化器里原来的那个。"""
    return getattr(optimizer, "optimizer", optimizer)
