"""评测的结果收下、落盘：statistics.nc，由它合成的成绩，metrics.json 与 metrics.csv；只在零号进程。"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import astuple, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from engine.cases.collect import CaseFound
from engine.evaluation.baselines import CLIMATOLOGY
from engine.evaluation.metrics_file import BlowUp, Provenance, Result, Scores
from engine.evaluation.saved_fields import open_savers, remove_others
from engine.evaluation.task import BlownUp, Pair, Scored, Task
from engine.verification.result import SPECTRUM_FLOOR, csv_lines, event_scores, event_variables
from util.atomic import replacing
from util.calendar import time_text
from util.cli import number
from util.files.records import as_json
from util.scores.cells import tabulate_cells
from util.scores.common import Contender
from util.scores.statistics_file import Statistics, StatisticsFile
from util.scores.table import ScoreTable
from util.scores.tabulate import Found, plain, tabulate, write_csv

log = logging.getLogger("ar_pred")
Table = TypeVar("Table", bound=ScoreTable)
LINES_SHOWN = 20


class Seen:
    """流过之后留下的小东西：谱与秩的和、序列、地图、个例、各模型预报的时间。"""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.spectra: dict[str, np.ndarray] = {}
        self.ranks: np.ndarray | None = None
        self.events: dict[tuple[str, str], np.ndarray] = {}
        self.blown_up: list[BlownUp] = []
        self.series: list[Pair] = []
        self.pictures: dict[tuple[str, int], Pair] = {}
        self.seconds: dict[str, float] = {}
        self.cases: list[list[CaseFound]] = [[] for _ in task.cases]
        self.windows = 0
        self.counts = np.zeros((task.steps, task.spec.num_channels))  # 有效场数

    def take(self, scored: Scored) -> None:
        for name, total in scored.spectra.items():
            self.spectra[name] = self.spectra.get(name, 0) + total
        if scored.ranks is not None:
            self.ranks = scored.ranks if self.ranks is None else self.ranks + scored.ranks
        for key, total in scored.events.items():
            self.events[key] = self.events.get(key, 0) + total
        self.blown_up += scored.blown_up
        squares = np.stack([one["square"] for one in scored.statistics.values()])  # (models, B, L, C)
        count = squares.shape[1]
        self.counts += np.isfinite(squares).all(0).sum(0)
        rows = self.task.glimpse.series_rows
        chosen = [i for i in range(count) if scored.row + i in rows]
        self.series.append(Pair(*(values[chosen] for values in scored.series)))
        self.pictures |= scored.pictures
        for held, found in zip(self.cases, scored.cases, strict=True):
            held += [found] if found else []
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


def write_statistics(task: Task, stream: Iterable[Scored], out: Path, origin: Provenance) -> tuple[Scores, Seen]:
    """收下全部结果，写 statistics.nc 与要存的场，合成成绩。"""
    seen = Seen(task)
    path = out / "statistics.nc"
    leads = task.spec.leads(task.steps)
    about = {"model": task.judged, **as_json(origin)}
    with ExitStack() as stack:
        file = stack.enter_context(
            StatisticsFile(
                path, task.spec, list(task.models), task.init_hours, leads, task.thresholds.numpy(), about, task.regions
            )
        )
        savers = open_savers(stack, task, out, leads, origin)
        for scored in stream:
            file.write(scored.row, scored.statistics)
            seen.take(scored)
            for save in savers:
                save(scored)
        finish_statistics(file, task, seen)
    remove_others(task, out)
    with Statistics(path) as statistics:
        return add_events(task, make_scores(task, statistics), seen), seen


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
    if task.verifier:
        for name, dims, values in event_variables(task.verifier.asked, seen.events, seen.counts, list(task.models)):
            file.add(name, dims, values)


def make_scores(task: Task, statistics: Statistics) -> Scores:
    """成绩表，加上谱的距离与秩直方图。"""
    baselines = [name for name in task.models if name != task.judged]
    contenders = [Contender(name, statistics, name) for name in task.models]
    table = add_spectral_distance(tabulate(contenders, baselines), contenders)
    ranks = statistics.result("rank_histogram")  # (L, C, M + 1)
    histogram = None
    if ranks is not None:
        histogram = {c: [plain(row) for row in ranks[:, i]] for i, c in enumerate(table.channels)}
    label = "zonal wavenumber" if task.spec.closes_circle else "half waves over the domain"
    cells = tabulate_cells(contenders, baselines, by=task.options.by) or None
    return Scores(**vars(table), rank_histogram=histogram, spectrum_label=label, cells=cells)


def add_events(task: Task, scores: Scores, seen: Seen) -> Scores:
    """--events 的成绩；爆掉的预报，一次一行。"""
    if task.verifier:
        found = event_scores(
            task.verifier.asked, task.spec, seen.events, seen.counts, seen.spectra, scores, base=CLIMATOLOGY
        )
        scores = replace(scores, events=found)
    leads = task.spec.leads(task.steps)
    lost = [BlowUp(name, time_text(int(task.init_hours[row])), leads[lead]) for name, row, lead in seen.blown_up]
    for name, init, lead in map(astuple, lost[:LINES_SHOWN]):
        log.warning("%s blew up: the forecast from %s UTC holds non-finite values from +%d h on", name, init, lead)
    if len(lost) > LINES_SHOWN:
        log.warning("... and %d more forecasts blew up, see blown_up in metrics.json", len(lost) - LINES_SHOWN)
    return replace(scores, blown_up=lost or None)


def add_spectral_distance(table: Table, contenders: Iterable[Contender]) -> Table:
    """对数谱距离（分贝）：10 lg(预报谱 / 真值谱) 对波数的均方根；谱先在全部场上平均。

    只用真值的功率不低于总量 SPECTRUM_FLOOR 的波数：带限的场在截断以外只有舍入的噪声。
    """
    scores = dict(table.scores)
    for label, file, model, *_ in contenders:
        spectra, truth = file.result("spectrum"), file.result("spectrum_truth")
        assert spectra is not None and truth is not None
        with np.errstate(divide="ignore", invalid="ignore"):
            decibel = 10 * np.log10(spectra[file.models.index(model)] / truth)  # (L, C, K)
            real = truth >= SPECTRUM_FLOOR * truth.sum(-1, keepdims=True)
            distance = np.sqrt(np.where(real, decibel**2, 0).sum(-1) / real.sum(-1))  # (L, C)
        columns = {c: plain(distance[:, file.channels.index(c)]) for c in table.channels}
        scores[label] = {c: {**one, "log_spectral_distance": columns[c]} for c, one in scores[label].items()}
    return replace(table, scores=scores)


def write_result(out: Path, result: Result, more: Iterable[Found] = ()) -> Path:
    """metrics.json 与 metrics.csv；返回前者的路径。more: 只进 CSV 的。

    各区域、时段的只进 CSV：几百格的 JSON 读不回来，比较也从 statistics.nc 重算。
    """
    target = out / "metrics.json"
    with replacing(target) as temporary:
        record = as_json(replace(result, cells=None))
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")
    whole = csv_lines(result.events, result) if result.events else ()
    write_csv(out / "metrics.csv", result, result.cells, [*whole, *more])
    return target


def scores_text(table: ScoreTable, lead: int = 0) -> str:
    """一张对齐的文字表：每行一个通道，每列一个模型。"""
    names = list(table.scores)
    title = f"latitude-weighted RMSE at +{table.lead_hours[lead]} h"
    labels = [f"{channel} [{table.units[channel]}]" for channel in table.channels]
    width = max(map(len, [title, *labels])) + 2
    lines = [title.ljust(width) + "".join(f"{name:>24}" for name in names)]
    for label, channel in zip(labels, table.channels, strict=True):
        values = (table.scores[name][channel]["rmse"][lead] for name in names)
        lines.append(label.ljust(width) + "".join(f"{number(v, '.5g'):>24}" for v in values))
    for base, ratios in table.mean_rmse_ratio.items():
        shown = ", ".join(f"{name} {number(values[lead], '.4f')}" for name, values in ratios.items())
        lines.append(f"mean over channels of RMSE / {base} RMSE: {shown}")
    return "\n".join(lines)
