"""确定性预报模型共用的几句：状态还是变化；有效目标的均方误差；只有一个成员。"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from util.batch import Batch

Predict = Literal["state", "tendency"]  # 网络给出的是场本身，还是与最后一帧历史之差


def to_state(made: Tensor, history: Tensor, predict: Predict) -> Tensor:
    """网络的输出 (B, T_out, C, H, W) → 预报的场；tendency 从持续性预报起步，头一个时效好学得多。"""
    return made + history[:, -1:] if predict == "tendency" else made


def partner_frames(frames_in: int, frames_out: int) -> list[int]:
    """各输出帧的跳接接哪一帧输入：最后 T_out 帧；输出更长时，余下的都接最后一帧。"""
    later = max(0, frames_in - frames_out)
    return [min(later + j, frames_in - 1) for j in range(frames_out)]


def target_mse(prediction: Tensor, batch: Batch) -> Tensor:
    """(B, T_out, C, H, W) 与目标的均方误差（标准化空间），只算有效的场；没有有效的场时为 0。"""
    valid = batch.valid[:, -prediction.shape[1] :, :, None, None].to(batch.future.dtype)  # 半精度数不准几千个场
    error = (prediction - batch.future).square() * valid
    return error.mean((-2, -1)).sum() / valid.sum().clamp(min=1)


def refuse_members(name: str, num_members: int) -> None:
    """确定性模型只有一个成员。

    Raises:
        ValueError: num_members > 1；集合预报用引擎的 --perturb。
    """
    if num_members != 1:
        raise ValueError(f"{name} is deterministic: {num_members} members need --perturb")


def frames_of(batch: Batch) -> Tensor:
    """窗口的全部帧摊平，(N, C, H, W)，N = B·(T_in + T_out)；自编码器逐帧看。"""
    return torch.cat([batch.history, batch.future], 1).flatten(0, 1)


def encoded_fields(batch: Batch, encodes: Predict) -> tuple[Tensor, Tensor]:
    """阶段一逐个看的场 (N, C, H, W) 与 valid (N, C)：各帧，或相邻两帧之差（两帧都有效才有效）。"""
    frames, valid = torch.cat([batch.history, batch.future], 1), batch.valid
    if encodes == "tendency":
        frames, valid = frames.diff(dim=1), valid[:, 1:] & valid[:, :-1]
    return frames.flatten(0, 1), valid.flatten(0, 1)


def field_errors(made: Tensor, truth: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """(..., C, H, W) 的绝对误差与平方误差的平均，只算 valid (..., C) 为真的场；一个也没有时为 0。"""
    keep = valid[..., None, None].to(truth.dtype)
    difference = made - truth
    count = valid.sum().clamp(min=1)
    mae, mse = ((error * keep).mean((-2, -1)).sum() / count for error in (difference.abs(), difference.square()))
    return mae, mse


def zonal_amplitudes(fields: Tensor) -> Tensor:
    """(…, H, W) → 每条纬圈实 FFT 的振幅 (…, H, W // 2 + 1)，正交归一。"""
    return torch.fft.rfft(fields, dim=-1, norm="ortho").abs()
