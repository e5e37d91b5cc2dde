"""几个模型共用的几句：有效目标的均方误差，重建的两种误差，纬圈的谱；确定性的只有一个成员。"""

from __future__ import annotations

import torch
from torch import Tensor

from util.batch import Batch


def target_mse(prediction: Tensor, batch: Batch, weights: Tensor | None = None) -> Tensor:
    """(B, T_out, C, H, W) 与目标的均方误差（标准化空间），只算有效的场；没有有效的场时为 0。weights 见 weighed。"""
    valid = batch.valid[:, -prediction.shape[1] :, :, None, None].to(batch.future.dtype)  # 半精度数不准几千个场
    error = weighed((prediction - batch.future).square(), weights) * valid
    return error.mean((-2, -1)).sum() / valid.sum().clamp(min=1)


def weighed(error: Tensor, weights: Tensor | None) -> Tensor:
    """(…, C, H, W) 的误差逐点乘 weights (C, H)；None 原样。"""
    return error if weights is None else error * weights[..., None]


def refuse_members(name: str, num_members: int) -> None:
    """确定性模型只有一个成员。

    Raises:
        ValueError: num_members > 1；集合预报用引擎的 --perturb。
    """
    if num_members != 1:
        raise ValueError(f"{name} is deterministic: {num_members} members need --perturb")


def field_errors(made: Tensor, truth: Tensor, valid: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(..., C, H, W) 的绝对误差与平方误差的平均，只算 valid (..., C) 为真的场；一个也没有时为 0。"""
    keep = valid[..., None, None].to(truth.dtype)
    difference = made - truth
    count = valid.sum().clamp(min=1)
    errors = (weighed(error, weights) * keep for error in (difference.abs(), difference.square()))
    mae, mse = (error.mean((-2, -1)).sum() / count for error in errors)
    return mae, mse


def zonal_amplitudes(fields: Tensor) -> Tensor:
    """(…, H, W) → 每条纬圈实 FFT 的振幅 (…, H, W // 2 + 1)，正交归一。"""
    return torch.fft.rfft(fields, dim=-1, norm="ortho").abs()
