"""一次预报写出的文件：npy、NetCDF、图，有真值时的成绩。"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import torch

from engine.forecasting.zarr_output import FORECAST, TRUTH, appending_truth
from util.batch import DataSpec
from util.calendar import time_text
from util.files.netcdf import write_forecast
from util.files.zarr_fields import ZarrFields
from util.grid import latitude_weights
from util.plot.maps import forecast_figure
from util.plot.side_by_side import side_by_side_figures
from util.plot.style import save_figures
from util.scores.metrics import errors

log = logging.getLogger("ar_pred")
MEMBERS_SHOWN = 4


def write_forecast_files(
    out: Path,
    spec: DataSpec,
    result: torch.Tensor,
    truth: torch.Tensor | None,
    valid: torch.Tensor | None,
    init: int | None,
    checkpoint: str,
) -> None:
    """每个时效两个 npy（物理单位与标准化），一个 NetCDF，一张图（集合另有一张成员的），有真值时的 scores.json。"""
    leads = spec.leads(result.shape[1])
    physical = spec.to_physical(result)  # (M, L, C, H, W)
    for i, lead in enumerate(leads):
        for suffix, fields in (("", physical), ("_standardized", result)):
            array = fields[:, i].permute(0, 2, 3, 1).numpy()  # (M, H, W, k)
            np.save(out / f"forecast+{lead:03d}h{suffix}.npy", array[0] if len(array) == 1 else array)
    members = physical.numpy()
    real = None if truth is None else spec.to_physical(truth).numpy()
    attributes = {"title": "ar_pred forecast", "source": checkpoint}
    write_forecast(out / "forecast.nc", spec, members, init, leads, attributes, real)
    start = "" if init is None else f"{time_text(init)} UTC "
    pictures: list[Path] = []
    for i, lead in enumerate(leads):
        one = None if real is None else real[i]
        pictures += draw_lead(out, spec, members[:, i], one, f"{start}+{lead} h", f"+{lead:03d}h")
    log.info("forecast: %s; picture: %s", out / "forecast.nc", pictures[0])
    if truth is not None and valid is not None:
        write_scores(out / "scores.json", spec, result.mean(0), truth, valid, leads)


def write_zarr(
    out: Path, spec: DataSpec, result: torch.Tensor, truth: torch.Tensor | None, valid: torch.Tensor | None, init: int
) -> None:
    """同样的预报写进 forecast.zarr（调用者已接长），真值写进 truth.zarr；形状同 write_forecast_files。"""
    ZarrFields(out / FORECAST, spec).write_forecast(np.array([init]), spec.to_physical(result).numpy()[None])
    if truth is not None and valid is not None:
        hours = init + np.array(spec.leads(len(truth)))
        with appending_truth(out, spec, hours):
            ZarrFields(out / TRUTH, spec).write_truth(hours, spec.to_physical(truth).numpy(), valid.numpy())


def draw_lead(
    out: Path, spec: DataSpec, members: np.ndarray, truth: np.ndarray | None, title: str, suffix: str
) -> list[Path]:
    """一个时效的图，物理单位：members (M, C, H, W)，truth (C, H, W)；返回图的路径，预报的在前。"""
    count, mean = len(members), members.mean(0)
    note = f", mean of {count} members" if count > 1 else ""
    pictures = save_figures(forecast_figure(spec, truth, mean, f"{title}{note}"), out / f"forecast{suffix}")
    if count > 1:
        columns = {} if truth is None else {"truth": truth}
        columns |= {f"mean of {count}": mean}
        columns |= {f"member {m}": fields for m, fields in enumerate(members[:MEMBERS_SHOWN], 1)}
        pictures += save_figures(side_by_side_figures(spec, columns, title), out / f"members{suffix}")
    return pictures


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
