"""检查整棵目录树（dataset.py check）。

读配置所选通道、三个划分全部抽样小时的每一个文件，查：缺、打不开、形状、类型、非有限值、填充值；再查每个通道的
mean_std.json、min_max.json，并把训练段量到的均值、标准差与 json 相比（文件是原始值还是已标准化，都认得）。
不随时间变的场（`<root>/static/`）也查。遇到一处毛病不停，全部查完再报。整场同一个数的、超出合理范围的只是提一句：它们可能就是数据。
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import numpy as np
from tqdm import tqdm

from util.calendar import time_text
from util.cli import aligned
from util.config import DataConfig
from util.data.index import SPLITS, sampled_hours, split_hours
from util.data.normalize import Verdict, judge
from util.data.tree_files import (
    Fault,
    FieldError,
    channel_fills,
    field_path,
    read_extremes,
    read_field,
    read_mean_std,
    read_static,
    read_tendency,
    select_channels,
    static_names,
)
from util.files.fills import Fills

FILES_PER_TASK = 256
FAULTS: tuple[Fault, ...] = get_args(Fault)


class BadFile(NamedTuple):
    """一个用不了的文件；hour 是文件名的历法，1970 年以来。"""

    channel: str
    hour: int
    path: str
    fault: Fault
    reason: str


class FileBatch(NamedTuple):
    """一个进程一次做的事：一个通道的若干小时。

    measure：训练段，顺便量均值与方差；fills：认作填充值的；limits：合理范围，文件里的数是物理单位的、是标准化了的各一个，
    哪一个算数要等全部量完才知道，不知道的没有。
    """

    root: str
    channel: str
    hours: np.ndarray
    shape: tuple[int, int]
    measure: bool
    fills: Fills
    limits: list[tuple[float, float]]


class Part(NamedTuple):
    """一个 Task 的结果。

    moments: (n, 2) 训练段可读文件的均值与方差；spans: (m, 3 + R) 可读文件的小时、最小、最大、在各个 limits 之外的点数。
    """

    channel: str
    files: int
    moments: np.ndarray
    spans: np.ndarray
    bad: list[BadFile]


@dataclass
class ChannelReport:
    """一个通道的检查结果；measured 与 stated 是 (均值, 标准差)，没有就是 None；outside 是有点超出合理范围的文件数。"""

    channel: str
    expected: int
    faults: Counter[str]
    measured: tuple[float, float] | None
    stated: tuple[float, float] | None
    state: Verdict | None
    outside: int
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def check_tree(config: DataConfig, workers: int) -> tuple[list[ChannelReport], list[BadFile]]:
    """检查配置所选的全部文件。

    Raises:
        ValueError: 根目录、变量、层或划分写错，没有可查的东西。
    """
    channels = select_channels(config)
    tasks = list(plan_tasks(config, channels))
    parts: dict[str, list[Part]] = {channel: [] for channel in channels}
    bar = tqdm(total=sum(t.hours.size for t in tasks), unit="file", desc="check", smoothing=0)
    with bar, mapper(workers) as run:
        for part in run(check_files, tasks):
            parts[part.channel].append(part)
            bar.update(part.files)
    reports = [summarize(config, channel, parts[channel]) for channel in channels]
    compare_states(config, reports)
    return reports, [bad for channel in channels for part in parts[channel] for bad in part.bad]


class StaticReport(NamedTuple):
    """一个不随时间变的场；about 是单位与统计量，用不了时是 None，problem 说为什么。"""

    name: str
    about: dict[str, Any] | None
    problem: str | None

    @property
    def line(self) -> str:
        """给人看的一行。"""
        if self.about is None:
            return f"static {self.name}: {self.problem}"
        mean, std, low, high = (self.about[key][0] for key in ("mean", "std", "min", "max"))
        units = self.about["units"] or "units unknown"
        return f"static {self.name}: {units}, mean {mean:.4g}, std {std:.4g}, {low:.4g} to {high:.4g}"


def check_static(config: DataConfig) -> list[StaticReport]:
    """`<root>/static/` 里的各个场。"""
    reports = []
    for name in static_names(config.root):
        try:
            about = read_static(config.root, name, config.latitude, config.longitude).about()
        except ValueError as error:
            reports.append(StaticReport(name, None, str(error)))
        else:
            reports.append(StaticReport(name, about, None))
    return reports


def plan_tasks(config: DataConfig, channels: Sequence[str]) -> Iterator[FileBatch]:
    shape = (config.latitude.count, config.longitude.count)
    spans = split_hours(config)
    for channel in channels:
        fills, limits = channel_fills(config, channel), file_limits(config, channel)
        for split in SPLITS:
            hours = sampled_hours(spans[split], *config.sampling)
            for first in range(0, hours.size, FILES_PER_TASK):
                part = hours[first : first + FILES_PER_TASK]
                yield FileBatch(config.root, channel, part, shape, split == "train", fills, limits)


@contextmanager
def mapper(workers: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """一个进程时就地做，多个时用进程池：小文件的时间一半花在解释器里，线程分担不了。"""
    if workers == 1:
        yield map
        return
    with ProcessPoolExecutor(workers) as pool:
        yield pool.map


def check_files(task: FileBatch) -> Part:
    """逐个读文件；训练时的快路认不得的也由这个 read_field 定，这里放过的训练时也读得了。"""
    moments, spans, bad = [], [], []
    for hour in task.hours.tolist():
        path = field_path(task.root, task.channel, hour)
        try:
            values = read_field(path, task.shape, task.fills)
        except FieldError as error:
            reason = error.detail
            if error.fault == "missing" and not path.parent.is_dir():
                reason = f"missing (no folder {path.parent})"
            bad.append(BadFile(task.channel, hour, str(path), error.fault, reason))
            continue
        low, high = values.min(), values.max()
        spans.append((hour, low, high, *(count_outside(values, low, high, limits) for limits in task.limits)))
        if task.measure:
            moments.append((values.mean(dtype=np.float64), values.var(dtype=np.float64)))
    return Part(
        task.channel,
        task.hours.size,
        np.array(moments).reshape(-1, 2),
        np.array(spans).reshape(-1, 3 + len(task.limits)),
        bad,
    )


def summarize(config: DataConfig, channel: str, parts: list[Part]) -> ChannelReport:
    """一个通道的文件与 json 合起来看。"""
    faults = Counter(bad.fault for part in parts for bad in part.bad)
    moments = np.concatenate([part.moments for part in parts])  # (n, 2)
    measured = None
    if moments.size:  # 各文件一样大：总方差 = 方差的平均 + 均值的方差
        measured = (float(moments[:, 0].mean()), float(np.sqrt(moments[:, 1].mean() + moments[:, 0].var())))
    problems = [f"{faults[fault]} {fault}" for fault in FAULTS if faults[fault]]
    stated = None
    try:
        stated = read_mean_std(config.root, channel)
    except ValueError as error:
        problems.append(str(error))
    for read in (read_extremes, read_tendency):
        try:
            read(config.root, channel)
        except ValueError as error:
            problems.append(str(error))
    state = judge(*measured, *stated) if measured and stated else None
    files = sum(p.files for p in parts)
    spans = np.concatenate([part.spans for part in parts])  # (m, 3 + R)
    limits, standard = file_limits(config, channel), state == "standard"
    outside = int(np.count_nonzero(spans[:, 3 + standard])) if limits else 0
    said = remarks(limits, spans, standard)
    return ChannelReport(channel, files, faults, measured, stated, state, outside, problems, said)


def file_limits(config: DataConfig, channel: str) -> list[tuple[float, float]]:
    """合理范围：物理单位的，和标准化了的（mean_std.json 读得出时）；不知道就是空的。"""
    limits = config.limits(channel)
    if limits is None:
        return []
    try:
        mean, std = read_mean_std(config.root, channel)
    except ValueError:  # 由 summarize 说
        return [limits]
    low, high = ((limit - mean) / std for limit in limits)
    return [limits, (low, high)]


def count_outside(values: np.ndarray, low: float, high: float, limits: tuple[float, float]) -> int:
    """limits 之外的点数；最小 low、最大 high 都在里面就不必数。"""
    if limits[0] <= low and high <= limits[1]:
        return 0
    return int(((values < limits[0]) | (values > limits[1])).sum())


def remarks(limits: list[tuple[float, float]], spans: np.ndarray, standard: bool) -> list[str]:
    """整场同一个数的文件有几个；超出合理范围的有几个文件、几个点；头一个在哪里。它们照样是数据。

    Args:
        limits, spans: 见 FileBatch、Part；standard: 文件里的数是标准化了的。
    """
    said = []
    constant = spans[spans[:, 1] == spans[:, 2]]
    if len(constant):
        values = ", ".join(f"{value:g} in {count}" for value, count in Counter(constant[:, 1].tolist()).most_common(3))
        said.append(
            f"{len(constant)} files hold one value everywhere ({values}; first {time_text(int(constant[0, 0]))})"
        )
    if limits:
        which = int(standard)
        (low, high), points = limits[which], spans[:, 3 + which]
        outside = spans[points > 0]
        if len(outside):
            said.append(
                f"{len(outside)} files with {int(points.sum())} points outside {low:.4g} to {high:.4g} "
                f"(lowest {outside[:, 1].min():.4g}, highest {outside[:, 2].max():.4g}; first "
                f"{time_text(int(outside[0, 0]))}); kept as data, data.valid_range sets the limits"
            )
    return said


def compare_states(config: DataConfig, reports: list[ChannelReport]) -> None:
    """每个通道量到的，应当与 json、与 data.standardize、与别的通道都说得通；说不通的记进 problems。"""
    decided = Counter(r.state for r in reports if r.state in ("raw", "standard"))
    wanted = {"yes": "raw", "no": "standard"}.get(config.standardize)
    other = f"against data.standardize = {config.standardize}" if wanted else "unlike other channels"
    if wanted is None and decided:
        wanted = decided.most_common(1)[0][0]
    if wanted is None:  # 全都接近 0 和 1，训练时 auto 也不肯猜
        for report in reports:
            if report.state == "both":
                report.problems.append(
                    "raw and standardised look alike; set data.standardize to yes (files are raw) or no"
                )
    for report in reports:
        if report.state is None or report.state in ("both", wanted):
            continue
        assert report.measured
        assert report.stated
        found = "measured mean {:.4g}, std {:.4g}; mean_std.json {:.4g}, {:.4g}".format(
            *report.measured, *report.stated
        )
        if report.state == "neither":
            report.problems.append(f"statistics disagree with the files ({found})")
        else:
            report.problems.append(f"the files look {report.state}, {other} ({found})")


def table(reports: Sequence[ChannelReport]) -> str:
    """每个通道一行的文本表格。"""
    rows = [["channel", "expected", "present", *FAULTS, "mean", "json", "std", "json", "files are", "verdict"]]
    for r in reports:
        pairs = zip(r.measured or (None, None), r.stated or (None, None), strict=True)
        numbers = ["-" if value is None else f"{value:.4g}" for pair in pairs for value in pair]
        counts = [r.expected, r.expected - r.faults["missing"], *(r.faults[fault] for fault in FAULTS)]
        verdict = "WRONG" if r.problems else f"ok, {r.outside} outside" if r.outside else "ok"
        rows.append([r.channel, *map(str, counts), *numbers, r.state or "-", verdict])
    first, *lines = aligned(rows)
    return "\n".join([first, "-" * len(first), *lines])


def describe_bad(bad: Sequence[BadFile], interval: int) -> list[str]:
    """坏文件的清单，同一通道里相邻、原因相同的并成一行（整年的文件夹不在时有上千个）。"""
    runs: list[list[BadFile]] = []
    for item in bad:
        wanted = runs[-1][-1]._replace(hour=runs[-1][-1].hour + interval, path=item.path) if runs else None
        if item == wanted:
            runs[-1].append(item)
        else:
            runs.append([item])
    return [
        f"{run[0].channel} {time_text(run[0].hour)}"
        + (f" to {time_text(run[-1].hour)} ({len(run)} files)" if len(run) > 1 else "")
        + f": {run[0].reason} ({run[0].path}{', ...' if len(run) > 1 else ''})"
        for run in runs
    ]


def report_json(
    config_path: str, config: DataConfig, reports: list[ChannelReport], bad: list[BadFile], static: list[StaticReport]
) -> dict[str, Any]:
    """机器可读的报告：每个通道一条，每个坏文件一条，每个不随时间变的场一条。"""
    return {
        "config": config_path,
        "root": config.root,
        "ok": not any(r.problems for r in reports) and not any(s.problem for s in static),
        "files_expected": sum(r.expected for r in reports),
        "files_bad": len(bad),
        "channels": [
            {
                "channel": r.channel,
                "expected": r.expected,
                "present": r.expected - r.faults["missing"],
                **{fault.replace(" ", "_").replace("-", "_"): r.faults[fault] for fault in FAULTS},
                "measured": None if r.measured is None else dict(zip(("mean", "std"), r.measured, strict=True)),
                "mean_std_json": None if r.stated is None else dict(zip(("mean", "std"), r.stated, strict=True)),
                "files_are": r.state,
                "files_outside": r.outside,
                "problems": r.problems,
                "remarks": r.remarks,
            }
            for r in reports
        ],
        "bad_files": [{**item._asdict(), "time": time_text(item.hour)} for item in bad],
        "static": [{"name": s.name, **(s.about or {}), "problem": s.problem} for s in static],
    }
