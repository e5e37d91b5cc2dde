"""导出的程序：与模型自己给出的逐个相同，不造模型也能预报；导不出的一行说清。"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.commands import inference_command
from engine.forecasting import program
from engine.forecasting.program import Program, read_program, traced, write_onnx, write_program
from models.interface import Sampled, can_forecast
from tests.engine.runs import train_here, write_run
from tests.models.small import make_model, small_batch
from tests.models.test_models import SMALL, at_the_root, make, one_config_a_model

__all__ = ["at_the_root"]  # 各份 YAML 的 data.set 从仓库根目录算起


def saved(exported: torch.export.ExportedProgram, path: Path) -> Any:
    """写了又读回来的。"""
    write_program(path, exported, {})
    return torch.export.load(path).module()


def noise_like(value: Tensor) -> Tensor:
    return torch.rand_like(value) if value.is_floating_point() else torch.full_like(value, 3)


@one_config_a_model
def test_every_config_is_exported_or_refused(path: Path, tmp_path: Path) -> None:
    model, batch = make(path).eval(), small_batch(SMALL, count=2)
    name = path.stem
    if not can_forecast(model):
        with pytest.raises(ValueError, match=rf"^--export: this configuration of {name} reconstructs, it cannot"):
            traced(model, SMALL, name)
        return
    if model.probabilistic and not isinstance(model, Sampled):
        with pytest.raises(ValueError, match=rf"^--export: {name} draws its members inside the forecast"):
            traced(model, SMALL, name)
        return
    exported, facts = traced(model, SMALL, name)
    graph = saved(exported, tmp_path / "a.pt2")
    with torch.no_grad():
        if isinstance(model, Sampled):
            network, inputs = model.network_call(batch.history[:1])
            inputs = tuple(noise_like(value) for value in inputs)
            torch.testing.assert_close(graph(*inputs), network(*inputs))
            assert not facts["whole"]
            return
        made = Program(graph, SMALL, name, facts["needs_time"]).forecast(batch.history, batch.time)
        torch.testing.assert_close(made, model.forecast(batch.history, batch.time))
    assert facts == {"whole": True, "needs_time": name == "climatology"}


def test_a_model_with_noise_is_refused() -> None:
    model = make_model({"name": "cnn", "width": 4, "noise": {}}, SMALL)
    with pytest.raises(ValueError, match=r"^--export: cnn draws its members inside the forecast, a program holds no"):
        traced(model, SMALL, "cnn")


def test_the_program_forecasts_without_the_model(
    make_tree: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = make_tree(tmp_path / "tree", ("t2m",), (8, 16), "2000-01-01", "2000-02-20")
    train_here(write_run(tmp_path, tree, train={"epochs": 1}), "run.name=a")
    checkpoint, file = str(tmp_path / "checkpoints/a/best.ckpt"), str(tmp_path / "a.pt2")
    when = ["--time", "2000-02-15T06", "--steps", "2"]
    assert inference_command(["--checkpoint", checkpoint, "--out", str(tmp_path / "model"), *when]) == 0
    assert inference_command(["--checkpoint", checkpoint, "--export", file]) == 0
    monkeypatch.setattr(program, "load_forecaster", None)
    monkeypatch.setattr("models.build_model", None)
    assert inference_command(["--program", file, "--out", str(tmp_path / "program"), *when]) == 0
    for lead in ("006", "012"):
        made, expected = (np.load(tmp_path / way / f"forecast+{lead}h.npy") for way in ("program", "model"))
        np.testing.assert_allclose(made, expected, rtol=1e-6)
    frames = tree.fields[:3].transpose(0, 2, 3, 1)
    np.save(tmp_path / "frames.npy", frames)
    inputs = ["--inputs", str(tmp_path / "frames.npy"), "--out", str(tmp_path / "inputs")]
    assert inference_command(["--program", file, *inputs]) == 0  # 不用时刻的，不给也行

    def refuse(arguments: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            inference_command(arguments)

    refuse(["--program", file, "--out", str(tmp_path / "b"), *when, "--set", "model.dim=3"], "nothing in it may change")
    refuse(["--checkpoint", checkpoint, "--export", file, *when], r"goes with --checkpoint alone")
    refuse(["--program", file, "--export", file], r"goes with --checkpoint alone")
    refuse(["--checkpoint", checkpoint, "--export", checkpoint], r"name it with \.pt2 .* or \.onnx")
    refuse(["--program", file, *when], "give --out")
    refuse(["--program", checkpoint, "--out", str(tmp_path / "b"), *when], "not a .pt2")
    with pytest.raises(ValueError, match=r"no such file; python inference\.py --checkpoint CKPT --export"):
        read_program("nowhere.pt2")
    with pytest.raises(ValueError, match="x needs the time of the forecast: give --time beside --inputs"):
        Program(torch.nn.Identity(), SMALL, "x", needs_time=True).forecast(torch.zeros(1), None)


@pytest.mark.skipif(find_spec("onnxscript") is not None, reason="onnxscript is installed")
def test_onnx_says_what_to_install(tmp_path: Path) -> None:
    exported = torch.export.export(torch.nn.Identity(), (torch.zeros(1),))
    with pytest.raises(ValueError, match=r"ONNX needs onnx and onnxscript .*; pip install -r requirements-onnx\.txt"):
        write_onnx(tmp_path / "a.onnx", exported)


@one_config_a_model
def test_onnx_gives_the_same(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs requirements-onnx.txt")
    runtime = pytest.importorskip("onnxruntime", reason="another runtime to compare with")
    model, batch = make(path).eval(), small_batch(SMALL, count=1)
    if not can_forecast(model) or (model.probabilistic and not isinstance(model, Sampled)):
        return
    exported, _ = traced(model, SMALL, path.stem)
    write_onnx(tmp_path / "a.onnx", exported)
    graph = runtime.InferenceSession(str(tmp_path / "a.onnx"))
    inputs: tuple[Tensor, ...] = (batch.history, batch.time)
    if isinstance(model, Sampled):
        inputs = tuple(noise_like(value) for value in model.network_call(batch.history)[1])
    names = [one.name for one in graph.get_inputs()]
    found = graph.run(None, dict(zip(names, (value.numpy() for value in inputs), strict=True)))
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found[0]), exported.module()(*inputs), rtol=1e-4, atol=1e-5)


def test_a_network_alone_does_not_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = torch.export.export(torch.nn.Identity(), (torch.zeros(1),))
    facts = {
        "run": "x",
        "config": {"model": {"name": "dit"}, "train": {}, "data": {}},
        "spec": SMALL.to_dict(),
        "progress": {"epoch": 1, "step": 2, "batches": 0},
        "whole": False,
    }
    torch.export.save(graph, tmp_path / "a.pt2", extra_files={program.FACTS: json.dumps(facts)})
    with pytest.raises(ValueError, match=r"a\.pt2: needs_time: field required"):
        read_program(str(tmp_path / "a.pt2"))
    facts["needs_time"] = False
    torch.export.save(graph, tmp_path / "a.pt2", extra_files={program.FACTS: json.dumps(facts)})
    with pytest.raises(ValueError, match="holds one network call of dit, its sampler is not in it; forecast with"):
        read_program(str(tmp_path / "a.pt2"))
    torch.export.save(graph, tmp_path / "b.pt2")
    with pytest.raises(ValueError, match=r"b\.pt2: not written by inference\.py --export"):
        read_program(str(tmp_path / "b.pt2"))
