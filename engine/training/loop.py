"""训练：打开数据 → 预检 → 循环（走一步、存、验证、选优、停） → 用最优权重在测试集上对照基线计分、画图。"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext

import torch

from engine.device import (
    deterministic,
    device_name,
    float32_matmuls,
    kept_memory,
    peak_memory,
    random_now,
    reset_peak_memory,
)
from engine.memory.advice import announce, explained, settled
from engine.memory.estimate import Machine, changed, this_machine
from engine.objective import channel_weights, make_objective, objective_loss, rolled
from engine.one_pass import fit_one_pass, measured_changes
from engine.optim import follow_step, follow_validation
from engine.parallel import from_main, together
from engine.progress import Progress
from engine.seeds import training_seeds
from engine.training.finish import finish
from engine.training.meter import Launched, Meter
from engine.training.preflight import preflight
from engine.training.resume import find_resume
from engine.training.run import (
    Run,
    copy_from_last,
    epoch_batches,
    keep_bad_step,
    make_fabric,
    open_run,
    save,
    save_for_later,
    time_to_save,
)
from engine.training.shapes import record_shapes, shape_table
from engine.training.state import NonFinite, State, train_step
from engine.training.validation import BASELINES, baseline_losses, validation_loss
from models import build_config, check_first_stage
from models.interface import OnePass
from util.batch import Batch
from util.calendar import time_text
from util.cli import only_new_garbage
from util.config import RunConfig, eval_batch_size
from util.data.batches import share_batches
from util.data.dataset import WeatherData
from util.data.feed import feed
from util.data.origin import DataError
from util.signals import Interrupted, catch_signals

log = logging.getLogger("ar_pred")
HELPFUL = {"predict": "tendency", "last_group_share": 0.9}  # 有这些选项的模型，量过总是好得多


def train(
    config: RunConfig, config_path: str, resume: str | None, verify: bool = True, reproducible: bool = False
) -> int:
    """一次完整的训练；返回退出码（被信号停下时是 128 + 信号）。

    verify: resume 的检查点核对校验和；reproducible: 只用每次结果都相同的算法。

    Raises:
        ValueError: 配置、数据、检查点的任何一处不对，或损失不再有限。
    """
    build_config(config.model, config_path)  # 拼错的模型键要在读数据之前报出来
    fabric = make_fabric(config)
    with ExitStack() as held, catch_signals() as stop, only_new_garbage(), kept_memory():
        content, name = find_resume(fabric, config, config_path, resume, held, verify)
        if content is None:
            check_first_stage(config.model)  # 续训不再需要它
        machine = this_machine(fabric.device, config.run.devices)  # 模型造好之前
        config = from_main(fabric, lambda: settled(config, content, machine))
        held.enter_context(explained(config, machine))
        run = open_run(config, config_path, name, fabric, content, stop)
        if fabric.is_global_zero:
            announce_memory(run, machine, fresh=content is None)
        try:
            with float32_matmuls(config.train.matmul_precision), deterministic(reproducible):
                if content is None:
                    start_fresh(run)
                elif not content["progress"]["batches"]:  # 上一次可能恰好死在存与复制之间
                    save(run)
                    copy_from_last(run)
                run.wandb.wait()
                fit(run)
            finish(run)
            return 0
        except Interrupted as signal:
            log.warning("stopped by %s; %s", signal, save_for_later(run))
            run.wandb.finish()
            fabric.barrier()  # 一起走：谁先以 143 退出，起它们的就把没走的杀掉
            return 128 + signal.signum
        except BadStep as error:  # 各进程都停在这一步：损失是合起来的
            keep_bad_step(run, error.launched.starts, error.launched.random)
            raise
        except DataError:
            if fabric.world_size == 1:  # 别的进程未必停在同一处，不能一起存
                log.warning("%s", save_for_later(run))
            raise
        finally:
            run.wandb.finish()
            if run.metrics:
                run.metrics.close()


class BadStep(NonFinite):
    """走不下去的一步；progress 已回到它之前。"""

    def __init__(self, message: str, launched: Launched) -> None:
        super().__init__(message)
        self.launched = launched


def announce_memory(run: Run, machine: Machine, fresh: bool) -> None:
    """一步要多少内存，日志里一行；续训不预检。"""
    config = run.config if fresh else changed(run.config, preflight=False)
    announce(config.model_copy(update={"model": run.state.options(config)}), machine)


def start_fresh(run: Run) -> None:
    """新的运行：参数个数、预检、每一层的形状；不动运行的随机状态，也不动模型（BatchNorm、码本）。"""
    model, spec = run.state.model, run.data.spec
    count = sum(p.numel() for p in model.parameters())
    log.info("model %s: %d parameters", run.config.model["name"], count)
    for split in run.data.segments:
        log.info("split %s: %d samples, windows of %d", split, run.data.samples(split), spec.window)
    if run.config.train.preflight:
        preflight(run.fabric, run.config, spec, run.checkpoint_dir)
    if run.state.optimizer is not None:
        log_shapes(run)


def log_shapes(run: Run) -> None:
    """第一批走一次前向：每一层的输入与输出形状。"""
    fabric, model = run.fabric, run.state.model
    batches = epoch_batches(run.config, run.data, fabric, 0)
    first = next(share_batches(batches, fabric.global_rank, fabric.world_size, run.config.train.accumulate))
    batch = fabric.to_device(run.data.windows.__getitems__(first))
    devices = [fabric.device] if fabric.device.type == "cuda" else []
    model.eval()
    seen = torch.compiler.set_stance("force_eager") if run.config.train.compile else nullcontext()  # 编译了就看不见
    recorded = record_shapes(run.state.module)
    with torch.random.fork_rng(devices), torch.no_grad(), fabric.autocast(), seen, recorded as rows:
        objective_loss(model, batch, run.state.objective)
    log.info("input and output shapes of every layer (first batch):\n%s", shape_table(rows))


def fit(run: Run) -> None:
    """循环本身：每轮训练，验证，存 last，更好就复制成 best，隔几轮留一份，太久不进步就停。"""
    config, progress = run.config, run.state.progress
    model, ema = run.state.model, run.state.ema
    if not progress.step and isinstance(model, OnePass) and model.needs_pass:
        fit_one_pass(model, run.data, eval_batch_size(config), together(run.fabric, run.stop.check))
        if ema is not None:  # 一步不走的时候，副本不会自己跟上
            ema.module.load_state_dict(run.state.model.state_dict())
    if run.state.optimizer is None or not config.train.epochs:  # 没有梯度步的模型：存下就好
        progress.best_step = progress.step
        save(run)
        copy_from_last(run)
        return
    know_objective(run)
    patience = config.train.early_stop_epochs
    reset_peak_memory(run.fabric.device)
    while progress.epoch < config.train.epochs and not (patience and progress.stale >= patience):
        train_epoch(run)
        number = progress.epoch + 1
        if number % config.train.validate_every_epochs == 0 or number == config.train.epochs:
            validate_epoch(run)
        progress.epoch, progress.batches = number, 0
        progress.loss_sum, progress.loss_count = 0.0, 0
        progress.peak_memory = max(progress.peak_memory, peak_memory(run.fabric.device))
        progress.device = device_name(run.fabric.device)
        save(run)
        copy_from_last(run)


def know_objective(run: Run) -> None:
    """权重里由数据定的：变化的标准差由零号进程在第一步之前量一次，随进度存下，续训不再量。"""
    config, progress = run.config, run.state.progress
    if config.train.objective.channels != "tendency":
        return
    if progress.changes is None:
        progress.changes = from_main(run.fabric, lambda: measured_changes(run.data, config, run.stop.check))
    run.state.objective = make_objective(config.train.objective, run.data.spec, progress.changes, run.fabric.device)
    weights = channel_weights(config.train.objective, run.data.spec, progress.changes)
    log.info("weights of the channels: %s", ", ".join(
        f"{channel} {weight * len(weights) / sum(weights):.3g}"
        for channel, weight in zip(run.data.spec.channels, weights, strict=True)
    ))  # fmt: skip


def train_epoch(run: Run) -> None:
    """从 progress.batches 处接着走完这一轮。"""
    config, progress, fabric, scheduler = run.config, run.state.progress, run.fabric, run.state.scheduler
    assert scheduler is not None
    batches = epoch_batches(config, run.data, fabric, progress.epoch)
    parts, ahead = config.train.accumulate, frames_ahead(config, run.data, progress, len(batches))
    mine = list(share_batches(batches[progress.batches :], fabric.global_rank, fabric.world_size, parts))
    loader = feed(run.data, mine, fabric.device, ahead)
    meter = Meter(progress, config.train.epochs, len(batches), fabric.is_global_zero)
    try:
        for i, starts in enumerate(batches[progress.batches :]):
            if time_to_save(run):
                settle(run, meter)
                save(run)
            pieces = mine[i * parts : (i + 1) * parts]
            micro = prepared(meter.wait(loader, parts), pieces, starts, config, run.state)
            random = random_now(fabric.device)
            step = train_step(fabric, run.state, config, micro)
            settle(run, meter)
            progress.step += 1
            progress.batches += 1
            meter.launched = Launched(step, starts, float(scheduler.get_last_lr()[0]), random)
    finally:  # 收到信号、数据读不出，走过的一步也要算
        settle(run, meter)
    meter.close()
    if lost := run.data.windows.reader.try_again():
        log.warning(
            "epoch %d: %d fields could not be read and were interpolated or left out; from here on they are read again",
            progress.epoch + 1, lost,
        )  # fmt: skip


def frames_ahead(config: RunConfig, data: WeatherData, progress: Progress, count: int) -> int:
    """这一轮（count 步）的窗口读几帧目标；一轮里一样长，续训也是。"""
    first = progress.step - progress.batches
    return data.spec.ahead(config.train.objective.rollout.most(first, first + count))


def prepared(
    batches: Sequence[Batch], pieces: Sequence[Sequence[int]], starts: Sequence[int], config: RunConfig, state: State
) -> list[Batch]:
    """下一步的各小批（起点是 pieces，合起来是全局批 starts）：随机数的种子，滚几步。"""
    progress, steps = state.progress, config.train.objective.rollout.at(state.progress.step)
    seeds = [training_seeds(config.run.seed, progress.epoch, progress.step, starts, piece) for piece in pieces]
    return [rolled(batch._replace(seeds=s), steps, state.objective) for batch, s in zip(batches, seeds, strict=True)]


def settle(run: Run, meter: Meter) -> None:
    """读出上一步的数，算进 progress（它总是正好算到这一步），记下来。设备这时已经在算下一步，不必等主机。

    Raises:
        BadStep: 那一步坏了，跳过的已有 train.skip_nonfinite 步；progress 与学习率回到它之前。
    """
    launched, meter.launched = meter.launched, None
    if launched is None:
        return
    progress, scheduler = run.state.progress, run.state.scheduler
    try:
        terms = launched.step.terms()
    except NonFinite as error:
        most, where = run.config.train.skip_nonfinite, where_it_broke(error, progress, launched.starts)
        if progress.skipped < most:
            progress.skipped += 1
            meter.step({"loss": math.nan}, launched)
            log.warning("%s; left out, %d of train.skip_nonfinite = %d", where, progress.skipped, most)
            return
        progress.step -= 1
        progress.batches -= 1
        assert scheduler is not None
        follow_step(scheduler, progress.step)
        raise BadStep(where, launched) from None
    progress.loss_sum += terms["loss"]
    progress.loss_count += 1
    row = meter.step(terms, launched)
    if progress.step % run.config.log.every_steps == 0:
        run.record("train", row)


def where_it_broke(error: NonFinite, progress: Progress, starts: Sequence[int]) -> str:
    """坏的那一步在哪里（progress 已数过它）；starts 是这一批窗口的起点。"""
    first = ", ".join(time_text(h) for h in starts[:4])
    place = f"epoch {progress.epoch + 1}, batch {progress.batches}; windows from {first} ..."
    return f"{error} at step {progress.step} ({place}); no weights were changed"


def validate_epoch(run: Run) -> None:
    """验证一次，记下是否更好。"""
    progress = run.state.progress
    objective, check = run.state.objective, run.stop.check
    value = validation_loss(run.state.best_model, objective, run.data, "val", run.config, run.fabric, check)
    if not math.isfinite(value):
        raise ValueError(
            f"validation loss {value} is not finite after epoch {progress.epoch + 1}, step {progress.step}"
        )
    if progress.persistence is None:
        measured = baseline_losses(run.state.model, objective, run.data, run.config, run.fabric, check)
        progress.persistence, progress.climatology = (measured.get(name) for name in BASELINES)
    assert run.state.scheduler is not None
    follow_validation(run.state.scheduler, value)
    improved = progress.best is None or value < progress.best
    if improved:
        progress.best, progress.best_step, progress.stale = value, progress.step, 0
    else:
        progress.stale += run.config.train.validate_every_epochs
    mean = progress.loss_sum / max(1, progress.loss_count)
    run.record("train", {"epoch_loss": mean})
    found = {name: getattr(progress, name) for name in BASELINES}
    beside = {name: loss for name, loss in found.items() if loss is not None}
    run.record("val", {"loss": value, **beside})
    star = " (best)" if improved else ""
    aside = "".join(f", {name} {loss:.5f}" for name, loss in beside.items())
    log.info(
        "epoch %d, step %d: train loss %.5f, val loss %.5f%s%s",
        progress.epoch + 1, progress.step, mean, value, star, aside,
    )  # fmt: skip
    if remark := no_better(run.config, progress):
        log.warning("%s", remark)


def no_better(config: RunConfig, progress: Progress) -> str | None:
    """三分之一走完时还没有好过持续性预报：说一次，点名试什么。"""
    number, epochs = progress.epoch + 1, config.train.epochs
    before = number - config.train.validate_every_epochs
    if progress.persistence is None or progress.best is None or progress.best < progress.persistence:
        return None
    if not 3 * before < epochs <= 3 * number:  # 走过三分之一之后的头一次验证
        return None
    options = dict(build_config(config.model))
    switches = [f"model.{key}={value}" for key, value in HELPFUL.items() if options.get(key, value) != value]
    tries = f"try {' and '.join(switches)}, or " if switches else "try "
    return (
        f"a third of the training is over, and the lowest validation loss, {progress.best:.5g}, is not below that of "
        f"persistence, {progress.persistence:.5g}: {tries}another train.lr; what helped is in docs/models.md (AR_pred: "
        "docs/ar_pred.md)"
    )
