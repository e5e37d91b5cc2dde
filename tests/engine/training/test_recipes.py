"""config/published、config/wb2：发表的成绩的任务与训练；缩小了走一步、存、读回、再走一步。"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.training.preflight import smoke
from models import build_config
from tests.engine.runs import ROOT
from util.config import load_config

PUBLISHED, OTHERS = (sorted((ROOT / "config" / folder).glob("*.yaml")) for folder in ("published", "wb2"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", [*PUBLISHED, *OTHERS], ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_recipe_runs_when_small(path: Path, tmp_path: Path) -> None:
    build_config(load_config(path).model, str(path))
    assert smoke(load_config(path, [f"data.cache_dir={tmp_path}"], smoke=True)) == 0


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_the_recipe_of_the_source(path: Path) -> None:
    """2 米气温，12 → 4，全部窗口，批 32，AdamW 1e-4，裁剪 1，早停。"""
    config = load_config(path)
    data, train = config.data, config.train
    assert (data.frames_in, data.frames_out, data.windows, data.eval_stride) == (12, 4, "all", 1)
    assert (list(data.variables), data.splits.test) == (["t2m"], ["2020", "2020"])
    assert (train.batch_size, train.optimizer, train.lr, train.clip_norm) == (32, "adamw", 1e-4, 1.0)
    assert 100 <= train.epochs <= 200 and train.early_stop_epochs == 15
    wanted = ("cosine", 0.01) if "unet" in path.stem else ("plateau", 1e-5)
    assert (train.schedule.name, train.weight_decay) == wanted
