"""benchmarks.train：参照与我们的模型是同一个函数，运算次数与手算的相同，表里的数合得上。"""

from __future__ import annotations

import json
import re
import runpy
import sys

import pytest
import torch

from benchmarks.step.arithmetic import training_flops
from benchmarks.step.reference import WrittenCross, WrittenGroup, as_written
from tests.engine.runs import SMALL_MODEL
from tests.models.small import count, make_model, small_batch, small_spec
from util.batch import Seeds

TINY = ["data.variables={t2m: single}", "data.latitude.count=8", "data.longitude.count=16", f"model={SMALL_MODEL}"]


def run(monkeypatch, *options: str) -> None:
    monkeypatch.setattr("sys.argv", ["train", "--config", "config/quickstart.yaml", *options, *TINY])
    monkeypatch.delitem(sys.modules, "benchmarks.train", raising=False)  # 引入过的，runpy 要抱怨
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("benchmarks.train", run_name="__main__")


def test_the_reference_is_the_same_function_and_nothing_in_it_is_fused() -> None:
    spec, options = small_spec(), {**SMALL_MODEL, "decoder_depth": 2, "attention": "sdpa"}
    batch = small_batch(spec)._replace(seeds=Seeds((1, 2, 3), (0.0, 0.3, 0.6), 7))
    found = []
    for written in (False, True):
        torch.manual_seed(0)
        if written:
            with as_written():
                model = make_model(options, spec).train()
        else:
            model = make_model(options, spec).train()
        loss = model.loss(batch)["loss"]
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    kinds = {type(module) for module in model.modules()}
    assert {WrittenGroup, WrittenCross} < kinds
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_training_flops_of_ar_pred_are_those_counted_by_hand() -> None:
    """一个线性层前向一次矩阵乘、反向两次；embed 的输入不要梯度，少一次。"""
    spec = small_spec(channels=2, frames_in=3)
    dim, width, group, pixels, hidden = 16, 16, 8, 4 * 4 * 2, 4
    tokens, seen = 4 * group, 3 * group
    linear = seen * (dim * 3 * dim + dim * dim + 2 * hidden * dim * dim)  # 编码器的一块
    attention = 2 * seen * seen * dim
    decoder = group * (dim * width + 2 * width * width + 2 * hidden * width * width + width * pixels)
    decoder += seen * (dim * width + 2 * width * width) + 2 * group * seen * width
    expected = 2 * (3 * (linear + attention + decoder) + 2 * tokens * pixels * dim)
    assert training_flops(SMALL_MODEL, spec) == expected
    assert training_flops({**SMALL_MODEL, "attention": "auto"}, spec) == expected


def test_the_parts_make_up_the_step(monkeypatch, capsys, tmp_path) -> None:
    out, trace = tmp_path / "a/train.json", tmp_path / "trace"
    options = ["--imagined", "--against", "reference", "--steps", "2", "--rounds", "1", "--profile", str(trace)]
    run(monkeypatch, *options, "--out", str(out), "train.ema_decay=0.9", "train.batch_size=2")
    found = json.loads(out.read_text())
    weights = count(make_model(SMALL_MODEL, small_spec(channels=1)))
    assert list(found["sides"]) == ["ours", "reference"]
    for several in found["rounds"].values():
        for one in several:
            assert sum(one["host"].values()) == pytest.approx(one["step"])
            assert all(seconds >= 0 for seconds in one["host"].values())
            assert min(one["host"][part] for part in ("forward", "backward", "optimizer")) > 0
            assert 0 < one["processor"] < one["step"]
            assert one["memory"] >= 4 * 4 * weights  # 权重、EMA、Adam 的两份，各四字节
    ours = found["sides"]["ours"]
    assert ours["windows/s"] == pytest.approx(2 / ours["step, ms"] * 1000)
    assert 0 < ours["utilisation"] < 1
    printed = capsys.readouterr().out
    whole, times, kernels = map(float, re.findall(r"profiled: (\S+) s, (\S+) x the operators' own (\S+) s", printed)[0])
    assert times == pytest.approx(whole / kernels, rel=0.1) and kernels < whole
    assert "| | ours | reference | ours / reference |" in printed and "| forward, ms |" in printed
    assert (trace / "trace.json").stat().st_size and "aten::" in (trace / "operators.txt").read_text()


def test_only_ar_pred_has_a_reference(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["train", "--config", "config/simvp.yaml", "--imagined", "--against", "reference"])
    monkeypatch.delitem(sys.modules, "benchmarks.train", raising=False)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("benchmarks.train", run_name="__main__")
    assert "simvp has no written-out reference, only ar_pred_video_vanilla has" in capsys.readouterr().err
