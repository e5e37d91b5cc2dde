"""评测结果落盘：statistics.nc、预报与真值、metrics.json、metrics.csv、图和报告；只在零号进程。"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from engine.evaluation.task import Scored, Task
from util.atomic import replacing
from util.files.array_file import ArrayFile
from util.files.netcdf import ForecastFile, TruthFile
from util.scores.common import Contender
from util.scores.statistics_file import Statistics, StatisticsFile
from util.scores.tabulate import plain, tabulate, write_csv

log = logging.getLogger("ar_pred")
Table = dict[str, Any]
FIELD_FILES = {"netcdf": ("forecast.nc", "truth.nc"), "npy": ("inputs.npy", "trues.npy", "preds.npy")}
SPECTRUM_FLOOR = 1e-8  # 真值的功率低于总量的这一份，只是舍入的噪声


class Seen:
    """流过之后留下的小东西：谱与秩的和、序列、地图、各模型预报的时间。"""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.spectra: dict[str, np.ndarray] = {}
        self.ranks: np.ndarray | None = None
        self.series: dict[str, list[np.ndarray]] = {"truth": [], "forecast": []}
        self.pictures: dict[int, dict[str, np.ndarray]] = {}
        self.seconds: dict[str, float] = {}
        self.windows = 0
        self.counts = np.zeros((task.steps, task.spec.num_channels))  # 有效场数

    def take(self, scored: Scored) -> None:
        for name, total in scored.spectra.items():
            self.spectra[name] = self.spectra.get(name, 0) + total
        if scored.ranks is not None:
            self.ranks = scored.ranks if self.ranks is None else self.ranks + scored.ranks
        square = scored.statistics[self.task.judged]["square"]  # (B, L, C)
        count = len(square)
        self.counts += np.isfinite(square).sum(0)
        rows = self.task.view.series_rows
        chosen = [i for i in range(count) if scored.row + i in rows]
        for name, values in scored.series.items():
            self.series[name].append(values[chosen])
        self.pictures |= scored.pictures
        if self.windows:  # 第一批要预热，不计
            for name, value in scored.seconds.items():
                self.seconds[name] = self.seconds.get(name, 0.0) + value
        self.windows += count

    def rates(self) -> dict[str, float | None]:
        """各模型每秒做多少次预报（frames_out 帧、一个成员的一次，与运算次数同一个单位）；只有一批时量不出来。"""
        task = self.task
        first = min(self.windows, max(1, task.batch_size // task.options.members))
        forecasts = (self.windows - first) * math.ceil(task.steps / task.spec.frames_out)
        rates: dict[str, float | None] = {}
        for name in task.models:
            seconds, members = self.seconds.get(name, 0.0), task.options.members if name == task.judged else 1
            rates[name] = forecasts * members / seconds if seconds > 0 else None
        return rates


def write_results(task: Task, stream: Iterable[Scored], out: Path, attributes: Mapping[str, Any]) -> tuple[Table, Seen]:
    """收下全部结果，写 statistics.nc 与要存的场，合成成绩表；attributes 记进文件，普通值。"""
    seen = Seen(task)
    path = out / "statistics.nc"
    leads = [task.spec.interval_hours * (i + 1) for i in range(task.steps)]
    about = {"model": task.judged, **attributes}
    with ExitStack() as stack:
        file = stack.enter_context(
            StatisticsFile(path, task.spec, list(task.models), task.init_hours, leads, task.thresholds.numpy(), about)
        )
        savers = open_savers(stack, task, out, leads, attributes)
        for scored in stream:
            file.write(scored.row, scored.statistics)
            seen.take(scored)
            for save in savers:
                save(scored)
        finish_statistics(file, task, seen)
    for name in set(chain(*FIELD_FILES.values())) - set(chain(*(FIELD_FILES[k] for k in task.options.save))):
        (out / name).unlink(missing_ok=True)  # 上一次留下的，与这一次的成绩不是一回事
    with Statistics(path) as statistics:
        table = make_table(task, statistics, seen)
    return table, seen


def finish_statistics(file: StatisticsFile, task: Task, seen: Seen) -> None:
    """谱与秩直方图：有效场上的平均。"""
    counts = seen.counts[..., None]  # (L, C, 1)
    with np.errstate(invalid="ignore"):
        spectra = np.stack([seen.spectra[name] / counts for name in task.models])
        file.add("spectrum", ("model", "prediction_timedelta", "channel", "wavenumber"), spectra)
        truth = seen.spectra["truth"] / counts
        file.add("spectrum_truth", ("prediction_timedelta", "channel", "wavenumber"), truth)
        if seen.ranks is not None:
            file.add("rank_histogram", ("prediction_timedelta", "channel", "bin"), seen.ranks / counts)


def make_table(task: Task, statistics: Statistics, seen: Seen) -> Table:
    """成绩表，加上谱的距离与秩直方图。"""
    baselines = [name for name in task.models if name != task.judged]
    table = tabulate([Contender(name, statistics, name) for name in task.models], baselines)
    add_spectral_distance(table, statistics, {name: name for name in task.models})
    ranks = statistics.result("rank_histogram")
    if ranks is not None:
        table["rank_histogram"] = {c: [plain(row) for row in ranks[:, i]] for i, c in enumerate(table["channels"])}
    table["spectrum_label"] = "zonal wavenumber" if task.spec.closes_circle else "half waves over the domain"
    table["samples_per_second"] = seen.rates()
    return table


def add_spectral_distance(table: Table, statistics: Statistics, models: Mapping[str, str]) -> None:
    """对数谱距离（分贝）：10 lg(预报谱 / 真值谱) 对波数的均方根；谱先在全部场上平均。

    只用真值的功率不低于总量 SPECTRUM_FLOOR 的波数：带限的场在截断以外只有舍入的噪声。models: 表上的名字 → 文件里的。
    """
    spectra, truth = statistics.result("spectrum"), statistics.result("spectrum_truth")
    assert spectra is not None and truth is not None
    for label, name in models.items():
        with np.errstate(divide="ignore", invalid="ignore"):
            decibel = 10 * np.log10(spectra[statistics.models.index(name)] / truth)  # (L, C, K)
            real = truth >= SPECTRUM_FLOOR * truth.sum(-1, keepdims=True)
            distance = np.sqrt(np.where(real, decibel**2, 0).sum(-1) / real.sum(-1))
        for channel in table["channels"]:
            i = statistics.channels.index(channel)
            table["scores"][label][channel]["log_spectral_distance"] = plain(distance[:, i])


def open_savers(stack: ExitStack, task: Task, out: Path, leads: list[int], attributes: Mapping[str, Any]) -> list[Any]:
    """要存的场：netcdf 是 forecast.nc 与 truth.nc，npy 是 inputs、trues、preds（像 SimVP 的测试那样，集合取平均）。

    Raises:
        ValueError: 磁盘放不下。
    """
    kinds, spec, members = task.options.save, task.spec, task.options.members
    check_space(task, out)
    savers = []
    if "netcdf" in kinds:
        title = {"title": "ar_pred forecast", **{k: str(v) for k, v in attributes.items()}}
        valid_hours = np.unique(task.init_hours[:, None] + np.array(leads))
        forecast = stack.enter_context(ForecastFile(out / "forecast.nc", spec, task.init_hours, leads, members, title))
        truth = stack.enter_context(TruthFile(out / "truth.nc", spec, valid_hours, title))

        def save_netcdf(scored: Scored) -> None:
            fields = scored.fields
            forecast.write(scored.row, fields["forecast"])
            hours = task.init_hours[scored.row : scored.row + len(fields["truth"]), None] + np.array(leads)  # (B, L)
            shape = fields["truth"].shape[2:]
            truth.write(hours.ravel(), fields["truth"].reshape(-1, *shape), fields["valid"].reshape(-1, shape[0]))

        savers.append(save_netcdf)
    if "npy" in kinds:
        frame = (spec.num_channels, spec.height, spec.width)
        sizes = {"inputs": spec.frames_in, "trues": task.steps, "preds": task.steps}
        files = {
            name: stack.enter_context(ArrayFile(out / f"{name}.npy", (len(task.starts), size, *frame)))
            for name, size in sizes.items()
        }

        def save_npy(scored: Scored) -> None:
            files["inputs"].write(scored.row, scored.fields["history"])
            files["trues"].write(scored.row, scored.fields["truth"])
            files["preds"].write(scored.row, scored.fields["forecast"].mean(1))

        savers.append(save_npy)
    return savers


def check_space(task: Task, out: Path) -> None:
    """开始之前就看磁盘够不够，不要算了一夜才满。"""
    spec, options = task.spec, task.options
    frame = 4 * spec.num_channels * spec.height * spec.width
    frames = {"netcdf": (options.members + 1) * task.steps, "npy": spec.frames_in + 2 * task.steps}
    need = frame * len(task.starts) * sum(frames[kind] for kind in options.save)
    free = shutil.disk_usage(out).free
    if need > free:
        raise ValueError(
            f"--save {' '.join(options.save)} needs up to {need / 2**30:.1f} GiB in {out}, {free / 2**30:.1f} GiB are "
            "free; use --save none, or a larger --stride"
        )
    if need:
        log.info("fields will be saved in %s: up to %.2f GiB before compression", out, need / 2**30)


def write_table(out: Path, table: Table) -> Path:
    """metrics.json 与 metrics.csv。"""
    target = out / "metrics.json"
    with replacing(target) as temporary:
        temporary.write_text(json.dumps(table, indent=1, allow_nan=False), encoding="utf-8")
    write_csv(out / "metrics.csv", table)
    return target


def scores_text(table: Table, lead: int = 0) -> str:
    """一张对齐的文字表：每行一个通道，每列一个模型。"""
    names = list(table["scores"])
    title = f"latitude-weighted RMSE at +{table['lead_hours'][lead]} h"
    labels = [f"{channel} [{table['units'][channel]}]" for channel in table["channels"]]
    width = max(map(len, [title, *labels])) + 2
    lines = [title.ljust(width) + "".join(f"{name:>24}" for name in names)]
    for label, channel in zip(labels, table["channels"], strict=True):
        values = (table["scores"][name][channel]["rmse"][lead] for name in names)
        lines.append(label.ljust(width) + "".join(f"{_number(v, '.5g'):>24}" for v in values))
    for base, ratios in table["mean_rmse_ratio"].items():
        shown = ", ".join(f"{name} {_number(values[lead], '.4f')}" for name, values in ratios.items())
        lines.append(f"mean over channels of RMSE / {base} RMSE: {shown}")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
