"""评测：一批批窗口流过，每个模型逐时效地预报，每个（起报时间，时效，通道）的统计量写进文件，最后才合成成绩。

模型旁边总有持续性预报和气候态，在完全相同的窗口上。多进程时各算各的批，零号进程按批的次序收下，结果与一个进程逐位相同。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from engine.cases.collect import Collector
from engine.device import Span, elapsed, now
from engine.evaluation.baselines import CLIMATOLOGY
from engine.evaluation.kept import Kept
from engine.evaluation.task import BlownUp, Scored, Task, standardize_thresholds
from engine.forecasting.members import Ensemble, ensemble
from engine.one_pass import Check
from engine.parallel import together
from engine.verification.verifier import SUMS
from util.batch import Batch, DataSpec
from util.calendar import time_text
from util.data.batches import split_batches
from util.data.feed import feed
from util.grid import latitude_weights
from util.scores.metrics import pair_statistics, rank_counts, zonal_spectrum
from util.scores.regional import Cells, make_cells

Found = dict[tuple[str, str], Tensor]  # 一批的结果，见 score_lead


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
    check = together(fabric, check)
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
    """一批窗口：各模型逐时效地往前走，每走一步就算统计量，不留下整段预报（要存盘、要画的除外）。

    结果留在设备上，这一批走完才一起取到主机，中途不等设备。
    """
    spec, weights = task.spec, latitude_weights(task.spec.latitudes).to(device)
    thresholds = standardize_thresholds(task.thresholds, spec).to(device)
    masks = torch.from_numpy(np.stack([*task.regions.values()])).to(device) if task.regions else None
    cells = None if masks is None else make_cells(masks, weights)
    spans: dict[str, list[Span]] = {name: [] for name in task.models}
    rolls = {name: timed(roll_model(task, name, batch), spans[name], device) for name in task.models}
    found: list[Found] = []  # 各时效的
    kept = Kept(task, row, len(batch.time), weights)
    cases = Collector(task.cases, task.judged, kept.rows)
    alive = {name: torch.ones(len(batch.time), dtype=torch.bool, device=device) for name in task.models}
    init_hours = task.init_hours[row : row + len(batch.time)]
    for lead, hours in enumerate(spec.leads(task.steps)):
        truth, valid = batch.future[:, lead], batch.valid[:, spec.frames_in + lead]  # (B, C, H, W)、(B, C)
        forecasts = {name: next(roll) for name, roll in rolls.items()}  # 各 (B, M, C, H, W)
        found.append(score_lead(task, forecasts, truth, valid, init_hours + hours, weights, thresholds, cells, alive))
        cases.take(lead, forecasts, truth, valid, alive, forecasts[CLIMATOLOGY][:, 0])
        kept.take(lead, forecasts[task.judged], truth.masked_fill(~valid[..., None, None], float("nan")))
    results = fetch({key: torch.stack([one[key] for one in found]) for key in found[0]})
    finite = {name: results["finite", name] for name in task.models}
    check_finite(finite, batch.time[:, spec.frames_in - 1], spec)
    statistics: dict[str, dict[str, np.ndarray]] = {name: {} for name in task.models}
    for name, key in (key for key in results if key[0] in statistics):
        statistics[name][key] = results[name, key].swapaxes(0, 1)  # (B, L, C[, R])
    return Scored(
        row,
        statistics,
        {name: results["spectrum", name] for name in ("truth", *task.models)},
        results.get(("ranks", task.judged)),
        {key: values for key, values in results.items() if key[0] in SUMS},
        [BlownUp(name, row + i, lead) for name, good in finite.items() for i, lead in first_lost(good)],
        kept.series(),
        kept.pictures(),
        kept.fields(batch),
        {name: sum(elapsed(*span) for span in found) for name, found in spans.items()},
        cases.found(),
    )


def score_lead(
    task: Task,
    forecasts: Mapping[str, Tensor],
    truth: Tensor,
    valid: Tensor,
    valid_hours: np.ndarray,
    weights: Tensor,
    thresholds: Tensor,
    cells: Cells | None,
    alive: dict[str, Tensor],
) -> Found:
    """一批的一个时效；forecasts: 各 (B, M, C, H, W)；truth: (B, C, H, W)；valid: (B, C)；valid_hours: (B,) UTC。

    （模型，统计量）→ (B, C) 或 (B, C, R)，无效的场为 NaN；（finite，模型）→ (B,)，预报到这个时效为止处处有限；
    （spectrum，模型或 truth）→ (C, K)、（ranks，模型）→ (C, M + 1) 与 Verifier.lead 的各种和：大家都有效的场之和。

    Args:
        alive: 模型 → (B,)，到上一个时效为止处处有限；这里改成到这个时效为止。
    """
    found: Found = {}
    normal = forecasts[CLIMATOLOGY][:, 0]
    pairs = pair_statistics(forecasts, truth, normal, weights, thresholds, cells=cells)
    for name, statistics in pairs.items():
        square = statistics["square"].float()  # 文件里是单精度，那里放不下的也是爆掉；真值总是有限的
        alive[name] = found["finite", name] = alive[name] & square.isfinite().all(1)
    keep = valid & torch.stack([*alive.values()]).all(0)[:, None]  # 大家都有效的场，(B, C)
    asked = task.verifier.lead(forecasts, truth, normal, keep, valid_hours, cells) if task.verifier else {}
    for name in forecasts:
        scored = pairs[name] | {key: values for (model, key), values in asked.items() if model == name}
        lost = ~(valid & alive[name][:, None])
        for key, values in scored.items():
            found[name, key] = values.masked_fill(lost.view(*lost.shape, *[1] * (values.ndim - 2)), float("nan"))
    found |= {key: values for key, values in asked.items() if key[0] in SUMS}
    for name, fields in {"truth": truth[:, None], **forecasts}.items():
        power = zonal_spectrum(fields, weights, task.spec.closes_circle).mean(1)  # (B, C, K)
        found["spectrum", name] = power.where(keep[..., None], 0.0).sum(0)
    if task.options.members > 1:
        ranks = rank_counts(forecasts[task.judged], truth, weights)
        found["ranks", task.judged] = ranks.where(keep[..., None], 0.0).sum(0)
    return found


def fetch(found: Found) -> dict[tuple[str, str], np.ndarray]:
    """一次取到主机，都成了 float64。"""
    flat = torch.cat([values.flatten().double() for values in found.values()]).cpu()
    parts = flat.split([values.numel() for values in found.values()])
    return {key: part.view(found[key].shape).numpy() for key, part in zip(found, parts, strict=True)}


def roll_model(task: Task, name: str, batch: Batch) -> Iterator[Tensor]:
    """一个模型在一批窗口上逐时效的预报 (B, M, C, H, W)；基线只有一个成员，被评的有 options.members 个。"""
    options, time = task.options, batch.time[:, : task.spec.frames_in]
    wanted = Ensemble(options.members if name == task.judged else 1, options.perturb, options.smooth, task.seed)
    return ensemble(task.models[name], batch.history, time, task.steps, task.spec, wanted, limit=task.batch_size)


def timed(frames: Iterator[Tensor], spans: list[Span], device: torch.device) -> Iterator[Tensor]:
    """每个时效的预报的起止记进 spans。"""
    while True:
        begin = now(device)
        frame = next(frames, None)
        if frame is None:
            return
        spans.append((begin, now(device)))
        yield frame


def check_finite(finite: Mapping[str, np.ndarray], init: Tensor, spec: DataSpec) -> None:
    """模型的第一次预报必须处处有限，滚下去的才可能爆掉；finite: 模型 → (L, B)；init (B,) 是起报时间。"""
    for lead, hours in enumerate(spec.leads(min(spec.frames_out, len(next(iter(finite.values())))))):
        for name, good in finite.items():
            if not good[lead].all():
                hour = int(init[int(good[lead].argmin())])
                made = f"{name}: the forecast from {time_text(hour)} UTC"
                raise ValueError(f"{made} holds non-finite values at +{hours} h")


def first_lost(finite: np.ndarray) -> list[tuple[int, int]]:
    """(L, B) → 爆掉的各窗口与它头一个不是处处有限的时效。"""
    return [(i, int(finite[:, i].argmin())) for i in np.flatnonzero(~finite.astype(bool).all(0)).tolist()]
