"""torch.export 的程序（.pt2）：训练好的模型的整个预报，离开 models/ 也能算；采样的模型是它一次次调的网络。

一个程序收一个窗口：几种模型的批数在追踪时会定死（einops、逐块的循环），所以都取 1，几个窗口就调几次。
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass
from torch.fx import GraphModule

from engine.loading import Content, load_forecaster
from models.interface import ForecastModel, Sampled, can_forecast
from util.atomic import flush, replacing
from util.batch import DataSpec
from util.files.bounded import parse_json
from util.files.training_checkpoint import Described, check_described, load_training

log = logging.getLogger("ar_pred")
FACTS = "ar_pred.json"  # .pt2 里另带的：配置、DataSpec，与 whole、needs_time


@dataclass(frozen=True)
class _Facts(Described):
    """FACTS 里的；whole：是整个预报；needs_time：要时刻。"""

    whole: bool
    needs_time: bool


class Whole(nn.Module):
    """(1, T_in, C, H, W) 与 (1, T_in + T_out) UTC 小时 → (1, 1, T_out, C, H, W)。"""

    def __init__(self, model: ForecastModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, history: Tensor, time: Tensor) -> Tensor:
        return self.model.forecast(history, time)


class Program:
    """与 ForecastModel.forecast 同样的用法，算的是程序；总是确定性的。"""

    probabilistic = False
    can_forecast = True
    takes_leads = True  # 走哪一种由时刻看出，与模型相同

    def __init__(self, graph: nn.Module, spec: DataSpec, name: str, needs_time: bool) -> None:
        self.graph, self.spec, self.name, self.needs_time = graph, spec, name, needs_time

    def forecast(self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: object = None) -> Tensor:
        """(B, T_in, C, H, W) → (B, 1, T_out, C, H, W)。

        Raises:
            ValueError: 需要时刻而没有。
        """
        assert num_members == 1, "deterministic; see check_members"
        if time is None:
            if self.needs_time:
                raise ValueError(f"{self.name} needs the time of the forecast: give --time beside --inputs")
            time = torch.zeros(len(history), self.spec.window, dtype=torch.long, device=history.device)
        return torch.cat([self.graph(*one) for one in zip(history.split(1), time.split(1), strict=True)])


def export_program(checkpoint: str, path: Path) -> int:
    """检查点（有 EMA 用 EMA）→ path：.pt2，或者 .onnx，给别的运行时。

    Raises:
        ValueError: 模型只能重建；采样的网络不是一次调用说得清的；没有装 ONNX 要的库。
    """
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"--export {path}: name it with .pt2 (a program of torch.export) or .onnx")
    content = load_training(checkpoint)
    model, spec = load_forecaster(content, torch.device("cpu"))
    program, facts = traced(model, spec, content["config"]["model"]["name"])
    kept = {key: content[key] for key in ("run", "config", "spec", "progress")}
    if path.suffix == ".onnx":
        write_onnx(path, program)
    else:
        write_program(path, program, {**kept, **facts})
    log.info("exported: %s", path)
    return 0


def write_program(path: Path, program: torch.export.ExportedProgram, facts: dict[str, Any]) -> None:
    """原子地写；Raises 见 replacing。先写在内存里：torch 自己写盘，满了时抛的是另一种。"""
    made = BytesIO()
    with quiet():
        torch.export.save(program, made, extra_files={FACTS: json.dumps(facts)})
    with replacing(path) as temporary:
        temporary.write_bytes(made.getbuffer())
        flush(temporary)


def write_onnx(path: Path, program: torch.export.ExportedProgram) -> None:
    """只有算的图与权重，没有配置；两 GB 以上的权重由 onnx 写在旁边的一个文件里，所以不先写临时名。

    Raises:
        ValueError: 没有装 onnx、onnxscript。
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # 没有装 torchvision，它的算子不必说
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated")
        try:
            made = torch.onnx.export(program, dynamo=True, verbose=False)
        except ImportError as error:
            raise ValueError(
                f"--export {path}: ONNX needs onnx and onnxscript ({error}); pip install -r requirements-onnx.txt"
            ) from None
    assert made is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path)


def why_not(model: object, name: str) -> str | None:
    """导不出的原因；导得出是 None。"""
    if not can_forecast(model):
        return f"this configuration of {name} reconstructs, it cannot forecast"
    if model.probabilistic and not isinstance(model, Sampled):
        return (
            f"{name} draws its members inside the forecast, a program holds no random numbers; "
            "forecast with --checkpoint"
        )
    return None


def traced(model: object, spec: DataSpec, name: str) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """模型 → 程序，与它的 whole、needs_time；随机数不必有，值不必真。

    Raises:
        ValueError: 见 export_program。
    """
    if reason := why_not(model, name):
        raise ValueError(f"--export: {reason}")
    history = torch.zeros(1, spec.frames_in, spec.num_channels, spec.height, spec.width)
    assert can_forecast(model)
    with torch.no_grad(), quiet():
        if model.probabilistic:
            assert isinstance(model, Sampled)
            program = torch.export.export(*model.network_call(history))
            return pathless(program), {"whole": False, "needs_time": False}
        time = torch.zeros(1, spec.window, dtype=torch.long)
        program = torch.export.export(Whole(model), (history, time))
        return pathless(program), {"whole": True, "needs_time": uses_last_input(program)}


def pathless(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """去掉每一步是哪个文件的哪一行：那是这台机器的路径。"""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """torch 的两句提醒与我们无关：nn.LSTM 追踪时重排自己的权重，共用存储的权重存一份；出来的数是对的。"""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(The tensor attributes? self|No complete tensor found)", UserWarning)
        yield


def uses_last_input(program: torch.export.ExportedProgram) -> bool:
    """最后一个输入用到了没有。"""
    *_, last = program.graph_signature.user_inputs
    return any(node.name == last and node.users for node in program.graph.nodes)


def read_program(path: str) -> tuple[Content, torch.export.ExportedProgram]:
    """.pt2 → 它带着的（与检查点的同名的项）与程序。

    Raises:
        ValueError: 不在、不是 export_program 写的；只有采样的网络，没有整个预报。
    """
    extra = {FACTS: ""}
    if Path(path).suffix != ".pt2":  # 别的文件 torch 要先说上二十行
        raise ValueError(f"--program {path}: not a .pt2; python inference.py --checkpoint CKPT --export FILE.pt2")
    if not Path(path).is_file():
        raise ValueError(f"--program {path}: no such file; python inference.py --checkpoint CKPT --export FILE.pt2")
    try:
        program = torch.export.load(path, extra_files=extra)
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise ValueError(f"--program {path}: not a program of torch.export ({type(error).__name__})") from None
    if not extra[FACTS]:
        raise ValueError(f"--program {path}: not written by inference.py --export, its data and config are not in it")
    content = parse_json(extra[FACTS])
    check_described(_Facts, content, f"--program {path}")
    if not content["whole"]:
        name = content["config"]["model"]["name"]
        raise ValueError(
            f"--program {path}: holds one network call of {name}, its sampler is not in it; forecast with --checkpoint"
        )
    return content, program


def program_forecaster(content: Content, program: torch.export.ExportedProgram, device: torch.device) -> Program:
    """程序搬到设备上；content 是 read_program 给的。"""
    if device.type != "cpu":
        program = move_to_device_pass(program, device)
    spec = DataSpec.from_dict(content["spec"])
    return Program(program.module(), spec, content["config"]["model"]["name"], content["needs_time"])
