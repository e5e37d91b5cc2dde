"""GRIB：经 cfgrib 打开成 xarray 的数据集，逐条消息惰性地读；可选，装 requirements-grib.txt 才有。"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray as xr

MAGIC = b"GRIB"


def open_grib(path: Path, filters: Mapping[str, Any]) -> xr.Dataset:
    """filters 是 cfgrib 的 filter_by_keys：shortName、typeOfLevel、level、step、number……；不在旁边写索引文件。

    Raises:
        ValueError: 没有装 cfgrib；损坏；所选的消息拼不成一个网格（说明可以加哪个键）。一条也没有选中就没有变量。
    """
    try:
        import cfgrib  # noqa: F401  # pyright: ignore[reportMissingImports]  xarray 按名字找它，这里只为说清缺什么
        from gribapi.errors import GribInternalError  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # 有 Python 包而没有 ecCodes 的库时是 RuntimeError
        raise ValueError(
            f"{path}: reading GRIB needs cfgrib and eccodes ({error}); pip install -r requirements-grib.txt"
        ) from None
    import xarray as xr

    backend = {"indexpath": "", "filter_by_keys": dict(filters), "errors": "raise"}
    try:
        return xr.open_dataset(path, engine="cfgrib", backend_kwargs=backend, cache=False, decode_timedelta=False)
    except (OSError, EOFError, ValueError, KeyError, GribInternalError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be opened ({reason}); --filter KEY=VALUE chooses messages") from None


def decoding_errors() -> tuple[type[Exception], ...]:
    """读场时 ecCodes 的错误类型，不是 ValueError 也不是 OSError；没有打开过 GRIB 就没有。"""
    module = sys.modules.get("gribapi.errors")
    return (module.GribInternalError,) if module else ()


def described(filters: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in filters.items()) or "any key"
