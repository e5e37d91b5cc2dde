"""气候态的缓存：训练时读得到的每个文件都在键里；坏了的缓存当作没有。"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from engine.evaluation import baselines
from engine.evaluation.baselines import fit_baselines
from engine.one_pass import fit_one_pass, training_fingerprint
from tests.holding import two_at_once
from tests.trees import DAYS, config_of, damage
from util.calendar import parse_time
from util.config import DataConfig, RunConfig
from util.data.dataset import open_data
from util.data.tree_files import field_path, write_field
from util.training_config import TrainConfig

T0 = parse_time("2000-01-01")
TRAINING = range(T0, T0 + 6 * 24, 6)
TIMES = T0 + 6 * torch.arange(4)[None]  # 末一帧是 18 时


@pytest.fixture
def tree(make_tree: Any, tmp_path: Path) -> Any:
    return make_tree(tmp_path / "tree", **DAYS)


def climatology(config: DataConfig) -> np.ndarray:
    """18 时的气候态 (C, H, W)，标准化；经过缓存。"""
    run = RunConfig(data=config, model={"name": "persistence"}, train=TrainConfig(epochs=0, batch_size=1))
    models = fit_baselines(open_data(config), run, 4, Fabric(accelerator="cpu", devices=1))
    return models["climatology"].forecast(torch.zeros(1, 3, 2, 4, 8), TIMES)[0, 0, 0].numpy()


def caches(config: DataConfig) -> list[Path]:
    return sorted(Path(config.cache_dir).glob("climatology-*"))


@pytest.mark.parametrize("hour", [TRAINING[3], TRAINING[7], TRAINING[-1]])
def test_one_repaired_file_is_noticed(tree: Any, hour: int) -> None:
    """一个训练文件坏了又修好：用的是好的数的平均，与没有坏过的相同。"""
    config = config_of(tree, standardize="no")
    path = field_path(tree.root, "t2m", hour)
    right = np.load(path)
    write_field(path, np.full_like(right, 1e7))
    broken = climatology(config)
    write_field(path, right)
    assert (climatology(config) == climatology(config)).all() and len(caches(config)) == 2
    targets = [i for i, h in enumerate(tree.hours) if h in TRAINING[3:] and h % 24 == 18]  # 作过目标的
    mean = tree.fields[targets].mean(0, dtype=np.float64)
    np.testing.assert_allclose(climatology(config), mean, rtol=1e-5)
    assert (abs(broken[0] - mean[0]).max() > 1e5) == (hour % 24 == 18)


def test_every_file_that_is_read_counts_and_no_other(tree: Any) -> None:
    """抽样时刻的每一个、空缺两侧的逐小时邻居；验证段的、别的小时的不算。"""
    config = config_of(tree)
    gap = TRAINING[9]
    damage(tree, "t2m", gap, "removed")
    for hour in (gap - 2, gap + 1, gap + 2, gap + 7):  # 两侧最近的是 gap - 2 与 gap + 1
        write_field(field_path(tree.root, "t2m", hour), tree.fields[0, 0])
    first = training_fingerprint(open_data(config))

    def touched(channel: str, hour: int) -> bool:
        path = field_path(tree.root, channel, hour)
        before = path.stat()
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        changed = training_fingerprint(open_data(config)) != first
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return changed

    read = [("z_level_00", hour) for hour in TRAINING] + [("t2m", hour) for hour in TRAINING if hour != gap]
    assert all(touched(*one) for one in [*read, ("t2m", gap - 2), ("t2m", gap + 1)])
    assert not any(touched("t2m", hour) for hour in (gap + 2, gap + 7, T0 + 7 * 24))
    assert training_fingerprint(open_data(config)) == first


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"x" * 100])
def test_an_unreadable_cache_counts_as_absent(tree: Any, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(tree)
    right = climatology(config)
    (cache,) = caches(config)
    cache.write_bytes(content)
    assert (climatology(config) == right).all()
    assert "cannot be used, fitted again" in caplog.text
    assert caches(config) == [cache] and cache.stat().st_size > 1000


def test_two_fit_at_once(tree: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """两个进程同时要，还没有：一个拟合，一个等着用。"""
    config = config_of(tree)
    alone = climatology(config.model_copy(update={"cache_dir": str(tmp_path / "alone")}))
    fits = tmp_path / "fits"

    def counted(*arguments: Any) -> None:
        with fits.open("a") as file:
            file.write("x")
        fit_one_pass(*arguments)

    monkeypatch.setattr(baselines, "fit_one_pass", counted)

    def fit() -> None:
        assert (climatology(config) == alone).all()

    two_at_once(fit)
    assert fits.read_text() == "x"
    assert len(caches(config)) == 1 and not list(Path(config.cache_dir).glob(".*"))
    fit()
