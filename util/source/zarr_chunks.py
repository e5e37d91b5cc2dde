"""Zarr 的填充值，两件事分开：什么是缺测，没有写过的块是什么。

fill_value 只说没有写过的块读出来是什么；缺测由属性 _FillValue、missing_value 说。xarray 把第 2 版的 fill_value
也当缺测，那样降水的 0 全成了 NaN；可它自己写打包的整数时缺测又只记在 fill_value 里，所以像记号的、打包而不是 0 的
仍当缺测。
没有写过的块：fill_value 是 NaN 或认得的填充值，就是缺测；别的（0）说不准，由 --absent-chunks 定。
块有没有，只看文件名（分片的看片里的索引），不读场；记成很小的一张表，随变量裁剪、选层，各维的块号是坐标。
"""

from __future__ import annotations

import base64
import json
import math
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from util.files.fills import CODES, FAR, match

if TYPE_CHECKING:
    import xarray as xr

ABSENT = "absent chunks"  # encoding 里的键
NEVER = 2**64 - 1  # 分片的索引里，没有写过的块的位置


class Absent(NamedTuple):
    """一个变量没有写过的块：哪些 (块数, …) bool，各维的名字，fill_value（没有写是 None）。"""

    chunks: np.ndarray
    dims: tuple[str, ...]
    fill: float | None

    @property
    def missing(self) -> bool:
        """没有写过就是缺测。"""
        return self.fill is not None and (math.isnan(self.fill) or match(self.fill, FAR + CODES) is not None)


def decode_zarr(dataset: xr.Dataset, path: Path) -> xr.Dataset:
    """没有解码的数据集（decode_cf=False）→ 解码的；缺测照属性，没有写过的块记在 encoding[ABSENT]。"""
    import xarray as xr

    found = {}
    for name, variable in dataset.variables.items():
        meta = _metadata(path / str(name))
        fill = _number(meta["fill_value"])
        variable.attrs.pop("_FillValue", None)  # xarray 放的是 fill_value
        if (declared := _number(meta["attributes"].get("_FillValue"))) is None and _declares(meta, fill):
            declared = fill
        if declared is not None and variable.dtype.kind in "iuf":
            variable.attrs["_FillValue"] = np.array(declared).astype(variable.dtype)[()]
        chunks = _absent(path / str(name), meta) if name in dataset.data_vars else np.zeros(0, dtype=bool)
        if chunks.any():
            found[str(name)] = Absent(chunks, tuple(map(str, variable.dims)), fill), _inner(meta)
    dataset = xr.decode_cf(dataset, decode_timedelta=False)
    for name, (absent, sizes) in found.items():
        dataset.variables[name].encoding[ABSENT] = absent
        numbers = {d: np.arange(dataset.sizes[d]) // size for d, size in zip(absent.dims, sizes, strict=True)}
        dataset = dataset.assign_coords({_label(name, dim): (dim, number) for dim, number in numbers.items()})
    return dataset


def settle_absent(array: xr.DataArray, choice: str | None) -> None:
    """裁剪、选层之后的变量：没有写过的块是数据、或都在外面，就不再记着。choice 是 --absent-chunks。

    Raises:
        ValueError: 说不准，又没有写 --absent-chunks。
    """
    absent: Absent | None = array.encoding.get(ABSENT)
    if absent is None:
        return
    used = absent.chunks[np.ix_(*(np.unique(numbers) for numbers in _numbers(array, absent)))]
    if used.any() and choice is None and not absent.missing:
        raise ValueError(
            f"variable {array.name}: {int(used.sum())} of {used.size} chunks were never written and read as fill_value "
            f"{absent.fill}: data or missing? --absent-chunks data or --absent-chunks missing decides"
        )
    if not used.any() or choice == "data":
        del array.encoding[ABSENT]


def hide_absent(block: np.ndarray, array: xr.DataArray) -> np.ndarray:
    """array 读出来的 block，没有写过的块换成 NaN；同样的次序。"""
    absent: Absent | None = array.encoding.get(ABSENT)
    if absent is None:
        return block
    where = absent.chunks[np.ix_(*_numbers(array, absent))]
    where = where.squeeze(tuple(i for i, dim in enumerate(absent.dims) if dim not in array.dims))
    kept = [dim for dim in absent.dims if dim in array.dims]
    where = where.transpose([kept.index(str(dim)) for dim in array.dims])
    return np.where(where, np.nan, block) if where.any() else block


def _numbers(array: xr.DataArray, absent: Absent) -> list[np.ndarray]:
    return [np.atleast_1d(array[_label(str(array.name), dim)].values) for dim in absent.dims]


def _label(name: str, dim: str) -> str:
    return f"chunk of {name} along {dim}"


def _metadata(folder: Path) -> dict[str, Any]:
    """两版的元数据写成一样：shape、chunks、separator、fill_value、attributes、prefix，分片的有 sharding。"""
    if (folder / "zarr.json").is_file():
        meta = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))
        key, codecs = meta["chunk_key_encoding"], meta.get("codecs") or [{"name": ""}]
        plain = key["name"] == "v2"
        return {
            "shape": meta["shape"],
            "chunks": meta["chunk_grid"]["configuration"]["chunk_shape"],
            "separator": key.get("configuration", {}).get("separator", "." if plain else "/"),
            "prefix": [] if plain else ["c"],
            "fill_value": meta["fill_value"],
            "attributes": meta.get("attributes", {}),
            "sharding": codecs[0]["configuration"] if codecs[0]["name"] == "sharding_indexed" else None,
            "version": 3,
        }
    meta = json.loads((folder / ".zarray").read_text(encoding="utf-8"))
    attributes = folder / ".zattrs"
    return {
        "shape": meta["shape"],
        "chunks": meta["chunks"],
        "separator": meta.get("dimension_separator", "."),
        "prefix": [],
        "fill_value": meta["fill_value"],
        "attributes": json.loads(attributes.read_text(encoding="utf-8")) if attributes.is_file() else {},
        "sharding": None,
        "version": 2,
    }


def _number(value: Any) -> float | None:
    """JSON 里的数；"NaN" 之类是文字，第 3 版 xarray 把 _FillValue 写成双精度的 base64。别的不是数。"""
    try:
        return float(value)
    except (TypeError, ValueError):
        pass
    try:
        return float(struct.unpack("<d", base64.b64decode(str(value), validate=True))[0])
    except (ValueError, struct.error):
        return None


def _declares(meta: dict[str, Any], fill: float | None) -> bool:
    """第 2 版的 fill_value 兼作缺测的记号。"""
    if meta["version"] != 2 or fill is None or math.isnan(fill):
        return False
    packed = {"scale_factor", "add_offset"} & set(meta["attributes"])
    return match(fill, FAR + CODES) is not None or bool(packed and fill != 0)


def _inner(meta: dict[str, Any]) -> list[int]:
    """一块的大小；分片的是片里的块。"""
    return (meta["sharding"] or {"chunk_shape": meta["chunks"]})["chunk_shape"]


def _absent(folder: Path, meta: dict[str, Any]) -> np.ndarray:
    """哪些块没有写过 (块数, …) bool。"""
    inner = _inner(meta)
    per_file = [outer // size for outer, size in zip(meta["chunks"], inner, strict=True)]
    files = [-(-size // chunk) for size, chunk in zip(meta["shape"], meta["chunks"], strict=True)]
    absent = np.ones([n * m for n, m in zip(files, per_file, strict=True)], dtype=bool)
    for root, _, names in os.walk(folder):
        above = Path(root).relative_to(folder).parts
        for name in names:
            words = meta["separator"].join([*above, name]).split(meta["separator"])
            place = words[len(meta["prefix"]) :]
            if (
                words[: len(meta["prefix"])] != meta["prefix"]
                or len(place) != len(files)
                or not all(word.isdecimal() and int(word) < n for word, n in zip(place, files, strict=True))
            ):
                continue
            part = tuple(slice(int(w) * m, (int(w) + 1) * m) for w, m in zip(place, per_file, strict=True))
            absent[part] = (
                _absent_in_shard(Path(root) / name, meta["sharding"], per_file) if meta["sharding"] else False
            )
    return absent[tuple(slice(-(-size // chunk)) for size, chunk in zip(meta["shape"], inner, strict=True))]


def _absent_in_shard(file: Path, sharding: dict[str, Any], per_file: list[int]) -> np.ndarray:
    """片里的索引：各块的 (位置, 长度) uint64，后面有四个字节的校验和。"""
    size = 16 * math.prod(per_file)
    checksum = 4 * sum(codec["name"] == "crc32c" for codec in sharding["index_codecs"])
    with file.open("rb") as opened:
        if sharding.get("index_location", "end") == "end":
            opened.seek(-(size + checksum), os.SEEK_END)
        index = np.frombuffer(opened.read(size), "<u8").reshape(*per_file, 2)
    return index[..., 0] == NEVER
