"""训练结束后的样本图：真值、预报、差，每个划分几张。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric

from util.batch import DataSpec
from util.data.calendar import time_text
from util.data.dataset import WeatherData
from util.data.index import SPLITS
from util.data.windows import all_starts
from util.plot import forecast_figure, save_figures


@torch.inference_mode()
def draw_samples(model: Any, data: WeatherData, fabric: Fabric, count: int, folder: Path) -> list[Path]:
    """每个划分均匀取 count 个窗口，物理单位画出来；返回 PNG 的路径。"""
    paths: list[Path] = []
    spec: DataSpec = data.spec
    for split in SPLITS:
        starts = all_starts(data.segments[split], spec.window)
        chosen = starts[np.linspace(0, starts.size - 1, count + 2).round().astype(int)[1:-1]]
        for number, start in enumerate(chosen.tolist(), 1):
            batch = fabric.to_device(data.windows[start])
            forecast = spec.to_physical(model.forecast(batch.history, batch.time)[0, 0, 0]).cpu().numpy()
            truth = spec.to_physical(batch.future[0, 0]).cpu().numpy()
            valid_time = time_text(int(batch.time[0, spec.frames_in]))
            title = f"{split}: {valid_time} UTC, +{spec.interval_hours} h"
            paths += save_figures(forecast_figure(spec, truth, forecast, title), folder / f"{split}-{number}")
    return paths
