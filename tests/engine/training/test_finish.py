"""训练的收尾里可有可无的几样（图、报告、W&B）全坏了：各一行警告，成绩与检查点照样在，退出码 0。"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from engine.evaluation import evaluate as evaluation
from engine.training import finish as finishing
from engine.training import run as opening
from tests.engine.runs import train_here, write_run
from tests.holding import held_elsewhere
from util import atomic
from util.logger import WandbRun


class BrokenWandb:
    """什么都抛，每次都不同。"""

    def log(self, *_: Any, **__: Any) -> None:
        raise TypeError("not a number")

    def finish(self) -> None:
        raise RuntimeError("the service is gone")


def broken(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.fixture(scope="module")
def config(make_tree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tree = make_tree(folder / "tree", ("t2m",), (4, 8), "2000-01-01", "2000-02-20")
    return write_run(folder, tree, train={"epochs": 1, "batch_size": 30}, log={"figures": 1})


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("the page is too large")])
def test_what_is_optional_never_ends_a_training(
    config: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    name, folder = type(error).__name__, config.parent
    monkeypatch.setattr(Figure, "savefig", broken(RuntimeError("no font")))
    for module in (evaluation, finishing):
        monkeypatch.setattr(module, "write_report", broken(error))
    monkeypatch.setattr(opening, "open_wandb", lambda *_: WandbRun(BrokenWandb(), logging.getLogger("ar_pred")))
    assert train_here(config, f"run.name={name}") == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    goes_on = "failed, the run goes on without it"
    assert [text for text in warnings if goes_on in text] == [
        f"W&B {goes_on}: TypeError: not a number",
        f"the figure of the curves {goes_on}: RuntimeError: no font",
        f"the report with the figures of the scores {goes_on}: {name}: {error}",
        f"the figures of samples {goes_on}: RuntimeError: no font",
    ]
    assert (folder / f"checkpoints/{name}/best.ckpt").is_file()
    assert json.loads((folder / f"log/{name}/metrics.json").read_text())["test_loss"] > 0
    assert json.loads((folder / f"log/{name}/test/metrics.json").read_text())["scores"]
    log = (folder / f"log/{name}/train.log").read_text()
    assert "Traceback (most recent call last):" in log and "RuntimeError: no font" in log


def test_a_page_that_cannot_be_made_is_a_warning(
    config: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(finishing, "make_page", broken(KeyError("facts")))
    assert train_here(config, "run.name=no-page") == 0
    warning = "the report with the figures of the scores failed, the run goes on without it: KeyError: 'facts'"
    assert warning in caplog.text
    assert (config.parent / "log/no-page/metrics.json").is_file()
    assert (config.parent / "log/no-page/figures/curves.png").is_file()


def test_the_scores_wait_for_an_evaluation_there(
    config: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """evaluate.py --out log/RUN/test 还在写：收尾等它，不与它写同一个文件夹。"""
    place = config.parent / "log/waits/test"
    with held_elsewhere(place) as holder:
        monkeypatch.setattr(atomic.time, "sleep", lambda _: holder.communicate())
        assert train_here(config, "run.name=waits") == 0
    assert re.search(rf"{place} is in use by process {holder.pid} on .*; waiting for it", caplog.text)
    assert (place / "metrics.json").is_file() and not (place / ".lock").exists()
