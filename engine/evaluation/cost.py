"""一个模型的代价：参数、每个样本的运算次数、峰值内存；速度在评测时量。"""

from __future__ import annotations

import copy
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine.forecasting.rollout import window_time
from engine.training.state import Progress
from util.batch import DataSpec

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


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


def reset_peak_memory(device: torch.device) -> None:
    """从这里起重新量峰值内存。"""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")  # 内核只认这个数：VmHWM 回到现在的值


def peak_memory(device: torch.device) -> int:
    """字节：显卡上是分配过的最多显存；CPU 上是整个进程的最大驻留内存（没有 /proc 的系统从进程开始算起）。"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(row for row in STATUS.read_text().splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def device_name(device: torch.device) -> str:
    """显卡的型号；CPU 则写用了几个线程。"""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


def training_cost(progress: Progress) -> dict[str, Any]:
    """检查点里记着的训练代价，续训累计在内；没有梯度步的模型为空。"""
    if not progress.seconds:
        return {}
    return {
        "training_seconds": progress.seconds,
        "training_samples_per_second": progress.samples / progress.seconds,
        "training_peak_memory_bytes": progress.peak_memory,
        "training_device": progress.device,
    }
