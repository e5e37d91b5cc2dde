"""训练之后数据搬了家：评测、预报、重建写 data.root=… 就接着用，成绩与没搬时相同；别的键不许改。"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from engine.codecs.reconstruct import main as reconstruct
from engine.commands import evaluate_command, inference_command
from engine.loading import DATA_MAY_CHANGE, checkpoint_config, run_name
from tests.engine.codecs.tiny_codec import register
from tests.engine.runs import train_here, write_run
from util.checkpoint import load_checkpoint
from util.config import load_config
from util.data.tree_files import field_path, write_joined_about

TIME = "2000-02-15T06"


@pytest.mark.parametrize("name", ["persistence", "tiny_codec"])
def test_every_command_finds_the_data_elsewhere(make_tree, tmp_path: Path, monkeypatch, name: str):
    register(monkeypatch)
    tree = make_tree(tmp_path / "tree", ("t2m", "u10"), (8, 16), "2000-01-01", "2000-02-20")
    config = write_run(tmp_path, tree, train={"epochs": 0 if name == "persistence" else 1})
    model = "{name: persistence}" if name == "persistence" else "{name: tiny_codec, scaling: minmax}"
    assert train_here(config, "run.name=mine", f"model={model}") == 0
    best = ["--checkpoint", str(tmp_path / "checkpoints/mine/best.ckpt")]
    commands = {
        "evaluate": (evaluate_command, [*best, "--save", "none"], "metrics.csv"),
        "inference": (inference_command, [*best, "--time", TIME], "forecast+006h.npy"),
        "reconstruct": (reconstruct, best, "metrics.csv"),
    }
    for word in ("reconstruct",) if name == "tiny_codec" else ("evaluate", "inference"):
        command, arguments, _ = commands[word]
        assert command([*arguments, "--out", str(tmp_path / "here" / word)]) == 0
    shutil.move(tree.root, tmp_path / "elsewhere")
    moved = [f"data.root={tmp_path / 'elsewhere'}", "data.workers=0", f"data.cache_dir={tmp_path / 'other'}"]
    for word in ("reconstruct",) if name == "tiny_codec" else ("evaluate", "inference"):
        command, arguments, file = commands[word]
        out = tmp_path / "there" / word
        with pytest.raises(ValueError, match=r"data.root .*tree is not a directory; give data.root=FOLDER"):
            command([*arguments, "--out", str(out)])
        assert command([*arguments, "--out", str(out), *moved]) == 0
        assert (out / file).read_bytes() == (tmp_path / "here" / word / file).read_bytes()
        with pytest.raises(ValueError, match=r"override 'data.frames_in=2': a checkpoint carries its own config"):
            command([*moved, "data.frames_in=2", *arguments, "--out", str(out)])


def test_a_run_on_several_data_sets(make_tree, tmp_path: Path):
    """两半接起来的与整棵树的训练逐位相同；检查点记着各在哪里，搬走一半，预报时写 data.parts.NAME.root 就接着用。"""
    tree = make_tree(tmp_path / "tree", ("t2m", "u10"), (8, 16), "2000-01-01", "2000-02-20")
    whole = write_run(tmp_path, tree, train={"epochs": 1, "batch_size": 16})
    for name, hours in (("early", tree.hours[:100]), ("late", tree.hours[100:])):
        for channel in tree.channels:
            for hour in hours:
                target = field_path(tmp_path / name, channel, hour)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(field_path(tree.root, channel, hour), target)
        values = {**tree.data, "root": str(tmp_path / name)}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    for folder, name in itertools.product(("t2m_npy", "u10_npy"), ("together", "early", "late")):
        (tmp_path / name / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(tree.root / folder / "mean_std.json", tmp_path / name / folder)
    values = yaml.safe_load(whole.read_text())
    sets = [str(tmp_path / f"{name}.yaml") for name in ("early", "late")]
    common = {"frames_in": 3, "splits": values["data"]["splits"]}
    values["data"] = {"set": sets, "statistics": str(tmp_path / "together"), **common}
    joined = tmp_path / "joined.yaml"
    joined.write_text(yaml.safe_dump(values))
    write_joined_about(load_config(joined).data)
    for name, path in (("whole", whole), ("joined", joined)):
        assert train_here(path, f"run.name={name}", "data.eval_stride=9") == 0
    one, other = (load_checkpoint(tmp_path / f"checkpoints/{run}/best.ckpt") for run in ("whole", "joined"))
    assert one["spec"] == other["spec"]
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
    assert other["config"]["data"]["parts"]["late"]["root"] == str(tmp_path / "late")
    page = (tmp_path / "log/joined/report.html").read_text(encoding="utf-8")
    assert "data set early" in page

    shutil.move(tmp_path / "late", tmp_path / "elsewhere")
    words = {run: ["--checkpoint", str(tmp_path / f"checkpoints/{run}/best.ckpt")] for run in ("joined", "whole")}
    words = {run: [*word, "--time", TIME, "--out", str(tmp_path / f"forecast_{run}")] for run, word in words.items()}
    with pytest.raises(ValueError, match=r"data.root .*late is not a directory"):
        inference_command(words["joined"])
    assert inference_command([*words["joined"], f"data.parts.late.root={tmp_path / 'elsewhere'}"]) == 0
    assert inference_command(words["whole"]) == 0
    files = [(tmp_path / f"forecast_{run}/forecast+006h.npy").read_bytes() for run in words]
    assert files[0] == files[1]


def test_what_may_change_is_what_resuming_lets_change(make_tree, tmp_path: Path):
    tree = make_tree(tmp_path / "tree", ("t2m",), (8, 16), "2000-01-01", "2000-02-20")
    config = write_run(tmp_path, tree, train={"epochs": 0})
    assert train_here(config, "run.name=mine", "model={name: persistence}") == 0
    content = load_checkpoint(tmp_path / "checkpoints/mine/best.ckpt")
    for key in sorted(content["config"]["data"]):
        value = content["config"]["data"][key]
        override = [f"data.{key}={'null' if value is None else value}"]
        if key in DATA_MAY_CHANGE:
            read = checkpoint_config(content, "best.ckpt", [f"data.cache_dir={tree.data['cache_dir']}", *override])
            assert read.model_dump() == {**content["config"], "run": {**content["config"]["run"], "name": None}}
        else:
            with pytest.raises(ValueError, match=rf"override .data.{key}=.*: a checkpoint carries its own config"):
                checkpoint_config(content, "best.ckpt", override)
    with pytest.raises(ValueError, match="best.ckpt: data.workers = -1"):
        checkpoint_config(content, "best.ckpt", ["data.workers=-1"])


def test_a_checkpoint_does_not_say_where_to_write(make_tree, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """从前的运行名什么都许，照样读得出；缓存不写到检查点说的地方去，除非命令行也这样说。"""
    tree = make_tree(tmp_path / "tree", ("t2m",), (8, 16), "2000-01-01", "2000-02-20")
    config = load_config(write_run(tmp_path, tree)).model_dump()
    content = {"config": {**config, "run": {**config["run"], "name": "../lr=1e-3"}}, "run": "../lr=1e-3"}
    assert checkpoint_config(content, "best.ckpt").data.cache_dir == "tmp"
    assert f"give data.cache_dir={tree.data['cache_dir']}" in caplog.text
    assert checkpoint_config(content, "best.ckpt", ["data.cache_dir=here"]).data.cache_dir == "here"
    with pytest.raises(ValueError, match=r"best.ckpt: its run is called '../lr=1e-3': a name is that of one folder"):
        run_name(content, "best.ckpt")
