"""远处的源文件：fsspec 的地址（https://、s3://、gs://）怎样读。Zarr 见 remote_zarr，别的文件先整个下到临时文件夹。

网络会断：连接错误、5xx、429 退避几次再试，仍不行就是一行，说是哪个地址。只有 404 才是「没有」，是 FileNotFoundError；
别的一律是 ValueError：Zarr 里没有写过的块也是 404，失败的请求绝不能当作没有写过。
文件整个下载，不经 fsspec 的类文件对象给 HDF5：那样一次读几 KB，要来回几千次，断在中间 HDF5 说不清，NetCDF 3 也不行；
下载时内存里只有一段，盘上多一份文件那么大（TMPDIR 说放在哪里）。
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

import fsspec
from fsspec.callbacks import TqdmCallback

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # 秒，每次重试之前
SILENCE = 60.0  # 秒，这么久没有一个字节就算断了
Result = TypeVar("Result")


class Forbidden(ValueError):
    """403：不让读，也可能是没有。"""


class Remote(NamedTuple):
    """一个地址：files 是它的文件系统，path 是它在那里的路径。"""

    address: str
    files: fsspec.AbstractFileSystem
    path: str

    def read(self, key: str = "", start: int | None = None, end: int | None = None) -> bytes:
        """path/key 的字节 [start, end)，start 为负从末尾数。

        Raises:
            FileNotFoundError: 没有（404）。
            ValueError: 读不到。
        """
        assert end is not None or (start or 0) <= 0, "whether the server minds such a range cannot be seen"
        path = f"{self.path}/{key}" if key else self.path
        where = f"{self.address}/{key}".rstrip("/")
        data = cast(bytes, patiently(lambda: self.files.cat_file(path, start=start, end=end), where))
        ignored = end is not None and len(data) > end - (start or 0)  # 服务器不认 Range，给了整个文件
        return data[start:end] if ignored or (start or 0) < 0 else data


def is_address(path: str | Path) -> bool:
    return "://" in str(path)


def connect(address: str) -> Remote:
    """还不发请求。

    Raises:
        ValueError: 缺可选的库，或没有这种地址。
    """
    address = address.rstrip("/")
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    try:
        if address.startswith(("http://", "https://")):
            import aiohttp

            silence = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
            options["client_kwargs"] = {"timeout": silence, "trust_env": True}  # 环境变量里的代理
        files, path = fsspec.url_to_fs(address, **options)
    except ImportError as error:
        raise ValueError(
            f"{address}: a library for it is not installed ({error}); pip install -r requirements-remote.txt"
        ) from None
    except ValueError as error:
        raise ValueError(f"{address}: {error}; addresses start with https://, s3:// or gs://") from None
    return Remote(address, files, path)


def download(remote: Remote, folder: Path) -> Path:
    """整个文件 → folder 里的同名文件，一边下一边写盘；断了从头再下。

    Raises:
        ValueError: 没有，或下不来。
    """
    path = folder / (Path(urlsplit(remote.address).path).name or "file")
    bar = {"unit": "B", "unit_scale": True, "desc": f"download {path.name}", "disable": None}
    options: dict[str, Any] = {"callback": TqdmCallback(bar)}
    try:
        patiently(lambda: remote.files.get_file(remote.path, str(path), **options), remote.address)
    except FileNotFoundError:
        raise ValueError(f"{remote.address}: not found, neither a file nor a Zarr store") from None
    return path


def patiently(action: Callable[[], Result], where: str) -> Result:
    """网络的毛病退避再试；FileNotFoundError 原样抛出。

    Raises:
        ValueError: 别的毛病，或试完了。
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except FileNotFoundError:
            raise
        except _network_errors() as error:
            status = next((vars(error)[key] for key in ("status", "code") if key in vars(error)), None)
            reason = f"{status} {getattr(error, 'message', '')}".strip() if isinstance(status, int) else str(error)
            reason = " ".join(reason.split()) or type(error).__name__
            if status == 403 or isinstance(error, PermissionError):
                raise Forbidden(f"{where}: {reason}") from None
            if not _passing(error, status):
                raise ValueError(f"{where}: {reason}") from None
            if wait is None:
                raise ValueError(f"{where}: no answer after {len(WAITS) + 1} tries ({reason})") from None
            time.sleep(wait)
    raise AssertionError("the last round returns or raises")


def _passing(error: BaseException, status: Any) -> bool:
    """过一会儿再试也许就好：连不上、断了、5xx、429。"""
    if isinstance(status, int):
        return status == 429 or status >= 500
    return isinstance(error, (ConnectionError, TimeoutError, asyncio.TimeoutError, *_named(BROKEN)))


BROKEN = ("aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError")
FAILED = (
    "aiohttp.ClientError",
    "botocore.exceptions.BotoCoreError",
    "gcsfs.retry.HttpError",
    "google.auth.exceptions.GoogleAuthError",
)


def _network_errors() -> tuple[type[BaseException], ...]:
    return OSError, asyncio.TimeoutError, *_named(FAILED)


def _named(names: Sequence[str]) -> tuple[type[BaseException], ...]:
    """可选的库里的错误类型；没有引入过的库就没有。"""
    pairs = (name.rpartition(".") for name in names)
    return tuple(getattr(sys.modules[module], name) for module, _, name in pairs if module in sys.modules)
