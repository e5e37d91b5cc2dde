"""预检：随机数据走一步、存、读回、再走一步，与没中断的那一步比，末了真实大小走一步；夜里的训练才不会死在第一个检查点上。"""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import suppress
from pathlib import Path

import torch
from lightning_fabric import Fabric

from engine.device import check_device
from engine.imagined import imagined_spec, random_batch
from engine.memory.advice import explained
from engine.memory.estimate import changed, this_machine
from engine.objective import objective_loss, rolled
from engine.one_pass import solve_one_pass
from engine.training.know_latents import observe
from engine.training.snapshot import restore, snapshot, write, writes_shards
from engine.training.start import read_initial
from engine.training.state import NonFinite, State, build_state, train_step
from models.interface import OnePass, can_forecast, is_codec
from util.atomic import InUse, reserved, temporary_name
from util.batch import Batch, DataSpec, window_time
from util.checkpoint import load_checkpoint, random_state, set_random_state
from util.config import RunConfig, least_batch

FEW = 2  # 窗口
SMOKE, YOUNG = "smoke", 60  # 秒：刚建立的也许还没有占上
log = logging.getLogger("ar_pred")


def preflight(fabric: Fabric, config: RunConfig, spec: DataSpec, folder: Path) -> None:
    """用随机批次检查存取、续训、预报，用真实大小的检查训练；前后的全局随机状态不变。

    逐位相同几个窗口就看得出；真实大小的一步放在末了：优化器的状态已经在，内存最满。

    Args:
        folder: 写临时检查点的地方（就是正式检查点要写的地方，磁盘满在这里就会发现）。

    Raises:
        ValueError: 损失不是有限值、预报形状不对、读回之后的一步与没中断的一步不同。
    """
    before = random_state()
    # 被杀时留下的，由下一个主人清掉
    place = folder / fabric.broadcast(temporary_name("preflight"))
    path = place / "last.ckpt"
    try:
        place.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.run.seed)
        size = max(1, config.train.windows // (fabric.world_size * config.train.accumulate))
        steps = config.train.objective.rollout.longest  # 走到那里才用尽内存，就晚了
        batches = [fabric.to_device(random_batch(spec, size, steps)) for _ in range(config.train.accumulate)]
        count = size if config.train.compile else FEW  # 编译的见到两种大小，就再编译一遍
        few = [Batch(*(part[:count] for part in batch.tensors)) for batch in batches]
        state = build_state(fabric, config, spec, total_steps=1_000_000)
        if isinstance(state.model, OnePass):
            far = [fabric.to_device(random_batch(spec, size, max(spec.jumps)))] if spec.jumps else []  # 时效还没有抽的
            one = far or [rolled(batches[0], 1, state.objective)]
            solve_one_pass(state.model, one, one)
        state.progress.step = state.total_steps - 1  # 由粗到细的模型到这时是全部的尺度，内存最大
        if state.optimizer is not None:
            train_step(fabric, state, config, few).terms()
        if is_codec(state.model):
            observe(state.model, batches)
        sharded = writes_shards(config, fabric)
        write(fabric, path, snapshot(fabric, state, config, spec, "preflight", sharded), sharded)
        expected = next_result(fabric, state, config, spec, few)
        del state
        content = load_checkpoint(path, gather=False)
        again = build_state(fabric, config, spec, total_steps=1_000_000, saved=content)
        restore(fabric, again, content)
        fabric.barrier()
        found = next_result(fabric, again, config, spec, few)
        tolerance = 0.0 if fabric.device.type == "cpu" else 1e-3 * abs(expected)  # 显卡上的归约次序不定
        if abs(found - expected) > tolerance:
            raise ValueError(
                f"preflight: the step after restoring gives {found:.9g}, without interruption {expected:.9g}"
            )
        if again.optimizer is not None:
            train_step(fabric, again, config, batches).terms()
        log.info("preflight passed: one step, save, restore, equal next step (%.6g), a step of %d windows", found, size)
    except NonFinite as error:
        raise NonFinite(f"preflight, a step on random numbers: {error}") from None
    finally:
        if fabric.is_global_zero:
            shutil.rmtree(place, ignore_errors=True)
        set_random_state(before)


def next_result(fabric: Fabric, state: State, config: RunConfig, spec: DataSpec, batches: list[Batch]) -> float:
    """接下来的一步的损失（没有梯度步的模型：预报的平均，或全冻结的阶段一的损失），并检查预报的形状。"""
    loss = train_step(fabric, state, config, batches).terms()["loss"] if state.optimizer is not None else None
    state.model.eval()
    with torch.inference_mode(), fabric.autocast():
        if not can_forecast(state.model):
            return float(objective_loss(state.model, batches[0], state.objective)["loss"]) if loss is None else loss
        one = batches[0].history[:1]
        forecast = state.model.forecast(one, window_time(batches[0].time[:1, : spec.frames_in], spec))
    shape = (1, 1, spec.frames_out, spec.num_channels, spec.height, spec.width)
    if tuple(forecast.shape) != shape:
        raise ValueError(f"preflight: forecast has shape {tuple(forecast.shape)}, expected {shape}")
    return float(forecast.mean()) if loss is None else loss


def smoke(config: RunConfig) -> int:
    """--smoke：只做预检，不需要数据，一分钟以内。"""
    if config.train.batch_size == "auto":
        config = changed(config, batch_size=least_batch(config))
    run = config.run
    check_device(run.device)
    if run.devices * run.num_nodes > 1 or run.strategy == "fsdp":
        log.warning("--smoke runs in one process: run.devices, run.num_nodes and run.strategy are not tried")
    fabric = Fabric(accelerator=run.device, devices=1, precision=config.train.precision)
    caches = Path(config.data.cache_dir)
    remove_abandoned(caches)
    place = caches / temporary_name(SMOKE)  # 两个 --smoke 各用各的
    with explained(config, this_machine(fabric.device)), reserved(place):
        try:
            preflight(fabric, config, imagined_spec(config.data), place)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    if config.train.init:
        read_initial(config.train.init)  # 大小与缩小了的模型不同，只看它在不在、读不读得出
    return 0


def remove_abandoned(caches: Path) -> None:
    """从前的 --smoke 被杀时留下的；还有主人的不动。"""
    for place in caches.glob(f".{SMOKE}.*.tmp"):
        with suppress(InUse, FileNotFoundError):
            if time.time() - place.stat().st_mtime > YOUNG:
                with reserved(place):
                    shutil.rmtree(place, ignore_errors=True)
