"""一个变量的几个文件接成一个：网格、层、单位要对得上，各变量的时刻相同；只看坐标，不读场。"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from util.calendar import moment_of, time_text
from util.data.index import date_hours
from util.source.axes import (
    SHOWN,
    Dims,
    find_dims,
    has_levels,
    listed,
    read_coordinates,
    read_pressures,
    same_coordinates,
    span,
)
from util.source.collection import Source
from util.source.lead_time import read_hours
from util.source.request import Request, Wanted
from util.source.wanted import Held
from util.variables import plain_units, variable_info

if TYPE_CHECKING:
    import xarray as xr


class FileVariable(NamedTuple):
    """一个文件里的一个变量，还没有读：array 已经裁剪、只留要的层；ranks 是各通道在剩下的层里的下标，单层为空。"""

    source: Source
    array: xr.DataArray
    dims: Dims
    hours: np.ndarray
    ranks: list[int]


def find_layers(held: Mapping[str, Sequence[Held]], request: Request) -> dict[str, bool]:
    """目录树里的名字 → 有没有气压维；各文件须相同。"""
    result = {}
    for name, several in held.items():
        found = {}
        for one in several:
            with _naming(one.source):
                found[has_levels(one.dataset, request.source(name), find_dims(one.dataset))] = one.source.name
        if len(found) > 1:
            raise ValueError(f"{name}: levels in {found[True]}, none in {found[False]}; import them apart")
        result[name] = next(iter(found))
    return result


def choose_pressures(held: Mapping[str, Sequence[Held]], request: Request, layered: dict[str, bool]) -> list[float]:
    """依次为 level_00、level_01……的气压：写明的，或文件里的全部（各变量、各文件须相同）；没有多层变量时为空。

    Raises:
        ValueError: 没有写明而各处的层不同；写明了，却没有一个变量有层。
    """
    there = {}
    for name in (name for name in layered if layered[name]):
        for source, dataset in held[name]:
            with _naming(source):
                there[name, source.name] = read_pressures(dataset, str(find_dims(dataset).level))[1]
    if not there and request.pressure_hpa:
        raise ValueError(
            f"--levels (pressure_hpa) {_hpa(request.pressure_hpa)}: none of {listed(layered)} has levels; leave it out"
        )
    if request.pressure_hpa or not there:
        return request.pressure_hpa
    ((one, where), pressures), *others = there.items()
    for (other, place), found in others:
        if found != pressures:
            raise ValueError(
                f"the levels differ: {one} in {where} has {_hpa(pressures)}, {other} in {place} has {_hpa(found)}; "
                "say with --levels (pressure_hpa in a --map file) which to import, or import them apart"
            )
    return pressures


def _hpa(pressures: Sequence[float]) -> str:
    return f"{listed(f'{p:g}' for p in pressures)} hPa"


def view_files(
    held: Mapping[str, Sequence[Held]], request: Request, region: tuple[slice, slice], pressures: list[float]
) -> dict[str, list[FileVariable]]:
    """目录树里的名字 → 各文件里的它，裁剪、选层、选时刻；一个要的时刻也没有的文件不在内。

    Raises:
        ValueError: 网格、层对不上；--dates 之内没有时刻。
    """
    first = next(iter(held.values()))[0]
    hours = date_hours(*request.dates) if request.dates else None
    result = {}
    for name, several in held.items():
        found = [view(one, request.source(name), first, region, pressures, hours) for one in several]
        result[name] = [file for file in found if file.hours.size]
        if not result[name]:
            raise ValueError(f"{name}: no time within --dates {' '.join(request.dates or [])}")
    return result


def view(
    held: Held,
    source: str,
    first: Held,
    region: tuple[slice, slice],
    pressures: list[float],
    wanted_hours: range | None,
) -> FileVariable:
    """裁剪、选层、选时刻；网格须与 first（第一个变量的第一个文件）相同。"""
    dataset = held.dataset
    with _naming(held.source):
        dims, like = find_dims(dataset), find_dims(first.dataset)
        for name, expected in ((dims.latitude, like.latitude), (dims.longitude, like.longitude)):
            there, wanted = read_coordinates(dataset, name), read_coordinates(first.dataset, expected)
            if not same_coordinates(there, wanted):
                raise ValueError(
                    f"variable {source}: its {name} ({span(there)}) differs from that of {first.source.name} "
                    f"({span(wanted)})"
                )
        array = dataset[source].isel({dims.latitude: region[0], dims.longitude: region[1]})
        array = array.squeeze([dim for dim in array.dims if dim not in dims])  # 只剩长度为 1 的，has_levels 查过
        ranks: list[int] = []
        if has_levels(dataset, source, dims):
            places, levels = read_pressures(dataset, str(dims.level))
            if absent := [p for p in pressures if p not in levels]:
                raise ValueError(f"variable {source}: no level {listed(absent)} hPa; there: {listed(levels)}")
            chosen = [places[levels.index(p)] for p in pressures]
            kept = sorted(chosen)
            if array.encoding.get("preferred_chunks", {}).get(dims.level) == len(levels):
                kept = list(range(kept[0], kept[-1] + 1))  # 各层在一块里：隔着挑要反复解压，读了再挑
            array = array if len(kept) == len(levels) else array.isel({str(dims.level): kept})
            ranks = [kept.index(place) for place in chosen]
        hours = read_hours(dataset[source])
    if wanted_hours is not None:
        array, hours = _within(array, dims.time, hours, wanted_hours)
    return FileVariable(held.source, array, dims, hours, ranks)


def _within(array: xr.DataArray, time: str | None, hours: np.ndarray, wanted: range) -> tuple[xr.DataArray, np.ndarray]:
    """只留 wanted 之内的时刻；一个也没有时 hours 是空的。"""
    kept = np.flatnonzero((hours >= wanted.start) & (hours < wanted.stop))
    if time and kept.size < hours.size:
        connected = kept.size and kept[-1] - kept[0] == kept.size - 1
        array = array.isel({time: slice(int(kept[0]), int(kept[-1]) + 1) if connected else kept})
    return array, hours[kept]


def common_hours(files: Mapping[str, Sequence[FileVariable]]) -> np.ndarray:
    """(T,) 有序；各变量相同，没有重复，至少两个。

    Raises:
        ValueError: 哪个变量在哪一年缺，哪两个文件有同一个时刻。
    """
    found = {name: _joined_hours(name, several) for name, several in files.items()}
    hours = np.unique(np.concatenate(list(found.values())))
    for name, held in found.items():
        if held.size < hours.size:
            raise ValueError(_lacking(name, np.setdiff1d(hours, held), found, files[name]))
    if hours.size < 2:
        raise ValueError("only one time, so no time step; at least two are needed (--source takes several files)")
    return hours


def find_units(files: Sequence[FileVariable], name: str, wanted: Wanted) -> str:
    """写明的，或文件里的，或变量表里的。

    Raises:
        ValueError: 各文件不同，或写明的与文件里的不同，却没有写怎样换。
    """
    there = {plain_units(str(held.array.attrs.get("units", ""))): held.source.name for held in files}
    (given, source), *others = there.items()
    if others:
        raise ValueError(f"{name}: units {given!r} in {source}, {others[0][0]!r} in {others[0][1]}; import them apart")
    if wanted.units == given and abs(wanted.scale) != 1:  # 换号是换方向，不是换单位
        raise ValueError(f"{name}: the file has {given!r} already, and scale {wanted.scale:g} would convert it again")
    if wanted.units and given and wanted.units != given and not wanted.converts:
        raise ValueError(
            f"{name}: units {wanted.units!r} wanted, the file has {given!r}; write the scale and offset that convert "
            "it, or leave units out"
        )
    return wanted.units or given or variable_info(name).units


def _joined_hours(name: str, files: Sequence[FileVariable]) -> np.ndarray:
    """一个变量的各文件的时刻，有序；没有重复。"""
    hours = np.concatenate([held.hours for held in files])
    unique, counts = np.unique(hours, return_counts=True)
    twice = unique[counts > 1]
    if twice.size:
        where = dict.fromkeys(held.source.name for held in files if np.isin(twice[0], held.hours))
        raise ValueError(
            f"time: {twice.size} times occur more than once, first {time_text(twice[0])} "
            f"({name} in {' and '.join(where)}); give each time once"
        )
    return unique


def _lacking(name: str, absent: np.ndarray, found: dict[str, np.ndarray], files: Sequence[FileVariable]) -> str:
    """一个变量缺的时刻，逐年说；别的变量有，也说它自己在哪几个文件里。"""
    other = next(one for one, hours in found.items() if np.isin(absent[0], hours))
    years = np.array([moment_of(int(hour)).year for hour in absent])
    parts = [f"{year} ({int((years == year).sum())} times)" for year in np.unique(years)[:SHOWN]]
    names = [held.source.name for held in files]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (
        f"{name} is missing in {listed(parts)}, first {time_text(absent[0])}, where {other} is there; {name} is in "
        f"{listed(names[:SHOWN])}{more}: give its other files too, or import the variables apart"
    )


@contextmanager
def _naming(source: Source) -> Iterator[None]:
    """报错以来源的名字开头。"""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from None
