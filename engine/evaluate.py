"""评测：同样的窗口、同样的尺子，模型旁边总有持续性预报和气候态。"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from tqdm import tqdm

from engine.rollout import rollout
from engine.state import load_forecaster, reduce_tensor
from models import build_model
from models.interface import OnePass
from util.batch import DataSpec
from util.checkpoint import load_checkpoint
from util.config import RunConfig, validate
from util.data.dataset import WeatherData, open_data
from util.data.windows import all_starts, make_loader, split_batches
from util.logger import setup_logging
from util.metrics import ErrorSums, latitude_weights

log = logging.getLogger("ar_pred")
BASELINES = ("persistence", "climatology")
Check = Callable[[], None]


def fit_one_pass(model: Any, data: WeatherData, batch_size: int, check: Check = lambda: None) -> None:
    """OnePass 模型看一遍步长 1 的训练窗口，再求解。"""
    batches = split_batches(all_starts(data.segments["train"], data.spec.window), batch_size)
    loader = make_loader(data.windows, batches, data.config.workers, pin=False)
    for batch in tqdm(loader, "one pass", len(batches), leave=False):
        check()
        model.accumulate(batch)
    model.solve()


def fit_baselines(
    data: WeatherData, batch_size: int, device: torch.device, check: Check = lambda: None
) -> dict[str, Any]:
    """持续性预报与气候态：和别的模型一样造、一样用。"""
    models: dict[str, Any] = {}
    for name in BASELINES:
        models[name] = build_model({"name": name}, data.spec)
        if isinstance(models[name], OnePass):
            fit_one_pass(models[name], data, batch_size, check)
        models[name].to(device).eval()
    return models


@torch.inference_mode()
def score(
    models: Mapping[str, Any],
    data: WeatherData,
    split: str,
    batch_size: int,
    fabric: Fabric,
    stride: int = 1,
    steps: int | None = None,
    check: Check = lambda: None,
) -> dict[str, ErrorSums]:
    """每个模型在同一批窗口上的误差累计；插值得来的真值不计。概率模型取一个成员。

    Args:
        steps: 滚动预报的帧数；None 即 frames_out。
    """
    spec = data.spec
    steps = steps or spec.frames_out
    starts = all_starts(data.segments[split], spec.frames_in + steps, stride)
    if not starts.size:
        raise ValueError(f"split {split}: no run of {spec.frames_in} + {steps} samples without a gap; lower --steps")
    sums = {name: ErrorSums(steps, spec.num_channels) for name in models}
    weights = latitude_weights(spec.latitudes).to(fabric.device)
    mine = starts[fabric.global_rank :: fabric.world_size]
    batches = split_batches(mine, batch_size)
    loader = make_loader(
        data.windows.with_future(steps),
        batches,
        data.config.workers,
        data.config.pin_memory and fabric.device.type == "cuda",
    )
    for batch in tqdm(loader, f"score {split}", len(batches), leave=False, disable=fabric.global_rank > 0):
        check()
        batch = fabric.to_device(batch)
        for name, model in models.items():
            forecast = rollout(model, batch.history, batch.time[:, : spec.frames_in], steps, spec)[:, 0]
            if not torch.isfinite(forecast).all():
                raise ValueError(f"{name}: the forecast holds non-finite values (batch of windows in split {split})")
            sums[name].add(forecast, batch.future, batch.valid[:, spec.frames_in :], weights)
    if fabric.world_size > 1:
        for one in sums.values():
            one.square, one.plain, one.count = (reduce_tensor(fabric, t, "sum").cpu() for t in one.tensors())
    return sums


def validation_loss(
    model: Any, data: WeatherData, split: str, config: RunConfig, fabric: Fabric, check: Check
) -> float:
    """模型自己的 loss 在一个划分上的平均（按有效目标数加权），eval 模式、固定种子，不动全局随机数。"""
    starts = all_starts(data.segments[split], data.spec.window, config.data.eval_stride)
    batches = split_batches(starts[fabric.global_rank :: fabric.world_size], eval_batch_size(config, fabric))
    loader = make_loader(
        data.windows, batches, config.data.workers, config.data.pin_memory and fabric.device.type == "cuda"
    )
    total = torch.zeros(2, dtype=torch.float64)
    devices = [fabric.device] if fabric.device.type == "cuda" else []
    training = model.training
    model.eval()
    with torch.inference_mode(), torch.random.fork_rng(devices), fabric.autocast():
        torch.manual_seed(config.run.seed)
        for batch in tqdm(loader, split, len(batches), leave=False, disable=fabric.global_rank > 0):
            check()
            weight = float(batch.valid[:, data.spec.frames_in :].double().sum())
            total += torch.tensor([float(model.loss(fabric.to_device(batch))["loss"]) * weight, weight])
    model.train(training)
    loss_sum, count = reduce_tensor(fabric, total, "sum").tolist()
    return loss_sum / count if count else float("nan")


def eval_batch_size(config: RunConfig, fabric: Fabric) -> int:
    """评测时每个进程一批的窗口数：与训练的小批相同，显存已知够用。"""
    return max(1, config.train.batch_size // (config.train.accumulate * fabric.world_size))


def score_table(sums: Mapping[str, ErrorSums], spec: DataSpec) -> dict[str, Any]:
    """误差累计 → 普通值：每个模型每个通道每个时效的 RMSE（物理单位），与各基线之比的通道平均；没有可计的场为 None。"""
    rmse = {name: one.rmse(spec.std) for name, one in sums.items()}  # (L, C)
    table: dict[str, Any] = {
        "units": dict(zip(spec.channels, spec.units, strict=True)),
        "lead_hours": [spec.interval_hours * (i + 1) for i in range(len(next(iter(rmse.values()))))],
        "rmse": {n: {c: _plain(r[:, i]) for i, c in enumerate(spec.channels)} for n, r in rmse.items()},
        "mse_standardized": dict(zip(sums, _plain(torch.tensor([s.mse() for s in sums.values()])), strict=True)),
        "fields_scored": {c: next(iter(sums.values())).count[:, i].tolist() for i, c in enumerate(spec.channels)},
        "mean_rmse_ratio": {},
    }
    for base in BASELINES:
        if base in rmse:
            table["mean_rmse_ratio"][base] = {
                n: _plain((r / rmse[base]).nanmean(1)) for n, r in rmse.items() if n not in BASELINES
            }
    return table


def _plain(values: torch.Tensor) -> list[float | None]:
    """JSON 里没有 NaN，写 null。"""
    return [None if math.isnan(v) else v for v in values.tolist()]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table_text(table: Mapping[str, Any], lead: int = 0) -> str:
    """一张对齐的文字表：每行一个通道，每列一个模型。"""
    names = list(table["rmse"])
    lines = [f"latitude-weighted RMSE at +{table['lead_hours'][lead]} h" + "".join(f"{n:>24}" for n in names)]
    for channel, units in table["units"].items():
        values = "".join(f"{_number(table['rmse'][n][channel][lead], '.5g'):>24}" for n in names)
        lines.append(f"{channel + ' [' + units + ']':<{len(lines[0]) - 24 * len(names)}}{values}")
    for base, ratios in table["mean_rmse_ratio"].items():
        shown = ", ".join(f"{n} {_number(r[lead], '.4f')}" for n, r in ratios.items())
        lines.append(f"mean over channels of RMSE / {base} RMSE: {shown}")
    return "\n".join(lines)


def evaluate_checkpoint(path: str, split: str, stride: int, steps: int | None, out: Path) -> Path:
    """evaluate.py：检查点在一个划分上的成绩，写 metrics.json；数据来自检查点里记下的目录树。"""
    out.mkdir(parents=True, exist_ok=True)
    setup_logging(out / "evaluate.log")
    content = load_checkpoint(path)
    config: RunConfig = validate(RunConfig, content["config"], path)
    fabric = Fabric(accelerator=config.run.device, devices=1)
    model, spec = load_forecaster(content, fabric.device)
    data = open_data(config.data, out / "missing.csv")
    check_same_data(spec, data.spec, path)
    batch_size = eval_batch_size(config, fabric)
    name = config.model["name"]
    models = {**fit_baselines(data, batch_size, fabric.device), name: model}
    table = score_table(score(models, data, split, batch_size, fabric, stride, steps), spec)
    table |= {"checkpoint": path, "split": split, "stride": stride}
    for lead in range(len(table["lead_hours"])):
        log.info("%s\n%s", split, table_text(table, lead))
    target = out / "metrics.json"
    target.write_text(json.dumps(table, indent=1, allow_nan=False), encoding="utf-8")
    log.info("scores: %s", target)
    return target


def check_same_data(saved: DataSpec, found: DataSpec, path: str) -> None:
    """检查点与数据必须是同一组通道、网格、间隔和统计量。

    Raises:
        ValueError: 第一处不同，两边的值都给出。
    """
    for key, value in saved.to_dict().items():
        other = found.to_dict()[key]
        if value != other:
            raise ValueError(f"{path} was trained with {key} = {_brief(value)}, the data set has {_brief(other)}")


def _brief(value: Any) -> str:
    return (
        str(value)
        if not isinstance(value, list) or len(value) <= 12
        else f"{len(value)} values from {value[0]} to {value[-1]}"
    )
