"""参加比较的评测：打开、核对、起名字，定下表上的各行。"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.evaluation import baselines
from engine.evaluation.metrics_file import Provenance, Result, read_scores
from util.scores.bootstrap import block_sums
from util.scores.common import Common, Contender
from util.scores.statistics_file import Statistics


class Entry(NamedTuple):
    """一个参加比较的评测：label 是表上的名字，folder 里有 result（metrics.json）与 file（statistics.nc）。"""

    label: str
    folder: Path
    result: Result
    file: Statistics

    @property
    def report(self) -> Path:
        """训练留下的 test/ 的报告是整个运行的，在上一层。"""
        own = self.folder / "report.html"
        return self.folder.parent / "report.html" if self.folder.name == "test" and not own.is_file() else own

    @property
    def training(self) -> Path | None:
        """训练的 metrics.csv，在运行的文件夹里；写到别处的评测没有。"""
        path = self.folder.parent / "metrics.csv"
        return path if self.folder.parent.name == self.result.run and path.is_file() else None

    def holds(self, base: str) -> bool:
        """文件里有这个基线。扰动初值的持续性预报是集合，不是基线。"""
        own_ensemble = self.result.model == base and self.result.members > 1
        return base in self.file.models and not own_ensemble

    def rmse(self, model: str, common: Common) -> np.ndarray:
        """共同的场上的 RMSE (L, C)，物理单位；没有场的地方为 NaN。"""
        blocks = block_sums(Contender(model, self.file, model), common, ["square"])
        with np.errstate(invalid="ignore"):
            mean = blocks.sums["square"].sum(0) / blocks.counts.sum(0)
        return np.sqrt(mean) * blocks.std


def open_entries(stack: ExitStack, folders: Sequence[Path], names: Sequence[str]) -> list[Entry]:
    """打开各评测，定下表上的名字。

    Raises:
        ValueError: 不是一次评测，同一个给了两次，或没有评完。
    """
    places = [find_evaluation(folder) for folder in folders]
    for i, place in enumerate(places):
        if place.resolve() in [p.resolve() for p in places[:i]]:
            raise ValueError(f"{folders[i]} is given twice")
    files = [stack.enter_context(Statistics(place / "statistics.nc")) for place in places]
    results = [read_matching(place, file) for place, file in zip(places, files, strict=True)]
    labels = choose_labels(list(names) or [r.run for r in results], places, results)
    return [Entry(*parts) for parts in zip(labels, places, results, files, strict=True)]


def find_evaluation(folder: Path) -> Path:
    """运行的文件夹（train.py 把测试成绩留在它的 test/）或 evaluate.py 的 --out → 有 statistics.nc 的那一个。"""
    for place in (folder, folder / "test"):
        if (place / "statistics.nc").is_file():
            return place
    raise ValueError(
        f"{folder}: no statistics.nc there or in its test/; give the log folder of a finished run, "
        "or a folder that evaluate.py --out has written"
    )


def read_matching(folder: Path, file: Statistics) -> Result:
    """metrics.json；它与 statistics.nc 必须出自同一次评测。"""
    path = folder / "metrics.json"
    if not path.is_file():
        raise ValueError(f"no file {path}: that evaluation did not finish; run evaluate.py again")
    result = read_scores(path, Result)
    for key in (field.name for field in fields(Provenance)):
        own, other = getattr(result, key), file.attributes.get(key)
        if own != other:
            raise ValueError(
                f"{path} has {key} = {own}, statistics.nc beside it {other}: "
                "a later evaluation did not finish; run evaluate.py again"
            )
    return result


def choose_labels(names: Sequence[str], places: Sequence[Path], results: Sequence[Result]) -> list[str]:
    """表上的名字，互不相同。

    头一个被评的就是基线的运行即是那个基线的一行；同一运行来几次时加上文件夹的名字，还重就加整个路径。
    """
    forms = [(n, f"{n} ({p.name})", f"{n} ({p})") for n, p in zip(names, places, strict=True)]
    labels: list[str] = []
    for mine, result in zip(forms, results, strict=True):
        if result.model in baselines.NAMES and result.members == 1 and result.model not in labels:
            labels.append(result.model)
            continue
        label = next(form for k, form in enumerate(mine) if [other[k] for other in forms].count(form) == 1)
        labels.append(label if label not in baselines.NAMES else f"{label} (run)")
    return labels


def choose_contenders(entries: Sequence[Entry]) -> list[Contender]:
    """每个运行一行，基线排在后面：自己就是一个运行的取那个运行，其余的取自有它的评测里时效最多的第一份。

    它没有的时效由别的评测补上：标准差须逐个相同（同样的训练数据），基线才是同一个。
    """
    rows = {e.label: Contender(e.label, e.file, e.result.model) for e in entries}
    for base in baselines.NAMES:
        holder = max((e for e in entries if e.holds(base)), key=lambda e: len(e.file.leads), default=None)
        if base in rows:
            rows[base] = rows.pop(base)
        elif holder is not None:
            others = (e.file for e in entries if e.holds(base) and e is not holder)
            rows[base] = Contender(base, holder.file, base, tuple(f for f in others if same_scale(f, holder.file)))
    return list(rows.values())


def same_scale(one: Statistics, other: Statistics) -> bool:
    return one.channels == other.channels and np.array_equal(one.std, other.std)
