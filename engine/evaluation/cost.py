"""一个模型的代价：参数、每个样本的运算次数；内存与速度在评测时量。"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from util.batch import DataSpec, window_time


def parameter_count(model: Any) -> int:
    """全部参数，冻结的也算。"""
    return sum(p.numel() for p in model.parameters())


def flops_per_sample(model: Any, spec: DataSpec) -> int:
    """预报一个窗口（frames_out 帧）的浮点运算次数，乘加算两次；只数矩阵乘、卷积和注意力。

    在 CPU 的副本上数：那里的注意力是展开的矩阵乘，LSTM 是 mkldnn 的一层，别的融合的核计数器未必认得。被遮住的块也照算。
    """
    counted = copy.deepcopy(model).cpu().requires_grad_(False)  # 计数器会给要求导的视图挂钩子，挂不上就倒
    history = torch.zeros(1, spec.frames_in, spec.num_channels, spec.height, spec.width)
    time = torch.arange(spec.frames_in)[None] * spec.interval_hours
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_rnn_layer: _rnn_flops})
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        counted.forecast(history, window_time(time, spec))
    return counter.get_total_flops()


def _rnn_flops(x: Sequence[int], w_in: Sequence[int], w_hidden: Sequence[int], *_: object, **__: object) -> int:
    """循环网络一层一个方向的运算次数：x (T, B, I)，每步乘 w_in (4D, I) 与 w_hidden (4D, D)；参数都是形状。"""
    return 2 * x[0] * x[1] * (w_in[0] * w_in[1] + w_hidden[0] * w_hidden[1])
