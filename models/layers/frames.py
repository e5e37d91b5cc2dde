"""场、帧与差：网络给的是场还是变化，窗口的帧怎样摊平给逐帧看的模型。"""

from __future__ import annotations

import torch
from torch import Tensor

from util.batch import Batch, Predict


def to_state(made: Tensor, history: Tensor, predict: Predict) -> Tensor:
    """网络的输出 (B, T_out, C, H, W) → 预报的场；tendency 从持续性预报起步，头一个时效好学得多。"""
    return made + history[:, -1:] if predict == "tendency" else made


def partner_frames(frames_in: int, frames_out: int) -> list[int]:
    """各输出帧的跳接接哪一帧输入：最后 T_out 帧；输出更长时，余下的都接最后一帧。"""
    later = max(0, frames_in - frames_out)
    return [min(later + j, frames_in - 1) for j in range(frames_out)]


def frames_of(batch: Batch) -> Tensor:
    """窗口的全部帧摊平，(N, C, H, W)，N = B·(T_in + T_out)；自编码器逐帧看。"""
    return torch.cat([batch.history, batch.future], 1).flatten(0, 1)
