"""导入成目录树：逐个写场，末了写统计量；往旧树上再导入时，统计量连同树里原有的一起重算。"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from util.calendar import moment_of
from util.data.index import planned_index, sampled_hours, split_hours
from util.data.tree_files import (
    STATISTICS,
    FieldError,
    field_path,
    holds_tendency,
    read_field,
    static_names,
    write_field,
    write_moments,
)
from util.exchange.plan import ImportPlan, survey
from util.inspection.statistics import channel_statistics
from util.moments import Moments
from util.source.axes import listed
from util.variables import channel_folder

log = logging.getLogger("ar_pred")


def write_fields(plan: ImportPlan, overwrite: bool = False) -> list[tuple[str, int]]:
    """写出目录树：全部场和统计量（训练日期内树里全部的场，不只这一次写的）；返回因含非有限值而没有写的 (通道, 小时)。

    Raises:
        ValueError: 文件已在而没有 overwrite；旧树有这次不写的层、另一种网格；读不出；
            某通道在训练日期内没有场、有坏的，或全是同一个数。
    """
    _refuse_other_levels(plan)
    if not overwrite:
        refuse_existing(plan.config.root, plan.names, plan.hours)
    others = _refuse_other_grid(plan)
    if holds_tendency(plan.config.root, plan.names):
        log.warning(
            "mean_std.json loses its tendency_std, which was of the former fields; "
            "python dataset.py statistics --config CONFIG --tendency --write --overwrite computes it anew"
        )
    for name in plan.names:  # 中断了不留下与场不符的
        for file in STATISTICS:
            (Path(plan.config.root) / channel_folder(name) / file).unlink(missing_ok=True)
    moments, holes = survey(plan, lambda name, hour, field: _write_or_remove(plan, name, hour, field))
    moments = _measure_tree(plan) if others else moments
    for name, result in moments.items():
        write_moments(plan.config.root, name, result, " to ".join(plan.config.splits.train))
    return holes


def _measure_tree(plan: ImportPlan) -> dict[str, Moments]:
    """训练日期内树里的全部场，与 dataset.py statistics 相同。

    Raises:
        ValueError: 有用不了的文件。
    """
    found = channel_statistics(plan.config)
    for name, result in found.items():
        if bad := result.faults.total() - result.faults["missing"]:
            raise ValueError(
                f"{name}: {bad} files of earlier imports in the training dates cannot be used, so no statistics are "
                "written; python dataset.py check lists them, python dataset.py statistics --write goes on without them"
            )
    return {name: result.moments for name, result in found.items()}


def _refuse_other_grid(plan: ImportPlan) -> bool:
    """训练日期内，树里有没有这次不写的场；有就看头一个，形状要与这次的相同。"""
    config = plan.config
    hours = sampled_hours(split_hours(config)["train"], config.interval_hours, config.first_hour)
    hours = np.setdiff1d(hours, plan.hours)
    index = planned_index(config, plan.names, plan.hours)
    there = index.present[:, hours - index.start]  # (C, n)
    for c in np.flatnonzero(there.any(axis=1)).tolist():
        path = field_path(config.root, plan.names[c], int(hours[there[c].argmax()]))
        try:
            read_field(path, (config.latitude.count, config.longitude.count))
        except FieldError as error:
            if error.fault == "wrong shape":
                raise ValueError(f"{error}: the tree holds another grid; give another --root") from None
    return bool(there.any())


def _write_or_remove(plan: ImportPlan, name: str, hour: int, field: np.ndarray) -> bool:
    """写一个场；含非有限值的不写，覆盖旧树时也不留下旧的。"""
    path = field_path(plan.config.root, name, int(hour))
    finite = bool(np.isfinite(field).all())
    if finite:
        write_field(path, field)
    else:
        path.unlink(missing_ok=True)
    return finite


def _refuse_other_levels(plan: ImportPlan) -> None:
    """读取时 `all` 是文件夹里的全部层，气压却按这次的层数：旧树多出来的层不能留着。"""
    for variable, channels in plan.channels.items():
        there = {p.name for p in (Path(plan.config.root) / f"{variable}_npy").glob("level_*") if p.is_dir()}
        old = sorted(there - {Path(channel_folder(name)).name for name in channels})
        if old:
            folder = Path(plan.config.root) / f"{variable}_npy"
            raise ValueError(f"{folder} holds {listed(old)}, which this import does not write; remove it first")


def refuse_static(root: str | Path, names: Iterable[str]) -> None:
    """要写的不随时间变的场已经有了就报错。"""
    taken = sorted(set(names) & set(static_names(root)))
    if taken:
        raise ValueError(f"{Path(root) / 'static' / taken[0]}.npy exists already; give --overwrite to replace it")


def refuse_existing(root: str | Path, channels: Sequence[str], hours: np.ndarray) -> None:
    """要写的已经有了就报错；逐个年份文件夹查，不逐个文件问盘。"""
    years = sorted({moment_of(hour).year for hour in hours.tolist()})
    for name in channels:
        folder = Path(root) / channel_folder(name)
        taken = [p for p in (folder / str(year) for year in years) if p.is_dir() and any(p.iterdir())]
        taken += [p for p in (folder / "mean_std.json", folder / "min_max.json") if p.exists()]
        if taken:
            raise ValueError(f"{taken[0]} exists already; give --overwrite to replace it")
