"""评测要存盘的场：forecast.nc 与 truth.nc（或 .zarr），inputs、trues、preds 三个 .npy；开始之前先看磁盘够不够。"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np
from lightning_fabric import Fabric

from engine.evaluation.metrics_file import Provenance
from engine.evaluation.task import Scored, Task
from engine.forecasting.zarr_output import FORECAST, TRUTH, appending_forecast, appending_truth, forecast_origin
from util.files.array_file import ArrayFile
from util.files.netcdf import ForecastFile, TruthFile
from util.files.zarr_fields import ZarrFields

log = logging.getLogger("ar_pred")
Saver = Callable[[Scored], None]
Keep = Callable[[Scored], Scored]
FIELD_FILES = {"netcdf": ("forecast.nc", "truth.nc"), "npy": ("inputs.npy", "trues.npy", "preds.npy")}


def open_savers(stack: ExitStack, task: Task, out: Path, leads: list[int], origin: Provenance) -> list[Saver]:
    """要存的场，各一个逐批写的函数；文件随 stack 关上。

    Raises:
        ValueError: 磁盘放不下。
    """
    check_space(task, out)
    makers = {"netcdf": netcdf_saver, "npy": npy_saver, "zarr": zarr_saver}
    return [make(stack, task, out, leads, origin) for kind, make in makers.items() if kind in task.options.save]


def netcdf_saver(stack: ExitStack, task: Task, out: Path, leads: list[int], origin: Provenance) -> Saver:
    """forecast.nc 与 truth.nc。"""
    about = {key: str(value) for key, value in asdict(origin).items() if key != "model" and value is not None}
    title = {"title": "ar_pred forecast", **about}
    spec, members = task.spec, task.options.members
    forecast = stack.enter_context(ForecastFile(out / "forecast.nc", spec, task.init_hours, leads, members, title))
    truth = stack.enter_context(TruthFile(out / "truth.nc", spec, valid_hours(task, leads), title))

    def save(scored: Scored) -> None:
        fields = scored.fields
        assert fields is not None and fields.forecast is not None
        forecast.write(scored.row, fields.forecast)
        truth.write(*truth_fields(task, leads, scored))

    return save


def valid_hours(task: Task, leads: list[int]) -> np.ndarray:
    """全部有效时刻，UTC 小时，升序不重复。"""
    return np.unique(task.init_hours[:, None] + np.array(leads))


def truth_fields(task: Task, leads: list[int], scored: Scored) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """一批的真值：有效时刻 (n,)，场 (n, C, H, W)，valid (n, C)；n = B · L。"""
    fields = scored.fields
    assert fields is not None
    hours = task.init_hours[scored.row : scored.row + len(fields.truth), None] + np.array(leads)  # (B, L)
    shape = fields.truth.shape[2:]
    return hours.ravel(), fields.truth.reshape(-1, *shape), fields.valid.reshape(-1, shape[0])


def zarr_saver(stack: ExitStack, task: Task, out: Path, leads: list[int], origin: Provenance) -> Saver:
    """truth.zarr，由零号进程写：同一时刻在几个进程的窗口里都有。"""
    stack.enter_context(appending_truth(out, task.spec, valid_hours(task, leads)))
    truth = ZarrFields(out / TRUTH, task.spec)

    def save(scored: Scored) -> None:
        truth.write_truth(*truth_fields(task, leads, scored))

    return save


def open_zarr(stack: ExitStack, task: Task, out: Path, origin: Provenance, fabric: Fabric) -> Keep:
    """每个进程把自己那几批的预报写进 forecast.zarr，一个起报时刻一块；零号进程先接长，随 stack 收尾。

    Raises:
        ValueError: 接不上，见 appending。
    """
    leads = task.spec.leads(task.steps)
    if fabric.is_global_zero:
        words = (origin.set or "").split()
        how = forecast_origin(origin.run, origin.step, origin.model, origin.perturb, origin.smooth, words)
        again = task.options.overwrite
        stack.enter_context(appending_forecast(out, task.spec, task.init_hours, leads, origin.members, how, again))
    fabric.barrier()
    zarr, others = ZarrFields(out / FORECAST, task.spec), set(task.options.save) - {"zarr"}

    def keep(scored: Scored) -> Scored:
        fields = scored.fields
        assert fields is not None and fields.forecast is not None
        zarr.write_forecast(task.init_hours[scored.row : scored.row + len(fields.truth)], fields.forecast)
        return scored if others else scored._replace(fields=fields._replace(forecast=None))

    return keep


def npy_saver(stack: ExitStack, task: Task, out: Path, leads: list[int], origin: Provenance) -> Saver:
    """inputs、trues、preds（像 SimVP 的测试那样，集合取平均）。"""
    spec = task.spec
    frame = (spec.num_channels, spec.height, spec.width)
    sizes = {"inputs": spec.frames_in, "trues": task.steps, "preds": task.steps}
    files = {
        name: stack.enter_context(ArrayFile(out / f"{name}.npy", (len(task.starts), size, *frame)))
        for name, size in sizes.items()
    }

    def save(scored: Scored) -> None:
        fields = scored.fields
        assert fields is not None and fields.history is not None and fields.forecast is not None
        files["inputs"].write(scored.row, fields.history)
        files["trues"].write(scored.row, fields.truth)
        files["preds"].write(scored.row, fields.forecast.mean(1))

    return save


def remove_others(task: Task, out: Path) -> None:
    """上一次留下而这一次不存的：与这一次的成绩不是一回事。接着写的 .zarr 不动，里面记着是哪个模型的。"""
    for name in set(chain(*FIELD_FILES.values())) - set(chain(*(FIELD_FILES.get(k, ()) for k in task.options.save))):
        (out / name).unlink(missing_ok=True)


def check_space(task: Task, out: Path) -> None:
    """开始之前就看磁盘够不够，不要算了一夜才满。"""
    spec, options = task.spec, task.options
    frame = 4 * spec.num_channels * spec.height * spec.width
    whole = (options.members + 1) * task.steps
    frames = {"netcdf": whole, "zarr": whole, "npy": spec.frames_in + 2 * task.steps}
    need = frame * len(task.starts) * sum(frames[kind] for kind in options.save)
    free = shutil.disk_usage(out).free
    if need > free:
        raise ValueError(
            f"--save {' '.join(options.save)} needs up to {need / 2**30:.1f} GiB in {out}, {free / 2**30:.1f} GiB are "
            "free; use --save none, or a larger --stride"
        )
    if need:
        log.info("fields will be saved in %s: up to %.2f GiB", out, need / 2**30)
