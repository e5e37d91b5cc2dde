"""预报：检查点自带配置与统计量；历史帧按时刻从目录树取，或由 .npy 文件给出；写 npy、NetCDF 和图。"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.forecasting.perturbation import check_members, perturb
from engine.forecasting.rollout import rollout
from engine.loading import load_forecaster
from models.interface import can_forecast
from util.batch import DataSpec
from util.calendar import moment_of, parse_time, time_text
from util.checkpoint import load_checkpoint
from util.config import DataConfig, RunConfig, eval_batch_size
from util.data.dataset import open_origin
from util.data.index import Index, bridgeable
from util.data.reader import FieldReader
from util.data.windows import window_valid
from util.files.netcdf import write_forecast
from util.grid import latitude_weights
from util.logger import setup_logging
from util.plot.maps import forecast_figure
from util.plot.side_by_side import side_by_side_figures
from util.plot.style import save_figures
from util.scores.metrics import errors
from util.strict import validate

log = logging.getLogger("ar_pred")
MEMBERS_SHOWN = 4


def forecast(
    checkpoint: str,
    time: str | None,
    inputs: list[str],
    out: Path,
    steps: int | None,
    members: int,
    noise: float,
    smooth: float,
    changes: Sequence[str] = (),
) -> int:
    """inference.py：从一个初始时刻预报 steps 帧，写进 out。

    Args:
        time: 初始时刻，即最后一帧历史的 UTC 时刻；只给 inputs 时可以没有。
        inputs: `.npy` 文件，每个是一帧 (H, W, k)，或一个 (T_in, H, W, k)。
        noise, smooth: 初值扰动的标准差（标准化单位）与相关长度（度），确定性模型由它得到集合。
        changes: 改过的模型选项，见 models.change_options。

    Raises:
        ValueError: 检查点、时刻、输入的个数或形状不对，成员数要求不合理。
    """
    content = load_checkpoint(checkpoint)
    config: RunConfig = validate(RunConfig, content["config"], checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() and config.run.device != "cpu" else "cpu")
    model, spec = load_forecaster(content, device, changes)
    if not can_forecast(model):
        raise ValueError(f"{checkpoint}: this configuration of {config.model['name']} reconstructs, it cannot forecast")
    check_members(model, config.model["name"], members, noise, smooth)
    steps = steps or spec.frames_out
    init = parse_time(time) if time is not None else None
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    setup_logging(out / "inference.log")  # 读数据时补了什么也要记下
    if inputs:
        history, truth, valid = read_inputs(inputs, spec), None, None
    else:
        assert init is not None
        history, truth, valid = read_tree(config.data, spec, init, steps)
    limit = eval_batch_size(config)
    result = run_model(
        model, history, init, spec, steps, members, noise, smooth, config.run.seed, device, limit
    )  # (M, L, C, H, W)
    write_outputs(out, spec, result, truth, valid, init, checkpoint)
    return 0


@torch.inference_mode()
def run_model(
    model: Any,
    history: torch.Tensor,
    init: int | None,
    spec: DataSpec,
    steps: int,
    members: int,
    noise: float,
    smooth: float,
    seed: int,
    device: torch.device,
    limit: int,
) -> torch.Tensor:
    """(T_in, C, H, W) → (M, steps, C, H, W)，标准化，在 CPU 上；limit：一次至多几个成员，内存由它封顶。"""
    generator = torch.Generator().manual_seed(seed)
    back = torch.arange(1 - spec.frames_in, 1) * spec.interval_hours
    time = None if init is None else (init + back)[None].to(device)
    batch = history[None].to(device)  # (1, T_in, C, H, W)
    if noise:
        batch = perturb(history[None], noise, members, [generator], spec, smooth).to(device)  # (M, T_in, C, H, W)
        time = None if time is None else time.expand(members, -1)
        made = rollout(model, batch, time, steps, spec, limit=limit)[:, 0]  # (M, steps, C, H, W)
    else:
        made = rollout(model, batch, time, steps, spec, members, generator, limit)[0]
    if not torch.isfinite(made).all():
        raise ValueError("the forecast holds non-finite values; check the inputs and their standardisation")
    return made.float().cpu()


def read_inputs(paths: list[str], spec: DataSpec) -> torch.Tensor:
    """`.npy` 文件 → (T_in, C, H, W) 标准化；文件的标准化状态与训练时目录树的相同。

    Raises:
        ValueError: 读不了、形状或个数不对、含非有限值；说明要的和给的。
    """
    frame = (spec.height, spec.width, spec.num_channels)
    wanted = f"expected {spec.frames_in} files of shape {frame}, or one of {(spec.frames_in, *frame)}"
    arrays = []
    for path in paths:
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"--inputs {path}: cannot be read ({str(error).splitlines()[0]}); {wanted}") from None
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            found = f"dtype {array.dtype}" if isinstance(array, np.ndarray) else "an archive"
            raise ValueError(f"--inputs {path}: holds {found}, not real numbers; {wanted}")
        if array.shape == (spec.frames_in, *frame) and len(paths) == 1:
            arrays = list(array)
        elif array.shape == frame:
            arrays.append(array)
        else:
            alone = " alone" if array.ndim == 4 and len(paths) > 1 else ""
            raise ValueError(f"--inputs {path}: shape {array.shape}; {wanted}{alone}")
        if not np.isfinite(array).all():
            raise ValueError(f"--inputs {path}: {int((~np.isfinite(array)).sum())} non-finite values")
    if len(arrays) != spec.frames_in:
        raise ValueError(f"--inputs: {len(arrays)} frames; {wanted}")
    history = torch.from_numpy(np.stack(arrays).astype(np.float32)).permute(0, 3, 1, 2).contiguous()  # (T_in, C, H, W)
    return history if spec.standardized else spec.to_standard(history)


def read_tree(
    config: DataConfig, spec: DataSpec, init: int, steps: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """按时刻从目录树读：历史 (T_in, C, H, W)，以及存在时的真值 (steps, C, H, W) 与 valid (steps, C)。

    Raises:
        ValueError: 时刻不在抽样的钟点上，或目录树里没有那些历史帧。
    """
    origin = open_origin(config.model_copy(update={"max_missing": 1.0}))  # 只读几帧，缺一帧就超过百分之一
    if tuple(origin.channels) != spec.channels:
        raise ValueError(
            f"data.root {origin.root}: channels {origin.channels}, the checkpoint has {list(spec.channels)}"
        )
    hour = init + config.utc_offset_hours  # 文件名的历法
    step = spec.interval_hours
    if hour % step:
        raise ValueError(f"--time {time_text(init)}: the tree is sampled every {step} h, at hours divisible by {step}")
    wanted = hour + np.arange(1 - spec.frames_in, steps + 1) * step
    past = wanted[: spec.frames_in]
    there = origin.years(sorted({moment_of(int(h)).year for h in wanted}))
    index = origin.index(there) if there else None
    gone = [int(h) for h in past if index is None or not covered(index, int(h), config.max_gap_hours)]
    if index is None or gone:
        lost = ", ".join(time_text(h - config.utc_offset_hours) for h in gone)
        raise ValueError(
            f"--time {time_text(init)}: the tree {origin.root} lacks history at {lost} UTC "
            f"(needed: {spec.frames_in} frames every {step} h up to the given time)"
        )
    for channel, found, *saved in zip(origin.channels, origin.mean_std(), spec.mean, spec.std, strict=True):
        if found != (*saved,):
            raise ValueError(f"{channel}: mean_std.json in {origin.root} holds {found}, the checkpoint {(*saved,)}")
    reader = FieldReader(origin, spec, index, past, None)
    return _read_frames(reader, spec, past.tolist(), wanted[len(past) :].tolist())


def covered(index: Index, hour: int, max_gap: int) -> bool:
    """这一小时每个通道或有文件、或补得上。"""
    place = hour - index.start
    return 0 <= place < index.present.shape[1] and all(bridgeable(row, max_gap)[place] for row in index.present)


def _read_frames(
    reader: FieldReader, spec: DataSpec, history_hours: list[int], target_hours: list[int]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    frames = [reader.frame(h, until=history_hours[-1]) for h in history_hours]
    history = torch.from_numpy(np.stack([f.fields for f in frames]))
    if not all(reader.available(h) for h in target_hours):
        return history, None, None
    hours = np.array(history_hours + target_hours)
    frames += [reader.frame(h) for h in target_hours]
    valid = window_valid(hours, frames, len(history_hours))[len(history_hours) :]
    truth = np.stack([f.fields for f in frames[len(history_hours) :]])
    return history, torch.from_numpy(truth), torch.from_numpy(valid)


def write_outputs(
    out: Path,
    spec: DataSpec,
    result: torch.Tensor,
    truth: torch.Tensor | None,
    valid: torch.Tensor | None,
    init: int | None,
    checkpoint: str,
) -> None:
    """每个时效两个 npy（物理单位与标准化），一个 NetCDF，一张图（集合另有一张成员的），有真值时的 scores.json。"""
    leads = [spec.interval_hours * (i + 1) for i in range(result.shape[1])]
    physical = spec.to_physical(result)  # (M, L, C, H, W)
    for i, lead in enumerate(leads):
        for suffix, fields in (("", physical), ("_standardized", result)):
            array = fields[:, i].permute(0, 2, 3, 1).numpy()  # (M, H, W, k)
            np.save(out / f"forecast+{lead:03d}h{suffix}.npy", array[0] if len(array) == 1 else array)
    real = None if truth is None else spec.to_physical(truth).numpy()
    attributes = {"title": "ar_pred forecast", "source": checkpoint}
    write_forecast(out / "forecast.nc", spec, physical.numpy(), init, leads, attributes, real)
    mean = physical.mean(0).numpy()  # (L, C, H, W)
    start = "" if init is None else f"{time_text(init)} UTC "
    pictures: list[Path] = []
    for i, lead in enumerate(leads):
        members = f", mean of {len(physical)} members" if len(physical) > 1 else ""
        figures = forecast_figure(spec, None if real is None else real[i], mean[i], f"{start}+{lead} h{members}")
        pictures += save_figures(figures, out / f"forecast+{lead:03d}h")
        if members:
            columns = {} if real is None else {"truth": real[i]}
            columns |= {f"mean of {len(physical)}": mean[i]}
            columns |= {f"member {m}": fields[i].numpy() for m, fields in enumerate(physical[:MEMBERS_SHOWN], 1)}
            gallery = side_by_side_figures(spec, columns, f"{start}+{lead} h")
            pictures += save_figures(gallery, out / f"members+{lead:03d}h")
    log.info("forecast: %s; picture: %s", out / "forecast.nc", pictures[0])
    if truth is not None and valid is not None:
        write_scores(out / "scores.json", spec, result.mean(0), truth, valid, leads)


def write_scores(
    path: Path, spec: DataSpec, made: torch.Tensor, truth: torch.Tensor, valid: torch.Tensor, leads: list[int]
) -> None:
    """有真值时的成绩：每个时效、通道的纬度加权 RMSE，物理单位；插值的真值不计（null）。"""
    square = errors(made, truth, latitude_weights(spec.latitudes))["square"]  # (L, C)
    rmse = square.sqrt().masked_fill(~valid, float("nan")) * torch.tensor(spec.std)
    scores = {
        "lead_hours": leads,
        "units": dict(zip(spec.channels, spec.units, strict=True)),
        "rmse": {c: [None if torch.isnan(v) else float(v) for v in rmse[:, i]] for i, c in enumerate(spec.channels)},
    }
    path.write_text(json.dumps(scores, indent=1), encoding="utf-8")
    log.info("truth is in the tree; scores: %s", path)
