"""inference.py：检查点自带配置与统计量；历史帧 → 集合的成员 → 文件与图。"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.forecasting.inputs import Start, open_tree, read_inputs, read_start
from engine.forecasting.members import Ensemble, check_members, ensemble
from engine.forecasting.outputs import write_forecast_files, write_zarr
from engine.forecasting.program import program_forecaster, read_program
from engine.forecasting.starts import forecast_starts
from engine.forecasting.zarr_output import appending_forecast, forecast_origin
from engine.loading import Content, checkpoint_config, load_forecaster
from models.interface import Forecaster, can_forecast
from util.batch import DataSpec
from util.calendar import parse_time, time_text
from util.config import RunConfig, eval_batch_size
from util.files.training_checkpoint import load_training
from util.logger import setup_logging

MOST_STARTS = 1_000_000


@dataclass(frozen=True)
class Options:
    """一次预报的选项，与命令行同名。

    time: 初始时刻（最后一帧历史，UTC），或者起、止、隔几小时；只给 inputs 时可以没有，种子里以 1970-01-01T00 代替。
    inputs: `.npy` 文件，每个是一帧 (H, W, k)，或一个 (T_in, H, W, k)。
    perturb、smooth: 初值扰动的标准差（标准化单位）与相关长度（度），确定性模型由它得到集合。
    set: 改过的模型选项，见 models.change_options；overrides: 数据在哪里、怎样读，见 checkpoint_config。
    zarr: 另外接进 forecast.zarr；overwrite: 那里已有的起报时刻重写。
    program: 给的不是检查点，是 --export 写的程序；compile: 模型的块编译了再走。
    """

    time: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    steps: int | None = None
    members: int = 1
    perturb: float = 0.0
    smooth: float = 0.0
    set: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    zarr: bool = False
    overwrite: bool = False
    program: bool = False
    verify: bool = True
    compile: bool = False


def forecast(checkpoint: str, options: Options, out: Path) -> int:
    """inference.py：从一个或许多初始时刻预报，写进 out。

    Raises:
        ValueError: 检查点、时刻、输入的个数或形状不对，成员数要求不合理；forecast.zarr 接不上。
    """
    inits = initial_times(options.time)
    if options.inputs and len(options.time) > 1:
        raise ValueError("--inputs are the frames of one forecast: give one --time, or none")
    content, config, device, model = open_forecaster(checkpoint, options)
    spec = DataSpec.from_dict(content["spec"])
    check_members(model, config.model["name"], options.members, options.perturb, options.smooth)
    steps = options.steps or spec.frames_out
    wanted = Ensemble(options.members, options.perturb, options.smooth, config.run.seed)
    limit = eval_batch_size(config)
    setup_logging(out / "inference.log")  # 读数据时补了什么也要记下
    reader = None if options.inputs else open_tree(config.data, spec, inits, steps)
    start = Start(read_inputs([*options.inputs], spec)) if reader is None else read_start(reader, inits[0], steps)
    with ExitStack() as stack:
        if options.zarr:
            append_zarr(stack, content, config, options, out, spec, inits, steps)
        if reader is not None and len(options.time) > 1:
            forecast_starts(model, reader, np.array(inits), steps, wanted, limit, device, out, checkpoint, options.zarr)
            return 0
        init = inits[0] if inits else None
        result = predict(model, spec, start.history.to(device), init, steps, wanted, limit)
        write_forecast_files(out, spec, result, start.truth, start.valid, init, checkpoint)
        if options.zarr:
            write_zarr(out, spec, result, start.truth, start.valid, inits[0])
    return 0


def open_forecaster(path: str, options: Options) -> tuple[Content, RunConfig, torch.device, Forecaster]:
    """检查点或程序 → 它的内容、配置（数据可以在别处）、算在哪里、预报的。

    Raises:
        ValueError: 读不了；只能重建；程序的选项改不了。
    """
    if options.program and options.compile:
        raise ValueError("--compile: a program of torch.export runs as it was exported; give --checkpoint")
    if options.program and options.set:
        raise ValueError(f"--set {' '.join(options.set)}: a program is as it was exported, nothing in it may change")
    content, program = read_program(path) if options.program else (load_training(path, verify=options.verify), None)
    config = checkpoint_config(content, path, options.overrides)
    device = torch.device("cuda" if torch.cuda.is_available() and config.run.device != "cpu" else "cpu")
    if program is not None:
        return content, config, device, program_forecaster(content, program, device)
    model, _ = load_forecaster(content, device, options.set, options.compile)
    if not can_forecast(model):
        raise ValueError(f"{path}: this configuration of {config.model['name']} reconstructs, it cannot forecast")
    return content, config, device, model


def initial_times(texts: tuple[str, ...]) -> list[int]:
    """`--time` 的一个时刻，或起、止（在内）、隔几小时 → UTC 小时。

    Raises:
        ValueError: 个数或写法不对；止在起之前。
    """
    if len(texts) < 2:
        return [parse_time(text) for text in texts]
    given = f"--time {' '.join(texts)}"
    if len(texts) != 3 or not texts[2].isdecimal() or int(texts[2]) < 1:
        raise ValueError(f"{given}: give one time, or FROM TO EVERY, e.g. 2015-06-01T00 2015-06-30T18 6 (hours)")
    first, last = map(parse_time, texts[:2])
    if last < first:
        raise ValueError(f"{given}: {time_text(last)} lies before {time_text(first)}")
    if last - first >= MOST_STARTS * int(texts[2]):
        raise ValueError(f"{given}: more than {MOST_STARTS} forecasts; give a shorter span")
    return list(range(first, last + 1, int(texts[2])))


def append_zarr(
    stack: ExitStack, content: Content, config: RunConfig, options: Options, out: Path, spec: DataSpec,
    inits: list[int], steps: int,
) -> None:  # fmt: skip
    """forecast.zarr 接上这些起报时刻，随 stack 收尾。

    Raises:
        ValueError: 接不上，见 appending。
    """
    words = (content["progress"]["step"], config.model["name"], options.perturb, options.smooth, options.set)
    origin, leads = forecast_origin(content["run"], *words), spec.leads(steps)
    hours = np.array(inits)
    stack.enter_context(appending_forecast(out, spec, hours, leads, options.members, origin, options.overwrite))


@torch.inference_mode()
def predict(
    model: Forecaster, spec: DataSpec, history: Tensor, init: int | None, steps: int, wanted: Ensemble, limit: int
) -> Tensor:
    """history (T_in, C, H, W) → 各成员逐时效的预报 (M, L, C, H, W)，在主机上；limit: 一次模型调用的样本数。

    Raises:
        ValueError: 有非有限值。
    """
    back = torch.arange(1 - spec.frames_in, 1) * spec.interval_hours
    hours = None if init is None else (init + back)[None].to(history.device)  # (1, T_in)
    frames = ensemble(model, history[None], hours, steps, spec, wanted, limit)
    result = torch.stack([frame[0].float().cpu() for frame in frames], 1)
    if not torch.isfinite(result).all():
        raise ValueError("the forecast holds non-finite values; check the inputs and their standardisation")
    return result
