"""区域平均，给小的一段场用：不分段，几步就完；整批的用 util/scores/metrics.py 的 area_mean。"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_over(fields: Tensor, weights: Tensor) -> Tensor:
    """(..., H, W)、(H,) → (...) float64 的加权平均；bool 先数清（整数）再加权，浮点数用双精度相加。"""
    rows = fields.sum(-1, dtype=torch.float64 if fields.is_floating_point() else None)
    return rows.double() @ (weights / (weights.sum() * fields.shape[-1]))
