"""优化器与学习率曲线。"""

from __future__ import annotations

import math

from torch import optim
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from models.interface import Network, Undecayed
from util.training_config import Schedule, TrainConfig


def make_optimizer(model: Network, config: TrainConfig) -> optim.Optimizer:
    """Adam（默认）或 AdamW；权重衰减只作用于矩阵，偏置、归一化和编码不衰减。

    二维的编码（位置、尺度的表）由模型在 no_decay 里点名。各步合成一个核（fused），处理器上也是：
    它当场乘裁剪的系数、坏的一步一个数也不动（state.py 的 update），不必多过一遍梯度，也不必等设备。
    """
    tables = set(model.no_decay) if isinstance(model, Undecayed) else set()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name for name, p in trainable.items() if p.ndim >= 2 and name not in tables}
    groups = [
        {
            "params": [p for name, p in trainable.items() if (name in matrices) == decays],
            "weight_decay": config.weight_decay if decays else 0.0,
            "decays": decays,
        }
        for decays in (True, False)
    ]
    kind = {"adam": optim.Adam, "adamw": optim.AdamW}[config.optimizer]
    return kind(
        [g for g in groups if g["params"]],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        fused=True,
    )


def make_scheduler(optimizer: optim.Optimizer, schedule: Schedule, lr: float, total_steps: int) -> LRScheduler:
    """每次参数更新走一步（follow_step）；plateau 不看步数，每次验证走一步（follow_validation）。

    constant：线性预热（没有写 warmup_steps 就没有），之后不变；cosine：线性预热后余弦降到 min_ratio；
    onecycle：PyTorch 的默认形状，自己有预热，不看 warmup_steps；plateau：降到 min_ratio 为止。

    Raises:
        ValueError: 预热比整个训练还长。
    """
    if schedule.name == "onecycle":
        return OneCycleLR(optimizer, max_lr=lr, total_steps=max(1, total_steps))
    if schedule.name == "plateau":
        return ReduceLROnPlateau(
            optimizer, factor=schedule.factor, patience=schedule.patience, min_lr=lr * schedule.min_ratio
        )
    warmup, floor = schedule.warmup_steps, schedule.min_ratio
    if total_steps and warmup >= total_steps:
        raise ValueError(f"train.schedule.warmup_steps = {warmup}, but the whole training has {total_steps} steps")

    def ratio(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if schedule.name == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, ratio)


def follow_step(scheduler: LRScheduler, step: int) -> None:
    """走过了 step 次参数更新：学习率到那里的；几种曲线都只看步数，退回去也一样。"""
    if not isinstance(scheduler, ReduceLROnPlateau):
        scheduler.last_epoch = step - 1
        scheduler.step()


def follow_validation(scheduler: LRScheduler, loss: float) -> None:
    """验证过了一次。"""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(loss)


def set_weight_decay(optimizer: optim.Optimizer, config: TrainConfig, step: int, total_steps: int) -> None:
    """第 step 次参数更新（从 0 数，共 total_steps 次）用的权重衰减；不作衰减的一直是零。"""
    first, last = config.weight_decay, config.final_weight_decay
    if last is None:
        return
    done = min(1.0, step / max(1, total_steps - 1))
    for group in optimizer.param_groups:
        if group["decays"]:
            group["weight_decay"] = last + (first - last) * 0.5 * (1 + math.cos(math.pi * done))
