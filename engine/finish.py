"""训练的收尾：最优权重在测试集上的成绩，旁边是各基线（阶段一则是重建的成绩）；各划分的图，和整个运行的报告。"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.baselines import Check
from engine.codecs import Table, score_codecs
from engine.evaluate import evaluate, present, run_page, training_cost
from engine.figures import draw_samples
from engine.latents import is_codec, know_latents
from engine.reconstruct import table_text as reconstruction_text
from engine.reconstruct import write_reconstruction
from engine.results import table_text
from engine.scoring import Options
from engine.state import load_forecaster
from engine.validation import eval_batch_size, validation_loss
from util.atomic import replacing
from util.checkpoint import load_checkpoint
from util.plot import curves_figure, save_figures
from util.report import write_report

if TYPE_CHECKING:
    from engine.train import Run

log = logging.getLogger("ar_pred")
Facts = list[list[str]]


def finish(run: Run) -> None:
    """metrics.json 最后写：有它就是走完了。"""
    fabric, config = run.fabric, run.config
    check = run.stop.check if fabric.world_size == 1 else lambda: None
    fabric.barrier()
    codec = is_codec(run.state.model)
    if codec:
        know_latents(run, check)
    content = load_checkpoint(run.best)
    model, _ = load_forecaster(content, fabric.device)
    test_loss = validation_loss(model, run.data, "test", config, fabric, check)
    about = {"run": run.name, "checkpoint": str(run.best), "step": content["progress"]["step"]}
    result = None
    if model.can_forecast:
        options = Options(split="test", stride=config.data.eval_stride)
        result = evaluate(model, run.data, config, options, run.log_dir / "test", fabric, about, check)
    elif not codec:
        log.warning("this configuration of %s makes no forecasts: no scores, no sample figures", config.model["name"])
    if not fabric.is_global_zero:
        return
    log.info("test loss of the best checkpoint: %.5f", test_loss)
    summary = {**about, "test_loss": test_loss, "best_validation_loss": run.state.progress.best}
    run.record("test", {"test_loss": test_loss})
    assert run.metrics is not None
    pictures = save_figures([curves_figure(run.metrics.rows())], run.log_dir / "figures" / "curves")
    page = run_page(config, run.name, run.log_dir, run.data, test_loss)
    if codec:
        table, drawn = reconstruct(run, model, check)
        page["facts"] += reconstruction_facts(table)
        summary["reconstruction"] = table["codecs"][run.name]
        pictures += drawn
    if result is None:
        write_report(run.log_dir / "report.html", page)
    else:
        result.table["cost"] |= training_cost(run.state.progress)
        log.info("test split, best checkpoint\n%s", table_text(result.table))
        summary |= {key: result.table[key] for key in ("cost", "mean_rmse_ratio")}
        pictures += present(result, config, run.log_dir / "test", run.log_dir / "report.html", page)
        pictures += draw_samples(model, run.data, fabric, config.log.figures, run.log_dir / "figures")
    with replacing(run.log_dir / "metrics.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1, allow_nan=False), encoding="utf-8")
    for path in pictures:  # 各用各的名字：大小不同的图放在一组里，W&B 会抱怨
        run.wandb.images(run.state.progress.step, f"figures/{path.stem}", [path])
    log.info("done: %s, %s, report %s", run.log_dir, run.best, run.log_dir / "report.html")


def reconstruct(run: Run, model: Any, check: Check) -> tuple[Table, list[Path]]:
    """阶段一的成绩：测试集的每一帧编码再解码；写进 reconstruction/，与 python -m engine.reconstruct 相同。"""
    codecs, device = {run.name: model}, run.fabric.device
    table = score_codecs(codecs, run.data, "test", 1, eval_batch_size(run.config), device, check)
    table["codecs"][run.name]["source"] = str(run.best)
    pictures = write_reconstruction(run.log_dir / "reconstruction", table, codecs, run.data, device)
    log.info("%s", reconstruction_text(table))
    return table, pictures


def reconstruction_facts(table: Table) -> Facts:
    """报告开头的几行：每个通道重建的 RMSE。"""
    (found,) = table["codecs"].values()
    scores = ((channel, found["scores"][channel]["rmse"]) for channel in table["channels"])
    return [
        ["latent", f"{' x '.join(map(str, found['latent_shape']))}, {found['compression']:.3g} of the field's values"],
        *([f"reconstruction RMSE, {c}", f"{v:.4g} {table['units'][c]}"] for c, v in scores if v is not None),
    ]
