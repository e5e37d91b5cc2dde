"""网格上的两件事：纬度权重，和输出时由北向南、由西向东的排列。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from util.batch import DataSpec


def latitude_weights(latitudes: Sequence[float]) -> Tensor:
    """(H,) float64，格点面积之比，平均为 1：相邻纬度的中线为界，两端外推半格并截在两极。"""
    lat = torch.tensor(latitudes, dtype=torch.float64)
    if lat.numel() == 1:
        return torch.ones(1, dtype=torch.float64)
    middle = (lat[1:] + lat[:-1]) / 2
    ends = lat[[0, -1]] + (lat[[0, -1]] - middle[[0, -1]])
    bounds = torch.cat([ends[:1], middle, ends[1:]]).clamp(-90, 90)
    area = (bounds.deg2rad().sin().diff()).abs()
    return area / area.mean()


class OutputGrid(NamedTuple):
    """输出的排列：fields[..., rows, :][..., columns] 由北向南、由西向东，坐标单位为度。"""

    rows: np.ndarray
    columns: np.ndarray
    latitudes: np.ndarray
    longitudes: np.ndarray


def output_grid(spec: DataSpec) -> OutputGrid:
    """由北向南，经度 0–360 升序；跨过本初子午线的区域若取 0–360 会被撕成两半，改用 -180–180。"""
    latitudes, given = np.array(spec.latitudes), np.round(spec.longitudes, 9)  # -1e-14 取模会变成 360
    rows = np.argsort(-latitudes, kind="stable")
    longitudes = given % 360
    step = np.abs(np.diff(given)).min(initial=360.0)
    if np.diff(np.sort(longitudes)).max(initial=0.0) > 1.5 * step:
        longitudes = given - 360 * np.floor((given.min() + 180) / 360)
    columns = np.argsort(longitudes, kind="stable")
    return OutputGrid(rows, columns, latitudes[rows], longitudes[columns])
