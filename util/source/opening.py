"""导入的读入一侧：打开 NetCDF、Zarr 或 GRIB，交出一个个 xarray.Dataset；不读场。

以后要加别的格式，只需让 open_source 也能打开它。
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from util.source.axes import listed
from util.source.grib import MAGIC, open_grib
from util.source.request import Scalar
from util.source.zarr_chunks import decode_zarr

if TYPE_CHECKING:
    import xarray as xr

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

    Raises:
        ValueError: 不在、不是这几种格式、损坏，或时间单位解不开。
    """
    import xarray as xr

    path = Path(path)
    options: dict[str, Any] = {"cache": False, "decode_timedelta": False}
    if path.is_dir():
        if not is_store(path):
            raise ValueError(f"{path}: a folder without .zgroup or zarr.json, so not a Zarr store")
        options |= {"engine": "zarr", "consolidated": (path / ".zmetadata").is_file()}
    elif not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    elif start_of(path) == MAGIC:
        return open_grib(path, filters or {})
    elif not start_of(path).startswith(KINDS):
        raise ValueError(f"{path}: not a NetCDF file; NetCDF and GRIB files and Zarr folders can be imported")
    if filters:
        raise ValueError(f"{path}: filter {listed(filters)} is for GRIB messages, and this is not a GRIB file")
    try:
        if path.is_dir():
            return decode_zarr(xr.open_dataset(path, decode_cf=False, **options), path)
        return xr.open_dataset(path, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: cannot be opened ({error})") from None
