"""训练的状态 ⇄ 检查点的内容（张量与普通值）。"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from lightning_fabric import Fabric
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from engine.loading import Content
from engine.progress import Progress
from engine.training.state import State
from engine.versions import versions
from models import check_weights
from util.batch import DataSpec
from util.checkpoint import random_state, set_random_state
from util.config import RunConfig

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)  # 单进程、DDP、FSDP2 存出同样的文件


def snapshot(fabric: Fabric, state: State, config: RunConfig, spec: DataSpec, run_name: str) -> Content:
    """状态 → 张量与普通值；每个进程都要调用（聚合权重与各自的随机状态）。"""
    ranks: list[Any] = [random_state()]
    if fabric.world_size > 1:
        ranks = [None] * fabric.world_size
        torch.distributed.all_gather_object(ranks, random_state())
    optimizer = None
    if state.adam is not None and state.adam.state:  # 一步没走时取状态会偷偷走一步空的，Adam 的步数就错了
        optimizer = get_optimizer_state_dict(state.module, state.adam, options=FULL)
    return {
        "run": run_name,
        "model": get_model_state_dict(state.module, options=FULL),
        "optimizer": optimizer,
        "scheduler": state.scheduler.state_dict() if state.scheduler else None,
        "ema": state.ema.state_dict() if state.ema else None,
        "progress": asdict(state.progress),
        "init": state.init,
        "first_stage": state.first_stage,
        "model_options": state.options(config),
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
    check_weights(state.model, content["model"], "checkpoint does not fit this model")
    set_model_state_dict(state.module, content["model"], options=FULL)
    if state.adam is not None and state.scheduler is not None:
        if content["optimizer"] is not None:
            for group in content["optimizer"]["param_groups"]:
                group["fused"] = True  # 从前的检查点在处理器上没有用它
            set_optimizer_state_dict(state.module, state.adam, content["optimizer"], options=FULL)
        state.scheduler.load_state_dict(content["scheduler"])
    if state.ema is not None:
        state.ema.load_state_dict(content["ema"])
    state.progress = Progress(**content["progress"])
    state.init = content.get("init", "")  # 有 train.init 之前的检查点没有这一项
    if len(content["random"]) == fabric.world_size:
        set_random_state(content["random"][fabric.global_rank])
