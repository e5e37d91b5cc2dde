"""一次运行手里的东西，怎样打开；一轮的批次表；什么时候存、存成哪几份。"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from engine.device import check_device, set_random, to_host
from engine.loading import Content, check_same_data
from engine.parallel import (
    check_launch,
    from_first_here,
    launched_processes,
    plugins,
    reduce_tensor,
)
from engine.sharding import sharded_strategy
from engine.training.resume import reach, windows_fingerprint
from engine.training.snapshot import restore, snapshot, write, writes_shards
from engine.training.start import check_start, read_initial
from engine.training.state import State, build_state
from engine.versions import versions
from util.atomic import replacing
from util.batch import DataSpec
from util.checkpoint import copy_checkpoint
from util.config import RunConfig, check_batch_size, eval_batch_size
from util.data.batches import epoch_starts, split_batches
from util.data.dataset import WeatherData, open_data
from util.data.feed import batch_bytes, check_shared_memory
from util.logger import MetricsLog, WandbRun, open_wandb, setup_logging
from util.signals import Interrupted, StopFlag, die_with_parent
from util.strict import dump_yaml

log = logging.getLogger("ar_pred")


def make_fabric(config: RunConfig) -> Fabric:
    """设备、精度与多进程由 Fabric 管；循环是我们自己的。"""
    run = config.run
    check_device(run.device)
    check_launch(run.devices, run.num_nodes)
    check_batch_size(config)
    fabric = Fabric(
        accelerator=run.device,
        devices=run.devices,
        num_nodes=run.num_nodes,
        strategy=sharded_strategy(run.devices * run.num_nodes) if run.strategy == "fsdp" else run.strategy,
        plugins=plugins(config.train.precision, run.device),
    )
    fabric.launch()
    if fabric.local_rank and launched_processes() is None:  # 零号进程起的
        die_with_parent()
    return fabric


@dataclass
class Run:
    """一次运行手里的东西。"""

    config: RunConfig
    name: str
    fabric: Fabric
    data: WeatherData
    state: State
    metrics: MetricsLog | None  # 只有零号进程记
    wandb: WandbRun
    stop: StopFlag
    saved_at: float
    asked: Callable[[], list[float]] = lambda: [0.0, 0.0]  # 上一步各进程合起来的：收到的信号，要不要存

    @property
    def log_dir(self) -> Path:
        return Path(self.config.log.dir) / self.name

    @property
    def checkpoint_dir(self) -> Path:
        return Path(self.config.checkpoint.dir) / self.name

    @property
    def last(self) -> Path:
        return self.checkpoint_dir / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.checkpoint_dir / "best.ckpt"

    def record(self, split: str, values: dict[str, float]) -> None:
        """同样的标量进 metrics.csv 和 W&B。"""
        if self.metrics is not None:
            if self.metrics.gone:
                restore_log(self)
            progress = self.state.progress
            self.metrics.log(progress.step, progress.epoch, split, values)
            self.wandb.log(progress.step, {f"{split}/{name}": value for name, value in values.items()})


def restore_log(run: Run) -> None:
    """记录的文件夹在训练当中被删去、移走了：当场重建，写过的数与日志都在。"""
    assert run.metrics is not None
    run.metrics.restore()
    write_config(run.log_dir, run.config)
    log.warning("%s was removed during the run and is made anew; its figures and missing.csv are lost", run.log_dir)


def write_config(folder: Path, config: RunConfig) -> None:
    """补全了的配置，接着训练、另起同样的一个都用它。"""
    with replacing(folder / "config.yaml") as temporary:
        temporary.write_text(dump_yaml(config.model_dump()), encoding="utf-8")


def open_run(
    config: RunConfig, config_path: str, name: str, fabric: Fabric, content: Content | None, stop: StopFlag
) -> Run:
    """建好日志、数据、模型；续训时读回状态。"""
    log_dir = Path(config.log.dir) / name
    main = fabric.is_global_zero
    setup_logging(log_dir / "train.log" if main else None, quiet=not main)
    log.info("run %s, config %s, log in %s", name, config_path, log_dir)
    log.debug("resolved config:\n%s\nversions: %s", dump_yaml(config.model_dump()), versions())
    initial = read_initial(config.train.init) if config.train.init and content is None else None  # 写错了不必等数据
    data = open_data(config.data, log_dir / "missing.csv", main, fabric.device, partial(from_first_here, fabric))
    if content is not None:
        check_same_data(DataSpec.from_dict(content["spec"]), data.spec, f"{name}/last.ckpt")
    check_reach(config, data)
    check_room(config, data, fabric)
    fabric.seed_everything(config.run.seed, verbose=False)  # 处处同样的初值：分片时各留各的一片
    total_steps = config.train.epochs * len(epoch_batches(config, data, fabric, 0))
    state = build_state(fabric, config, data.spec, total_steps, initial, content)
    if fabric.global_rank:
        fabric.seed_everything(config.run.seed + fabric.global_rank, verbose=False)
    if content is None:
        check_start(state.model, state.first_stage, config.model, initial)
    else:
        restore(fabric, state, content)
        log.info("resumed at epoch %d, step %d", state.progress.epoch, state.progress.step)
        if state.progress.batches and content["windows"] != windows_fingerprint(config, data):
            log.warning("files were added or removed, the windows are not the same: this epoch starts again")
            state.progress.batches, state.progress.loss_sum, state.progress.loss_count = 0, 0.0, 0
    if main:
        write_config(log_dir, config)
    fabric.barrier()
    metrics = MetricsLog(log_dir / "metrics.csv", state.progress.step if content else None) if main else None
    wandb_config = config.log.wandb if main else config.log.wandb.model_copy(update={"mode": "disabled"})
    wandb = open_wandb(wandb_config, name, config.model_dump(), log)
    return Run(config, name, fabric, data, state, metrics, wandb, stop, time.monotonic())


def check_reach(config: RunConfig, data: WeatherData) -> None:
    """训练、验证、测试都放得下滚得最长的窗口。

    Raises:
        ValueError: 哪个划分放不下。
    """
    frames = reach(config, data.spec)
    for split, segments in data.segments.items():
        longest = max(piece.size for piece in segments)
        if longest < frames:
            asks = f"train.objective.rollout: {config.train.objective.rollout.longest} steps need"
            asks = f"data.lead_hours = {config.data.lead_hours}: they need" if config.data.lead_hours else asks
            raise ValueError(
                f"{asks} windows of {frames} frames; the longest run without a gap in data.splits.{split} has {longest}"
            )


def check_room(config: RunConfig, data: WeatherData, fabric: Fabric) -> None:
    """训练与验证的批都要放得进共享内存，走完一轮才发现就晚了；一台机器上的各进程分这一块。

    Raises:
        ValueError: 放不下，见 check_shared_memory。
    """
    size = max(config.train.windows // (fabric.world_size * config.train.accumulate), eval_batch_size(config))
    windows = data.windows.with_future(reach(config, data.spec) - data.spec.frames_in)
    batch = batch_bytes(windows, size, fabric.device)
    check_shared_memory(batch, config.data.workers, processes=fabric.world_size // config.run.num_nodes)


def epoch_batches(config: RunConfig, data: WeatherData, fabric: Fabric, epoch: int) -> list[list[int]]:
    """这一轮的全局批次表，起点够滚最长的一次；不够每个进程每个小批一个窗口的零头不要。

    Raises:
        ValueError: 一批也凑不出来。
    """
    starts = epoch_starts(
        data.segments["train"], data.spec.window, config.data.windows, config.run.seed, epoch, reach(config, data.spec)
    )
    least = fabric.world_size * config.train.accumulate
    batches = [b for b in split_batches(starts, config.train.windows) if len(b) >= least]
    if not batches:
        raise ValueError(
            f"data.splits.train gives {len(starts)} windows an epoch, fewer than devices x train.accumulate = {least}"
        )
    return batches


def time_to_save(run: Run) -> bool:
    """到了定时存档的时候没有；收到过信号就抛 Interrupted。

    多进程时一起决定：存档要大家都来。看的是上一步各进程说的，主机才不必等设备。
    """
    due = time.monotonic() - run.saved_at > 60 * run.config.checkpoint.every_minutes
    if run.fabric.world_size == 1:
        run.stop.check()
        return due
    signum, saving = run.asked()
    own = torch.tensor([float(run.stop.signum), float(due and not saving)])
    run.asked = to_host(reduce_tensor(run.fabric, own, "max"))
    if signum:  # 自己收到的要等大家都知道
        raise Interrupted(int(signum))
    return bool(saving)


def save(run: Run) -> None:
    """写 last.ckpt；各进程都要来。"""
    write_state(run, run.last, writes_shards(run.config, run.fabric))
    run.saved_at = time.monotonic()


def write_state(run: Run, path: Path, sharded: bool, **changes: Any) -> None:
    """现在的状态存成 path，changes 盖在上面；各进程都要来。"""
    content = snapshot(run.fabric, run.state, run.config, run.data.spec, run.name, sharded)
    content["windows"] = windows_fingerprint(run.config, run.data)
    write(run.fabric, path, content | changes, sharded)


def copy_from_last(run: Run) -> None:
    """一轮之末刚存的 last 若正是最优的、或该留一份的那一轮，就复制出来；重复做也无妨。各进程都要来。"""
    progress, source = run.state.progress, run.last
    copies = [run.best] if progress.best_step == progress.step else []
    if progress.epoch and progress.epoch % run.config.checkpoint.every_epochs == 0:
        copies.append(run.checkpoint_dir / f"epoch-{progress.epoch:04d}.ckpt")
    if copies and writes_shards(run.config, run.fabric):  # last 不是完整的一个文件：头一份另写
        source = copies.pop(0)
        write_state(run, source, sharded=False)
    if run.fabric.is_global_zero:
        for copy in copies:
            copy_checkpoint(source, copy)


def save_for_later(run: Run) -> str:
    """中途停下时存一次；返回怎样接着跑。没有梯度步的模型没有可接的，重跑就是。"""
    if run.state.optimizer is None:
        return "nothing to resume, run it again"
    save(run)
    return f"resume with: {resume_command(run)}"


def resume_command(run: Run) -> str:
    """从 last.ckpt 接着训练的命令。"""
    return f"python train.py --config {run.log_dir / 'config.yaml'} --resume {run.last}"


def keep_bad_step(run: Run, starts: Sequence[int], random: list[torch.Tensor]) -> None:
    """存下坏的一步之前的状态，另存一份重走它要的；说怎样看它、怎样接着训练。各进程都要来。

    starts 是那一步全局批的起点，random 是走之前的 random_now：从这里接着走，就是没停过的。重走不看优化器与 EMA。
    """
    set_random(random, run.fabric.device)
    save(run)
    number = run.state.progress.step + 1
    dump = run.checkpoint_dir / f"bad-step-{number}.ckpt"
    write_state(run, dump, sharded=False, optimizer=None, ema=None, bad_step=list(starts))
    log.warning("step %d is kept: python -m engine.studies.replay %s walks it again, names the layer", number, dump)
    log.warning(
        "go on in a new run at a lower rate: python train.py --config %s run.name=%s-again train.init=%s train.lr=%.2g",
        run.log_dir / "config.yaml", run.name, run.last, run.config.train.lr / 10,
    )  # fmt: skip
    log.warning(
        "or leave that step out: %s train.skip_nonfinite=%d", resume_command(run), run.config.train.skip_nonfinite + 1
    )
