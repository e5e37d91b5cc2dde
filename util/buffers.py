"""一批场的缓冲区：有大页的内存，numpy 与 torch 两面看的是同一块；numpy 没有的 bfloat16 用 uint16 的位模式。"""

from __future__ import annotations

import numpy as np
import torch


def empty_fields(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """内存里的一块，由 numpy 要来：它请系统给大页，几十 MB 的缓冲区头一次写进去时少几千次缺页，快几倍。"""
    kind = np.dtype(np.uint16) if dtype == torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype
    return as_tensor(np.empty(shape, dtype=kind))


def as_array(fields: torch.Tensor) -> np.ndarray:
    """同一块内存；numpy 没有 bfloat16，给它 uint16 的位模式。"""
    return fields.view(torch.uint16).numpy() if fields.dtype == torch.bfloat16 else fields.numpy()


def as_tensor(fields: np.ndarray) -> torch.Tensor:
    """as_array 的逆。"""
    tensor = torch.from_numpy(fields)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
