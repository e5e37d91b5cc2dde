"""训练的状态 ⇄ 检查点：内容是张量与普通值，写成一个文件，或各进程各写一片。"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from secrets import token_hex
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
from util.checkpoint import (
    SHARDS,
    flat,
    random_state,
    read_shards,
    remove_shards,
    save_checkpoint,
    set_random_state,
    write_shards,
)
from util.config import RunConfig
from util.files.records import read_record

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)  # 单进程、DDP、FSDP2 存出同样的文件
PIECES = StateDictOptions()  # 各进程自己的一片


def snapshot(
    fabric: Fabric, state: State, config: RunConfig, spec: DataSpec, run_name: str, sharded: bool = False
) -> Content:
    """状态 → 张量与普通值；每个进程都要调用（聚合权重与各自的随机状态）。

    张量完整的只在零号进程；sharded 时各是自己的一片，没有抄过，接着训练就会变。
    """
    options = PIECES if sharded else FULL
    ranks: list[Any] = [random_state()]
    if fabric.world_size > 1:
        ranks = [None] * fabric.world_size
        torch.distributed.all_gather_object(ranks, random_state())
    optimizer, balance = None, state.objective.balance
    if state.adam is not None and state.adam.state:  # 一步没走时取状态会偷偷走一步空的，Adam 的步数就错了
        optimizer = get_optimizer_state_dict(state.module, state.adam, options=options)
    return {
        "run": run_name,
        "model": get_model_state_dict(state.module, options=options),
        "optimizer": optimizer,
        "scheduler": state.scheduler.state_dict() if state.scheduler else None,
        "ema": get_model_state_dict(state.ema, options=options) if state.ema else None,
        "progress": {**asdict(state.progress), "balance": balance and balance.means.tolist()},
        "init": state.init,
        "first_stage": state.first_stage,
        "model_options": state.options(config),
        "random": ranks,
        "config": config.model_dump(),
        "spec": spec.to_dict(),
        "versions": versions(),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
    }


def writes_shards(config: RunConfig, fabric: Fabric) -> bool:
    """last.ckpt 是不是各进程各写一片；只有一个进程时就是一个文件。"""
    return config.checkpoint.sharded and fabric.world_size > 1


def write(fabric: Fabric, path: Path, content: Content, sharded: bool) -> None:
    """snapshot 的结果（sharded 相同）存成 path；各进程都要来，存好了才一起走。

    Raises:
        OSError: 写不下；从前的那一个还在。
    """
    if sharded:
        content = write_shards(path.with_name(f"{path.stem}-{fabric.broadcast(token_hex(4))}{SHARDS}"), content)
    if fabric.is_global_zero:
        save_checkpoint(path, content)
        remove_shards(path, content.get("shards"))
    fabric.barrier()


def restore(fabric: Fabric, state: State, content: Content) -> None:
    """snapshot 的逆；进程数变了时随机状态对不上，只恢复其余的。

    Raises:
        ValueError: 检查点的权重与模型对不上；没有学习率曲线、EMA 的状态。
    """
    options = FULL
    if "shards" in content:
        options = PIECES
        content |= read_pieces(state, content)
    else:
        check_weights(state.model, content["model"], "checkpoint does not fit this model")
        set_model_state_dict(state.module, content["model"], options=FULL)
    for part, mine in (("scheduler", state.scheduler), ("ema", state.ema)):
        if mine is not None and content[part] is None:
            raise ValueError(f"checkpoint does not fit this training: it holds no {part}")
    if state.adam is not None and state.scheduler is not None:
        if content["optimizer"] is not None:
            for group in content["optimizer"]["param_groups"]:
                group["fused"] = True  # 从前的检查点在处理器上没有用它
            set_optimizer_state_dict(state.module, state.adam, content["optimizer"], options=options)
        state.scheduler.load_state_dict(content["scheduler"])
    if state.ema is not None:
        set_model_state_dict(state.ema, content["ema"], options=options)
    state.progress = read_record(Progress, content["progress"], "checkpoint: progress")
    state.bad.fill_(state.progress.skipped)
    if state.objective.balance is not None and state.progress.balance is not None:
        state.objective.balance.means.copy_(torch.tensor(state.progress.balance))
    state.init = content.get("init", "")  # 有 train.init 之前的检查点没有这一项
    if len(content["random"]) == fabric.world_size:
        set_random_state(content["random"][fabric.global_rank])


def read_pieces(state: State, content: Content) -> Content:
    """分片的检查点里，各进程自己的一片：权重就地读进模型与 EMA；优化器的在返回的内容里。"""
    optimizer = content["optimizer"]
    if optimizer is not None:
        assert state.adam is not None
        held = get_optimizer_state_dict(state.module, state.adam, options=PIECES)
        optimizer = {**held, "param_groups": optimizer["param_groups"]}
    pieces = {
        "model": get_model_state_dict(state.module, options=PIECES),
        "ema": get_model_state_dict(state.ema, options=PIECES) if state.ema else None,
        "optimizer": optimizer,
    }
    read_shards(content, flat(pieces))
    return pieces
