"""所要的变量各在哪几个来源里：一个变量的几个来源以后由时刻接起来，变量之间不必在同一个文件里。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from util.source.axes import SHOWN, listed
from util.source.collection import Source
from util.source.grib import MAGIC, described
from util.source.lead_time import is_lead, places_of_lead
from util.source.opening import open_source, start_of
from util.source.request import Request, Scalar
from util.strict import nearest

if TYPE_CHECKING:
    import xarray as xr


class Held(NamedTuple):
    """一个来源里有所要的变量：它的数据集，select 已经取好。"""

    source: Source
    dataset: xr.Dataset


def open_wanted(
    sources: Sequence[Source], request: Request, stack: ExitStack
) -> tuple[dict[str, list[Held]], list[Source]]:
    """目录树里的名字 → 有它的各来源；另给一个所要的变量也没有的来源。打开的由 stack 关，场还没有读。

    哪里都没有的变量：skip_lacking 时略去，只要还有别的。

    Raises:
        ValueError: 有打不开的；有一个变量哪里都没有；select 的轴没有，或同一个变量在这里有、在那里没有。
    """
    from tqdm import tqdm

    held: dict[str, list[Held]] = {name: [] for name in request.variables}
    there: dict[str, None] = {}  # 各来源里有过的变量，报错用
    unused = []
    for source in tqdm(sources, "open", unit="file", leave=False, disable=len(sources) == 1 or None):
        found = False
        for name, dataset in _open_each(source, request, stack).items():
            there |= dict.fromkeys(map(str, dataset.data_vars))
            if request.source(name) in dataset.data_vars:
                held[name].append(Held(source, dataset))
                found = True
        unused += [] if found else [source]
    lacking = [name for name, several in held.items() if not several]
    if lacking and (not request.skip_lacking or len(lacking) == len(held)):
        raise ValueError(_nowhere(request, lacking[0], sources, list(there)))
    return _select_all({name: several for name, several in held.items() if several}, request), unused


def _open_each(source: Source, request: Request, stack: ExitStack) -> dict[str, xr.Dataset]:
    """目录树里的名字 → 可能有它的数据集；只有 GRIB 才因 filter 不同而开多个。"""
    opened: dict[str, xr.Dataset] = {}
    result = {}
    grib = _is_grib(source)
    for name in request.variables:
        filters = request.filters(name)
        if filters and not grib:  # 几种格式混着给时，有 filter 的只在 GRIB 里找
            continue
        key = str(sorted(filters.items()))
        if key not in opened:
            opened[key] = stack.enter_context(open_named(source, filters))
        result[name] = opened[key]
    return result


def _is_grib(source: Source) -> bool:
    return isinstance(source.path, Path) and start_of(source.path) == MAGIC


def open_named(source: Source, filters: Mapping[str, Scalar]) -> xr.Dataset:
    """open_source，报错里写来源的名字，不写 ZIP 取到了哪里。"""
    try:
        return open_source(source.path, filters)
    except ValueError as error:
        raise ValueError(str(error).replace(str(source.path), source.name)) from None


def _nowhere(request: Request, name: str, sources: Sequence[Source], there: list[str]) -> str:
    """一个变量哪里都没有，说成一行。"""
    source, filters = request.source(name), request.filters(name)
    where = f"{sources[0].name}: no variable {source!r} in the file"
    if len(sources) > 1:
        where = f"no variable {source!r} in any of the {len(sources)} files"
    if filters and not any(map(_is_grib, sources)):
        return f"{where}: filter {listed(filters)} is for GRIB messages, and there is no GRIB file"
    if filters and not there:
        return f"{where}: no message with {described(filters)}"
    return f"{where} ({nearest(source, there, 'names')}); there: {listed(there) or 'none'}"


def _select_all(held: Mapping[str, list[Held]], request: Request) -> dict[str, list[Held]]:
    """select 的各轴取一项；没有这个轴的变量照旧，但一个变量的各来源要么都有、要么都没有。"""
    left = dict.fromkeys(request.select)
    result: dict[str, list[Held]] = {}
    for name, several in held.items():
        for dim in request.select:
            have = [h for h in several if _has_axis(h.dataset, dim)]
            if have and len(have) < len(several):
                lacks = next(h for h in several if not _has_axis(h.dataset, dim))
                raise ValueError(
                    f"{name}: select {dim}: {have[0].source.name} has this axis, {lacks.source.name} has not; "
                    "import them apart"
                )
            if have:
                left.pop(dim, None)
        result[name] = [Held(h.source, take_selected(h, request.select)) for h in several]
    for dim in left:
        first = next(iter(held.values()))[0]
        raise ValueError(
            f"{first.source.name}: select {dim}: no such axis; dimensions there: {listed(first.dataset.dims)}"
        )
    return result


def _has_axis(dataset: xr.Dataset, dim: str) -> bool:
    return dim in dataset.coords and dataset[dim].dims in ((), (dim,))


def take_selected(held: Held, select: Mapping[str, Scalar]) -> xr.Dataset:
    """按坐标的值取一项；GRIB 里已由 filter 挑到只剩一项的，核对一下。"""
    dataset = held.dataset
    for dim, value in select.items():
        if not _has_axis(dataset, dim):
            continue
        there = np.atleast_1d(dataset[dim].values)
        found = places_of_lead(dataset[dim], value) if is_lead(dataset, dim) else np.flatnonzero(there == value)
        if found.size != 1:
            raise ValueError(
                f"{held.source.name}: select {dim}={value}: {found.size} such entries; there: {listed(there[:SHOWN])}"
            )
        if dataset[dim].ndim:
            dataset = dataset.isel({dim: int(found[0])})
    return dataset
