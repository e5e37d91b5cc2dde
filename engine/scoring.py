"""评测：一批批窗口流过，每个模型逐时效地预报，每个（起报时间，时效，通道）的统计量写进文件，最后才合成成绩。

模型旁边总有持续性预报和气候态，在完全相同的窗口上。多进程时各算各的批，零号进程按批的次序收下，结果与一个进程逐位相同。
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Generator, Tensor
from tqdm import tqdm

from engine.baselines import Check
from engine.rollout import perturb, roll
from engine.views import View
from util.batch import Batch, DataSpec
from util.config import nearest
from util.data.calendar import time_text
from util.data.dataset import WeatherData
from util.data.feed import feed
from util.data.windows import all_starts, split_batches
from util.metrics import latitude_weights, pair_statistics, rank_counts, zonal_spectrum


@dataclass(frozen=True)
class Options:
    """一次评测的选项，与命令行同名。thresholds: 通道 → 物理单位的阈值；set: 改过的模型选项。"""

    split: str = "test"
    stride: int = 1
    steps: int | None = None
    members: int = 1
    perturb: float = 0.0
    smooth: float = 0.0
    thresholds: Mapping[str, tuple[float, ...]] | None = None
    save: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """评测一个划分要用的全部：judged 是被评的模型的名字，其余是基线。"""

    models: Mapping[str, Any]
    judged: str
    data: WeatherData
    options: Options
    steps: int
    starts: np.ndarray
    batch_size: int
    seed: int
    view: View
    thresholds: Tensor  # (C, K) 物理单位，不足 K 个的补 NaN

    @property
    def spec(self) -> DataSpec:
        return self.data.spec

    @property
    def init_hours(self) -> np.ndarray:
        """各窗口的起报时间（最后一帧历史），UTC。"""
        back = (self.spec.frames_in - 1) * self.spec.interval_hours
        return self.starts + back - self.data.config.utc_offset_hours


class Scored(NamedTuple):
    """一批窗口的结果，都在内存里；row 是第一个窗口的序号。"""

    row: int
    statistics: dict[str, dict[str, np.ndarray]]  # 模型 → 统计量 → (B, L, C)，无效的场为 NaN
    spectra: dict[str, np.ndarray]  # 模型与 truth → (L, C, K) 有效场之和
    ranks: np.ndarray | None  # (L, C, M + 1) 有效场之和
    series: dict[str, np.ndarray]  # truth、forecast → (B, L', C', P)
    pictures: dict[int, dict[str, np.ndarray]]  # 起报时间的序号 → truth、forecast → (L', C', h, w)
    fields: dict[str, np.ndarray]  # 要存盘的场，物理单位
    seconds: dict[str, float]  # 模型 → 预报所用的时间


def find_starts(data: WeatherData, split: str, steps: int, stride: int) -> np.ndarray:
    """一个划分的窗口起点。

    Raises:
        ValueError: 没有一段够长。
    """
    spec = data.spec
    starts = all_starts(data.segments[split], spec.frames_in + steps, stride)
    if not starts.size:
        longest = max(s.size for s in data.segments[split])
        raise ValueError(
            f"split {split}: the longest run without a gap has {longest} samples, a window needs frames_in + steps = "
            f"{spec.frames_in} + {steps}; --steps {longest - spec.frames_in} is the most"
        )
    return starts


def threshold_table(thresholds: Mapping[str, tuple[float, ...]] | None, spec: DataSpec) -> Tensor:
    """通道 → 阈值，排成 (C, K) float64，物理单位，不足 K 个的补 NaN。

    Raises:
        ValueError: 没有这个通道。
    """
    thresholds = thresholds or {}
    for channel in thresholds:
        if channel not in spec.channels:
            raise ValueError(f"--thresholds: no channel {channel!r}; {nearest(channel, spec.channels, 'channels')}")
    count = max(map(len, thresholds.values()), default=0)
    table = torch.full((spec.num_channels, count), float("nan"), dtype=torch.float64)
    for channel, values in thresholds.items():
        table[spec.channels.index(channel), : len(values)] = torch.tensor(values, dtype=torch.float64)
    return table


def standardize_thresholds(table: Tensor, spec: DataSpec) -> Tensor:
    """(C, K) 物理单位 → 标准化 float32，与读取器逐位同样的算法：恰好落在阈值上的数不能因舍入成了超过。"""
    mean, std = (torch.tensor(v, dtype=torch.float32)[:, None] for v in (spec.mean, spec.std))
    return (table.float() - mean) / std


@torch.inference_mode()
def score(task: Task, fabric: Fabric, check: Check = lambda: None) -> Iterator[Scored]:
    """逐批给出结果，按窗口的次序；只有零号进程得到，别的进程也要走完。

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
        for scored in gather(fabric, one):
            bar.update()
            yield scored
    bar.close()


def gather(fabric: Fabric, one: Scored | None) -> list[Scored]:
    """各进程这一轮的结果，收到零号进程，按批的次序；别的进程得到空表。"""
    if fabric.world_size == 1:
        return [one] if one is not None else []
    everyone: list[Any] | None = [None] * fabric.world_size if fabric.is_global_zero else None
    torch.distributed.gather_object(one, everyone)
    return [s for s in everyone if s is not None] if everyone else []


def score_batch(task: Task, batch: Batch, row: int, device: torch.device) -> Scored:
    """一批窗口：各模型逐时效地往前走，每走一步就算统计量，不留下整段预报（要存盘、要画的除外）。"""
    spec, weights = task.spec, latitude_weights(task.spec.latitudes).to(device)
    thresholds = standardize_thresholds(task.thresholds, spec).to(device)
    periodic = spec.closes_circle
    seconds = dict.fromkeys(task.models, 0.0)
    rolls = {name: timed(run_model(task, name, batch), name, seconds, device) for name in task.models}
    parts: dict[str, list[dict[str, Tensor]]] = {name: [] for name in task.models}
    spectra: dict[str, list[Tensor]] = {name: [] for name in ("truth", *task.models)}
    ranks: list[Tensor] = []
    kept = Kept(task, row, len(batch.time))
    for lead in range(task.steps):
        truth, valid = batch.future[:, lead], batch.valid[:, spec.frames_in + lead]  # (B, C, H, W)、(B, C)
        keep = valid.double()
        normal = next(rolls["climatology"])
        for name in task.models:
            forecast = normal if name == "climatology" else next(rolls[name])  # (B, M, C, H, W)
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
        kept.pictures,
        kept.fields(batch),
        seconds,
    )


def run_model(task: Task, name: str, batch: Batch) -> Iterator[Tensor]:
    """一个模型在一批窗口上逐时效的预报 (B, M, C, H, W)；基线只有一个成员，被评的有 options.members 个。"""
    spec, options = task.spec, task.options
    model, history, when = task.models[name], batch.history, batch.time[:, : spec.frames_in]
    count = options.members if name == task.judged else 1
    if count > 1 and options.perturb > 0:  # 初值扰动：每个窗口自己的种子，与怎样分批无关
        generators = [Generator().manual_seed(_seed(task.seed, int(t))) for t in when[:, -1].tolist()]
        noisy = perturb(history, options.perturb, count, generators, spec, options.smooth)
        rolled = roll(model, noisy, when.repeat_interleave(count, 0), task.steps, spec, limit=task.batch_size)
        for frame in rolled:  # (B·M, 1, C, H, W)
            yield frame.unflatten(0, (-1, count))[:, :, 0]
    else:
        generator = Generator().manual_seed(_seed(task.seed, int(when[0, -1])))
        yield from roll(model, history, when, task.steps, spec, count, generator, limit=task.batch_size)


def _seed(seed: int, hour: int) -> int:
    return int(np.random.SeedSequence([seed, hour % 2**32]).generate_state(1)[0])


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


class Kept:
    """一批里要画、要存的场。"""

    def __init__(self, task: Task, row: int, count: int) -> None:
        self.task = task
        self.rows = range(row, row + count)
        self.lines: dict[str, list[np.ndarray]] = {"forecast": [], "truth": []}
        self.pictures: dict[int, dict[str, np.ndarray]] = {}
        self.saved: dict[str, list[np.ndarray]] = {"forecast": [], "truth": []}

    def take(self, lead: int, forecast: Tensor, truth: Tensor) -> None:
        """被评模型的一个时效：forecast (B, M, C, H, W)，truth (B, C, H, W)，插值得来的为 NaN。"""
        view, spec = self.task.view, self.task.spec
        both = {"forecast": forecast.mean(1), "truth": truth}
        if lead in view.leads:
            for name, fields in both.items():
                self.lines[name].append(view.series(fields))
                for i, row in enumerate(self.rows):
                    if row in view.map_rows:
                        frames = self.pictures.setdefault(row, {})
                        new = view.picture(fields[i])[None]
                        frames[name] = np.concatenate([frames[name], new]) if name in frames else new
        if self.task.options.save:
            self.saved["forecast"].append(spec.to_physical(forecast).float().cpu().numpy())
            self.saved["truth"].append(spec.to_physical(truth).float().cpu().numpy())

    def series(self) -> dict[str, np.ndarray]:
        return {name: np.stack(leads, 1) for name, leads in self.lines.items()}

    def fields(self, batch: Batch) -> dict[str, np.ndarray]:
        """forecast (B, M, L, C, H, W)，truth (B, L, C, H, W)，valid (B, L, C)，要存 npy 时 history。"""
        if not self.task.options.save:
            return {}
        spec = self.task.spec
        fields = {
            "forecast": np.stack(self.saved["forecast"], 2),
            "truth": np.stack(self.saved["truth"], 1),
            "valid": batch.valid[:, spec.frames_in :].cpu().numpy(),
        }
        if "npy" in self.task.options.save:
            fields["history"] = spec.to_physical(batch.history).float().cpu().numpy()
        return fields
