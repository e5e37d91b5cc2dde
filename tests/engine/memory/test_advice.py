"""训练里的估计：开头的一行；内存用尽时的表、放得下的最大的批、退出码 2。"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.memory import advice
from engine.memory.estimate import Estimate, Machine, estimate
from engine.training.preflight import smoke
from tests.engine.runs import checkpoint, train_here, write_run
from util.cli import report_error
from util.config import eval_batch_size, load_config

CPU = torch.device("cpu")
CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp:128] . DefaultCPUAllocator: can't allocate memory: 12 bytes.")
ERRORS = [torch.OutOfMemoryError("CUDA out of memory."), CPU_ERROR, MemoryError()]


@pytest.fixture
def run(make_tree: Any, tmp_path: Path) -> Path:
    tree = make_tree(tmp_path / "tree", ("t2m",), (8, 16), "2000-01-01", "2000-02-20")
    return write_run(tmp_path, tree)


def break_down(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """走到训练的一步就抛 error。"""

    def step(*_: object) -> None:
        raise error

    monkeypatch.setattr("engine.training.loop.train_step", step)


def test_every_training_opens_with_the_line(run: Path, tmp_path: Path) -> None:
    assert train_here(run, "run.name=a", "train.epochs=1", "model.dim=128") == 0
    train_log = tmp_path / "log/a/train.log"
    (line,) = [row for row in train_log.read_text(encoding="utf-8").splitlines() if "memory of a step" in row]
    found = estimate(load_config(run, ["model.dim=128"]), Machine(CPU, "CPU", 1, 0))
    assert " MB (CPU, " in line and "may not fit" not in train_log.read_text(encoding="utf-8")
    assert f" activations {found.parts['activations'] / 1e6:,.0f}, " in line
    assert train_here(run, "run.name=a", "train.epochs=2", "model.dim=128", resume="auto") == 0
    assert train_log.read_text(encoding="utf-8").count("memory of a step") == 2


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_out_of_memory_ends_with_the_table_and_a_batch(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    break_down(monkeypatch, error)
    message = r"^out of memory with train\.batch_size = 4, a step needs .* MB by estimate; try 2 "
    with pytest.raises(ValueError, match=message) as raised:
        train_here(run, "run.name=a")
    assert "\n" not in str(raised.value)
    assert report_error(raised.value) == 2
    text = (tmp_path / "log/a/train.log").read_text(encoding="utf-8")
    assert re.search(r"\n\* +32-true +none +4 ", text) and "largest train.batch_size that fits" in text


def test_other_errors_are_left_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_down(monkeypatch, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train_here(run, "run.name=a")


def test_what_may_not_fit_is_said_beforehand(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, machine = load_config(run), Machine(CPU, "a machine", 10_000_000, 0)
    small = Estimate({"all": 9_000_001}, machine.size)
    monkeypatch.setattr(advice, "estimate", lambda *_: small)
    monkeypatch.setattr(advice, "largest_batch", lambda *_, below: below - 1)
    with caplog.at_level(logging.INFO, "ar_pred"):
        advice.announce(config, machine)
    assert [record.getMessage() for record in caplog.records] == [
        "memory of a step of 4 window(s), estimated: 9 of 10 MB (a machine): all 9",
        "this may not fit; the largest train.batch_size that would: 3",
    ]


def test_auto_is_settled_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """放得下的最大的批定下来，写进 config.yaml 与检查点；续训用它，不再找。"""
    monkeypatch.setattr(advice, "largest_batch", lambda *_: 6)
    auto = ("run.name=a", "train.batch_size=auto")
    assert train_here(run, *auto, "train.epochs=1") == 0
    assert load_config(tmp_path / "log/a/config.yaml").train.batch_size == 6
    assert checkpoint(tmp_path, "a")["config"]["train"]["batch_size"] == 6
    monkeypatch.setattr(advice, "largest_batch", lambda *_: pytest.fail("settled already"))
    assert train_here(run, *auto, "train.epochs=2", resume="auto") == 0
    assert checkpoint(tmp_path, "a")["config"]["train"]["batch_size"] == 6
    with pytest.raises(ValueError, match=r"train.batch_size = 6 must be a multiple of devices x train.accumulate = 4"):
        advice.settled(load_config(run, [*auto, "run.devices=4"]), checkpoint(tmp_path, "a"), Machine(CPU, "", 1, 0))
    with pytest.raises(ValueError, match=r"train.batch_size = 6 in the checkpoint, 4 now"):
        train_here(run, "run.name=a", "train.batch_size=4", "train.epochs=3", resume="auto")
    monkeypatch.setattr(advice, "largest_batch", lambda *_: 0)
    with pytest.raises(ValueError, match=r"^train.batch_size = auto: not even 2 fits, a step needs \d+ of .* MB"):
        train_here(run, "run.name=b", "train.batch_size=auto", "train.accumulate=2")


def test_auto_is_for_trainings(run: Path) -> None:
    config = load_config(run, ["train.batch_size=auto"])
    assert smoke(config) == 0
    with pytest.raises(ValueError, match=r"train.batch_size = auto: only a training settles it; write a number here"):
        eval_batch_size(config)
