"""导入的读入一侧：打开本机或远处的 NetCDF、Zarr、GRIB，交出一个个 xarray.Dataset；不读场。

以后要加别的格式，只需让 open_source 也能打开它。
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from util.cli import one_line
from util.source.axes import listed
from util.source.grib import MAGIC, open_grib
from util.source.remote import connect, is_address
from util.source.remote_zarr import find_zarr
from util.source.request import Scalar
from util.source.zarr_chunks import decode_zarr
from util.source.zarr_folder import Folder, LocalZarr

if TYPE_CHECKING:
    import xarray as xr

CACHE_BYTES = 32 * 2**20  # 每个打开的 NetCDF 变量留住的解压过的块：够一次读用；库缺省 64 MiB
OPEN_FILES = 8  # 同时打开的文件；xarray 缺省 128，一年一个文件时各留各的缓存
# 元数据坏了时 xarray、zarr、numcodecs 抛的：没有的键、错的类型、块为 0、嵌套太深、装不下的大小
BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError)
KINDS = (b"CDF", b"\x89HDF", MAGIC)  # 文件开头的几个字节


def is_store(path: Path) -> bool:
    """是不是 Zarr 的文件夹。"""
    return any((path / name).is_file() for name in (".zgroup", ".zmetadata", "zarr.json"))


def start_of(path: Path) -> bytes:
    """文件开头的几个字节；不是文件就是空的。"""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(4)


def open_source(path: str | Path, filters: Mapping[str, Scalar] | None = None) -> xr.Dataset:
    """打开 NetCDF 文件、Zarr 文件夹（第 2 版不论是否合并过元数据），或 GRIB 文件里 filters 所选的消息。

    地址只能是 Zarr 的：别的文件由 find_sources 先下载。

    Raises:
        ValueError: 不在、不是这几种格式、损坏，或时间单位解不开；地址读不到。
    """
    if is_address(path):
        if not (folder := find_zarr(connect(str(path)))):
            raise ValueError(f"{path}: not found, no Zarr store is there")
        return _open(path, folder.store(), filters, folder, True)
    path = Path(path)
    if path.is_dir():
        if not is_store(path):
            raise ValueError(f"{path}: a folder without .zgroup or zarr.json, so not a Zarr store")
        return _open(path, path, filters, LocalZarr(path), (path / ".zmetadata").is_file())
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    if (start := start_of(path)) == MAGIC:
        return open_grib(path, filters or {})
    if not start.startswith(KINDS):
        raise ValueError(f"{path}: not a NetCDF file; NetCDF and GRIB files and Zarr folders can be imported")
    return _open(path, path, filters)


def _open(
    path: str | Path,
    store: Any,
    filters: Mapping[str, Scalar] | None,
    folder: Folder | None = None,
    consolidated: bool = False,
) -> xr.Dataset:
    """store 交给 xarray，path 写在报错里；folder 是 Zarr 的文件夹，别的是 None。"""
    import netCDF4
    import xarray as xr

    if filters:
        raise ValueError(f"{path}: filter {listed(filters)} is for GRIB messages, and this is not a GRIB file")
    options: dict[str, Any] = {"cache": False, "decode_timedelta": False}
    try:
        if folder is None:
            netCDF4.set_chunk_cache(CACHE_BYTES)
            xr.set_options(file_cache_maxsize=OPEN_FILES)
            return xr.open_dataset(store, **options)
        found = xr.open_dataset(store, engine="zarr", consolidated=consolidated, decode_cf=False, **options)
        return decode_zarr(found, folder)
    except BROKEN as error:
        raise ValueError(f"{path}: cannot be opened ({one_line(error) or type(error).__name__})") from None
