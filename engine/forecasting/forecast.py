"""inference.py：检查点自带配置与统计量；历史帧 → 集合的成员 → 文件与图。"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.forecasting.inputs import read_inputs, read_tree
from engine.forecasting.members import Ensemble, check_members, ensemble
from engine.forecasting.outputs import write_forecast_files, write_zarr
from engine.forecasting.zarr_output import appending_forecast, forecast_origin
from engine.loading import checkpoint_config, load_forecaster
from models.interface import ForecastModel, can_forecast
from util.batch import DataSpec
from util.calendar import parse_time
from util.checkpoint import load_checkpoint
from util.config import eval_batch_size
from util.logger import setup_logging


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
    overrides: Sequence[str] = (),
    save_zarr: bool = False,
    overwrite: bool = False,
) -> int:
    """inference.py：从一个初始时刻预报 steps 帧，写进 out。

    Args:
        time: 初始时刻，即最后一帧历史的 UTC 时刻；只给 inputs 时可以没有，成员的种子里就以 1970-01-01T00 代替。
        inputs: `.npy` 文件，每个是一帧 (H, W, k)，或一个 (T_in, H, W, k)。
        noise, smooth: 初值扰动的标准差（标准化单位）与相关长度（度），确定性模型由它得到集合。
        changes: 改过的模型选项，见 models.change_options；overrides: 数据在哪里、怎样读，见 checkpoint_config。
        save_zarr: 另外接进 out/forecast.zarr；overwrite: 那里已有的起报时刻重写。

    Raises:
        ValueError: 检查点、时刻、输入的个数或形状不对，成员数要求不合理；forecast.zarr 接不上。
    """
    content = load_checkpoint(checkpoint)
    config = checkpoint_config(content, checkpoint, overrides)
    device = torch.device("cuda" if torch.cuda.is_available() and config.run.device != "cpu" else "cpu")
    model, spec = load_forecaster(content, device, changes)
    if not can_forecast(model):
        raise ValueError(f"{checkpoint}: this configuration of {config.model['name']} reconstructs, it cannot forecast")
    check_members(model, config.model["name"], members, noise, smooth)
    steps = steps or spec.frames_out
    init = parse_time(time) if time is not None else None
    setup_logging(out / "inference.log")  # 读数据时补了什么也要记下
    if inputs:
        history, truth, valid = read_inputs(inputs, spec), None, None
    else:
        assert init is not None
        history, truth, valid = read_tree(config.data, spec, init, steps)
    wanted = Ensemble(members, noise, smooth, config.run.seed)
    to_zarr = init if save_zarr else None
    with ExitStack() as stack:
        if to_zarr is not None:
            step, name = content["progress"]["step"], config.model["name"]
            origin = forecast_origin(content["run"], step, name, noise, smooth, changes)
            inits, leads = np.array([to_zarr]), spec.leads(steps)
            stack.enter_context(appending_forecast(out, spec, inits, leads, members, origin, overwrite))
        result = predict(model, spec, history.to(device), init, steps, wanted, eval_batch_size(config))
        write_forecast_files(out, spec, result, truth, valid, init, checkpoint)
        if to_zarr is not None:
            write_zarr(out, spec, result, truth, valid, to_zarr)
    return 0


@torch.inference_mode()
def predict(
    model: ForecastModel, spec: DataSpec, history: Tensor, init: int | None, steps: int, wanted: Ensemble, limit: int
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
