"""检查点的各项：缺一项、类型不对、别的种类，都是一行，说出是哪个文件的哪一项；真的检查点原样通过。"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from util.checkpoint import load_checkpoint, save_checkpoint
from util.files.training_checkpoint import load_training

BEFORE = Path(__file__).resolve().parents[2] / "from_before"
Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize("name", ["ar_pred", "var", "latent_unet", "linear_regression"])
def test_what_was_saved_is_read_as_it_is(name: str) -> None:
    path = BEFORE / f"{name}.ckpt"
    held, read = load_checkpoint(path), load_training(path)
    assert list(read) == list(held)
    assert all(torch.equal(read["model"][key], value) for key, value in held["model"].items())
    assert {key: read[key] for key in ("progress", "config", "spec")} == {
        key: held[key] for key in ("progress", "config", "spec")
    }


def drop(key: str) -> Change:
    return lambda content: content.pop(key)


def put(key: str, value: Any) -> Change:
    return lambda content: content.update({key: value})


def below(section: str, key: str, value: Any) -> Change:
    return lambda content: content[section].update({key: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *(
            (drop(key), f"{key}: ")
            for key in ("run", "config", "spec", "progress", "model", "ema", "optimizer", "random")
        ),
        (drop("scheduler"), "scheduler: "),
        (put("run", 3), "run: input should be a valid string"),
        (put("model", [1]), "model: input should be"),
        (put("model", {"a": 1}), "model.a: input should be an instance of Tensor"),
        (put("ema", {"a": "b"}), "ema.a: "),
        (put("optimizer", []), "optimizer: "),
        (put("optimizer", {"state": {}}), "optimizer.param_groups: field required"),
        (put("optimizer", {"state": {"a": {"step": 1}}, "param_groups": []}), "optimizer.state.a.step: "),
        (put("scheduler", 7), "scheduler: "),
        (put("random", [None]), "random.0: "),
        (lambda content: content["random"][0].pop("torch"), "random.0.torch: field required"),
        (lambda content: content["random"][0].update(numpy=[1]), "random.0.numpy."),
        (put("config", {}), "config.model: field required"),
        (put("config", 3), "config: "),
        (below("config", "model", "cnn"), "config.model: "),
        (below("progress", "step", "many"), "progress.step: "),
        (lambda content: content["progress"].pop("batches"), "progress.batches: field required"),
        (below("spec", "mean", 3), "spec.mean: "),
        (below("spec", "frames_in", None), "spec.frames_in: "),
        (below("spec", "mean", [1.0, 2.0, 3.0]), "spec: assertion failed, per-channel fields disagree in length"),
        (below("spec", "colour", 1), "spec.colour is unknown here; a newer version wrote it"),
        (put("first_stage", {"path": 1}), "first_stage.path: "),
        (put("windows", 1), "windows: "),
        (put("shards", "../../x"), "shards = '../../x': not the name of a folder beside it"),
        (put("shards", 3), "shards = '3': not the name"),
        (put("shards", "last-0123abcd.shards"), "which is not beside it"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, change: Change, said: str) -> None:
    content = load_checkpoint(BEFORE / "ar_pred.ckpt")
    change(content)
    save_checkpoint(tmp_path / "x.ckpt", content)
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        load_training(tmp_path / "x.ckpt")
    assert str(tmp_path / "x.ckpt") in str(caught.value) and said in str(caught.value), str(caught.value)


def test_a_baseline_is_not_a_training(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "x.ckpt", {"model": {}})
    with pytest.raises(ValueError, match="x.ckpt holds a baseline, not a training; name a checkpoints/RUN/best.ckpt"):
        load_training(tmp_path / "x.ckpt")
    for other in ([1, 2], {"format": 99}):
        torch.save(other, tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match="x.ckpt: not an ar_pred checkpoint of format 1 or 2"):
            load_training(tmp_path / "x.ckpt")
