"""远处的 Zarr：元数据一次读齐，块要用时才取，几块同时；哪些块没有写过，列得出的列，列不出的逐块问。"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fsspec.asyn import AsyncFileSystem

from util.files.bounded import parse_json
from util.source.remote import Forbidden, Remote, connect, patiently

AT_ONCE = 16  # 同时问几块
FILES = (".zip", ".nc", ".nc4", ".cdf", ".h5", ".hdf5", ".grib", ".grib2", ".grb", ".grb2")  # 这样结尾的不会是 Zarr
Result = TypeVar("Result")


class RemoteZarr(AsyncFileSystem):
    """一个远处的 Zarr（zarr_folder.Folder）；给 zarr 的一面是 fsspec 的文件系统，只读，根就是这个 Zarr。"""

    cachable = False

    def __init__(self, remote: Remote, metadata: dict[str, Any]) -> None:
        """metadata: 键 → JSON，合并好的也在内；它们之外没有别的元数据。"""
        super().__init__(asynchronous=_zarr_version() >= 3)
        self.remote, self.json = remote, metadata
        self.pool = ThreadPoolExecutor(AT_ONCE)  # 不用事件循环自己的：那里的线程等着它，它又在等那里的线程
        self.known: set[str] = set()  # 看到过的块：后来说没有，是出了毛病
        self.failure: ValueError | None = None  # 试完了的：同时要的、排在后面的不再试

    def metadata(self, key: str) -> dict[str, Any] | None:
        return self.json.get(key)

    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        if self.failure:
            raise self.failure
        try:
            return self.remote.read(key, start, end)
        except FileNotFoundError:
            if key in self.known:
                raise ValueError(f"{self.remote.address}/{key}: was there before and is not found now") from None
            raise
        except ValueError as error:
            self.failure = error
            raise

    def present(self, name: str, keys: Sequence[str]) -> set[str]:
        """列得出的列一遍；http 的目录页信不过，逐个取一个字节。"""
        files, path = self.remote.files, self.remote.path
        if self.remote.address.startswith(("http://", "https://")):
            found = {key for key, there in zip(keys, in_parallel(self._exists_surely, keys), strict=True) if there}
        else:
            listing = patiently(lambda: files.find(f"{path}/{name}"), f"{self.remote.address}/{name}")
            found = {str(file).removeprefix(f"{path}/") for file in listing} & set(keys)
        self.known |= found
        return found

    def _exists_surely(self, key: str) -> bool:
        try:
            self.read(key, 0, 1)
        except FileNotFoundError:
            return False
        return True

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        key = path.lstrip("/")
        if key in self.json:
            return json.dumps(self.json[key]).encode()
        if key.rpartition("/")[2] in ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata"):
            raise FileNotFoundError(key)
        return await asyncio.get_running_loop().run_in_executor(self.pool, self.read, key, start, end)

    def store(self) -> Any:
        """交给 xarray 的。"""
        import zarr.storage

        if _zarr_version() >= 3:
            return zarr.storage.FsspecStore(self, read_only=True, path="")
        absent = (KeyError, FileNotFoundError)  # 默认的把每一种 OSError 都当作没有写过
        return zarr.storage.FSStore("", fs=self, mode="r", exceptions=absent)  # pyright: ignore


def find_zarr(remote: Remote) -> RemoteZarr | None:
    """地址上的 Zarr；没有它的元数据（那多半是一个文件）是 None。

    Raises:
        ValueError: 读不到，不让读。
    """
    parts = urlsplit(remote.address)
    if parts.query or parts.path.endswith(FILES):
        return None
    refused = None
    for key, gather in ((".zmetadata", _consolidated), ("zarr.json", _version_3), (".zgroup", _version_2)):
        try:
            meta = _json(remote, key)
        except Forbidden as error:  # 不让列文件夹的 S3，没有的也答 403
            refused = error
            continue
        if meta is not None:
            return RemoteZarr(remote, gather(remote, meta))
    if refused:
        raise refused
    return None


def address_stamp(address: str) -> list[Any]:
    """地址上的东西换过没有：Zarr 看元数据，文件看大小与服务器说的版本。"""
    remote = connect(address)
    if folder := find_zarr(remote):
        return [address, folder.json]
    try:
        info = patiently(lambda: remote.files.info(remote.path), address)
    except FileNotFoundError:
        raise ValueError(f"{address}: not found, or the server does not tell its size") from None
    return [address, *(str(info.get(key)) for key in ("size", "ETag", "Last-Modified", "LastModified", "updated"))]


def _consolidated(_: Remote, meta: dict[str, Any]) -> dict[str, Any]:
    return {".zmetadata": meta, **meta["metadata"]}


def _version_2(remote: Remote, meta: dict[str, Any]) -> dict[str, Any]:
    """没有合并过的，照合并过的样子。"""
    keys = [".zattrs", *(f"{name}/{file}" for name in _names(remote) for file in (".zarray", ".zattrs"))]
    held = dict(zip(keys, in_parallel(lambda key: _json(remote, key), keys), strict=True))
    found = {".zgroup": meta} | {key: value for key, value in held.items() if value is not None}
    return _consolidated(remote, {"zarr_consolidated_format": 1, "metadata": found})


def _version_3(remote: Remote, meta: dict[str, Any]) -> dict[str, Any]:
    if not (held := meta.get("consolidated_metadata")):
        names = _names(remote)
        found = zip(names, in_parallel(lambda name: _json(remote, f"{name}/zarr.json"), names), strict=True)
        arrays = {name: value for name, value in found if value is not None}
        held = {"kind": "inline", "must_understand": False, "metadata": arrays}
    arrays = {f"{name}/zarr.json": value for name, value in held["metadata"].items()}
    return {"zarr.json": meta | {"consolidated_metadata": held}, **arrays}


def in_parallel(function: Callable[[str], Result], items: Sequence[str]) -> list[Result]:
    """同样的次序；第一个错误抛出来，其余不再开始。"""
    from tqdm import tqdm

    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            bar = tqdm(pool.map(function, items), total=len(items), desc="look", unit="file", disable=None)
            return list(bar)
        except ValueError:
            pool.shutdown(cancel_futures=True)
            raise


def _json(remote: Remote, key: str) -> dict[str, Any] | None:
    """没有是 None。"""
    try:
        data = remote.read(key)
    except FileNotFoundError:
        return None
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"{remote.address}/{key}: not JSON ({error})") from None


def _names(remote: Remote) -> list[str]:
    """Zarr 根下面的名字；http 的取自目录页，多出来的没有元数据，自会略去。"""
    try:
        listing = patiently(lambda: remote.files.ls(remote.path, detail=False), remote.address)
    except FileNotFoundError:
        listing = []
    there = {str(file).rstrip("/").removeprefix(f"{remote.path}/") for file in listing}
    names = sorted(name for name in there if name and not set(name) & set("/?#=") and not name.startswith("."))
    if not names:
        raise ValueError(
            f"{remote.address}: a Zarr store without consolidated metadata, and the server lists no folders; "
            "consolidate it (zarr.consolidate_metadata), or copy it here"
        )
    return names


def _zarr_version() -> int:
    import zarr

    return int(zarr.__version__.partition(".")[0])
