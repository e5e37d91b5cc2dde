"""写开的卷积与归一化（NumPy，逐个核点相加），供各卷积模型的测试对照；数组一律 (B, C, H, W)。"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

Array = np.ndarray


def values(tensor: Tensor | None) -> Array:
    assert tensor is not None
    return tensor.detach().double().numpy()


def conv(x: Array, layer: nn.Conv2d) -> Array:
    """same 补零、步长 1 的卷积，分组与膨胀照 layer；输出先是偏置，再把每个核点的贡献一一加上。"""
    weight, dilation = values(layer.weight), layer.dilation[0]
    count, _, height, width = x.shape
    out_channels, per_group, kernel, _ = weight.shape
    made = np.zeros((count, out_channels, height, width)) + values(layer.bias)[:, None, None]
    reach = kernel // 2 * dilation
    wide = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    for out in range(out_channels):
        first = out // (out_channels // layer.groups) * per_group  # 这一组的第一个输入通道
        for i, row, column in np.ndindex(per_group, kernel, kernel):
            y, z = row * dilation, column * dilation
            made[:, out] += weight[out, i, row, column] * wide[:, first + i, y : y + height, z : z + width]
    return made


def group_norm(x: Array, layer: nn.GroupNorm) -> Array:
    made = np.empty_like(x)
    size = x.shape[1] // layer.num_groups
    for n, group in np.ndindex(len(x), layer.num_groups):
        part = x[n, group * size : (group + 1) * size]
        made[n, group * size : (group + 1) * size] = (part - part.mean()) / np.sqrt(part.var() + layer.eps)
    return made * values(layer.weight)[:, None, None] + values(layer.bias)[:, None, None]


def batch_norm(x: Array, layer: nn.BatchNorm2d) -> Array:
    """评测时：用攒下的均值与方差。"""
    mean, var = (values(v)[:, None, None] for v in (layer.running_mean, layer.running_var))
    made = (x - mean) / np.sqrt(var + layer.eps)
    return made * values(layer.weight)[:, None, None] + values(layer.bias)[:, None, None]
