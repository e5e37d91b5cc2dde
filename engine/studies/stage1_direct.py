"""直接预报的成绩与阶段 B 要的权重：`python -m engine.studies.stage1_direct --checkpoint CKPT --out DIR`。

DIR 里写（名字照需求）：
* metrics_stage1_direct.json：各通道、各时效的 RMSE、MAE，物理单位，按纬度加权；旁边是各基线的。
* spatial_examples_stage1.png：划分正中间的一个窗口，末一个时效的真值、预报、差，至多九个通道。
* decoder_fp16.safetensors、encoder_in_adapter_fp16.safetensors：半精度的解码器与 in_adapter；
  前者可作 config/rae.yaml 的 model.decoder_weights，rae 再作 DiT 的 first_stage。
* evaluate.py 写的全部（metrics.json、statistics.nc、report.html）：成绩就是由它算的。
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.evaluation.metrics_file import Result, read_scores
from util.atomic import replacing, reserved
from util.cli import Parser, run_command

if TYPE_CHECKING:  # --help 不必等 torch
    from torch import nn

    from models.interface import ForecastModel
    from util.config import RunConfig

MODEL = "rae_direct"
SCORES = ("rmse", "mae")
SCORES_FILE, EXAMPLES = "metrics_stage1_direct.json", "spatial_examples_stage1"
DECODER, IN_ADAPTER = "decoder_fp16.safetensors", "encoder_in_adapter_fp16.safetensors"


def stage1_direct(path: str, split: str, stride: int, out: Path) -> int:
    """命令本身：评测、取出 RMSE 与 MAE、画一个窗口、存半精度的权重。

    Raises:
        ValueError: 检查点不是 rae_direct 的，或见 evaluate_checkpoint。
    """
    import torch

    from engine.evaluation.evaluate import evaluate_checkpoint
    from engine.evaluation.task import Options
    from engine.loading import checkpoint_config, load_forecaster
    from models.interface import Donor, can_forecast
    from util.files.training_checkpoint import load_training

    content = load_training(path)
    name = content["config"]["model"].get("name")
    if name != MODEL:
        raise ValueError(f"{path}: holds {name or 'no model'}, not {MODEL}; config/{MODEL}.yaml trains one")
    evaluate_checkpoint(path, Options(split=split, stride=stride), out)
    with reserved(out):
        write_metrics(out, read_scores(out / "metrics.json", Result))
        model, _ = load_forecaster(content, torch.device("cpu"))
        assert can_forecast(model) and isinstance(model, Donor)
        draw_example(model, checkpoint_config(content, path), split, out)
        write_half(model.decoder, out / DECODER)
        write_half(model.in_adapter, out / IN_ADAPTER)
    return 0


def write_metrics(out: Path, result: Result) -> None:
    """成绩表里只留 RMSE 与 MAE；与 metrics.json 里的数相同。"""
    about = ("run", "checkpoint", "split", "stride", "model", "lead_hours", "units")
    scores = {
        name: {channel: {key: found[key] for key in SCORES} for channel, found in channels.items()}
        for name, channels in result.scores.items()
    }
    with replacing(out / SCORES_FILE) as temporary:
        text = json.dumps({**{key: getattr(result, key) for key in about}, "scores": scores}, indent=1, allow_nan=False)
        temporary.write_text(text, encoding="utf-8")


def draw_example(model: ForecastModel, config: RunConfig, split: str, out: Path) -> None:
    """划分正中间的窗口，末一个时效。"""
    import torch

    from util.calendar import time_text
    from util.data.batches import all_starts
    from util.data.dataset import open_data
    from util.plot.maps import forecast_figure
    from util.plot.style import save_figures

    data = open_data(config.data, announce=False)
    spec = data.spec
    starts = all_starts(data.segments[split], spec.window)
    batch = data.windows[int(starts[len(starts) // 2])]
    with torch.inference_mode():
        forecast = spec.to_physical(model.forecast(batch.history, batch.time)[0, 0, -1]).numpy()
    truth = spec.to_physical(batch.future[0, -1]).numpy()
    title = f"{split}: {time_text(int(batch.time[0, -1]))} UTC, +{spec.interval_hours * spec.frames_out} h"
    save_figures(forecast_figure(spec, truth, forecast, title)[:1], out / EXAMPLES)


def write_half(module: nn.Module, path: Path) -> None:
    """一个模块的全部权重，float16。

    Raises:
        ValueError: 有的权重超出半精度的范围。
    """
    import torch
    from safetensors.torch import save_file

    weights = {name: value.half().contiguous() for name, value in module.state_dict().items()}
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"{path.name}: {name} does not fit float16 (at most {torch.finfo(torch.half).max:g})")
    with replacing(path) as temporary:
        save_file(weights, temporary)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m engine.studies.stage1_direct",
        description="Scores, an example and half-precision weights of a trained rae_direct.",
    )
    parser.add_argument("--checkpoint", required=True, help="e.g. checkpoints/RUN/best.ckpt")
    parser.add_argument("--out", required=True, type=Path, help="folder for the scores, the picture and the weights")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="default: %(default)s")
    parser.add_argument("--stride", type=int, default=1, help="score every n-th window start (default: every one)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """命令行入口，返回退出码。

    Raises:
        ValueError: 参数写错，或见 stage1_direct。
    """
    arguments = parse_arguments(argv)
    if arguments.stride < 1:
        raise ValueError(f"--stride {arguments.stride}: must be at least 1")
    return stage1_direct(arguments.checkpoint, arguments.split, arguments.stride, arguments.out)


if __name__ == "__main__":
    run_command(main)
