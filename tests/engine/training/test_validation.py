"""验证损失旁边总有持续性预报的：与 NumPy 逐个窗口算的相同，只算一次；三分之一走完还没有好过它，说一句。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.objective import Objective
from engine.progress import Progress
from engine.training import loop
from engine.training.validation import baseline_losses
from models import build_model
from tests.engine.runs import SMALL_MODEL, train_here, write_run
from tests.models.small import make_model, small_spec
from util.checkpoint import load_checkpoint
from util.config import load_config
from util.data.batches import all_starts
from util.data.dataset import open_data
from util.logger import read_metrics


@pytest.fixture
def tree_run(make_tree, tmp_path):
    """写一份运行 YAML 的函数。"""
    tree = make_tree(tmp_path / "tree", ("t2m", "u10"), (8, 16), "2000-01-01", "2000-02-20")
    return lambda **changes: write_run(tmp_path, tree, **changes)


def test_persistence_stands_beside_and_is_measured_once(tree_run, tmp_path, caplog, monkeypatch) -> None:
    caplog.set_level("INFO")
    calls = []
    measured = loop.baseline_losses
    monkeypatch.setattr(loop, "baseline_losses", lambda *given: calls.append(1) or measured(*given))
    config = tree_run(train={"epochs": 3, "lr": 1e-9})
    options = ("run.name=slow", "data.eval_stride=3")
    assert train_here(config, *options) == 0
    assert train_here(config, *options, "train.epochs=4", resume="auto") == 0
    assert len(calls) == 1

    data = open_data(load_config(str(config), ["data.eval_stride=3"]).data)
    errors = []
    for start in all_starts(data.segments["val"], data.spec.window, 3):
        batch = data.windows.__getitems__([start])
        changed = batch.future[0, 0].double().numpy() - batch.history[0, -1].double().numpy()  # (C, H, W)
        good = batch.valid[0, -1].numpy()
        errors += [np.mean(field**2) for field in changed[good]]
    rows = [row for row in read_metrics(tmp_path / "log/slow/metrics.csv") if row.name == "persistence"]
    assert [row.epoch for row in rows] == [0, 1, 2, 3]
    assert [row.value for row in rows] == pytest.approx([np.mean(errors)] * 4, rel=1e-5)
    warned = [record.message for record in caplog.records if "a third of the training is over" in record.message]
    assert len(warned) == 1
    assert "try model.predict=tendency and model.last_group_share=0.9, or another train.lr" in warned[0]
    assert warned[0].endswith("what helped is in docs/models.md (AR_pred: docs/ar_pred.md)")

    # 气候态要拟合：头一次训练末了的评测拟合、存下了，下一次才知道
    assert not [row for row in read_metrics(tmp_path / "log/slow/metrics.csv") if row.name == "climatology"]
    assert train_here(config, "run.name=next", "data.eval_stride=3", "train.epochs=1") == 0
    (cache,) = Path(data.config.cache_dir).glob("climatology-*.ckpt")
    climatology: Any = build_model({"name": "climatology"}, data.spec)
    climatology.load_state_dict(load_checkpoint(cache)["model"])
    errors = []
    for start in all_starts(data.segments["val"], data.spec.window, 3):
        batch = data.windows.__getitems__([start])
        wrong = (climatology.forecast(batch.history, batch.time)[0, 0, 0] - batch.future[0, 0]).double().numpy()
        errors += [np.mean(field**2) for field in wrong[batch.valid[0, -1].numpy()]]
    (row,) = (row for row in read_metrics(tmp_path / "log/next/metrics.csv") if row.name == "climatology")
    assert row.value == pytest.approx(np.mean(errors), rel=1e-5)


@pytest.mark.parametrize(
    ("epoch", "best", "persistence", "said"),
    [(2, 0.5, 0.4, False), (3, 0.5, 0.4, True), (4, 0.5, 0.4, False), (3, 0.3, 0.4, False), (3, 0.5, None, False)],
)
def test_said_at_the_first_validation_after_a_third(tree_run, epoch, best, persistence, said) -> None:
    config = load_config(str(tree_run()), ["train.epochs=10"])
    assert bool(loop.no_better(config, Progress(epoch=epoch, best=best, persistence=persistence))) == said


def test_masked_reconstruction_alone_is_not_compared() -> None:
    spec = small_spec()
    model = make_model({**SMALL_MODEL, "grouping": {"order": "h w t", "size": 4}}, spec)
    nothing: Any = None
    assert baseline_losses(model, Objective(), nothing, nothing, nothing, nothing) == {}
