"""导入成目录树：逐个写场，末了写统计量；往旧树上再导入时，统计量连同树里原有的一起重算。"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from util.data.index import sampled_hours, split_hours, tree_hours
from util.data.normalize import judge
from util.data.tree_files import (
    STATISTICS,
    FieldError,
    field_path,
    holds_tendency,
    owned,
    read_field,
    read_mean_std,
    static_names,
    write_field,
    write_moments,
)
from util.exchange.plan import ImportPlan, blocks_of, read_blocks
from util.exchange.survey import Survey, measure_block, survey
from util.files.moments import Moments
from util.inspection.statistics import channel_statistics
from util.source.axes import listed
from util.variables import channel_folder

log = logging.getLogger("ar_pred")


def write_fields(plan: ImportPlan, overwrite: bool = False) -> Survey:
    """写出目录树：全部场和统计量（训练日期内树里全部的场，不只这一次写的）；返回过一遍所得，其中 holes 没有写。

    Raises:
        ValueError: 要写的文件已在而没有 overwrite；旧树有这次不写的层、另一种网格，或已标准化；读不出；
            某通道在训练日期内没有场、有坏的，或全是同一个数；别的进程正在写其中的变量。
    """
    with owned(plan.config.root, plan.names):  # 统计量是整棵树的：同一个变量的另一次导入还在写，就会只算到一部分
        return _write_reserved(plan, overwrite)


def _write_reserved(plan: ImportPlan, overwrite: bool) -> Survey:
    """write_fields 占下各变量的文件夹之后的事。"""
    _refuse_other_levels(plan)
    held = {name: tree_hours(plan.config.root, name) for name in plan.names}
    if not overwrite:
        _refuse_replacing(plan.config.root, held, plan.hours)
    others = _refuse_other_tree(plan, held)
    if holds_tendency(plan.config.root, plan.names):
        log.warning(
            "mean_std.json loses its tendency_std, which was of the former fields; "
            "python dataset.py statistics --config CONFIG --tendency --write --overwrite computes it anew"
        )
    for name in plan.names:  # 中断了不留下与场不符的
        for file in STATISTICS:
            (Path(plan.config.root) / channel_folder(name) / file).unlink(missing_ok=True)
    take, blocks = partial(_write_or_remove, plan), blocks_of(plan)
    pairs = zip(blocks, read_blocks(plan, blocks), strict=True)
    found = survey(plan, ((block, measure_block(plan, block, *read, take)) for block, read in pairs))
    moments = _measure_tree(plan) if others else found.moments
    for name, result in moments.items():
        write_moments(plan.config.root, name, result, " to ".join(plan.config.splits.train))
    return found


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


def _refuse_other_tree(plan: ImportPlan, held: dict[str, np.ndarray]) -> bool:
    """这次不写的场，各通道看头一个：形状要与这次的相同，而且是物理单位的；返回它们有没有在训练日期内的。"""
    config = plan.config
    train = sampled_hours(split_hours(config)["train"], *config.sampling)
    others = {name: np.setdiff1d(hours, plan.hours) for name, hours in held.items()}
    for name, hours in others.items():
        if hours.size:
            _refuse_other_kind(plan, name, int(hours[0]))
    return any(np.isin(hours, train).any() for hours in others.values())


def _refuse_other_kind(plan: ImportPlan, name: str, hour: int) -> None:
    root, shape = plan.config.root, (plan.config.latitude.count, plan.config.longitude.count)
    path = field_path(root, name, hour)
    try:
        field = read_field(path, shape)
    except FieldError as error:
        if error.fault == "wrong shape":
            raise ValueError(f"{error}: the tree holds another grid; give another --root") from None
        return  # 坏文件由 _measure_tree 说
    measured = float(field.mean()), float(field.std())
    known = (Path(root) / channel_folder(name) / "mean_std.json").is_file()
    if known and judge(*measured, *read_mean_std(root, name)) == "standard":
        raise ValueError(f"{path} is standardised, an import writes physical values; give another --root")


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


def _refuse_replacing(root: str | Path, held: dict[str, np.ndarray], hours: np.ndarray) -> None:
    """要写的文件已经有了就报错，说出头几个；别的时刻的不碍事：加一年不必 --overwrite。"""
    for name, there in held.items():
        taken = np.intersect1d(there, hours)
        if taken.size:
            first = ", ".join(field_path(root, name, int(hour)).name for hour in taken[:3])
            raise ValueError(
                f"{Path(root) / channel_folder(name)}: {taken.size} of the {hours.size} files to write exist already, "
                f"first {first}; give --overwrite to replace them, or a source without these times"
            )
