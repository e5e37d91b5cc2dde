"""Zarr 第 2 版的目录布局，只写不压缩的数组：元数据是几份 JSON，数据就是 C 次序的原始字节。

自己写这几份 JSON，是因为 zarr-python 的第 2、3 两版接口不同，而不压缩的布局本来就这么简单。
规范：https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html；维名用 xarray 的 _ARRAY_DIMENSIONS。
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from util.atomic import replacing

# 存法 → 文件里的类型；Zarr 第 2 版没有 bfloat16，存它的 16 位（float32 = 位模式左移 16 位）
FILE_TYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}


class Array(NamedTuple):
    """一个数组的元数据；fill 是读一方的缺测值，None 为没有。"""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    dims: Sequence[str]
    attributes: Mapping[str, Any]
    fill: str | None = None


def small_array(values: np.ndarray, dims: Sequence[str], attributes: Mapping[str, Any]) -> tuple[Array, bytes]:
    """一块就放得下的数组（坐标之类）：元数据与那一块的字节。"""
    return Array(values.shape, values.shape, values.dtype, dims, attributes), np.ascontiguousarray(values).tobytes()


def chunk_name(number: int, dims: int) -> str:
    """只在第一维分块时第 number 块的文件名：3.0.0.0。"""
    return ".".join([str(number)] + ["0"] * (dims - 1))


def write_metadata(folder: Path, arrays: Mapping[str, Array], attributes: Mapping[str, Any]) -> list[str]:
    """写 .zgroup、.zattrs、各数组的 .zarray 与 .zattrs，和合并了它们的 .zmetadata；返回写了的文件（相对路径）。"""
    metadata: dict[str, Any] = {".zgroup": {"zarr_format": 2}, ".zattrs": dict(attributes)}
    for name, array in arrays.items():
        metadata[f"{name}/.zarray"] = {
            "zarr_format": 2,
            "shape": list(array.shape),
            "chunks": list(array.chunks),
            "dtype": array.dtype.str,
            "compressor": None,
            "fill_value": array.fill,
            "order": "C",
            "filters": None,
        }
        metadata[f"{name}/.zattrs"] = {"_ARRAY_DIMENSIONS": list(array.dims), **array.attributes}
    consolidated = {"zarr_consolidated_format": 1, "metadata": metadata}
    for name, content in {**metadata, ".zmetadata": consolidated}.items():
        write_json(folder / name, content)
    return [*metadata, ".zmetadata"]


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def json_digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
