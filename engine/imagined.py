"""不碰数据的：由配置想象出的 DataSpec，真实大小的一批噪声；预检、量内存、比速度都用它们。"""

from __future__ import annotations

import torch

from util.batch import Batch, DataSpec
from util.config import DataConfig
from util.data.dataset import make_spec
from util.variables import channel_name


def random_batch(spec: DataSpec, size: int, steps: int = 1) -> Batch:
    """真实大小的一批高斯噪声；steps: 目标够滚几步。"""
    frames = spec.frames_in + steps * spec.frames_out
    fields = torch.randn(size, frames, spec.num_channels, spec.height, spec.width)
    hours = torch.arange(frames)[None] + torch.arange(size)[:, None]
    return Batch(
        history=fields[:, : spec.frames_in],
        future=fields[:, spec.frames_in :],
        time=hours * spec.interval_hours,
        valid=torch.ones(size, frames, spec.num_channels, dtype=torch.bool),
    )


def imagined_spec(config: DataConfig) -> DataSpec:
    """不碰目录树的 DataSpec（--smoke 用）：均值 0、标准差 1；写 `all` 的变量按 pressure_hpa 的层数展开。"""
    channels = []
    for variable, levels in config.variables.items():
        if levels == "all":
            levels = [f"level_{i:02d}" for i in range(len(config.pressure_hpa))]
        channels += [channel_name(variable, level) for level in ([None] if levels == "single" else levels)]
    zeros, ones = (0.0,) * len(channels), (1.0,) * len(channels)
    return make_spec(config, channels, zeros, ones, standardized=True)
