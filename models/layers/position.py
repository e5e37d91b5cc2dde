"""固定的正余弦位置编码；只认整数坐标。"""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_codes(places: Tensor, dim: int) -> Tensor:
    """多维坐标的正余弦编码：维数均分给各坐标，每份前半为正弦、后半为余弦。

    Args:
        places: (..., A) 每个 token 的 A 个坐标。
        dim: 编码维数；不能被 2A 整除时，末尾补零。

    Returns:
        (..., dim) float32。来源：Vaswani et al. 2017 §3.5 的一维式，按坐标拼接（He et al. 2021, MAE）。
    """
    axes = places.shape[-1]
    half = dim // (2 * axes)
    rates = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / max(half, 1))
    angles = places.to(torch.float64)[..., None] * rates  # (..., A, half)
    codes = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # (..., A·2·half)
    return torch.nn.functional.pad(codes, (0, dim - codes.shape[-1])).float()
