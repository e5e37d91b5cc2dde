"""Zarr 的填充值，两件事分开：什么是缺测，没有写过的块是什么。

fill_value 只说没有写过的块读出来是什么；缺测由属性 _FillValue、missing_value 说。xarray 把第 2 版的 fill_value
也当缺测，那样降水的 0 全成了 NaN；可它自己写打包的整数时缺测又只记在 fill_value 里，所以像记号的、打包而不是 0 的
仍当缺测。
没有写过的块：fill_value 是 NaN 或认得的填充值，就是缺测；别的（0）说不准，由 --absent-chunks 定。
块有没有，只看文件名（分片的看片里的索引），不读场，也只看要导入的那些：裁剪、选层之后才看，所以各维的块号是坐标。
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from util.files.fills import CODES, FAR, match
from util.source.zarr_folder import Folder
from util.strict import brief

if TYPE_CHECKING:
    import xarray as xr

ABSENT = "absent chunks"  # encoding 里的键
NEVER = 2**64 - 1  # 分片的索引里，没有写过的块的位置


class Absent(NamedTuple):
    """一个变量没有写过的块。

    dims: 各维的名字；sizes: 块的大小；fill: fill_value（没有写是 None）；find: 各维的块号 → 哪些没有写过 (…) bool；
    found: 看过之后，看的是哪些块号、find 给的。
    """

    dims: tuple[str, ...]
    sizes: list[int]
    fill: float | None
    find: Callable[[list[np.ndarray]], np.ndarray]
    found: tuple[list[np.ndarray], np.ndarray] | None = None

    @property
    def missing(self) -> bool:
        """没有写过就是缺测。"""
        return self.fill is not None and match(self.fill, FAR + CODES) is not None


def decode_zarr(dataset: xr.Dataset, folder: Folder) -> xr.Dataset:
    """没有解码的数据集（decode_cf=False）→ 解码的；缺测照属性，怎样看没有写过的块记在 encoding[ABSENT]。"""
    import xarray as xr

    found = {}
    for name, variable in dataset.variables.items():
        meta = _metadata(folder, str(name))
        fill = _number(meta["fill_value"])
        variable.attrs.pop("_FillValue", None)  # xarray 放的是 fill_value
        if (declared := _number(meta["attributes"].get("_FillValue"))) is None and _declares(meta, fill):
            declared = fill
        if declared is not None and _holds(variable.dtype, declared):
            variable.attrs["_FillValue"] = np.array(declared).astype(variable.dtype)[()]
        if name in dataset.data_vars and not (fill is not None and math.isnan(fill)):  # NaN 读出来就是缺测，不必看
            find = partial(_find_absent, folder, str(name), meta)
            found[name] = Absent(tuple(map(str, variable.dims)), _inner(meta), fill, find)
    dataset = xr.decode_cf(dataset, decode_timedelta=False)
    labels = {}
    for name, absent in found.items():
        dataset.variables[name].encoding[ABSENT] = absent
        for dim, size in zip(absent.dims, absent.sizes, strict=True):
            labels[_label(dim, size)] = dim, np.arange(dataset.sizes[dim]) // size
    return dataset.assign_coords(labels)


def settle_absent(array: xr.DataArray, choice: str | None) -> None:
    """裁剪、选层之后的变量：看它用到的块，都写过、或没有写过的是数据，就不再记着。choice 是 --absent-chunks。

    Raises:
        ValueError: 说不准，又没有写 --absent-chunks；远处的看不了。
    """
    absent: Absent | None = array.encoding.get(ABSENT)
    if absent is None:
        return
    del array.encoding[ABSENT]
    if choice == "data":
        return
    used = [np.unique(numbers) for numbers in _numbers(array, absent)]
    gone = absent.find(used)
    if gone.any() and choice is None and not absent.missing:
        raise ValueError(
            f"variable {array.name}: {int(gone.sum())} of {gone.size} chunks were never written and read as fill_value "
            f"{absent.fill}: data or missing? --absent-chunks data or --absent-chunks missing decides"
        )
    if gone.any():
        array.encoding[ABSENT] = absent._replace(found=(used, gone))


def hide_absent(block: np.ndarray, array: xr.DataArray) -> np.ndarray:
    """array 读出来的 block，没有写过的块换成 NaN；同样的次序。"""
    absent: Absent | None = array.encoding.get(ABSENT)
    if absent is None:
        return block
    assert absent.found is not None, "settle_absent goes first"
    used, gone = absent.found
    where = gone[np.ix_(*(np.searchsorted(u, n) for u, n in zip(used, _numbers(array, absent), strict=True)))]
    where = where.squeeze(tuple(i for i, dim in enumerate(absent.dims) if dim not in array.dims))
    kept = [dim for dim in absent.dims if dim in array.dims]
    where = where.transpose([kept.index(str(dim)) for dim in array.dims])
    return np.where(where, np.nan, block) if where.any() else block


def _numbers(array: xr.DataArray, absent: Absent) -> list[np.ndarray]:
    pairs = zip(absent.dims, absent.sizes, strict=True)
    return [np.atleast_1d(array[_label(dim, size)].values) for dim, size in pairs]


def _label(dim: str, size: int) -> str:
    return f"chunk of {size} along {dim}"


def _metadata(folder: Folder, name: str) -> dict[str, Any]:
    """两版的元数据写成一样：chunks、separator、fill_value、attributes、prefix、version，分片的有 sharding。

    Raises:
        ValueError: 块的大小不是正整数，片不是整数个块。
    """
    found = _either_version(folder, name)
    outer, inner = found["chunks"], _inner(found)
    whole = [type(size) is int and size > 0 for size in (*outer, *inner)]
    if not all(whole) or len(outer) != len(inner) or any(o % i for o, i in zip(outer, inner, strict=True)):
        raise ValueError(f"variable {name}: chunks of {brief(outer)}, inside them {brief(inner)}")
    return found


def _either_version(folder: Folder, name: str) -> dict[str, Any]:
    if (meta := folder.metadata(f"{name}/zarr.json")) is not None:
        key, codecs = meta["chunk_key_encoding"], meta.get("codecs") or [{"name": ""}]
        plain = key["name"] == "v2"
        return {
            "chunks": meta["chunk_grid"]["configuration"]["chunk_shape"],
            "separator": key.get("configuration", {}).get("separator", "." if plain else "/"),
            "prefix": [] if plain else ["c"],
            "fill_value": meta["fill_value"],
            "attributes": meta.get("attributes", {}),
            "sharding": codecs[0]["configuration"] if codecs[0]["name"] == "sharding_indexed" else None,
            "version": 3,
        }
    meta = folder.metadata(f"{name}/.zarray")
    assert meta is not None, "zarr opened it"
    return {
        "chunks": meta["chunks"],
        "separator": meta.get("dimension_separator", "."),
        "prefix": [],
        "fill_value": meta["fill_value"],
        "attributes": folder.metadata(f"{name}/.zattrs") or {},
        "sharding": None,
        "version": 2,
    }


def _number(value: Any) -> float | None:
    """JSON 里的数；"NaN" 之类是文字，第 3 版 xarray 把 _FillValue 写成双精度的 base64。别的不是数。"""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    try:
        return float(struct.unpack("<d", base64.b64decode(value if isinstance(value, str) else "", validate=True))[0])
    except (ValueError, struct.error):
        return None


def _declares(meta: dict[str, Any], fill: float | None) -> bool:
    """第 2 版的 fill_value 兼作缺测的记号。"""
    if meta["version"] != 2 or fill is None or math.isnan(fill):
        return False
    packed = {"scale_factor", "add_offset"} & set(meta["attributes"])
    return match(fill, FAR + CODES) is not None or bool(packed and fill != 0)


def _holds(dtype: np.dtype[Any], value: float) -> bool:
    """这个类型的数里有没有 value；没有的就不会是缺测的记号。"""
    if dtype.kind == "f":
        return True
    return dtype.kind in "iu" and value.is_integer() and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max


def _inner(meta: dict[str, Any]) -> list[int]:
    """一块的大小；分片的是片里的块。"""
    return (meta["sharding"] or {"chunk_shape": meta["chunks"]})["chunk_shape"]


def _find_absent(folder: Folder, name: str, meta: dict[str, Any], used: list[np.ndarray]) -> np.ndarray:
    """各维的块号 used（递增）所交的块里，哪些没有写过 (…) bool。"""
    per_file = [outer // size for outer, size in zip(meta["chunks"], _inner(meta), strict=True)]
    files = [np.unique(numbers // m).tolist() for numbers, m in zip(used, per_file, strict=True)]
    words = ([*meta["prefix"], *map(str, place)] for place in product(*files))
    keys = [f"{name}/{meta['separator'].join(word)}" for word in words]
    present = folder.present(name, keys)
    if not meta["sharding"]:  # 一个文件一块
        return np.array([key not in present for key in keys]).reshape([len(numbers) for numbers in used])
    gone = np.ones([len(numbers) for numbers in used], dtype=bool)
    for place, key in zip(product(*files), keys, strict=True):
        if key in present:
            inside = [np.flatnonzero(n // m == p) for n, m, p in zip(used, per_file, place, strict=True)]
            within = [n[i] % m for n, i, m in zip(used, inside, per_file, strict=True)]
            gone[np.ix_(*inside)] = _absent_in_shard(folder, key, meta["sharding"], per_file)[np.ix_(*within)]
    return gone


def _absent_in_shard(folder: Folder, key: str, sharding: dict[str, Any], per_file: list[int]) -> np.ndarray:
    """片里的索引：各块的 (位置, 长度) uint64，后面有四个字节的校验和。"""
    size = 16 * math.prod(per_file)
    checksum = 4 * sum(codec["name"] == "crc32c" for codec in sharding["index_codecs"])
    at_end = sharding.get("index_location", "end") == "end"
    data = folder.read(key, -(size + checksum), None) if at_end else folder.read(key, 0, size)
    return np.frombuffer(data[:size], "<u8").reshape(*per_file, 2)[..., 0] == NEVER
