"""评测：一批批窗口流过，每个模型逐时效地预报，每个（起报时间，时效，通道）的统计量写进文件，最后才合成成绩。

模型旁边总有持续性预报和气候态，在完全相同的窗口上。多进程时各算各的批，零号进程按批的次序收下，结果与一个进程逐位相同。
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from lightning_fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from engine.evaluation.baselines import CLIMATOLOGY
from engine.evaluation.kept import Kept
from engine.evaluation.task import Scored, Task, standardize_thresholds
from engine.forecasting.members import Ensemble, ensemble
from engine.one_pass import Check
from util.batch import Batch
from util.calendar import time_text
from util.data.batches import split_batches
from util.data.feed import feed
from util.grid import latitude_weights
from util.scores.metrics import pair_statistics, rank_counts, zonal_spectrum


@torch.inference_mode()
def score(
    task: Task, fabric: Fabric, check: Check = lambda: None, keep: Callable[[Scored], Scored] | None = None
) -> Iterator[Scored]:
    """逐批给出结果，按窗口的次序；只有零号进程得到，别的进程也要走完。keep: 各进程的结果送走之前先由它过手。

    Raises:
        ValueError: 预报里有非有限值，指明模型、起报时间与时效。
    """
    size = max(1, task.batch_size // task.options.members)
    batches = split_batches(task.starts, size)
    mine = batches[fabric.global_rank :: fabric.world_size]
    loader = feed(task.data, mine, fabric.device, task.steps)
    bar = tqdm(total=len(batches), desc=f"score {task.options.split}", leave=False, disable=fabric.global_rank > 0)
    for first in range(0, len(batches), fabric.world_size):
        check()
        number = first + fabric.global_rank
        one = None
        if number < len(batches):
            one = score_batch(task, next(loader), number * size, fabric.device)
            one = keep(one) if keep else one
        for scored in gather(fabric, one):
            bar.update()
            yield scored
    bar.close()


def gather(fabric: Fabric, one: Scored | None) -> list[Scored]:
    """各进程这一轮的结果，收到零号进程，按批的次序；别的进程得到空表。"""
    if fabric.world_size == 1:
        return [one] if one is not None else []
    everyone: list[Scored | None] = [None] * fabric.world_size
    torch.distributed.gather_object(one, everyone if fabric.is_global_zero else None)
    return [scored for scored in everyone if scored is not None] if fabric.is_global_zero else []


def score_batch(task: Task, batch: Batch, row: int, device: torch.device) -> Scored:
    """一批窗口：各模型逐时效地往前走，每走一步就算统计量，不留下整段预报（要存盘、要画的除外）。"""
    spec, weights = task.spec, latitude_weights(task.spec.latitudes).to(device)
    thresholds = standardize_thresholds(task.thresholds, spec).to(device)
    periodic = spec.closes_circle
    seconds = dict.fromkeys(task.models, 0.0)
    rolls = {name: timed(roll_model(task, name, batch), name, seconds, device) for name in task.models}
    parts: dict[str, list[dict[str, Tensor]]] = {name: [] for name in task.models}
    spectra: dict[str, list[Tensor]] = {name: [] for name in ("truth", *task.models)}
    ranks: list[Tensor] = []
    kept = Kept(task, row, len(batch.time))
    for lead in range(task.steps):
        truth, valid = batch.future[:, lead], batch.valid[:, spec.frames_in + lead]  # (B, C, H, W)、(B, C)
        keep = valid.double()
        normal = next(rolls[CLIMATOLOGY])
        for name in task.models:
            forecast = normal if name == CLIMATOLOGY else next(rolls[name])  # (B, M, C, H, W)
            check_finite(forecast, name, batch.time[:, spec.frames_in - 1], spec.interval_hours * (lead + 1))
            found = pair_statistics(forecast, truth, normal[:, 0], weights, thresholds)
            parts[name].append({k: v.masked_fill(~valid, float("nan")).cpu() for k, v in found.items()})
            power = zonal_spectrum(forecast, weights, periodic).mean(1)  # (B, C, K)
            spectra[name].append((power * keep[..., None]).sum(0).cpu())
            if name == task.judged:
                kept.take(lead, forecast, truth.masked_fill(~valid[..., None, None], float("nan")))
                if task.options.members > 1:
                    counts = rank_counts(forecast, truth, weights)
                    ranks.append((counts * keep[..., None]).sum(0).cpu())
        power = zonal_spectrum(truth, weights, periodic)
        spectra["truth"].append((power * keep[..., None]).sum(0).cpu())
    return Scored(
        row,
        {name: {k: torch.stack([p[k] for p in leads], 1).numpy() for k in leads[0]} for name, leads in parts.items()},
        {name: torch.stack(leads).numpy() for name, leads in spectra.items()},
        torch.stack(ranks).numpy() if ranks else None,
        kept.series(),
        kept.pictures(),
        kept.fields(batch),
        seconds,
    )


def roll_model(task: Task, name: str, batch: Batch) -> Iterator[Tensor]:
    """一个模型在一批窗口上逐时效的预报 (B, M, C, H, W)；基线只有一个成员，被评的有 options.members 个。"""
    options, time = task.options, batch.time[:, : task.spec.frames_in]
    wanted = Ensemble(options.members if name == task.judged else 1, options.perturb, options.smooth, task.seed)
    return ensemble(task.models[name], batch.history, time, task.steps, task.spec, wanted, limit=task.batch_size)


def timed(frames: Iterator[Tensor], name: str, seconds: dict[str, float], device: torch.device) -> Iterator[Tensor]:
    """预报所花的时间记进 seconds；显卡上要等它做完。"""
    while True:
        begin = time.perf_counter()
        frame = next(frames, None)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[name] += time.perf_counter() - begin
        if frame is None:
            return
        yield frame


def check_finite(forecast: Tensor, name: str, init: Tensor, lead: int) -> None:
    """预报 (B, M, C, H, W) 必须处处有限；init (B,) 是起报时间。"""
    bad = ~torch.isfinite(forecast).flatten(1).all(1)  # (B,)
    if bad.any():
        hour = int(init[bad.nonzero()[0, 0]])
        raise ValueError(f"{name}: the forecast from {time_text(hour)} UTC holds non-finite values at +{lead} h")
