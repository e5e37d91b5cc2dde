"""各区域的统计量：metrics.py 逐对给出整个网格的，这里同时给出每个区域的，每个 (B, C, R) float64。"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

BY_REGION = "_by_region"


class Cells(NamedTuple):
    """R 个区域，(H·W, R)：格点的面积权重，与不加权的；区域之外为零，各列之和为一。"""

    area: Tensor
    plain: Tensor


def make_cells(masks: Tensor, weights: Tensor) -> Cells:
    """masks (R, H, W) bool、weights (H,)：格点在里面的权重就是它的纬度权重。"""
    area, plain = ((masks * values).flatten(1).T for values in (weights[:, None], torch.ones_like(weights[:, None])))
    return Cells(area / area.sum(0), plain / plain.sum(0))


def in_regions(
    forecast: Tensor, mean: Tensor, truth: Tensor, normal: Tensor, points: Mapping[str, Tensor], cells: Cells
) -> dict[str, Tensor]:
    """一个模型的：与 metrics.py 同样的量，名字接 BY_REGION；SSIM 的窗跨过区域的边，没有。

    forecast (B, M, C, H, W)；mean、truth、normal（气候态）与 points（逐格点的别的量）各 (B, C, H, W)。
    """
    error, anomaly, real = (mean - truth).double(), (mean - normal).double(), (truth - normal).double()
    square, absolute = error.square(), error.abs()
    fields = {"square": square, "absolute": absolute, "error": error}
    fields |= {"forecast_anomaly": anomaly.square(), "anomaly_product": anomaly * real, "crps": absolute}
    found = {key: by_region(field, cells.area) for key, field in {**fields, **points}.items()}
    found["plain_square"], found["plain_absolute"] = (by_region(field, cells.plain) for field in (square, absolute))
    active = [activity((member - normal).double(), cells) for member in forecast.unbind(1)]
    found["forecast_activity"] = torch.stack(active).mean(0)
    return {f"{key}{BY_REGION}": values for key, values in found.items()}


def truth_in_regions(anomaly: Tensor, cells: Cells) -> dict[str, Tensor]:
    """只与真值有关的；anomaly (B, C, H, W) 双精度。"""
    found = {"truth_anomaly": by_region(anomaly.square(), cells.area), "truth_activity": activity(anomaly, cells)}
    return {f"{key}{BY_REGION}": values for key, values in found.items()}


def by_region(field: Tensor, area: Tensor) -> Tensor:
    """(..., H, W)、(H·W, R) → (..., R) float64。"""
    return field.flatten(-2).double() @ area


def activity(anomaly: Tensor, cells: Cells) -> Tensor:
    """绕区域自己的平均的方差 (..., R)。先减整个网格的平均（取到单精度）：两个大数相减会给出负的方差。"""
    centred = anomaly - anomaly.mean((-2, -1), keepdim=True).float()
    return (by_region(centred.square(), cells.area) - by_region(centred, cells.area).square()).clamp(min=0)
