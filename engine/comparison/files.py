"""别处做的预报（WeatherBench-X、WeatherBench2 的布局，NetCDF 或 Zarr）：对着一个运行的真值，与自己的预报一样地计分。

文件当作一个模型：给它起报时刻，它从文件里取出全部时效；窗口、基线、统计量都是评测的，所以成绩可以逐对比。
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from engine.device import device_name, peak_memory, reset_peak_memory
from engine.evaluation.baselines import NAMES
from engine.evaluation.evaluate import Trained, make_evaluation_fabric, make_task, provenance_of
from engine.evaluation.glimpse import choose_glimpse
from engine.evaluation.metrics_file import Cost, Provenance, Result, read_scores
from engine.evaluation.results import write_result, write_statistics
from engine.evaluation.scoring import score
from engine.evaluation.task import Options, Task
from engine.forecasting.datasets import find_channel, find_points
from engine.loading import checkpoint_config
from engine.progress import Progress
from models.interface import Generators
from util.batch import DataSpec
from util.calendar import time_text
from util.config import RunConfig
from util.data.dataset import open_data
from util.files.training_checkpoint import load_training
from util.source.axes import SHOWN, find_dims, listed, read_coordinates
from util.source.lead_time import TIME_NAMES, initial_hours, is_lead, lead_hours
from util.source.opening import open_source

log = logging.getLogger("ar_pred")
BATCH_BYTES = 2**28  # 一批预报至多，一个窗口总是要的
MEMBER_NAMES = ("number", "member", "realization", "ensemble", "sample")


class Archived(nn.Module):
    """文件里的预报；时刻就是索引。

    Raises:
        ValueError: 没有起报时刻或时效的维，时效不是一步步的，哪个通道没有、单位不同，网格不合。
    """

    can_forecast = True

    def __init__(self, dataset: xr.Dataset, spec: DataSpec) -> None:
        super().__init__()
        lead = next((str(name) for name in dataset.dims if is_lead(dataset, str(name))), None)
        if lead is None:
            raise ValueError(f"no lead-time dimension such as prediction_timedelta; there: {listed(dataset.dims)}")
        self.lead, self.member = lead, next((name for name in MEMBER_NAMES if name in dataset.dims), None)
        self.dataset, self.spec = dataset, spec
        self.members = 1 if self.member is None else dataset.sizes[self.member]
        self.probabilistic = self.members > 1
        self.places = find_leads(lead_hours(dataset[lead]), spec)
        first = self.at(0, 0)
        dims = find_dims(first)
        hours = initial_hours(find_channel(first, spec, 0, dims))
        self.rows = {int(hour): row for row, hour in enumerate(hours)}
        self.where = {
            dims.latitude: find_points("latitude", read_coordinates(first, dims.latitude), spec.latitudes),
            dims.longitude: find_points("longitude", read_coordinates(first, dims.longitude), spec.longitudes),
        }
        self.dims = dims
        for channel in range(spec.num_channels):
            find_channel(first, spec, channel, dims)

    def at(self, place: int, member: int) -> xr.Dataset:
        """一个时效、一个成员的，(起报时刻, …)。"""
        chosen = {self.lead: self.places[place]} | ({} if self.member is None else {self.member: member})
        there = self.dataset.isel(chosen, drop=True)
        valid = [name for name in TIME_NAMES if name in there.coords and name not in there.dims]
        return there.drop_vars(valid)

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generators | None = None
    ) -> Tensor:
        """(B, T_in, C, H, W) → (B, M, L, C, H, W)，标准化；history 不看，time 的第 T_in 个是起报时刻。"""
        assert time is not None and num_members == self.members, "members cut apart; see keep_starts"
        rows = [self.rows[int(hour)] for hour in time[:, history.shape[1] - 1]]
        made = [
            torch.stack([self.fields(rows, place, member) for place in range(len(self.places))], 1)
            for member in range(num_members)
        ]  # 各 (B, L, C, H, W)
        return torch.stack(made, 1).to(history)

    def fields(self, rows: Sequence[int], place: int, member: int) -> Tensor:
        """几个起报时刻的一个时效、一个成员 (B, C, H, W)，标准化。"""
        there = self.at(place, member)
        arrays = [find_channel(there, self.spec, i, self.dims) for i in range(self.spec.num_channels)]
        where = {str(self.dims.time): list(rows), **self.where}
        values = np.stack([array.isel(where).values.astype(np.float32) for array in arrays], 1)
        return self.spec.to_standard(torch.from_numpy(values))


def find_leads(hours: np.ndarray, spec: DataSpec) -> list[int]:
    """第 1、2、… 步的时效各在文件的第几项，到断开为止。

    Raises:
        ValueError: 连第一步也没有。
    """
    there, places = np.atleast_1d(hours), []
    while (found := np.flatnonzero(np.abs(there - (len(places) + 1) * spec.interval_hours) < 1e-3)).size:
        places.append(int(found[0]))
    if not places:
        shown = listed(f"{hour:g}" for hour in there[:SHOWN])
        first = spec.interval_hours
        raise ValueError(f"lead times {shown} h: +{first} h, the first step of the run, is not among them")
    return places


def score_file(path: str, beside: Path, out: Path) -> Path:
    """文件里的预报，在 beside（一次评测的文件夹）的划分、真值上计分，写进 out / 文件名；返回那个文件夹。

    Raises:
        ValueError: 文件不合，或没有一个起报时刻落在划分里。
    """
    origin = read_scores(beside / "metrics.json", Result)
    config = checkpoint_config(load_training(origin.checkpoint), origin.checkpoint, ())
    try:
        with open_source(path) as dataset:
            return _score(path, dataset, config, origin, out / name_of(path))
    except ValueError as error:
        raise ValueError(f"--files {path}: {error}") from None


def name_of(path: str) -> str:
    """文件或地址的末一段，去掉后缀。"""
    return Path(path).stem


def check_names(paths: Sequence[str]) -> None:
    """文件名就是表上的名字。

    Raises:
        ValueError: 是一个基线的名字，或者重了。
    """
    names = [name_of(path) for path in paths]
    for path, name in zip(paths, names, strict=True):
        if name in NAMES:
            raise ValueError(f"--files {path}: {name} is the name of a baseline; rename the file")
        if names.count(name) > 1:
            raise ValueError(f"--files {path}: another file is called {name} too; rename one")


def _score(path: str, dataset: xr.Dataset, config: RunConfig, origin: Provenance, out: Path) -> Path:
    single = config.data.model_copy(update={"frames_in": 1, "frames_out": 1, "lead_hours": []})
    model = Archived(dataset, open_data(single, announce=False).spec)
    steps = len(model.places)
    data_config = single.model_copy(update={"frames_out": steps})
    config = config.model_copy(update={"data": data_config, "model": {"name": name_of(path)}})
    fabric = make_evaluation_fabric(config)
    data = open_data(data_config, out / "missing.csv", announce=False)
    options = Options(split=origin.split, members=model.members)
    task = keep_starts(make_task(model, data, config, options, fabric), model)
    about = provenance_of(task, Trained(name_of(path), path, 0, Progress()))
    reset_peak_memory(fabric.device)
    out.mkdir(parents=True, exist_ok=True)
    scores, seen = write_statistics(task, score(task, fabric), out, about)
    cost = Cost(
        parameters=None,
        flops_per_sample=None,
        inference_samples_per_second=None,
        inference_peak_memory_bytes=peak_memory(fabric.device),
        device=device_name(fabric.device),
    )
    write_result(out, Result(**vars(about), **vars(scores), samples_per_second=seen.rates(), cost=cost))
    log.info("%s: %d initial times, %d lead times, %d member(s)", path, len(task.starts), steps, model.members)
    if left := dataset.sizes[model.lead] - steps:
        step = data.spec.interval_hours
        log.warning("%s: %d lead times left out, only steps of %d h in a row are scored", path, left, step)
    return out


def keep_starts(task: Task, model: Archived) -> Task:
    """只留文件里有的起报时刻；一次调用总是一个窗口的全部成员、全部时效，批的大小照 BATCH_BYTES 定。

    Raises:
        ValueError: 一个也没有。
    """
    kept = task.starts[np.isin(task.init_hours, [*model.rows])]
    if not kept.size:
        first, last, mine = task.init_hours[0], task.init_hours[-1], sorted(model.rows)
        raise ValueError(
            f"initial times {time_text(mine[0])} to {time_text(mine[-1])}: none of them starts a forecast in the "
            f"{task.options.split} split with all its lead times, {time_text(int(first))} to {time_text(int(last))}"
        )
    spec = task.spec
    window = 4 * model.members * task.steps * spec.num_channels * spec.height * spec.width  # 字节
    windows = min(max(1, task.batch_size // model.members), max(1, BATCH_BYTES // window))
    glimpse = choose_glimpse(spec, len(kept), task.steps, [])
    return replace(task, starts=kept, glimpse=glimpse, batch_size=windows * model.members)
