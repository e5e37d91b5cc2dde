"""读取进程里的批写在共享内存里，主进程拿到的就是它；放不下怎样说。"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from util.data.origin import DataError

SHARED = Path("/dev/shm")  # noqa: S108  容器里常只有 64 MB
REMEDY = (
    "lower data.workers or train.batch_size (data.workers=0 needs none), "
    "or make it larger, e.g. docker run --shm-size={size}m"
)


def remedy(needed: int) -> str:
    """共享内存不够时怎么办。"""
    return REMEDY.format(size=math.ceil(needed / 2**20) + 1)


def shared_fields(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """共享内存里的一块：直接读进来，交出去时不必再抄一遍。

    Raises:
        DataError: 放不下。
    """
    size = math.prod(shape) * dtype.itemsize
    with _fits(size):
        return torch.empty(0, dtype=dtype).set_(torch.UntypedStorage._new_shared(size)).view(shape)


def into_shared_memory(batch: Any) -> Any:
    """不在那里的当场放进去：放不下是这里的异常，主进程收得到；留给队列的线程放，它只印一段 traceback，主进程一直等。"""
    if get_worker_info() is not None:
        tensors = [part for part in batch if isinstance(part, Tensor)]  # 种子是引擎后来给的，这里没有
        with _fits(sum(part.nbytes for part in tensors)):
            for part in tensors:
                part.share_memory_()
    return batch


@contextmanager
def _fits(size: int) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"a batch of {size / 1e6:.1f} MB does not fit into shared memory ({reason}); "
            f"{shutil.disk_usage(SHARED).free / 1e6:.1f} MB are free in {SHARED}; {remedy(size)}"
        ) from None
