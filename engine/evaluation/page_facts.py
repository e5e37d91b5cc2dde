"""报告里与成绩无关的两节：数据的说明、训练的损失曲线；和几句各种报告都要说的话。"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from util.config import RunConfig
from util.data.dataset import WeatherData
from util.data.index import SPLITS
from util.logger import read_metrics
from util.plot.curves import BESIDE
from util.report.bilingual import Bilingual

CURVE_POINTS = 1000  # 损失曲线至多这么多点，再多就隔着取
MISSING_SHOWN = 50
Facts = list[tuple[str, str | int]]  # 标签与值；两种语言各有说法的是 Bilingual


@dataclass(frozen=True)
class Curves:
    """训练与验证的损失，各是 [步, 值]；两个基线的验证损失，没有就是 None。"""

    train: list[tuple[int, float]]
    val: list[tuple[int, float]]
    persistence: float | None = None
    climatology: float | None = None


@dataclass(frozen=True)
class DataFacts:
    """数据的说明；missing 的一行是通道、个数、最早、最晚、原因。"""

    facts: Facts
    missing: list[tuple[str, int, str, str, str]]


def windows_text(count: int, first: str, last: str) -> str:
    return Bilingual(f"{count:,}, initial times {first} to {last} UTC", f"{count:,} 个，起报时间 {first} 至 {last} UTC")


def data_facts(data: WeatherData, config: RunConfig, missing: Path) -> DataFacts:
    """各划分的样本数、段数；缺失与读坏的文件按通道与原因合计。"""
    spec = data.spec
    parts = config.data.part_configs()
    facts: Facts = [
        (Bilingual(f"data set {name}", f"数据集 {name}"), part.store or part.root) for name, part in parts.items()
    ]
    facts += [] if parts else [("root", config.data.root)]
    facts += [("statistics", config.data.statistics)] if config.data.statistics else []
    facts += [("store", str(config.data.store))] if config.data.source == "store" else []
    facts += [("grid", f"{spec.height} x {spec.width}")]
    standardized = Bilingual("yes", "是") if spec.standardized else Bilingual("no", "否")
    facts += [("interval", f"{spec.interval_hours} h"), ("files standardised", standardized)]
    for split in SPLITS:
        first, last = getattr(config.data.splits, split)
        count, pieces = data.samples(split), len(data.segments[split])
        english = f"{first} to {last}: {count} samples in {pieces} segment(s)"
        facts.append((split, Bilingual(english, f"{first} 至 {last}：{count} 个样本，{pieces} 段")))
    groups: dict[tuple[str, str], list[str]] = {}
    if missing.is_file():
        with missing.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                groups.setdefault((row["channel"], row["reason"]), []).append(row["time"])
    rows = [(channel, len(times), min(times), max(times), reason) for (channel, reason), times in groups.items()]
    return DataFacts(facts, rows[:MISSING_SHOWN])


def read_curves(path: Path) -> Curves | None:
    """训练与验证损失；没有这个文件就没有这一节。点太多时隔着取，最后一个总在。"""
    if not path.is_file():
        return None
    points: dict[str, list[tuple[int, float]]] = {"train": [], "val": []}
    beside: dict[str, float] = {}
    for row in read_metrics(path):
        if row.name in BESIDE:
            beside[row.name] = float(f"{row.value:.6g}")
        if row.name == "loss" and row.split in points and math.isfinite(row.value):
            points[row.split].append((row.step, float(f"{row.value:.6g}")))
    every = {split: -(-len(found) // CURVE_POINTS) or 1 for split, found in points.items()}
    kept = {split: found[:: -every[split]][::-1] for split, found in points.items()}
    curves = Curves(**kept, persistence=beside.get("persistence"), climatology=beside.get("climatology"))
    return curves if curves.train or curves.val else None
