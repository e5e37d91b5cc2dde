"""评测的入口：检查点 → 数据、模型、基线 → scoring.py 逐批计分 → results.py 落盘 → 图与报告。"""

from __future__ import annotations

import logging
import os
import shlex
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric

from engine.cases.collect import join
from engine.cases.page import About, remove_cases, write_cases
from engine.cases.plan import plan_cases
from engine.cases.settings import read_cases
from engine.device import peak_memory, reset_peak_memory
from engine.evaluation.baselines import CLIMATOLOGY, fit_baselines
from engine.evaluation.cost import model_cost
from engine.evaluation.glimpse import choose_glimpse, parse_points
from engine.evaluation.metrics_file import NAMES, Provenance, Result
from engine.evaluation.page import Page, Spectra, add_scores, make_page
from engine.evaluation.page_facts import Facts
from engine.evaluation.results import Seen, scores_text, write_result, write_statistics
from engine.evaluation.saved_fields import open_zarr
from engine.evaluation.scoring import score
from engine.evaluation.task import Options, Task, find_starts, standardize_thresholds, threshold_tensor
from engine.forecasting.members import check_members
from engine.loading import Content, check_same_data, checkpoint_config, load_forecaster
from engine.one_pass import Check
from engine.parallel import check_launch, environment, from_main
from engine.progress import Progress
from engine.verification.climate import climate_cache, load_climate
from engine.verification.page import FIGURES, drift_figures, drift_page, event_figures
from engine.verification.result import cell_lines
from engine.verification.settings import Events, read_events
from engine.verification.verifier import Verifier, make_verifier
from models.interface import ForecastModel, can_forecast
from util.atomic import reserved
from util.config import RunConfig, eval_batch_size
from util.data.dataset import WeatherData, open_data
from util.files.records import as_json, read_record
from util.files.training_checkpoint import load_training
from util.grid import latitude_weights
from util.logger import setup_logging
from util.plot.scorecard import save_scorecards
from util.plot.scores import ranks_figure, scores_figure, spectra_figure
from util.plot.style import remove_figures, save_figures
from util.report import write_report
from util.report.bilingual import Bilingual, chinese, split_text
from util.scores.regions import check_regions, read_regions
from util.scores.scorecard import make_cards, write_cards

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("ar_pred")


class Trained(NamedTuple):
    """被评的模型从哪里来；训练的代价由 progress 算。"""

    run: str
    checkpoint: str
    step: int
    progress: Progress


class Evaluated(NamedTuple):
    """一次评测之后手里的东西；result 就是 metrics.json。"""

    task: Task
    result: Result
    seen: Seen


def evaluate(
    model: ForecastModel,
    data: WeatherData,
    config: RunConfig,
    options: Options,
    out: Path,
    fabric: Fabric,
    trained: Trained,
    check: Check = lambda: None,
) -> Evaluated | None:
    """一个模型在一个划分上的全部成绩，statistics.nc 与要存的场写进 out；只有零号进程得到结果。

    Raises:
        ValueError: 选项与模型或数据不合；预报里有非有限值。
    """
    task = make_task(model, data, config, options, fabric, check)
    reset_peak_memory(fabric.device)
    origin = provenance_of(task, trained)
    with ExitStack() as stack:
        keep = open_zarr(stack, task, out, origin, fabric) if "zarr" in options.save else None
        stream = score(task, fabric, check, keep)
        if not fabric.is_global_zero:
            for _ in stream:
                pass
            return None
        out.mkdir(parents=True, exist_ok=True)
        scores, seen = write_statistics(task, stream, out, origin)
    memory, rates = peak_memory(fabric.device), seen.rates()  # 在数运算次数之前：那里要多一份副本
    cost = model_cost(model, task.spec, trained.progress, rates[task.judged], memory, fabric.device)
    return Evaluated(task, Result(**vars(origin), **vars(scores), samples_per_second=rates, cost=cost), seen)


def make_task(
    model: ForecastModel,
    data: WeatherData,
    config: RunConfig,
    options: Options,
    fabric: Fabric,
    check: Check = lambda: None,
) -> Task:
    """要走的窗口，被评的模型与拟合好的基线。

    Raises:
        ValueError: 选项与模型或数据不合。
    """
    spec, name = data.spec, config.model["name"]
    check_members(model, name, options.members, options.perturb, options.smooth)
    steps = options.steps or spec.frames_out
    starts = find_starts(data, options.split, steps, options.stride)
    thresholds = threshold_tensor(options.thresholds, spec)
    events = None if options.events is None else read_events(options.events)
    regions = read_regions(options.regions, spec) if options.regions else {}
    cases = read_cases(options.cases) if options.cases else []
    glimpse = choose_glimpse(spec, len(starts), steps, parse_points(list(options.points), spec))
    batch_size = eval_batch_size(config)
    models = {**fit_baselines(data, config, batch_size, fabric, check), name: model}
    task = Task(models, name, data, options, steps, starts, batch_size, config.run.seed, glimpse, thresholds, regions)
    if cases:
        area = latitude_weights(spec.latitudes).numpy()
        task = replace(task, cases=plan_cases(cases, spec, task.init_hours, steps, options.members, area))
    return task if events is None else replace(task, verifier=task_verifier(task, events, fabric, check))


def task_verifier(task: Task, events: Events, fabric: Fabric, check: Check) -> Verifier:
    """--events 问的；气候由零号进程看训练的数据估计，别的进程读它存下的。"""
    spec, climatology = task.spec, task.models[CLIMATOLOGY]
    fit = partial(climate_cache, task.data, climatology, events, task.batch_size, check)
    climate = load_climate(from_main(fabric, fit))
    thresholds = standardize_thresholds(task.thresholds, spec)
    given, by = task.options.thresholds or {}, task.options.by
    valid = task.init_hours[:, None] + np.array(spec.leads(task.steps))
    return make_verifier(events, spec, climate, thresholds, given, fabric.device, task.regions, by, valid)


def provenance_of(task: Task, trained: Trained) -> Provenance:
    """这次评测的来历。"""
    options = task.options
    return Provenance(
        run=trained.run,
        checkpoint=trained.checkpoint,
        step=trained.step,
        split=options.split,
        stride=options.stride,
        steps=task.steps,
        members=options.members,
        perturb=options.perturb,
        smooth=options.smooth,
        set=" ".join(options.set) or None,
        model=task.judged,
    )


def publish(evaluated: Evaluated, out: Path, report: Path, page: Page) -> list[Path]:
    """成绩的报告和图；page 里是与成绩无关的各节（来历、数据、曲线）；上一次评测留下的图先去掉。返回 PNG 的路径。"""
    task, result, seen = evaluated
    page = add_scores(page, task, result, seen, out / "statistics.nc")
    paths, links = publish_cases(evaluated, out, page)
    page = replace(page, links=[*(page.links or []), *links] or None)
    write_report(report, as_json(page))
    log.info("report: %s", report)
    figures = out / "figures"
    remove_figures(figures, ("rmse", "spectra", "ranks", *(f"scorecard-{base}" for base in NAMES), *FIGURES))
    (out / "scorecard.csv").unlink(missing_ok=True)
    paths += draw_scores(result, page, figures) + draw_events(result, page, seen.task.steps, figures)
    return paths + draw_cards(result, out)


def publish_cases(evaluated: Evaluated, out: Path, page: Page) -> tuple[list[Path], list[tuple[str, str]]]:
    """--cases 的，各一个文件夹、一页；返回 PNG 的路径与主页上的链接。"""
    task, result, seen = evaluated
    remove_cases(out)
    if not task.cases:
        return [], []
    origin = {field.name: getattr(result, field.name) for field in fields(Provenance)}
    about = About(task.judged, CLIMATOLOGY, task.init_hours, task.steps, origin, page.title, page.reproduce or [])
    return write_cases(out, task.cases, [join(found) for found in seen.cases], about)


def draw_scores(result: Result, page: Page, folder: Path) -> list[Path]:
    """RMSE 随时效、末一时效的谱与秩直方图；画一种存一种。"""
    assert page.models is not None and page.spectra is not None
    baselines = {line.name for line in page.models if line.role == "baseline"}
    rmse = {m.name: {c: found["rmse"] for c, found in result.scores[m.name].items()} for m in page.models}
    paths = save_figures(scores_figure(result.lead_hours, result.units, rmse, baselines), folder / "rmse")
    paths += save_figures(draw_spectra(page.spectra, result.units, baselines), folder / "spectra")
    if result.rank_histogram is not None:
        ranks = {c: rows[-1] for c, rows in result.rank_histogram.items()}
        paths += save_figures(ranks_figure(ranks, result.lead_hours[-1]), folder / "ranks")
    return paths


def draw_cards(result: Result, out: Path) -> list[Path]:
    """scorecard.csv 与各基线的评分卡；给了 --regions、--by 才有。"""
    cards = {base: make_cards(result, result.cells, base) for base in result.mean_rmse_ratio if result.cells}
    if cards:
        write_cards(out / "scorecard.csv", [card for some in cards.values() for card in some])
    stems = {base: out / "figures" / f"scorecard-{base}" for base in cards}
    return [path for base, some in cards.items() for path in save_scorecards(some, "rmse", stems[base])]


def draw_events(result: Result, page: Page, steps: int, folder: Path) -> list[Path]:
    """--events 的图：事件的几条曲线，球谐谱，滚动时的漂移。"""
    assert page.models is not None
    baselines = {line.name for line in page.models if line.role == "baseline"}
    figures = event_figures(page.events, baselines) if page.events else {}
    if page.sphere is not None:
        figures["spherical_spectra"] = draw_spectra(page.sphere, result.units, baselines)
    if result.events is not None and steps > 1:
        drift = drift_page(result.events)
        figures |= drift_figures(drift, result.lead_hours, result.units, baselines)
    return [path for name, drawn in figures.items() for path in save_figures(drawn, folder / name)]


def draw_spectra(spectra: Spectra, units: dict[str, str], baselines: set[str]) -> list[Figure]:
    """页面里的那几个通道，末一时效。"""
    truth = {c: rows[-1] for c, rows in spectra.truth.items()}
    models = {name: {c: rows[-1] for c, rows in one.items()} for name, one in spectra.models.items()}
    lead = spectra.lead_hours[-1]
    return spectra_figure(spectra.wavenumber, spectra.label, truth, models, units, lead, baselines)


def make_evaluation_fabric(config: RunConfig) -> Fabric:
    """一个进程；用 torchrun 起了几个就用几个。训练用的显卡这里没有时用 CPU。"""
    device = config.run.device
    if device == "cuda" and not torch.cuda.is_available():
        log.warning("the run was trained with run.device = cuda, which is not available here; using the CPU")
        device = "cpu"
    local, world = (int(os.environ.get(key, "1")) for key in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    nodes = world // local
    check_launch(local, nodes)
    fabric = Fabric(accelerator=device, devices=local, num_nodes=nodes, strategy="auto", plugins=environment())
    fabric.launch()
    return fabric


def evaluate_checkpoint(path: str, options: Options, out: Path) -> int:
    """evaluate.py：检查点在一个划分上的成绩；数据来自检查点里记下的目录树，或 options.overrides 所说的别处。

    Raises:
        ValueError: 检查点、数据、选项的任何一处不对；别的进程正往 out 里写。
    """
    if options.events is not None:  # 写错的 YAML 先说，不等读完检查点与数据
        read_events(options.events)
    if options.regions:
        check_regions(options.regions)
    if options.cases:
        read_cases(options.cases)
    content = load_training(path, verify=options.verify)
    config = checkpoint_config(content, path, options.overrides)
    fabric = make_evaluation_fabric(config)
    with ExitStack() as held:
        from_main(fabric, lambda: held.enter_context(reserved(out)))
        return score_checkpoint(content, config, path, options, out, fabric)


def score_checkpoint(
    content: Content, config: RunConfig, path: str, options: Options, out: Path, fabric: Fabric
) -> int:
    """evaluate_checkpoint 占下 out 之后的事。"""
    main = fabric.is_global_zero
    setup_logging(out / "evaluate.log" if main else None, quiet=not main)
    model, spec = load_forecaster(content, fabric.device, options.set, options.compile)
    if not can_forecast(model):
        raise ValueError(f"{path}: this configuration of {config.model['name']} makes no forecasts, nothing to score")
    data = open_data(config.data, out / "missing.csv", announce=main)
    check_same_data(spec, data.spec, path)
    run, progress = content["run"], read_record(Progress, content["progress"], f"{path}: progress")
    evaluated = evaluate(model, data, config, options, out, fabric, Trained(run, path, progress.step, progress))
    if evaluated is None:
        return 0
    for lead in range(evaluated.task.steps):
        log.info("%s\n%s", options.split, scores_text(evaluated.result, lead))
    asked = evaluated.task.verifier.asked if evaluated.task.verifier else None
    more = cell_lines(asked, data.spec, evaluated.seen.events) if asked else ()
    log.info("scores: %s", write_result(out, evaluated.result, more))
    facts: Facts = [("checkpoint", path), ("step", str(progress.step))]
    facts += [("set", " ".join(options.set))] if options.set else []
    page = make_page(
        "evaluation",
        Bilingual(f"{run}: {options.split} split", f"{run}：{chinese(split_text(options.split))}"),
        facts,
        f"python evaluate.py {shlex.join(command_line(path, options, out))}",
        config,
        data,
        missing=out / "missing.csv",
        curves=Path(config.log.dir) / run / "metrics.csv",
    )
    publish(evaluated, out, out / "report.html", page)
    return 0


def command_line(path: str, options: Options, out: Path) -> list[str]:
    """与 options 相当的参数；与缺省值相同的不写。"""
    words = ["--checkpoint", path, "--split", options.split]
    default = Options()
    for name in ("steps", "stride", "members", "perturb", "smooth"):
        if getattr(options, name) != getattr(default, name):
            words += [f"--{name}", str(getattr(options, name))]
    if options.thresholds:
        words += [
            "--thresholds",
            *(f"{c}={','.join(map(repr, values))}" for c, values in options.thresholds.items()),
        ]
    if options.points:
        words += ["--points", *options.points]
    words += ["--regions", str(options.regions)] if options.regions else []
    words += ["--by", *options.by] if options.by else []
    words += ["--cases", str(options.cases)] if options.cases else []
    if options.events is not None:
        words += ["--events", *([options.events] if options.events else [])]
    if options.set:
        words += ["--set", *options.set]
    words += ["--overwrite"] if options.overwrite else []
    words += [] if options.verify else ["--no-verify"]
    words += ["--compile"] if options.compile else []
    return [*words, "--save", *(options.save or ("none",)), "--out", str(out), *options.overrides]
