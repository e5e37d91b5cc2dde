"""一个个例的数：框里的成绩（scores.csv、scores.json），羽状图的每一条线（plume.csv）。"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from engine.cases.collect import TRUTH, CaseFound
from engine.cases.plan import Plan
from util.atomic import replacing
from util.calendar import time_text
from util.files.records import as_json
from util.scores.final import Means, final_scores
from util.scores.table import ScoreTable
from util.scores.tabulate import plain, write_csv

SHOWN = ("rmse", "mae", "bias", "acc", "crps", "spread", "spread_skill", "activity_ratio")


def case_scores(plan: Plan, found: CaseFound, judged: str, steps: int) -> ScoreTable:
    """框里、日期里的成绩；同 --regions 的一个区域，只是时刻少。"""
    spec = plan.spec
    at = found.leads == np.arange(steps)[:, None]  # (L, n)
    counts = at @ found.keep.astype(int)  # (L, C)
    tables = {name: scores_of(plan, found, name, judged, at, counts) for name in found.statistics}
    return ScoreTable(
        channels=list(spec.channels),
        units=dict(zip(spec.channels, spec.units, strict=True)),
        lead_hours=spec.leads(steps),
        initial_times=len(np.unique(found.rows)),
        bootstrap_blocks=0,  # 几天的天气，没有区间
        pairs={c: counts[:, i].tolist() for i, c in enumerate(spec.channels)},
        left_out={c: (at.sum(1) - counts[:, i]).tolist() for i, c in enumerate(spec.channels)},
        scores=tables,
        skill={},
        mean_rmse_ratio={},
    )


def scores_of(
    plan: Plan, found: CaseFound, name: str, judged: str, at: np.ndarray, counts: np.ndarray
) -> dict[str, dict[str, list[float | None]]]:
    """一个模型：通道 → 成绩 → 各时效；先平均，再开方、相除。"""
    members = found.values[judged].shape[1] if name == judged else 1
    with np.errstate(divide="ignore", invalid="ignore"):
        means = {
            key: (at @ np.where(found.keep, values, 0.0)) / counts for key, values in found.statistics[name].items()
        }
        scores = final_scores(Means(means, np.array(plan.spec.std), members))
    kept = {key: scores[key] for key in SHOWN if key in scores}
    return {c: {key: plain(v[:, i]) for key, v in kept.items()} for i, c in enumerate(plan.spec.channels)}


def write_scores(folder: Path, plan: Plan, table: ScoreTable, about: dict[str, Any]) -> None:
    """scores.csv 与 scores.json；about: 个例与来历的几栏。"""
    write_csv(folder / "scores.csv", table)
    kept = ("channels", "units", "lead_hours", "initial_times", "pairs", "left_out", "scores")
    record = {**about, **{key: value for key, value in as_json(table).items() if key in kept}}
    with replacing(folder / "scores.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")


def write_plume(path: Path, plan: Plan, found: CaseFound, judged: str, inits: np.ndarray) -> None:
    """一行一对（通道，起报时间，时效）：真值、各基线、集合平均、各成员，物理单位；没有的空着。"""
    names = [name for name in found.values if name not in (TRUTH, judged)]
    members = found.values[judged].shape[1]
    head = ["channel", "unit", "initial_time", "lead_hours", "valid_time", TRUTH, *names, judged]
    head += [f"member_{i}" for i in range(members)] if members > 1 else []
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        for c, channel in enumerate(plan.spec.channels):
            for i, (row, lead) in enumerate(zip(found.rows, found.leads, strict=True)):
                init, hours = int(inits[row]), plan.spec.lead(int(lead))
                moment = [time_text(init), hours, time_text(init + hours)]
                own = found.values[judged][i, :, c]
                numbers = [
                    *(found.values[n][i, 0, c] for n in (TRUTH, *names)),
                    own.mean(),
                    *(own if members > 1 else []),
                ]
                texts = (f"{v:.9g}" if np.isfinite(v) else "" for v in numbers)
                writer.writerow([channel, plan.spec.units[c], *moment, *texts])
