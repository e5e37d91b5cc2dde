"""各进程之间的归约。"""

from __future__ import annotations

import torch
from lightning.fabric import Fabric


def reduce_tensor(fabric: Fabric, value: torch.Tensor, how: str) -> torch.Tensor:
    """各进程的同形张量合成一个（mean、sum、max）；一个进程时原样。"""
    reduced = fabric.all_reduce(value.to(fabric.device), reduce_op=how)
    assert isinstance(reduced, torch.Tensor)
    return reduced
