"""token 的位置与空间位置编码；只认整数坐标。"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn


def token_places(order: str, frames: int, rows: int, cols: int) -> Tensor:
    """(N, 3)：按 order（如 "t h w"）排成一列之后，每个 token 的 (t, h, w)。"""
    index = torch.arange(frames * rows * cols).view(frames, rows, cols)
    flat = rearrange(index, f"t h w -> ({order})")
    return torch.stack([flat // (rows * cols), flat // cols % rows, flat % cols], dim=1)


def sincos_codes(places: Tensor, dim: int) -> Tensor:
    """多维坐标的正余弦编码：维数均分给各坐标，每份前半为正弦、后半为余弦，均方为 1。

    波长从 2 格到边长的 4 倍等比排列。通用的 10000 底数是给长句子的，十几格的边上绝大多数频率几乎不变，
    相邻的位置编码几乎一样，注意力分不开。

    Args:
        places: (..., A) 每个 token 的 A 个坐标。
        dim: 编码维数；不能被 2A 整除时，末尾补零。

    Returns:
        (..., dim) float32。来源：Vaswani et al. 2017 §3.5 的一维式，按坐标拼接（He et al. 2021, MAE）；波长与幅度不同。
    """
    axes = places.shape[-1]
    half = dim // (2 * axes)
    side = places.flatten(0, -2).max(0).values + 1  # (A,) 每个坐标的边长
    step = torch.arange(half, dtype=torch.float64) / max(half - 1, 1)
    rates = torch.pi * (2.0 * side[:, None]) ** -step  # (A, half)，从 π 到 π / (2·边长)
    angles = places.to(torch.float64)[..., None] * rates  # (..., A, half)
    codes = 2**0.5 * torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # (..., A·2·half)
    return torch.nn.functional.pad(codes, (0, dim - codes.shape[-1])).float()


def spatial_codes(places: Tensor, dim: int, kind: str) -> Tensor:
    """(..., A) 的坐标 → (..., dim) 的空间位置编码：固定的正余弦、可学习的参数，或全零。"""
    shape = (*places.shape[:-1], dim)
    if kind == "learned":
        return nn.Parameter(torch.randn(shape) * 0.02)
    return nn.Buffer(sincos_codes(places, dim) if kind == "sincos" else torch.zeros(shape), persistent=False)
