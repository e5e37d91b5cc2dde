"""外强迫从配置一路到预报：训练、按时刻与按文件的预报相同、离开目录树与导出成程序都行；少了时刻一行说清。"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.commands import evaluate_command, inference_command
from tests.engine.runs import train_here, write_run
from util.checkpoint import load_checkpoint
from util.config import Axis
from util.data.tree_files import StaticField, write_static

pytestmark = pytest.mark.usefixtures("unrendered")


def test_from_the_config_to_the_forecast(make_tree: Any, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", ("t2m", "tp"), (8, 16), "2000-01-01", "2000-02-20")
    axes = Axis(**tree.data["latitude"]), Axis(**tree.data["longitude"])
    heights = np.random.default_rng(0).normal(500, 300, (8, 16)).astype(np.float32)
    write_static(tree.root, "oro", StaticField(heights, "m"), *axes)
    keys = {"forcings": ["solar", "hour_of_day", "static/oro"], "roles": {"tp": "diagnostic"}}
    tree = tree._replace(data={**tree.data, **keys})
    train_here(write_run(tmp_path, tree, train={"epochs": 1, "preflight": True}), "run.name=a")
    checkpoint, program = tmp_path / "checkpoints/a/best.ckpt", tmp_path / "a.pt2"
    content = load_checkpoint(checkpoint)
    assert content["spec"]["forcings"] == keys["forcings"] and content["spec"]["diagnostic"] == ["tp"]
    standard = (heights - heights.mean(dtype=np.float64)) / heights.std(dtype=np.float64)
    np.testing.assert_allclose(content["model"]["inputs.static"][0], standard, rtol=1e-5, atol=1e-6)
    assert evaluate_command(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "scores"), "--steps", "3"]) == 0

    last = tree.hours.index(tree.hours[0] + 24 * 40 + 6)
    np.save(tmp_path / "frames.npy", tree.fields[last - 2 : last + 1].transpose(0, 2, 3, 1))
    when, steps = ["--time", "2000-02-10T06"], ["--steps", "2"]
    inputs = ["--inputs", str(tmp_path / "frames.npy")]

    def infer(name: str, *arguments: str) -> np.ndarray:
        assert inference_command([*arguments, "--out", str(tmp_path / name), *steps]) == 0
        return np.stack([np.load(tmp_path / name / f"forecast+{lead}h.npy") for lead in ("006", "012")])

    of_checkpoint = ["--checkpoint", str(checkpoint)]
    made = infer("time", *of_checkpoint, *when)
    assert inference_command([*of_checkpoint, "--export", str(program)]) == 0
    shutil.rmtree(tree.root)
    np.testing.assert_array_equal(infer("inputs", *of_checkpoint, *when, *inputs), made)
    np.testing.assert_allclose(infer("program", "--program", str(program), *when, *inputs), made, rtol=1e-5, atol=1e-6)
    for source in (of_checkpoint, ["--program", str(program)]):
        with pytest.raises(ValueError, match="needs? the time of the forecast: give --time beside --inputs$"):
            infer("none", *source, *inputs)
