"""许多起报时刻的预报：一批批地算，算出一个时效就写下去；内存里只有一批，与有多少个起报时刻无关。"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine.forecasting.inputs import Start, has_truth, read_start
from engine.forecasting.members import Ensemble, ensemble
from engine.forecasting.zarr_output import FORECAST, TRUTH, appending_truth
from models.interface import Forecaster
from util.calendar import time_text
from util.data.reader import FieldReader
from util.files.field_layout import forecast_coordinates
from util.files.netcdf import FieldFile
from util.files.zarr_fields import ZarrFields

log = logging.getLogger("ar_pred")


class Sink(NamedTuple):
    """写到哪里：frame 收第几个到第几个起报时刻的第几个时效 (B, M, C, H, W)，truth 收第几个的真值与 valid；物理单位。

    flush: 一批写完了。
    """

    frame: Callable[[slice, int, np.ndarray], None]
    truth: Callable[[int, np.ndarray, np.ndarray], None]
    flush: Callable[[], None] = lambda: None


@torch.inference_mode()
def forecast_starts(
    model: Forecaster, reader: FieldReader, inits: np.ndarray, steps: int, wanted: Ensemble, limit: int,
    device: torch.device, out: Path, checkpoint: str, to_zarr: bool,
) -> None:  # fmt: skip
    """inits (N,) 起报时刻，UTC 小时，升序；与逐个预报的是同样的场。limit: 一次模型调用的样本数（窗口 × 成员）。

    Raises:
        ValueError: 有非有限值。
    """
    spec = reader.spec
    known = np.array([has_truth(reader, init, steps) for init in inits.tolist()])
    back = torch.arange(1 - spec.frames_in, 1) * spec.interval_hours
    with ExitStack() as stack:
        sinks = [netcdf_sink(stack, reader, inits, known, steps, wanted.members, out, checkpoint)]
        if to_zarr:
            sinks.append(zarr_sink(stack, reader, inits, known, steps, out))
        bar = stack.enter_context(tqdm(total=len(inits), desc="forecast", unit="start", leave=False))
        for rows, starts in batches(reader, inits, steps, max(1, limit // wanted.members)):
            history = torch.stack([start.history for start in starts]).to(device)
            hours = torch.from_numpy(inits[rows])[:, None] + back  # (B, T_in)
            frames = ensemble(model, history, hours.to(device), steps, spec, wanted, limit)
            for lead, frame in enumerate(frames):
                made = finite(frame.float().cpu(), inits[rows], spec.interval_hours * (lead + 1))
                for sink in sinks:
                    sink.frame(rows, lead, spec.to_physical(made).numpy())
            for row, start in enumerate(starts, rows.start):
                if start.truth is not None and start.valid is not None:
                    for sink in sinks:
                        sink.truth(row, spec.to_physical(start.truth).numpy(), start.valid.numpy())
            for sink in sinks:
                sink.flush()
            bar.update(len(starts))
    first, last = (time_text(int(init)) for init in (inits[0], inits[-1]))
    log.info("forecasts: %s; %d initial times from %s to %s UTC", out / "forecast.nc", len(inits), first, last)


def batches(reader: FieldReader, inits: np.ndarray, steps: int, size: int) -> Iterator[tuple[slice, list[Start]]]:
    """依次一批起报时刻：第几个到第几个，各自的历史与真值。"""
    for first in range(0, len(inits), size):
        rows = slice(first, min(first + size, len(inits)))
        yield rows, [read_start(reader, init, steps) for init in inits[rows].tolist()]


def finite(frame: Tensor, inits: np.ndarray, lead: int) -> Tensor:
    """(B, M, C, H, W) 原样；lead: 小时。

    Raises:
        ValueError: 有非有限值，指明起报时刻与时效。
    """
    bad = ~frame.isfinite().flatten(1).all(1)
    if bad.any():
        init = time_text(int(inits[int(bad.nonzero()[0, 0])]))
        raise ValueError(
            f"the forecast from {init} UTC holds non-finite values at +{lead} h; check the inputs and their "
            "standardisation"
        )
    return frame


def netcdf_sink(
    stack: ExitStack, reader: FieldReader, inits: np.ndarray, known: np.ndarray, steps: int, members: int, out: Path,
    checkpoint: str,
) -> Sink:  # fmt: skip
    """forecast.nc，一个时效一写；有一个起报时刻有真值（known），就也有 `<变量>_truth`。

    许多起报时刻要算很久，所以不等全部写完才给名字：中断了留下写好的各批。
    """
    coordinates = forecast_coordinates(inits, reader.spec.leads(steps), members)
    attributes = {"title": "ar_pred forecast", "source": checkpoint}
    kinds = ("", "truth") if known.any() else ("",)
    file = stack.enter_context(FieldFile(out / "forecast.nc", reader.spec, coordinates, attributes, kinds, whole=False))

    def frame(rows: slice, lead: int, fields: np.ndarray) -> None:
        file.put(rows, fields if members > 1 else fields[:, 0], lead=lead)

    return Sink(frame, lambda row, truth, _: file.put(row, truth, "truth"), file.flush)


def zarr_sink(
    stack: ExitStack, reader: FieldReader, inits: np.ndarray, known: np.ndarray, steps: int, out: Path
) -> Sink:
    """forecast.zarr（调用者已接长）与 truth.zarr；一个起报时刻的全部时效是一块，一批的到齐了才写。"""
    spec, leads = reader.spec, np.array(reader.spec.leads(steps))
    forecasts = ZarrFields(out / FORECAST, spec)
    held: list[np.ndarray] = []  # 一批已有的时效，各 (B, M, C, H, W)

    def frame(rows: slice, lead: int, fields: np.ndarray) -> None:
        held.append(fields)
        if lead == steps - 1:
            forecasts.write_forecast(inits[rows], np.stack(held, 2))
            held.clear()

    if known.any():
        stack.enter_context(appending_truth(out, spec, np.unique(inits[known, None] + leads)))
    truths = ZarrFields(out / TRUTH, spec) if known.any() else None

    def truth(row: int, fields: np.ndarray, valid: np.ndarray) -> None:
        assert truths is not None
        truths.write_truth(inits[row] + leads, fields, valid)

    return Sink(frame, truth)
