"""事件的气候：大网格分几遍看，与一遍看完的相同；放不下时少用些时刻，够用为止；坏了的缓存重新估计。"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from engine.evaluation.baselines import fit_baselines
from engine.verification import climate
from engine.verification.climate import affordable, climate_cache, fit_climate, load_climate, tail_size
from engine.verification.settings import Events
from tests.engine.runs import write_run
from util.batch import DataSpec
from util.config import load_config
from util.data.dataset import open_data


@pytest.fixture(scope="module")
def fitted(make_tree, tmp_path_factory):
    """数据与气候态。"""
    folder = tmp_path_factory.mktemp("climate")
    tree = make_tree(folder / "tree", ("t2m", "tp"), (8, 16), "2000-01-01", "2000-02-20")
    config = load_config(write_run(folder, tree), [f"data.cache_dir={folder / 'tmp'}"])
    data = open_data(config.data, folder / "missing.csv")
    return data, fit_baselines(data, config, 16, Fabric(accelerator="cpu"), lambda: None)["climatology"]


def test_several_passes_find_what_one_pass_finds(fitted, monkeypatch, caplog):
    data, normal = fitted
    whole = fit_climate(data, normal, Events(), 16, lambda: None)
    monkeypatch.setattr(
        climate, "MOST_BYTES", 3 * 4 * 16 * (4 * 2 * tail_size(Events().quantiles, whole.times) + whole.times)
    )
    caplog.set_level("INFO")
    parts = fit_climate(data, normal, Events(), 16, lambda: None)
    assert "passes: 3" in caplog.text and parts.times == whole.times
    for one, other in zip(parts[:3], whole[:3], strict=True):
        assert one.shape[-2:] == (8, 16)
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 20, 33, 69, 300])
def test_a_quarter_degree_needs_no_more_memory(channels):
    """721 × 1440：从前 20 个通道是错，33 个永远转下去。"""
    degrees = tuple(np.linspace(90, -90, 721).tolist()), tuple((np.arange(1440) / 4).tolist())
    names, ones = tuple(f"c{i}" for i in range(channels)), (1.0,) * channels
    spec = DataSpec(names, ("1",) * channels, (None,) * channels, *degrees, 2, 1, 6, ones, ones, False)
    for rain in (0, 1):
        count, rows = affordable(spec, rain, Events(), 50_000)
        assert 50 <= count <= 1461 and 1 <= rows <= 721
        held = 4 * rows * 1440 * (4 * channels * tail_size(Events().quantiles, count) + rain * count)
        assert held <= climate.MOST_BYTES
        assert -(-721 // rows) <= climate.MOST_PASSES or count == 50


def test_a_damaged_cache_is_estimated_again(fitted, caplog):
    data, normal = fitted
    cache = climate_cache(data, normal, Events(), 16, lambda: None)
    before, whole = load_climate(cache), cache.read_bytes()
    assert climate_cache(data, normal, Events(), 16, lambda: None).read_bytes() == whole
    for damaged in (whole[: len(whole) // 2], whole.replace(b"quantiles", b"quantileX")):
        cache.write_bytes(damaged)
        assert climate_cache(data, normal, Events(), 16, lambda: None) == cache
        assert "cannot be used, estimated again" in caplog.text
        torch.testing.assert_close(load_climate(cache).quantiles, before.quantiles, rtol=0, atol=0)
        caplog.clear()
