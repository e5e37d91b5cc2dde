"""训练的收尾：最优权重在测试集上的成绩，旁边是各基线；各划分的图，和整个运行的报告。"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from engine.evaluate import evaluate, present, run_page, training_cost
from engine.figures import draw_samples
from engine.results import table_text
from engine.scoring import Options
from engine.state import load_forecaster
from engine.validation import validation_loss
from util.atomic import replacing
from util.checkpoint import load_checkpoint
from util.plot import curves_figure, save_figures
from util.report import write_report

if TYPE_CHECKING:
    from engine.train import Run

log = logging.getLogger("ar_pred")


def finish(run: Run) -> None:
    """metrics.json 最后写：有它就是走完了。"""
    fabric, config = run.fabric, run.config
    fabric.barrier()
    content = load_checkpoint(run.best)
    model, _ = load_forecaster(content, fabric.device)
    check = run.stop.check if fabric.world_size == 1 else lambda: None
    test_loss = validation_loss(model, run.data, "test", config, fabric, check)
    about = {"run": run.name, "checkpoint": str(run.best), "step": content["progress"]["step"]}
    result = None
    if model.can_forecast:
        options = Options(split="test", stride=config.data.eval_stride)
        result = evaluate(model, run.data, config, options, run.log_dir / "test", fabric, about, check)
    else:
        log.warning("this configuration of %s makes no forecasts: no scores, no sample figures", config.model["name"])
    if not fabric.is_global_zero:
        return
    log.info("test loss of the best checkpoint: %.5f", test_loss)
    summary = {**about, "test_loss": test_loss, "best_validation_loss": run.state.progress.best}
    run.record("test", {"test_loss": test_loss})
    assert run.metrics is not None
    pictures = save_figures([curves_figure(run.metrics.rows())], run.log_dir / "figures" / "curves")
    page = run_page(config, run.name, run.log_dir, run.data, test_loss)
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
