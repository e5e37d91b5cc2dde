"""config/ 里有哪些 YAML：`python -m engine.reference.write` 印成 config/README.md。

任务与成绩是各 YAML 开头的话；参数、一次预报的运算次数当场数，训练的一步的张量只走形状，都不读数据。
阶段一的检查点不在时，按那个名字的 YAML 造一个没有训练过的；要下载的权重不在时写一横。
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from engine.evaluation.cost import flops_per_sample, parameter_count
from engine.imagined import imagined_spec
from engine.memory.step import step_peak
from models import build_model, first_stage_file, without_files
from models.interface import can_forecast
from util.config import RunConfig, eval_batch_size, load_config

CONFIG = Path(__file__).resolve().parents[2] / "config"
PAGE = CONFIG / "README.md"
RUNS = {".": "一次运行", "published": "照发表的训练，与它们的成绩比", "wb2": "WeatherBench2 上的任务"}
LISTS = {
    "suites": "一列运行：`python compare.py --suite`",
    "data": "数据集：运行的 `data.set`",
    "maps": "别人的名字与单位：`python dataset.py import --preset`",
}
OTHERS = {
    "regions.yaml": "评测的区域：`python evaluate.py --regions`",
    "cases.yaml": "评测的个例：`python evaluate.py --cases`",
}
NONE = "—"
HEADING = "| YAML | 模型 | 任务 | 帧，通道 × 网格 | 参数 | GFLOP | MB | 成绩 |"
INTRO = """# 有哪些 YAML

First time here: `make train`, which is [quickstart.yaml](quickstart.yaml). Your own data:
[ar_pred_video_vanilla.yaml](ar_pred_video_vanilla.yaml). Every key: [docs/config.md](../docs/config.md).

头一次用：`make train`，即 [quickstart.yaml](quickstart.yaml)；再往后，一族一个的比较
[suites/zoo_small.yaml](suites/zoo_small.yaml)；自己的数据从
[ar_pred_video_vanilla.yaml](ar_pred_video_vanilla.yaml) 起。
一份是一次完整的运行：`python train.py --config config/NAME.yaml`。

由 `python -m engine.reference.write` 印出：任务、成绩是各 YAML 开头的话；参数连同阶段一的；
GFLOP 是预报一个窗口的浮点运算，乘加算两次；MB 是训练的一步的张量，精度与小批照 YAML，张量之外的见 `--estimate`；
一横：没有，或要下载的权重不在。
"""


class Cost(NamedTuple):
    """表里的三格。"""

    parameters: str = NONE
    gflop: str = NONE
    memory: str = NONE


def size(config: RunConfig) -> list[str]:
    """帧、通道、网格、参数个数、预报一次的 GFLOP。

    Raises:
        ValueError: 模型的选项不对；要的文件不在。
    """
    spec = imagined_spec(config.data)
    model = build_model(config.model, spec).eval()
    return [
        f"{spec.frames_in} → {spec.frames_out}",
        str(spec.num_channels),
        f"{spec.height} × {spec.width}",
        f"{parameter_count(model):,}",
        f"{flops_per_sample(model, spec) / 1e9:.3f}" if can_forecast(model) else "none",
    ]


def cost_of(path: Path) -> Cost:
    """参数、GFLOP、训练的一步的 MB。"""
    config = load_config(path)
    if file := first_stage_file(config.model):
        stage = load_config(CONFIG / f"{Path(file).parent.name}.yaml").model
        config = config.model_copy(update={"model": {**config.model, "first_stage": stage}})
    spec = imagined_spec(config.data)
    try:
        *_, parameters, gflop = size(config)
        peak = step_peak(without_files(config.model, spec), spec, config.train, eval_batch_size(config))
    except ValueError:  # 要下载的权重
        return Cost()
    memory = f"{sum(peak.sizes.values()) / 1e6:,.0f}" if peak.trainable else NONE
    return Cost(parameters, gflop.replace("none", NONE), memory)


def said(path: Path) -> tuple[str, str]:
    """开头的话里的任务（头一句）与成绩。"""
    lines = path.read_text(encoding="utf-8").split("\n")
    head = [line.lstrip("# ") for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")]]
    scored = (i for i, line in enumerate(head) if re.match("(来源的)?成绩|测试年", line))
    if (first := next(scored, None)) is not None:
        score = _sentence(head[first:]).removeprefix("成绩：")
    else:
        score = "没有训练过" if re.search("没有(在这里)?训练过", "".join(head)) else NONE
    return _sentence(head), score


def _sentence(lines: list[str]) -> str:
    return "".join(lines).partition("。")[0].replace("|", "\\|")


def run_row(path: Path, cost: Cost) -> str:
    config, (task, score) = load_config(path), said(path)
    spec = imagined_spec(config.data)
    shape = f"{spec.frames_in} → {spec.frames_out}，{spec.num_channels} × {spec.height} × {spec.width}"
    return f"| {_link(path)} | {config.model['name']} | {task} | {shape} | {' | '.join(cost)} | {score} |"


def _link(path: Path) -> str:
    name = path.relative_to(CONFIG).as_posix()
    return f"[{name}]({name})"


def listed(folder: str) -> list[Path]:
    """config/ 下一个文件夹里的 YAML；"." 里只有运行的。"""
    return sorted(path for path in (CONFIG / folder).glob("*.yaml") if path.name not in OTHERS)


def page(costs: Mapping[str, Cost]) -> str:
    """config/README.md；costs: 相对 config/ 的名字 → 代价。"""
    lines = [INTRO]
    for folder, title in RUNS.items():
        lines += [f"## {title}", "", HEADING, "|---" * 8 + "|"]
        lines += [run_row(path, costs.get(path.relative_to(CONFIG).as_posix(), Cost())) for path in listed(folder)]
        lines.append("")
    for folder, title in LISTS.items():
        lines += [f"## {title}", "", "| YAML | 是什么 |", "|---|---|"]
        lines += [f"| {_link(path)} | {said(path)[0]} |" for path in listed(folder)] + [""]
    for name, title in OTHERS.items():
        path = CONFIG / name
        lines += [f"## {title}", "", "| YAML | 是什么 |", "|---|---|", f"| {_link(path)} | {said(path)[0]} |", ""]
    return "\n".join(lines)


def written_costs(text: str) -> dict[str, Cost]:
    """印好的一页里的代价。"""
    rows = [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| [")]
    return {row[0].partition("]")[0][1:]: Cost(*row[4:7]) for row in rows if len(row) == 8}


def costs() -> dict[str, Cost]:
    """各 YAML 的，现数；几分钟。"""
    return {path.relative_to(CONFIG).as_posix(): cost_of(path) for folder in RUNS for path in listed(folder)}
