"""走假的一步（前向、反向、更新），说出最满的一刻内存里各是什么；与 engine/training/state.py 的 train_step 同样的次序。

假的张量都算在处理器上：显卡上也一样，形状、类型相同；FlexAttention 因此换成同样保存 q、k、v 与输出的 SDPA。
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from engine.blocks import checkpoint_blocks
from engine.imagined import random_batch
from engine.memory.live import KINDS, Kind, LiveTensors
from engine.objective import make_objective, objective_loss
from engine.optim import make_optimizer
from models import build_model
from models.interface import Learner, Scheduled
from util.batch import DataSpec, Seeds
from util.cli import one_line
from util.training_config import TrainConfig

PASSING: tuple[Kind, ...] = ("gradients", "activations", "temporary")
LONG = 1_000_000  # 步；由粗到细的模型走到末了，尺度全了，内存最大


class Peak(NamedTuple):
    """最满的一刻各是几字节；其中来来去去的（激活、梯度、临时的）小块合计几字节；学得动的参数一共几字节。"""

    sizes: Mapping[Kind, int]
    scattered: int
    trainable: int


def step_peak(options: Mapping[str, Any], spec: DataSpec, train: TrainConfig, size: int) -> Peak:
    """一个小批 size 个窗口；优化器已经有了状态，累积时梯度已经在。没有梯度步的模型只有前向。

    Raises:
        ValueError: 选项不对；损失依赖算出来的值之类，只有形状走不下去。
    """
    with FakeTensorMode(allow_non_fake_inputs=True), LiveTensors() as live:
        try:
            trainable = _walk(build_model(options, spec), spec, train, size, live)
        except RuntimeError as error:  # 问算出来的值，没有假的那一种的算子
            raise ValueError(
                f"memory of {options['name']} cannot be estimated, with shapes alone its step fails: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from None
    sizes: dict[Kind, int] = {kind: live.peak[kind, True] + live.peak[kind, False] for kind in KINDS}
    return Peak(sizes, sum(live.peak[kind, False] for kind in PASSING), trainable)


def _walk(model: Learner, spec: DataSpec, train: TrainConfig, size: int, live: LiveTensors) -> int:
    assert isinstance(model, nn.Module)
    live.mark("parameters", [*model.parameters(), *model.buffers()])
    batch = random_batch(spec, size, train.objective.rollout.longest)
    live.mark("batch", batch.tensors)
    batch = batch._replace(seeds=Seeds((0,) * size, (0.0,) * size, 0))
    objective = make_objective(train.objective, spec, None, torch.device("cpu"))
    if isinstance(model, Scheduled):
        model.at_step(LONG - 1, LONG)
    if train.activation_checkpointing == "blocks":
        checkpoint_blocks(model)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    precision = torch.autocast("cpu", torch.bfloat16, enabled=train.precision == "bf16-mixed")
    if not trainable:
        live.reset()
        with torch.no_grad(), precision:
            objective_loss(model, batch, objective)
        return 0
    optimizer = make_optimizer(model, train)
    for p in trainable:
        p.grad = torch.zeros_like(p)
        p.register_post_accumulate_grad_hook(lambda p: _mark_gradient(live, p))
        _mark_gradient(live, p)
    optimizer.step()
    live.mark("optimizer", [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)])
    if train.accumulate == 1:
        optimizer.zero_grad()
    kept = [buffer.clone() for buffer in model.buffers()]  # train_step 留着，坏的一步好还原
    live.mark("parameters", kept)
    if train.ema_decay is not None:
        average = [value.clone() for value in (*model.parameters(), *model.buffers())]
        live.mark("average", average)
        kept += average
    live.reset()
    with saved_tensors_hooks(live.saved, lambda tensor: tensor):
        with precision:
            loss = objective_loss(model, batch, objective)["loss"]
        live.forward_done()
        loss.backward()  # 最满的一刻在它里面：fused 的更新不另要内存
    kept.clear()
    return sum(p.nbytes for p in trainable)


def _mark_gradient(live: LiveTensors, parameter: Tensor) -> None:
    assert parameter.grad is not None
    live.mark("gradients", [parameter.grad])
