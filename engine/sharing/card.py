"""检查点的卡片（Markdown，英文）：是什么、由哪些数据怎样训练来的、成绩、限制、怎样用；没有哪台机器的路径。"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml

from engine.loading import Content, load_forecaster
from engine.progress import Progress
from engine.sharing.markdown import block, table
from engine.sharing.scores import find_gaps, find_scores, scores_section
from models.interface import Learner, can_forecast
from util.atomic import replacing
from util.batch import DataSpec
from util.files.package import described, nameless
from util.files.records import read_record
from util.files.training_checkpoint import load_training
from util.variables import variable_info

RECONSTRUCT = """\
```bash
python -m engine.codecs.reconstruct --checkpoint {source} --out OUT {where}
```"""
FORECAST = """\
## How to run

In the repository of ar_pred, where the data are (ROOT a tree, STORE a packed one):

```bash
python inference.py --checkpoint {source} --time {time} --steps {steps} --out OUT {where}
python evaluate.py --checkpoint {source} --split test --steps {steps} --out SCORES {where}
```

```python
from engine.forecasting.api import load_forecaster

forecast = load_forecaster("{source}").forecast(history, steps={steps})  # xarray.Dataset in and out
```"""
ALONE = """\
With nothing but PyTorch and safetensors:

```python
import torch
from safetensors.torch import load_file

weights = load_file("model.safetensors")
{how}
```"""
WHOLE = """\
forecast = torch.export.load("{program}").module()(history, time)
# history (1, {past}, {frames}) float32, standardised; time (1, {window}) int64, hours since 1970-01-01 UTC
# forecast (1, 1, {ahead}, {frames}), standardised"""
ONE_CALL = 'network = torch.export.load("{program}").module()  # one call of the network; the sampler is not in it'


def show_card(checkpoint: str, out: Path | None) -> int:
    """inference.py --card：写进 out，没有给就印出来。

    Raises:
        ValueError: 检查点不对。
    """
    content = load_training(checkpoint)
    model, _ = load_forecaster(content, torch.device("cpu"))
    text = make_card(content, model, nameless(checkpoint), written_on(content, checkpoint))
    if out is None:
        print(text, end="")
        return 0
    with replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return 0


def written_on(content: Content, checkpoint: str) -> str:
    """检查点是哪天写的；从前的检查点没有记，看文件。"""
    moment = datetime.fromtimestamp(Path(checkpoint).stat().st_mtime, timezone.utc)
    return content.get("date") or moment.date().isoformat()


def front_matter(content: Content) -> str:
    """Hugging Face 读的 YAML 头。"""
    about: dict[str, Any] = {"library_name": "ar_pred", "pipeline_tag": "time-series-forecasting"}
    about["tags"] = ["weather", "pytorch", content["config"]["model"]["name"]]
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n\n"


def make_card(content: Content, model: Learner, source: str, date: str, program: str | None = None) -> str:
    """content: 检查点的内容；source: 命令里怎样称呼它；program: 旁边的程序叫什么。"""
    about, spec = described(content, date), DataSpec.from_dict(content["spec"])
    progress = read_record(Progress, content["progress"], "checkpoint: progress")
    parts = [
        head_section(about, spec, model),
        model_section(about, model),
        data_section(about["config"]["data"], spec),
        training_section(about, progress),
        scores_section(progress, find_scores(content)),
        limits_section(about["config"]["data"], spec, model, find_gaps(content)),
        use_section(source, about["config"]["data"], spec, model, program),
    ]
    return "\n\n".join(parts) + "\n"


def head_section(about: Mapping[str, Any], spec: DataSpec, model: Learner) -> str:
    name, fields = (
        about["config"]["model"]["name"],
        f"{spec.num_channels} channels on {spec.height} x {spec.width} points",
    )
    does = (
        f"from {spec.frames_in} frames {spec.interval_hours} h apart it forecasts the next {spec.frames_out}"
        if can_forecast(model)
        else "it encodes and reconstructs fields, and does not forecast"
    )
    return f"# {about['run']}\n\nA weather model of ar_pred (`{name}`): {does}; {fields}."


def model_section(about: Mapping[str, Any], model: Learner) -> str:
    count = sum(p.numel() for p in model.parameters())
    averaged = about["config"]["train"].get("ema_decay") is not None
    weights = "exponential moving average over the steps" if averaged else "as the last step left them"
    rows = [("parameters", f"{count:,}"), ("weights", weights)]
    if can_forecast(model):
        drawn = "drawn by the model" if model.probabilistic else "from perturbed initial fields (`--perturb`)"
        rows.append(("ensemble members", drawn))
    options = about.get("model_options") or about["config"]["model"]
    return f"## Model\n\n{table(('', ''), rows)}\n\n{block(options)}"


def data_section(data: Mapping[str, Any], spec: DataSpec) -> str:
    roots = [part["root"] for part in data.get("parts", {}).values()] or [data["root"]]
    standard = "(field - mean) / std, channel by channel, statistics below"
    rows = [
        ("source", ", ".join(roots) if data.get("source", "tree") == "tree" else str(data["store"])),
        ("latitudes", axis(spec.latitudes)),
        ("longitudes", axis(spec.longitudes)),
        ("time", f"one frame every {spec.interval_hours} h"),
        *((f"{name} dates", " to ".join(map(str, span))) for name, span in data["splits"].items()),
        (
            "standardisation",
            f"{standard}; files {'hold standardised' if spec.standardized else 'hold physical'} values",
        ),
    ]
    rows += [("forcings", ", ".join(spec.forcings))] if spec.forcings else []
    rows += [("forecast only, not fed back", ", ".join(spec.diagnostic))] if spec.diagnostic else []
    channels = zip(spec.channels, spec.units, spec.pressures, spec.mean, spec.std, strict=True)
    columns = [
        (name, variable_info(name).long_name, unit, "" if p is None else f"{p:g} hPa", f"{mean:.6g}", f"{std:.6g}")
        for name, unit, p, mean, std in channels
    ]
    titles = ("channel", "", "unit", "pressure", "mean", "std")
    return f"## Data\n\n{table(('', ''), rows)}\n\n{table(titles, columns)}"


def training_section(about: Mapping[str, Any], progress: Progress) -> str:
    train = about["config"]["train"]
    rows = [
        ("steps", f"{progress.step:,}, {progress.samples:,} windows in {progress.seconds / 3600:.2f} h"),
        ("epochs", f"{progress.epoch} of {train['epochs']}"),
        ("objective", json.dumps(train.get("objective", {"distance": "mse"}))),
        ("seed", str(about["config"].get("run", {}).get("seed", 42))),
        ("device", progress.device or "-"),
        ("versions", ", ".join(f"{name} {number}" for name, number in about.get("versions", {}).items()) or "-"),
        ("checkpoint written", about["date"]),
    ]
    rows += [("started from", f"weights with sha256 {about['init']}")] if about.get("init") else []
    if first := about.get("first_stage"):
        rows.append(("first stage", f"{first['path']}, sha256 {first['sha256']}"))
    return f"## Training\n\n{table(('', ''), rows)}\n\n{block({k: v for k, v in train.items() if k != 'objective'})}"


def limits_section(data: Mapping[str, Any], spec: DataSpec, model: Learner, gaps: Mapping[str, int]) -> str:
    step, first, offset = spec.interval_hours, data.get("first_hour", 0), data.get("utc_offset_hours", 0)
    reach = ", ".join(f"+{hours} h" for hours in spec.lead_hours or [step * spec.frames_out])
    every = data.get("starts_every_hours") or step
    lines = []
    if can_forecast(model):
        lines += [
            f"Lead times are multiples of {step} h. One call reaches {reach}; further steps start from its own output."
        ]
        lines += [f"The history is {spec.frames_in} frames every {step} h, none missing."]
    lines += [f"These {spec.num_channels} channels on this grid only; other data must be brought onto it first."]
    lines += [f"Trained on hours {first}, {first + every}, ... in the calendar of the files (UTC{offset:+d} h)."]
    lines += ["Missing fields were interpolated in the inputs and never used as targets, over gaps of at most "]
    lines[-1] += f"{data.get('max_gap_hours')} h; windows over longer gaps were left out."
    if gaps:
        lines += [
            "Files found missing or unreadable in training: " + ", ".join(f"{k} {v}" for k, v in gaps.items()) + "."
        ]
    if not spec.closes_circle:
        lines += ["A region: nothing comes in through its edges but what the history shows."]
    return "## Limits\n\n" + "\n".join(f"* {line}" for line in lines)


def use_section(source: str, data: Mapping[str, Any], spec: DataSpec, model: Learner, program: str | None) -> str:
    where = " ".join(f"data.parts.{name}.root=ROOT" for name in data.get("parts", {})) or "data.root=ROOT"
    where = "data.store=STORE" if data.get("source") == "store" else where
    if not can_forecast(model):
        return "## How to run\n\n" + RECONSTRUCT.format(source=source, where=where)
    steps = max(1, 24 // (spec.interval_hours * spec.frames_out)) * spec.frames_out
    hour = (data.get("first_hour", 0) - data.get("utc_offset_hours", 0)) % 24
    time = f"{data['splits']['test'][0]}T{hour:02d}"
    parts = [FORECAST.format(source=source, steps=steps, time=time, where=where)]
    if program:
        frames = f"{spec.num_channels}, {spec.height}, {spec.width}"
        how = ONE_CALL if model.probabilistic else WHOLE
        how = how.format(program=program, frames=frames, past=spec.frames_in, ahead=spec.frames_out, window=spec.window)
        parts.append(ALONE.format(how=how))
    return "\n\n".join(parts)


def axis(values: Sequence[float]) -> str:
    return f"{len(values)} from {values[0]:g} to {values[-1]:g} degrees"
