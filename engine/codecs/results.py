"""阶段一重建的成绩落盘：表、文字、图；训练的收尾与 reconstruct 命令写同样的一份。"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from engine.codecs.scores import Table
    from util.data.dataset import WeatherData

METRICS = ("rmse", "mae", "correlation", "ssim", "psnr")


def table_rows(table: Table) -> list[dict[str, Any]]:
    """每个通道、每个自编码器一行。"""
    return [
        {
            "codec": name,
            "channel": channel,
            "unit": table["units"][channel],
            "fields": table["fields"][channel],
            **found["scores"][channel],
            "compression": found["compression"],
        }
        for channel in table["channels"]
        for name, found in table["codecs"].items()
    ]


def reconstruction_text(table: Table) -> str:
    """对齐的文字表。"""
    from engine.codecs.tokens import tokens_text

    rows = [["channel", "codec", *METRICS, "latent", "values"]]
    for row in table_rows(table):
        latent = " x ".join(map(str, table["codecs"][row["codec"]]["latent_shape"]))
        numbers = ["-" if row[metric] is None else format(row[metric], ".5g") for metric in METRICS]
        label = f"{row['channel']} [{row['unit']}]"
        rows.append([label, row["codec"], *numbers, latent, f"{row['compression']:.3g} of the field"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    what = "frames" if table["encodes"] == "state" else "changes between frames"
    title = f"reconstruction of the {table['split']} split, {max(table['fields'].values())} {what}"
    discrete = {name: found["tokens"] for name, found in table["codecs"].items() if "tokens" in found}
    tokens = [tokens_text(name, found, table["units"]) for name, found in discrete.items()]
    return "\n".join([f"{title}; RMSE, MAE latitude-weighted, physical units; PSNR in dB", *lines, *tokens])


def write_reconstruction(
    out: Path, table: Table, codecs: Mapping[str, Any], data: WeatherData, device: torch.device
) -> list[Path]:
    """metrics.json、metrics.csv 与每个自编码器一张图（离散的另有一张逐尺度的）；返回 PNG 的路径。"""
    from util.atomic import replacing

    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(table, indent=1, allow_nan=False), encoding="utf-8")
    rows = table_rows(table)
    with replacing(out / "metrics.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return draw(codecs, data, table["split"], device, out / "figures")


def draw(codecs: Mapping[str, Any], data: WeatherData, split: str, device: torch.device, folder: Path) -> list[Path]:
    """划分正中的一帧（或一个差）：真值、重建、两者之差。"""
    import torch

    from engine.codecs.scores import reconstruction, what_they_encode
    from engine.codecs.tokens import by_scale
    from models.interface import TokenAutoencoder
    from util.batch import encoded_fields
    from util.calendar import time_text
    from util.data.batches import all_starts
    from util.plot.maps import forecast_figure
    from util.plot.side_by_side import side_by_side_figures
    from util.plot.style import save_figures

    spec = data.spec
    starts = all_starts(data.segments[split], spec.window)
    batch = data.windows[int(starts[len(starts) // 2])]
    encodes = what_they_encode(codecs)
    truth = encoded_fields(batch, encodes)[0][:1]  # (1, C, H, W)
    shown = spec if encodes == "state" else replace(spec, mean=(0.0,) * spec.num_channels)  # 差没有平均值可加
    real = shown.to_physical(truth)[0].numpy()
    paths: list[Path] = []
    for name, model in codecs.items():
        with torch.inference_mode():
            made = shown.to_physical(reconstruction(model, truth.to(device), name).cpu())[0].numpy()
        first = time_text(int(batch.time[0, 0]))
        when = f"{first} UTC" if encodes == "state" else f"{first} to {time_text(int(batch.time[0, 1]))} UTC"
        title = f"{name}: {split}, {when}"
        paths += save_figures(forecast_figure(spec, real, made, title, "reconstruction"), folder / name)
        if isinstance(model, TokenAutoencoder):
            with torch.inference_mode():
                parts = list(by_scale(model, model.encode_tokens(truth.to(device))))
            fields = [shown.to_physical(part.cpu())[0].numpy() for part in parts]
            labels = [f"up to {h}x{w}" for h, w in model.quantizer.scales]
            columns = {"truth": real, **dict(zip(labels, fields, strict=True))}
            kind = None if encodes == "state" else "difference"
            paths += save_figures(side_by_side_figures(spec, columns, title, kind), folder / f"{name}_scales")
    return paths
