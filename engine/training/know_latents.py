"""阶段一的收尾：梯度步走完之后，用最优的权重把训练的每一帧看一遍，潜变量的统计量写回 best.ckpt。

在训练之后而不是之前：编码器学着，潜变量就在变。阶段二拿到的 best.ckpt 因此才是完整的。
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from engine.loading import Content, load_forecaster
from engine.one_pass import Check
from engine.parallel import together
from models.interface import Autoencoder, is_codec
from util.batch import Batch
from util.checkpoint import forecast_weights, load_checkpoint, save_checkpoint
from util.config import eval_batch_size
from util.data.batches import every_frame
from util.data.feed import feed

if TYPE_CHECKING:
    from engine.training.run import Run

log = logging.getLogger("ar_pred")


@torch.no_grad()
def observe(model: Autoencoder, batches: Iterable[Batch]) -> None:
    """看过这些窗口，求出统计量。

    Raises:
        ValueError: 有的潜变量没有变化。
    """
    model.eval()
    for batch in batches:
        model.observe_latents(batch)
    model.solve_latents()


def know_latents(run: Run, check: Check) -> None:
    """best.ckpt 里还没有潜变量的统计量就求出来写回去；有了就不动，所以重复做也无妨。

    各进程各看一份，求解时合计（solve_latents），零号进程写；中途停下时 best.ckpt 还是原来的，续训再从头看。
    """
    fabric, data = run.fabric, run.data
    content = load_checkpoint(run.best)
    model, _ = load_forecaster(content, fabric.device)
    assert is_codec(model)
    if not model.latents_known:
        batches = every_frame(
            data.segments["train"], data.spec.window, eval_batch_size(run.config), changes=model.encodes == "tendency"
        )
        shared = len(batches) // fabric.world_size  # 每个进程都有这么多批，有的多一批
        batches = batches[fabric.global_rank :: fabric.world_size]
        loader = feed(data, batches, fabric.device)

        stop = together(fabric, check)

        def moved() -> Iterable[Batch]:
            bar = tqdm(loader, "latents", len(batches), leave=False, disable=not fabric.is_global_zero)
            for number, batch in enumerate(bar):
                if number < shared:
                    stop()
                yield batch

        observe(model, moved())
        if fabric.is_global_zero:
            write_back(content, model)
            save_checkpoint(run.best, content)
            log.info("latents %s: mean and standard deviation over the training frames, in %s",
                     " x ".join(map(str, model.latent_shape)), run.best)  # fmt: skip
    fabric.barrier()


def write_back(content: Content, model: Autoencoder) -> None:
    """模型里变了的（只有统计量）写进检查点的内容：原样的权重与 EMA 里都是同一份。"""
    before = forecast_weights(content)
    for name, value in model.state_dict().items():
        value = value.cpu()
        if not torch.equal(value, before[name]):
            content["model"][name] = value
            if content["ema"] is not None:
                content["ema"][f"module.{name}"] = value
