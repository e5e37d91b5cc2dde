"""forecast.zarr 与 truth.zarr：预报与评测往同一种文件夹里接着写，几次的接在一起。"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from util.batch import DataSpec
from util.files.zarr_fields import appending, forecast_header, truth_header

FORECAST, TRUTH = "forecast.zarr", "truth.zarr"


def forecast_origin(
    run: str, step: int, model: str, perturb: float, smooth: float, changes: Sequence[str]
) -> dict[str, str]:
    """哪个模型、怎样预报的：这几样相同才能接在一起。run、step 定一个检查点；changes: 改过的采样选项。"""
    how = {"perturb": str(float(perturb)), "smooth": str(float(smooth)), "set": " ".join(sorted(changes)) or "none"}
    return {"run": run, "step": str(step), "model": model, **how}


def appending_forecast(
    out: Path,
    spec: DataSpec,
    init_hours: np.ndarray,
    leads: Sequence[int],
    members: int,
    origin: dict[str, str],
    overwrite: bool,
) -> AbstractContextManager[None]:
    """out/forecast.zarr 里接上这些起报时刻；先查能不能接，再开始算。见 appending。"""
    header = forecast_header(spec, leads, members, {"title": "ar_pred forecast", **origin})
    again = None if overwrite else "--overwrite replaces them, or give another --out"
    return appending(out / FORECAST, header, init_hours, again)


def appending_truth(out: Path, spec: DataSpec, hours: np.ndarray) -> AbstractContextManager[None]:
    """out/truth.zarr 里接上这些有效时刻；已有的是同样的数，照写。"""
    return appending(out / TRUTH, truth_header(spec, {"title": "ar_pred truth"}), hours)
