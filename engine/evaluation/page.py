"""报告的内容：把成绩表、谱、秩、序列、地图、配置与环境装成 util/report 要的普通值。"""

from __future__ import annotations

import base64
import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from engine.evaluation.glimpse import evenly
from engine.evaluation.results import Seen, Table
from engine.evaluation.task import Options, Task
from engine.loading import versions
from util.calendar import moment_of, time_text
from util.config import RunConfig
from util.data.dataset import WeatherData
from util.data.index import SPLITS
from util.logger import read_metrics
from util.plot.coast import coastlines
from util.plot.style import color_limits, plotly_scale
from util.scores.statistics_file import Statistics
from util.variables import variable_info

Facts = list[list[Any]]  # [标签, 文字或 phrase()]
CURVE_POINTS = 1000  # 损失曲线至多这么多点，再多就隔着取
MISSING_SHOWN = 50
SCORE_CELLS = 1000  # 页面里通道 × 时效至多这么多；全部的在 metrics.csv


def evaluation_content(
    task: Task, table: Table, seen: Seen, config: RunConfig, statistics_path: Path
) -> dict[str, Any]:
    """一次评测的页面里由成绩得来的部分；标题、来历、损失曲线由调用者加上。"""
    with Statistics(statistics_path) as statistics:
        channels = [task.spec.channels[c] for c in task.view.channels]
        spectra = spectra_section(table, statistics, {n: n for n in task.models}, channels, task.view.leads)
        maps = {**maps_section(task, seen), "scores": map_scores(task, statistics)}
    hours = task.init_hours
    first, last = (time_text(int(h)) for h in (hours[0], hours[-1]))
    left_out, scored = (sum(map(sum, table[key].values())) for key in ("left_out", "pairs"))
    facts: Facts = [
        ["split", task.options.split],
        ["windows", phrase("factWindows", len(hours), first, last)],
        ["fields scored", phrase("factScored", scored, left_out)],
    ]
    if task.options.members > 1:
        noise = [task.options.perturb] if task.options.perturb else []
        facts += [["members", phrase("factMembersNoise" if noise else "factMembers", task.options.members, *noise)]]
    shown = page_leads(table)
    if len(shown) < task.steps:
        facts += [["lead times", phrase("factLeads", len(shown), task.steps)]]
    return {
        "facts": facts,
        "models": models_section(list(task.models), [n for n in task.models if n != task.judged]),
        "channels": channels_section(table),
        **scores_sections(table, shown),
        "spectra": spectra,
        "series": series_section(task, seen),
        "maps": maps,
        "coast": coast_section(task),
        "config": yaml.safe_dump(config.model_dump(), allow_unicode=True, sort_keys=False),
        "environment": versions(),
    }


def phrase(key: str, *values: Any) -> dict[str, Any]:
    """页面按语言说出的一句话；句子在 util/report/words.js 里。"""
    return {"key": key, "values": list(values)}


def models_section(names: list[str], baselines: list[str]) -> list[dict[str, str]]:
    """被评的在前，基线在后。"""
    judged = [n for n in names if n not in baselines]
    return [{"name": n, "role": "model" if n in judged else "baseline"} for n in [*judged, *baselines]]


def channels_section(table: Table) -> list[dict[str, str]]:
    return [
        {"name": c, "long_name": variable_info(c).long_name, "unit": table["units"][c], "kind": variable_info(c).kind}
        for c in table["channels"]
    ]


def page_leads(table: Table) -> list[int]:
    """页面里放哪些时效：通道与时效都多时均匀地取一些。"""
    return evenly(len(table["lead_hours"]), max(2, SCORE_CELLS // len(table["channels"])))


def scores_sections(table: Table, leads: list[int]) -> dict[str, Any]:
    """成绩、技巧、场数与秩直方图，只留 leads 这些时效（序号）。"""

    def thin(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: thin(one) for key, one in value.items()}
        return [value[i] for i in leads]

    sections = {
        "lead_hours": thin(table["lead_hours"]),
        "scores": thin(table["scores"]),
        "skill": thin(table["skill"]),
        "fields": thin({c: {"scored": table["pairs"][c], "left_out": table["left_out"][c]} for c in table["channels"]}),
    }
    return sections | ({"ranks": thin(table["rank_histogram"])} if "rank_histogram" in table else {})


def spectra_section(
    table: Table, statistics: Statistics, models: Mapping[str, str], channels: list[str], leads: list[int]
) -> dict[str, Any]:
    """物理单位的功率谱；models: 表上的名字 → 文件里的；leads 是序号。"""
    spectra, truth = statistics.result("spectrum"), statistics.result("spectrum_truth")
    assert spectra is not None and truth is not None

    def by_channel(values: np.ndarray) -> dict[str, list[list[float | None]]]:  # (L, C, K)
        places = {c: statistics.channels.index(c) for c in channels}
        return {c: [_numbers(values[lead, i] * statistics.std[i] ** 2, 4) for lead in leads] for c, i in places.items()}

    return {
        "label": table["spectrum_label"],
        "lead_hours": [int(statistics.leads[lead]) for lead in leads],
        "wavenumber": list(range(1, truth.shape[-1] + 1)),
        "truth": by_channel(truth),
        "models": {label: by_channel(spectra[statistics.models.index(name)]) for label, name in models.items()},
    }


def _numbers(values: np.ndarray, digits: int) -> list[float | None]:
    """只留画得出来的几位有效数字，页面小得多。"""
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in values.tolist()]


def series_section(task: Task, seen: Seen) -> dict[str, Any]:
    """各地点与面积平均的序列；通道、时效只有 view 里的。"""
    view = task.view
    joined = {name: np.concatenate(parts) for name, parts in seen.series.items()}  # (T, L', C', P)
    inits = task.init_hours[view.series_rows.start : view.series_rows.stop]
    leads = [task.spec.interval_hours * (i + 1) for i in view.leads]
    points = [{"name": "area mean", "latitude": None, "longitude": None}]
    points += [{"name": p.name, "latitude": p.latitude, "longitude": p.longitude} for p in view.points]

    def nested(values: np.ndarray) -> dict[str, Any]:
        return {
            task.spec.channels[c]: [
                [_numbers(values[:, i, j, p], 6) for p in range(len(points))] for i in range(len(leads))
            ]
            for j, c in enumerate(view.channels)
        }

    return {
        "points": points,
        "lead_hours": leads,
        "valid_times": [[_iso(int(h) + lead) for h in inits] for lead in leads],
        "truth": nested(joined["truth"]),
        "models": {task.judged: nested(joined["forecast"])},
    }


def _iso(hour: int) -> str:
    return moment_of(hour).strftime("%Y-%m-%dT%H:%M")


def maps_section(task: Task, seen: Seen) -> dict[str, Any]:
    """真值、预报、误差的地图，每个像素一字节。"""
    view, spec = task.view, task.spec
    latitudes, longitudes = view.axes()
    pictures = [seen.pictures[row] for row in view.map_rows]  # 各 (L', C', h, w)
    fields: dict[str, Any] = {}
    colors: dict[str, Any] = {}
    for j, c in enumerate(view.channels):
        kind = variable_info(spec.channels[c]).kind
        stacks = {
            name: np.stack([p[name][:, j] for p in pictures], 1) for name in ("truth", "forecast")
        }  # (L', T, h, w)
        stacks["error"] = stacks["forecast"] - stacks["truth"]
        fields[spec.channels[c]] = [
            [{name: _bytes(stack[i, t]) for name, stack in stacks.items()} for t in range(len(pictures))]
            for i in range(len(view.leads))
        ]
        low, high = color_limits(np.stack([stacks["truth"], stacks["forecast"]]), kind)
        limit = color_limits(stacks["error"], "difference")
        colors[spec.channels[c]] = {
            "field": {"scale": plotly_scale(kind), "low": low, "high": high},
            "error": {"scale": plotly_scale("difference"), "low": limit[0], "high": limit[1]},
        }
    return {
        "latitudes": latitudes.round(4).tolist(),
        "longitudes": longitudes.round(4).tolist(),
        "times": [_iso(int(task.init_hours[row])) for row in view.map_rows],
        "lead_hours": [spec.interval_hours * (i + 1) for i in view.leads],
        "channels": [spec.channels[c] for c in view.channels],
        "note": _notes(task),
        "fields": fields,
        "colors": colors,
    }


def map_scores(task: Task, statistics: Statistics) -> dict[str, Any]:
    """每张地图自己的 RMSE 与偏差，取自全部格点的统计量，不由合并过的像素算。"""
    view, spec = task.view, task.spec
    rows = slice(view.map_rows.start, view.map_rows.stop)
    square, error = (statistics.read(name, task.judged, rows) for name in ("square", "error"))  # (T, L, C)

    def one(row: int, lead: int, c: int) -> dict[str, float] | None:
        if not math.isfinite(square[row, lead, c]):
            return None
        return {"rmse": math.sqrt(square[row, lead, c]) * spec.std[c], "bias": error[row, lead, c] * spec.std[c]}

    return {
        spec.channels[c]: [[one(row, lead, c) for row in range(len(square))] for lead in view.leads]
        for c in view.channels
    }


def _bytes(field: np.ndarray) -> dict[str, Any] | None:
    """插值得来的真值（NaN）没有图。"""
    if not np.isfinite(field).all():
        return None
    low, high = float(field.min()), float(field.max())
    scale = 255 / (high - low) if high > low else 0.0
    data = np.rint((field.astype(np.float64) - low) * scale).astype(np.uint8)
    return {"data": base64.b64encode(data.tobytes()).decode("ascii"), "low": low, "high": high}


def _notes(task: Task) -> list[dict[str, Any]]:
    """页面里少放了什么，说明白。"""
    view, spec = task.view, task.spec
    notes = [phrase("mapsPooled", view.factor)] if view.factor > 1 else []
    notes += [phrase("mapsChannels", len(view.channels), spec.num_channels)] * (len(view.channels) < spec.num_channels)
    notes += [phrase("mapsLeads", len(view.leads), task.steps)] * (len(view.leads) < task.steps)
    return notes


def coast_section(task: Task) -> list[list[list[float]]]:
    """海岸线，已在地图的经度约定里。"""
    latitudes, longitudes = task.view.axes()
    half = [np.abs(np.diff(v)).max(initial=1.0) / 2 for v in (latitudes, longitudes)]
    lines = coastlines(
        longitudes.min() - half[1], longitudes.max() + half[1],
        max(latitudes.min() - half[0], -90), min(latitudes.max() + half[0], 90),
    )  # fmt: skip
    return [line.round(2).tolist() for line in lines]


def data_section(data: WeatherData, config: RunConfig, missing: Path) -> dict[str, Any]:
    """数据：各划分的样本数、段数；缺失与读坏的文件按通道与原因合计。"""
    spec = data.spec
    facts = [["root", config.data.root]]
    facts += [["store", str(config.data.store)]] if config.data.source == "store" else []
    facts += [["grid", f"{spec.height} x {spec.width}"]]
    facts += [["interval", f"{spec.interval_hours} h"], ["files standardised", str(spec.standardized).lower()]]
    for split in SPLITS:
        dates = " to ".join(getattr(config.data.splits, split))
        facts.append([split, f"{dates}: {data.samples(split)} samples in {len(data.segments[split])} segment(s)"])
    groups: dict[tuple[str, str], list[str]] = {}
    if missing.is_file():
        with missing.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                groups.setdefault((row["channel"], row["reason"]), []).append(row["time"])
    rows = [[channel, len(times), min(times), max(times), reason] for (channel, reason), times in groups.items()]
    return {"facts": facts, "missing": rows[:MISSING_SHOWN]}


def curves_section(path: Path) -> dict[str, Any]:
    """训练与验证损失（页面的 curves 一节）；没有这个文件就没有这一节。点太多时隔着取，最后一个总在。"""
    if not path.is_file():
        return {}
    curves: dict[str, list[list[float]]] = {"train": [], "val": []}
    for row in read_metrics(path):
        if row.name == "loss" and row.split in curves and math.isfinite(row.value):
            curves[row.split].append([row.step, float(f"{row.value:.6g}")])
    thin = {split: points[:: -(-(-len(points) // CURVE_POINTS) or 1)][::-1] for split, points in curves.items()}
    return {"curves": thin} if any(thin.values()) else {}


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
    if options.set:
        words += ["--set", *options.set]
    return [*words, "--save", *(options.save or ("none",)), "--out", str(out)]


def run_page(config: RunConfig, name: str, folder: Path, data: WeatherData, test_loss: float) -> dict[str, Any]:
    """运行的页面里与成绩无关的部分；没有成绩（不能预报的配置）时就是整个页面。"""
    return {
        "kind": "run",
        "title": name,
        "subtitle": config.model["name"],
        "facts": [["test loss", f"{test_loss:.5f}"]],
        "reproduce": [f"python train.py --config {folder / 'config.yaml'} run.name={name}-again"],
        "data": data_section(data, config, folder / "missing.csv"),
        "config": yaml.safe_dump(config.model_dump(), allow_unicode=True, sort_keys=False),
        "environment": versions(),
        **curves_section(folder / "metrics.csv"),
    }
