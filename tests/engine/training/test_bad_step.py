"""损失不是有限值的一步：停在它之前，说怎样接着训练，照着做走得下去；重走得出同样的数；train.skip_nonfinite 跳过它。"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch

from engine.studies import replay
from engine.training import loop
from engine.training.state import train_step
from tests.engine.runs import checkpoint, losses, train_here, write_run

pytestmark = pytest.mark.usefixtures("unrendered")
DROPOUT = {"dropout": 0.1}


@pytest.fixture
def config(make_tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """一轮 8 步，收尾另有测试。"""
    monkeypatch.setattr(loop, "finish", lambda run: None)
    tree = make_tree(tmp_path / "tree", ("t2m", "u10"), (8, 16), "2000-01-01", "2000-02-20")
    return write_run(tmp_path, tree, model=DROPOUT, train={"epochs": 1})


@pytest.fixture
def bad_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[Collection[int]], None]:
    """这几步（从 1 数）的输入里有一个无穷大。"""

    def spoil(steps: Collection[int]) -> None:
        def walk(fabric, state, config, batches):
            if state.progress.step + 1 in steps:
                batches[0].history[0, 0, 0, 0, 0] = math.inf
            return train_step(fabric, state, config, batches)

        monkeypatch.setattr(loop, "train_step", walk)

    return spoil


def advice(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    """日志里的命令，从 word 起的各个词。"""
    (line,) = [text for text in caplog.messages if word in text]
    return shlex.split(line[line.index("python ") :].split(";")[0])


def test_the_layer_is_named(config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys) -> None:
    with pytest.raises(ValueError, match=r"not finite at step 2 \(epoch 1, batch 2; windows from 2000-01-.*no weights"):
        train_here(config, "run.name=bad", "train.lr=1e30", "train.accumulate=2")
    words = advice(caplog, "walks it again")
    assert words[:3] == ["python", "-m", "engine.studies.replay"]
    assert replay.main([words[3]]) == 0
    said = capsys.readouterr().out
    assert "step 2 of bad again: loss " in said and "first layer: " in said
    assert "weights: finite, at most 1e+30" in said
    kept = checkpoint(tmp_path, "bad", "bad-step-2")
    assert kept["optimizer"] is None and kept["progress"]["step"] == 1 == len(losses(tmp_path, "bad"))


def test_what_it_says_works(config: Path, tmp_path: Path, bad_at, caplog: pytest.LogCaptureFixture, capsys) -> None:
    """没有弄坏输入时，重走的损失就是没停过的训练的，dropout 也相同；照它说的起一个新的运行，走得完。"""
    train_here(config, "run.name=whole")
    bad_at({5})
    with pytest.raises(ValueError, match="step 5 "):
        train_here(config, "run.name=bad")
    bad_at(())
    assert replay.main([str(tmp_path / "checkpoints/bad/bad-step-5.ckpt")]) == 1
    said = capsys.readouterr().out
    assert f"step 5 of bad again: loss {losses(tmp_path, 'whole')[4][1]:.6g}," in said
    assert "here the step is finite" in said
    again = advice(caplog, "lower rate")
    assert again[2:4] == ["--config", str(tmp_path / "log/bad/config.yaml")]
    assert again[4:] == [
        "run.name=bad-again",
        f"train.init={tmp_path / 'checkpoints/bad/last.ckpt'}",
        "train.lr=0.0001",
    ]
    assert train_here(config, *again[4:]) == 0
    assert advice(caplog, "leave that step out")[-1] == "train.skip_nonfinite=1"


def test_bad_steps_are_left_out(config: Path, tmp_path: Path, bad_at, caplog: pytest.LogCaptureFixture) -> None:
    """多过 N 步才停；停下时是那一步之前的，接着训练认得跳过了几步。"""
    bad_at({3, 5})
    assert train_here(config, "run.name=skips", "train.skip_nonfinite=2") == 0
    assert [step for step, _ in losses(tmp_path, "skips")] == [1, 2, 4, 6, 7, 8]
    assert "left out, 2 of train.skip_nonfinite = 2" in caplog.text
    assert checkpoint(tmp_path, "skips")["progress"]["skipped"] == 2
    with pytest.raises(ValueError, match="not finite at step 5 "):
        train_here(config, "run.name=stops", "train.skip_nonfinite=1")
    stopped = checkpoint(tmp_path, "stops")["progress"]
    assert (stopped["step"], stopped["skipped"]) == (4, 1)
    with pytest.raises(ValueError, match="not finite at step 5 "):
        train_here(config, "run.name=stops", "train.skip_nonfinite=1", resume="auto")
    assert train_here(config, "run.name=stops", "train.skip_nonfinite=2", resume="auto") == 0
    one, two = (checkpoint(tmp_path, name)["model"] for name in ("skips", "stops"))
    assert all(torch.equal(one[name], two[name]) for name in one)
