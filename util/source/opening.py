"""导入的读入一侧：打开 NetCDF、Zarr 或 GRIB，交出一个个 xarray.Dataset；不读场。

以后要加别的格式，只需让 open_source 也能打开它。
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from util.source.axes import SHOWN, listed
from util.source.grib import MAGIC, open_grib
from util.source.lead_time import is_lead, places_of_lead
from util.source.request import Request, Scalar
from util.source.zarr_chunks import decode_zarr
from util.strict import nearest

if TYPE_CHECKING:
    import xarray as xr


def open_wanted(path: str | Path, request: Request, stack: ExitStack) -> dict[str, xr.Dataset]:
    """目录树里的名字 → 含有它的数据集，select 已经取好；只有 GRIB 才因 filter 不同而开多个。由 stack 关。

    Raises:
        ValueError: 打不开，或没有所要的变量、维、项。
    """
    opened: dict[str, xr.Dataset] = {}
    result = {}
    for name in request.variables:
        filters = request.filters(name)
        key = str(sorted(filters.items()))
        if key not in opened:
            opened[key] = _select(stack.enter_context(open_source(path, filters)), request.select, path)
        there = [str(v) for v in opened[key].data_vars]
        if (source := request.source(name)) not in there:
            hint = nearest(source, there, "names")
            raise ValueError(f"{path}: no variable {source!r} in the file ({hint}); there: {listed(there)}")
        result[name] = opened[key]
    return result


def open_source(path: str | Path, filters: Mapping[str, Scalar] | None = None) -> xr.Dataset:
    """打开 NetCDF 文件、Zarr 文件夹（第 2 版不论是否合并过元数据），或 GRIB 文件里 filters 所选的消息。

    Raises:
        ValueError: 不在、不是这几种格式、损坏，或时间单位解不开。
    """
    import xarray as xr

    path = Path(path)
    options: dict[str, Any] = {"cache": False, "decode_timedelta": False}
    if path.is_dir():
        if not any((path / name).is_file() for name in (".zgroup", ".zmetadata", "zarr.json")):
            raise ValueError(f"{path}: a folder without .zgroup or zarr.json, so not a Zarr store")
        options |= {"engine": "zarr", "consolidated": (path / ".zmetadata").is_file()}
    elif not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    else:
        with path.open("rb") as file:
            start = file.read(4)
        if start == MAGIC:
            return open_grib(path, filters or {})
        if not start.startswith((b"CDF", b"\x89HDF")):
            raise ValueError(f"{path}: not a NetCDF file; NetCDF and GRIB files and Zarr folders can be imported")
    if filters:
        raise ValueError(f"{path}: filter {listed(filters)} is for GRIB messages, and this is not a GRIB file")
    try:
        if path.is_dir():
            return decode_zarr(xr.open_dataset(path, decode_cf=False, **options), path)
        return xr.open_dataset(path, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: cannot be opened ({error})") from None


def _select(dataset: xr.Dataset, select: Mapping[str, Scalar], path: str | Path) -> xr.Dataset:
    """按坐标的值取一项；GRIB 里已由 filter 挑到只剩一项的，核对一下。"""
    for dim, value in select.items():
        if dim not in dataset.coords or dataset[dim].dims not in ((), (dim,)):
            raise ValueError(f"{path}: select {dim}: no such axis; dimensions there: {listed(dataset.dims)}")
        there = np.atleast_1d(dataset[dim].values)
        found = places_of_lead(dataset[dim], value) if is_lead(dataset, dim) else np.flatnonzero(there == value)
        if found.size != 1:
            raise ValueError(f"{path}: select {dim}={value}: {found.size} such entries; there: {listed(there[:SHOWN])}")
        if dataset[dim].ndim:
            dataset = dataset.isel({dim: int(found[0])})
    return dataset
