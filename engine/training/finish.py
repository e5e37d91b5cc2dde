"""训练的收尾：最优权重在测试集上的成绩，旁边是各基线（阶段一则是重建的成绩）；各划分的图，和整个运行的报告。"""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning_fabric import Fabric

from engine.codecs.results import draw_reconstruction, write_reconstruction
from engine.codecs.scores import score_codecs
from engine.codecs.table import CodecScores, Reconstruction, reconstruction_text
from engine.evaluation.evaluate import Evaluated, Trained, evaluate, publish
from engine.evaluation.metrics_file import Cost
from engine.evaluation.page import make_page
from engine.evaluation.page_facts import Facts
from engine.evaluation.results import scores_text, write_result
from engine.evaluation.task import Options
from engine.loading import load_forecaster
from engine.one_pass import Check
from engine.parallel import from_main
from engine.training.know_latents import know_latents
from engine.training.validation import validation_loss
from models.interface import Autoencoder, ForecastModel, can_forecast, is_codec
from util.atomic import WAITING, replacing, reserved, waiting
from util.batch import DataSpec
from util.calendar import time_text
from util.checkpoint import load_checkpoint
from util.config import eval_batch_size
from util.data.batches import all_starts
from util.data.dataset import WeatherData
from util.data.index import SPLITS
from util.files.records import as_json
from util.logger import optional
from util.plot.curves import curves_figure
from util.plot.maps import forecast_figure
from util.plot.style import save_figures
from util.report import write_report
from util.report.bilingual import Bilingual
from util.scores.table import Numbers

if TYPE_CHECKING:
    from engine.training.run import Run

log = logging.getLogger("ar_pred")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """log/<run>/metrics.json：运行的摘要；成绩本身在 test/。阶段一有重建的，能预报的有代价与比值。"""

    run: str
    checkpoint: str
    step: int
    test_loss: float
    best_validation_loss: float | None
    reconstruction: CodecScores | None = None
    cost: Cost | None = None
    mean_rmse_ratio: dict[str, dict[str, Numbers]] | None = None


def finish(run: Run) -> None:
    """metrics.json 最后写：有它就是走完了。"""
    with ExitStack() as held:  # 成绩的文件夹：有人正评测到那里，就等它
        _finish(run, held)


def _finish(run: Run, held: ExitStack) -> None:
    fabric, config = run.fabric, run.config
    check = run.stop.check
    fabric.barrier()
    if is_codec(run.state.model):
        know_latents(run, check)
    content = load_checkpoint(run.best)
    model, _ = load_forecaster(content, fabric.device)
    test_loss = validation_loss(model, run.state.objective, run.data, "test", config, fabric, check)
    trained = Trained(run.name, str(run.best), content["progress"]["step"], run.state.progress)
    evaluated = None
    if can_forecast(model):
        options, out = Options(split="test", stride=config.data.eval_stride), run.log_dir / "test"
        from_main(fabric, lambda: held.enter_context(waiting(lambda: reserved(out, WAITING), check)))
        evaluated = evaluate(model, run.data, config, options, out, fabric, trained, check)
    elif not is_codec(model):
        log.warning("this configuration of %s makes no forecasts: no scores, no sample figures", config.model["name"])
    rebuilt = from_main(fabric, lambda: reconstruct(run, model, check)) if is_codec(model) else None
    if not fabric.is_global_zero:
        return
    log.info("test loss of the best checkpoint: %.5f", test_loss)
    summary = Summary(
        run=trained.run,
        checkpoint=trained.checkpoint,
        step=trained.step,
        test_loss=test_loss,
        best_validation_loss=run.state.progress.best,
    )
    run.record("test", {"test_loss": test_loss})
    table, pictures = rebuilt or (None, [])
    if table is not None:
        summary = replace(summary, reconstruction=table.codecs[run.name])
    if evaluated is not None:
        result = evaluated.result
        log.info("test split, best checkpoint\n%s", scores_text(result))
        log.info("scores: %s", write_result(run.log_dir / "test", result))
        summary = replace(summary, cost=result.cost, mean_rmse_ratio=result.mean_rmse_ratio)
    assert run.metrics is not None
    with optional("the figure of the curves", log):
        pictures += save_figures([curves_figure(run.metrics.rows())], run.log_dir / "figures" / "curves")
    with optional("the report with the figures of the scores", log):
        pictures += show(run, test_loss, evaluated, table)
    if can_forecast(model):
        with optional("the figures of samples", log):
            pictures += draw_samples(model, run.data, fabric, config.log.figures, run.log_dir / "figures")
    with replacing(run.log_dir / "metrics.json") as temporary:
        temporary.write_text(json.dumps(as_json(summary), indent=1, allow_nan=False), encoding="utf-8")
    for path in pictures:  # 各用各的名字：大小不同的图放在一组里，W&B 会抱怨
        run.wandb.images(run.state.progress.step, f"figures/{path.stem}", [path])
    log.info("done: %s, %s", run.log_dir, run.best)


def show(run: Run, test_loss: float, evaluated: Evaluated | None, table: Reconstruction | None) -> list[Path]:
    """整个运行的报告，成绩的图；返回 PNG 的路径。"""
    page = make_page(
        "run",
        run.name,
        [("test loss", f"{test_loss:.5f}"), *(reconstruction_facts(table) if table is not None else ())],
        f"python train.py --config {run.log_dir / 'config.yaml'} run.name={run.name}-again",
        run.config,
        run.data,
        missing=run.log_dir / "missing.csv",
        curves=run.log_dir / "metrics.csv",
    )
    report = run.log_dir / "report.html"
    if evaluated is not None:
        return publish(evaluated, run.log_dir / "test", report, page)
    write_report(report, as_json(page))
    log.info("report: %s", report)
    return []


def reconstruct(run: Run, model: Autoencoder, check: Check) -> tuple[Reconstruction, list[Path]]:
    """阶段一的成绩：测试集的每一帧编码再解码；写进 reconstruction/，与 python -m engine.codecs.reconstruct 相同。"""
    codecs, sources, device = {run.name: model}, {run.name: str(run.best)}, run.fabric.device
    table = score_codecs(codecs, sources, run.data, "test", 1, eval_batch_size(run.config), device, check)
    folder, pictures = run.log_dir / "reconstruction", list[Path]()
    write_reconstruction(folder, table)
    log.info("%s", reconstruction_text(table))
    with optional("the figures of the reconstruction", log):
        pictures = draw_reconstruction(table, codecs, run.data, device, folder / "figures")
    return table, pictures


def reconstruction_facts(table: Reconstruction) -> Facts:
    """报告开头的几行：每个通道重建的 RMSE。"""
    (found,) = table.codecs.values()
    scores = ((channel, found.scores[channel].rmse) for channel in table.channels)
    shape, part = " x ".join(map(str, found.latent_shape)), f"{found.compression:.3g}"
    return [
        ("latent", Bilingual(f"{shape}, {part} of the field's values", f"{shape}，为场的数的 {part}")),
        *(
            (Bilingual(f"reconstruction RMSE, {c}", f"重建的均方根误差，{c}"), f"{v:.4g} {table.units[c]}")
            for c, v in scores
            if v is not None
        ),
    ]


@torch.inference_mode()
def draw_samples(model: ForecastModel, data: WeatherData, fabric: Fabric, count: int, folder: Path) -> list[Path]:
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
