"""评测的入口：检查点 → 数据、模型、基线 → engine/scoring.py 逐批计分 → engine/results.py 落盘 → 图与报告。"""

from __future__ import annotations

import logging
import os
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric

from engine.device import device_name, peak_memory, reset_peak_memory
from engine.evaluation.baselines import fit_baselines
from engine.evaluation.cost import flops_per_sample, parameter_count
from engine.evaluation.glimpse import choose_glimpse, parse_points
from engine.evaluation.page import command_line, curves_section, data_section, evaluation_content
from engine.evaluation.results import Seen, Table, scores_text, write_results, write_table
from engine.evaluation.scoring import score
from engine.evaluation.task import Options, Task, find_starts, threshold_table
from engine.forecasting.members import check_members
from engine.loading import check_same_data, load_forecaster
from engine.one_pass import Check
from engine.progress import Progress, training_cost
from models.interface import can_forecast
from util.checkpoint import load_checkpoint
from util.config import RunConfig, eval_batch_size
from util.data.dataset import WeatherData, open_data
from util.logger import setup_logging
from util.plot.scores import ranks_figure, scores_figure, spectra_figure
from util.plot.style import save_figures
from util.report import write_report
from util.strict import validate

log = logging.getLogger("ar_pred")


class Evaluated(NamedTuple):
    """一次评测之后手里的东西；table 就是 metrics.json。"""

    task: Task
    table: Table
    seen: Seen


def evaluate(
    model: Any,
    data: WeatherData,
    config: RunConfig,
    options: Options,
    out: Path,
    fabric: Fabric,
    about: dict[str, Any],
    check: Check = lambda: None,
) -> Evaluated | None:
    """一个模型在一个划分上的全部成绩，写进 out；只有零号进程得到结果。

    Args:
        about: 记进 metrics.json 与 statistics.nc 的来历（运行名、检查点），普通值。

    Raises:
        ValueError: 选项与模型或数据不合；预报里有非有限值。
    """
    spec, name = data.spec, config.model["name"]
    check_members(model, name, options.members, options.perturb, options.smooth)
    steps = options.steps or spec.frames_out
    starts = find_starts(data, options.split, steps, options.stride)
    thresholds = threshold_table(options.thresholds, spec)
    view = choose_glimpse(spec, len(starts), steps, parse_points(list(options.points), spec))
    batch_size = eval_batch_size(config)
    models = {**fit_baselines(data, config, batch_size, fabric, check), name: model}
    reset_peak_memory(fabric.device)
    task = Task(models, name, data, options, steps, starts, batch_size, config.run.seed, view, thresholds)
    stream = score(task, fabric, check)
    if not fabric.is_global_zero:
        for _ in stream:
            pass
        return None
    out.mkdir(parents=True, exist_ok=True)
    about = {**about, "split": options.split, "stride": options.stride, "steps": steps, "members": options.members}
    about |= {"perturb": options.perturb, "smooth": options.smooth}
    about |= {"set": " ".join(options.set)} if options.set else {}
    table, seen = write_results(task, stream, out, about)
    table = {**about, "model": name, **table}
    memory = peak_memory(fabric.device)  # 在数运算次数之前：那里要多一份副本
    table["cost"] = {
        "parameters": parameter_count(model),
        "flops_per_sample": flops_per_sample(model, spec),
        "inference_samples_per_second": table["samples_per_second"][name],
        "inference_peak_memory_bytes": memory,
        "device": device_name(fabric.device),
    }
    return Evaluated(task, table, seen)


def publish(result: Evaluated, config: RunConfig, out: Path, page: Path, content: dict[str, Any]) -> list[Path]:
    """成绩的表、图和报告；content 是页面独有的部分（标题、来历、损失曲线）。返回 PNG 的路径。"""
    table, task = result.table, result.task
    log.info("scores: %s", write_table(out, table))
    made = evaluation_content(task, table, result.seen, config, out / "statistics.nc")
    made["costs"] = [{"name": task.judged, **table["cost"]}]
    made |= {**content, "facts": [*made["facts"], *content["facts"]]}
    pictures = draw_scores(table, made, out / "figures")
    write_report(page, made)
    log.info("report: %s", page)
    return pictures


def draw_scores(table: Table, content: dict[str, Any], folder: Path) -> list[Path]:
    """RMSE 随时效、末一时效的谱与秩直方图。"""
    baselines = {m["name"] for m in content["models"] if m["role"] == "baseline"}
    rmse = {m["name"]: {c: s["rmse"] for c, s in table["scores"][m["name"]].items()} for m in content["models"]}
    figures = {"rmse": scores_figure(table["lead_hours"], table["units"], rmse, baselines)}
    spectra = content["spectra"]
    last, lead = -1, spectra["lead_hours"][-1]
    truth = {c: rows[last] for c, rows in spectra["truth"].items()}
    models = {n: {c: rows[last] for c, rows in one.items()} for n, one in spectra["models"].items()}
    wavenumber, label = spectra["wavenumber"], spectra["label"]
    figures["spectra"] = spectra_figure(wavenumber, label, truth, models, table["units"], lead, baselines)
    if "rank_histogram" in table:
        ranks = {c: rows[last] for c, rows in table["rank_histogram"].items()}
        figures["ranks"] = ranks_figure(ranks, lead)
    return [path for name, drawn in figures.items() for path in save_figures(drawn, folder / name)]


def make_evaluation_fabric(config: RunConfig) -> Fabric:
    """一个进程；用 torchrun 起了几个就用几个。训练用的显卡这里没有时用 CPU。"""
    device = config.run.device
    if device == "cuda" and not torch.cuda.is_available():
        log.warning("the run was trained with run.device = cuda, which is not available here; using the CPU")
        device = "cpu"
    local, world = (int(os.environ.get(key, "1")) for key in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    fabric = Fabric(accelerator=device, devices=local, num_nodes=world // local, strategy="auto")
    fabric.launch()
    return fabric


def evaluate_checkpoint(path: str, options: Options, out: Path) -> int:
    """evaluate.py：检查点在一个划分上的成绩；数据来自检查点里记下的目录树。

    Raises:
        ValueError: 检查点、数据、选项的任何一处不对。
    """
    content = load_checkpoint(path)
    config: RunConfig = validate(RunConfig, content["config"], path)
    fabric = make_evaluation_fabric(config)
    main = fabric.is_global_zero
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    setup_logging(out / "evaluate.log" if main else None, quiet=not main)
    model, spec = load_forecaster(content, fabric.device, options.set)
    if not can_forecast(model):
        raise ValueError(f"{path}: this configuration of {config.model['name']} makes no forecasts, nothing to score")
    data = open_data(config.data, out / "missing.csv", announce=main)
    check_same_data(spec, data.spec, path)
    about = {"run": content["run"], "checkpoint": path, "step": content["progress"]["step"]}
    result = evaluate(model, data, config, options, out, fabric, about)
    if result is None:
        return 0
    result.table["cost"] |= training_cost(Progress(**content["progress"]))
    for lead in range(result.task.steps):
        log.info("%s\n%s", options.split, scores_text(result.table, lead))
    page = {
        "kind": "evaluation",
        "title": f"{content['run']}: {options.split} split",
        "subtitle": config.model["name"],
        "facts": [
            ["checkpoint", path],
            ["step", str(content["progress"]["step"])],
            *([["set", " ".join(options.set)]] if options.set else []),
        ],
        "reproduce": [f"python evaluate.py {shlex.join(command_line(path, options, out))}"],
        "data": data_section(data, config, out / "missing.csv"),
        **curves_section(Path(config.log.dir) / content["run"] / "metrics.csv"),
    }
    publish(result, config, out, out / "report.html", page)
    return 0
