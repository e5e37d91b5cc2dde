"""一个模型的代价：参数、每个样本的运算次数、训练用去多少；速度与内存在评测时量。"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine.device import device_name
from engine.evaluation.metrics_file import Cost
from engine.progress import Progress
from models.interface import ForecastModel, Network
from util.batch import DataSpec, window_time


def model_cost(
    model: ForecastModel, spec: DataSpec, progress: Progress, rate: float | None, memory: int, device: torch.device
) -> Cost:
    """一个模型的代价；rate 是每秒的预报数，memory 是评测时的峰值（字节），progress 是训练走过的，续训累计在内。"""
    trained = progress.seconds > 0  # 没有梯度步的模型没有训练的代价
    return Cost(
        parameters=parameter_count(model),
        flops_per_sample=flops_per_sample(model, spec),
        inference_samples_per_second=rate,
        inference_peak_memory_bytes=memory,
        device=device_name(device),
        training_seconds=progress.seconds if trained else None,
        training_samples_per_second=progress.samples / progress.seconds if trained else None,
        training_peak_memory_bytes=progress.peak_memory if trained else None,
        training_device=progress.device if trained else None,
    )


def parameter_count(model: Network) -> int:
    """全部参数，冻结的也算。"""
    return sum(p.numel() for p in model.parameters())


def flops_per_sample(model: ForecastModel, spec: DataSpec) -> int:
    """预报一个窗口（frames_out 帧）的浮点运算次数，乘加算两次；只数矩阵乘、卷积和注意力。

    在 CPU 的副本上数：那里的注意力是展开的矩阵乘，LSTM 是 mkldnn 的一层，别的融合的核计数器未必认得。被遮住的块也照算。
    """
    counted = (
        copy.deepcopy(model).to(torch.device("cpu")).requires_grad_(False)
    )  # 计数器会给要求导的视图挂钩子，挂不上就倒
    history = torch.zeros(1, spec.frames_in, spec.num_channels, spec.height, spec.width)
    time = torch.arange(spec.frames_in)[None] * spec.interval_hours
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_rnn_layer: _rnn_flops})
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        counted.forecast(history, window_time(time, spec))
    return counter.get_total_flops()


def _rnn_flops(x: Sequence[int], w_in: Sequence[int], w_hidden: Sequence[int], *_: object, **__: object) -> int:
    """循环网络一层一个方向的运算次数：x (T, B, I)，每步乘 w_in (4D, I) 与 w_hidden (4D, D)；参数都是形状。"""
    return 2 * x[0] * x[1] * (w_in[0] * w_in[1] + w_hidden[0] * w_hidden[1])
