"""metrics.json：一次评测的来历、成绩与代价，写的与读回的是同一种记录；不引入 torch，读它的命令才轻。"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.verification.record import EventScores
from util.files.bounded import read_json
from util.files.records import Record, read_record
from util.scores.table import Cell, Numbers, ScoreTable

PERSISTENCE, CLIMATOLOGY = "persistence", "climatology"  # 前者查真值是不是同一份，距平相对后者；都少不了
BASELINES = (PERSISTENCE, CLIMATOLOGY)  # models/ 里的名字，加一个基线就是在这里加一个
FITTED = "linear_regression"  # 训练过就算一个基线
NAMES = (*BASELINES, FITTED)  # 成绩表上可以作基线的


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """评的是什么、怎样评的；statistics.nc 的属性里有同样的几栏。

    set: 改过的采样选项，空格隔开；没有改就没有这一栏。model 是被评的模型在表上的名字。
    """

    run: str
    checkpoint: str
    step: int
    split: str
    stride: int
    steps: int
    members: int
    perturb: float
    smooth: float
    set: str | None = None
    model: str


@dataclass(frozen=True)
class Cost:
    """一个模型的代价；运算次数是一个窗口、一个成员的。训练的几栏在没有梯度步的模型上没有，头两栏在别处做的预报上没有。"""

    parameters: int | None
    flops_per_sample: int | None
    inference_samples_per_second: float | None  # 只有一批，量不出来
    inference_peak_memory_bytes: int
    device: str
    training_seconds: float | None = None
    training_samples_per_second: float | None = None
    training_peak_memory_bytes: int | None = None
    training_device: str | None = None


@dataclass(frozen=True)
class BlowUp:
    """滚着滚着不再有限的一次预报：起报时间（UTC），头一个这样的时效。"""

    model: str
    initial_time: str
    lead_hours: int


@dataclass(frozen=True, kw_only=True)
class Scores(ScoreTable):
    """由 statistics.nc 得来的全部成绩。

    rank_histogram: 通道 → 时效 → M + 1 个份额，只有集合有；cells: 各区域、各段时间的，给了 --regions、--by 才有，
    只在内存里与 metrics.csv 里。
    events: --events 才有；blown_up: 有才有，从那个时效起不在任何成绩里。
    """

    rank_histogram: dict[str, list[Numbers]] | None = None
    events: EventScores | None = None
    blown_up: list[BlowUp] | None = None
    spectrum_label: str
    cells: list[Cell] | None = None


@dataclass(frozen=True, kw_only=True)
class Result(Scores, Provenance):
    """metrics.json 的全部，再加 cells。samples_per_second: 模型 → 每秒的预报数。"""

    samples_per_second: dict[str, float | None]
    cost: Cost


def read_scores(path: Path, kind: type[Record]) -> Record:
    """metrics.json 读成 Result，或只读它的一部分（Origin）。

    Raises:
        ValueError: 不是完整的 JSON，或缺一栏；一行。
    """
    try:
        values = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); run evaluate.py again") from None
    return read_record(kind, values, str(path))
