"""阶段一重建的成绩落盘：表与图；训练的收尾与 reconstruct 命令写同样的一份。"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from engine.codecs.scores import reconstruction
from engine.codecs.table import COLUMNS, Reconstruction, table_rows
from engine.codecs.tokens import by_scale
from models.interface import Autoencoder, TokenAutoencoder
from util.atomic import replacing
from util.batch import DataSpec, encoded_fields
from util.calendar import time_text
from util.data.batches import all_starts
from util.data.dataset import WeatherData
from util.files.records import as_json
from util.plot.maps import forecast_figure
from util.plot.side_by_side import side_by_side_figures
from util.plot.style import save_figures


def write_reconstruction(out: Path, table: Reconstruction) -> None:
    """metrics.json 与 metrics.csv。"""
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(as_json(table), indent=1, allow_nan=False), encoding="utf-8")
    with replacing(out / "metrics.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table_rows(table))


def draw_reconstruction(
    table: Reconstruction, codecs: Mapping[str, Autoencoder], data: WeatherData, device: torch.device, folder: Path
) -> list[Path]:
    """划分正中的一帧（或一个差）：真值、重建、两者之差，离散的另有一张逐尺度的；返回 PNG 的路径。"""
    spec = data.spec
    starts = all_starts(data.segments[table.split], spec.window)
    batch = data.windows[int(starts[len(starts) // 2])]
    truth = encoded_fields(batch, table.encodes)[0][:1]  # (1, C, H, W)
    state = table.encodes == "state"
    shown = spec if state else replace(spec, mean=(0.0,) * spec.num_channels)  # 差没有平均值可加
    first = time_text(int(batch.time[0, 0]))
    when = f"{first} UTC" if state else f"{first} to {time_text(int(batch.time[0, 1]))} UTC"
    real = shown.to_physical(truth)[0].numpy()
    paths: list[Path] = []
    for name, model in codecs.items():
        with torch.inference_mode():
            made = shown.to_physical(reconstruction(model, truth.to(device), name).cpu())[0].numpy()
        title = f"{name}: {table.split}, {when}"
        paths += save_figures(forecast_figure(spec, real, made, title, "reconstruction"), folder / name)
        if isinstance(model, TokenAutoencoder):
            columns = {"truth": real, **scales_of(model, truth.to(device), shown)}
            kind = None if state else "difference"
            paths += save_figures(side_by_side_figures(spec, columns, title, kind), folder / f"{name}_scales")
    return paths


@torch.inference_mode()
def scales_of(model: TokenAutoencoder, truth: torch.Tensor, shown: DataSpec) -> dict[str, np.ndarray]:
    """只用头 1 … K 个尺度的重建：列的名字 → (C, H, W)，物理单位；truth (1, C, H, W)。"""
    parts = by_scale(model, model.encode_tokens(truth))
    labels = (f"up to {h}x{w}" for h, w in model.quantizer.scales)
    return {label: shown.to_physical(p.cpu())[0].numpy() for label, p in zip(labels, parts, strict=True)}
