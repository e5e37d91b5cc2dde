"""训练里用到估计的两处：开头的一行；内存用尽时的表，与放得下的最大的批。"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from engine.imagined import imagined_spec
from engine.loading import Content
from engine.memory.estimate import Machine, changed, estimate
from engine.memory.fitting import largest_batch
from engine.memory.table import memory_line, memory_table
from models import without_files
from util.cli import out_of_memory
from util.config import RunConfig, check_batch_size, least_batch

log = logging.getLogger("ar_pred")


def announce(config: RunConfig, machine: Machine) -> None:
    """日志里的一行；放不下时再加一行警告，训练照样走：估计不是量出来的。model 段须是不必读文件的。"""
    try:
        found = estimate(config, machine)
    except ValueError as error:  # 只有形状走不下去的模型照样训练
        log.warning("%s", error)
        return
    log.info("%s", memory_line(found, config.train.windows, machine))
    if not found.fits:
        most = largest_batch(config, machine, below=config.train.windows)
        log.warning("this may not fit; the largest train.batch_size that would: %s", most or "none")


def settled(config: RunConfig, content: Content | None, machine: Machine) -> RunConfig:
    """train.batch_size: auto → 放得下的最大的；续训的是检查点里的那个，与这时有多少内存无关。

    Raises:
        ValueError: 一个小批一个窗口也放不下；检查点里的那个这几个进程切不开。
    """
    if config.train.batch_size != "auto":
        return config
    if content is not None:
        config = changed(config, batch_size=content["config"]["train"]["batch_size"])
        check_batch_size(config)
        return config
    described = config.model_copy(update={"model": without_files(config.model, imagined_spec(config.data))})
    if most := largest_batch(described, machine):
        return changed(config, batch_size=most)
    least = changed(described, batch_size=least_batch(config))
    raise ValueError(
        f"train.batch_size = auto: not even {least.train.batch_size} fits, a step needs "
        f"{estimate(least, machine).summary} by estimate; take a smaller model or another train.precision"
    )


@contextmanager
def explained(config: RunConfig, machine: Machine) -> Iterator[None]:
    """里面内存用尽时，表进日志，一行说出放得下的最大的批。

    Raises:
        ValueError: 用尽了。
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        log.debug("stopped:", exc_info=error)
        traceback.clear_frames(error.__traceback__)  # 各层手里的张量都放下
        size = config.train.windows
        config = config.model_copy(update={"model": without_files(config.model, imagined_spec(config.data))})
        log.info("%s", memory_table(config, machine))
        found = estimate(config, machine)
        most = largest_batch(config, machine, below=size // 2 + 1 if found.fits else size)  # 估计错了，只少一个没有用
        smaller = f"try {most}" if found.fits else f"the largest below it that would fit is {most}"
        advice = smaller if most else "no smaller one would fit"
        raise ValueError(
            f"out of memory with train.batch_size = {size}, a step needs {found.summary} "
            f"by estimate; {advice} (other settings: the table in the log)"
        ) from None
