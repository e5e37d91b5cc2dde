"""卡片里的成绩：检查点里的验证损失，与这一次运行的评测留下的 metrics.json；日志里的缺失。"""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from engine.evaluation.metrics_file import Result, read_scores
from engine.loading import Content
from engine.progress import Progress
from engine.sharing.markdown import table
from util.training_config import LogConfig

log = logging.getLogger("ar_pred")
MOST_LEADS = 6  # 一张表至多几个时效


def log_files(content: Content, pattern: str) -> list[Path]:
    """这一次运行的日志文件夹里的；运行名照字面看，不当作路径。"""
    folder = Path(content["config"].get("log", {}).get("dir", LogConfig().dir))
    return [path for path in sorted(folder.glob(f"*/{pattern}")) if path.relative_to(folder).parts[0] == content["run"]]


def find_gaps(content: Content) -> dict[str, int]:
    """训练时发现缺失与读坏的文件：通道 → 几个；日志不在就是空的。"""
    found: Counter[str] = Counter()
    for path in log_files(content, "missing.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            found.update(row["channel"] for row in csv.DictReader(file))
    return dict(found)


def find_scores(content: Content) -> dict[str, Result]:
    """log/<run>/ 里评过这个检查点（同一次运行、同一步）的 → 成绩。"""
    found = {}
    for path in log_files(content, "*/metrics.json"):
        try:
            result = read_scores(path, Result)
        except (ValueError, OSError) as error:  # 阶段一重建的成绩也叫这个名字
            log.debug("left out of the card: %s", error)
            continue
        if (result.run, result.step) == (content["run"], content["progress"]["step"]):
            found[path.parent.name] = result
    return found


def scores_section(progress: Progress, results: Mapping[str, Result]) -> str:
    rows = [("lowest validation loss", number(progress.best), f"at step {progress.best_step:,}")]
    rows += [
        (f"the same loss of {name}", number(value), "")
        for name, value in (("persistence", progress.persistence), ("climatology", progress.climatology))
        if value is not None
    ]
    parts = [
        "## Scores",
        table(("", "", ""), rows) if progress.best is not None else "No validation loss was recorded.",
    ]
    parts += [evaluation(name, result) for name, result in results.items()]
    if not results:
        parts.append("This checkpoint has not been evaluated: no scores in physical units are known.")
    return "\n\n".join(parts)


def evaluation(name: str, result: Result) -> str:
    """一次评测：各通道、几个时效的 RMSE，旁边是基线的。"""
    count = len(result.lead_hours)
    shown = sorted({round(i * (count - 1) / max(1, MOST_LEADS - 1)) for i in range(MOST_LEADS)})
    baselines = [other for other in result.scores if other != result.model]
    rows = []
    for channel in result.channels:
        numbers = [
            [number(result.scores[who][channel]["rmse"][i]) for who in (result.model, *baselines)] for i in shown
        ]
        rows.append((channel, result.units[channel], *(" / ".join(cell) for cell in numbers)))
    for base, ratios in result.mean_rmse_ratio.items():
        values = ratios[result.model]
        rows.append((f"mean of RMSE / {base} RMSE", "", *(number(values[i]) for i in shown)))
    how = f"{result.split} split, {result.initial_times:,} initial times"
    how += f", {result.members} members" if result.members > 1 else ""
    how += f", initial noise {result.perturb:g}" if result.perturb else ""
    how += f", {result.set}" if result.set else ""
    titles = ("channel", "unit", *(f"+{result.lead_hours[i]} h" for i in shown))
    beside = " / ".join(("this model", *baselines))
    return f"### {name}\n\n{how}. Latitude-weighted RMSE: {beside}.\n\n{table(titles, rows)}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
