"""标准化的判断：原始值、已标准化、两头都像、两头都不像；DataSpec 的换算。"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import CLIMATE
from tests.trees import DAYS, config_of, damage, rewrite, standardize_files
from util.data.dataset import open_data
from util.data.normalize import judge
from util.data.tree_files import field_path

NINE = ("t2m", "tp", "u10", "v10", *(f"{v}_level_00" for v in ("r", "t", "u", "v", "z")))


def set_statistics(root: Path, channel: str, mean: float, std: float) -> None:
    (root / f"{channel}_npy" / "mean_std.json").write_text(json.dumps({"mean": [mean], "std": [std]}))


@pytest.mark.parametrize("variable", list(CLIMATE))
def test_each_variable_is_told_apart(variable: str):
    """量级各异的九个变量：原始的与标准化的样本，即使季节让均值偏半个标准差、方差差一半，也不会认反。"""
    mean, std = CLIMATE[variable]
    for shift, scale in ((0.0, 1.0), (0.5, 1.4), (-0.5, 0.7)):
        assert judge(mean + shift * std, scale * std, mean, std) == "raw"
        assert judge(shift, scale, mean, std) == "standard"


@pytest.mark.parametrize(
    ("measured", "stated", "answer"),
    [
        ((1.1e-4, 4e-4), (1e-4, 4e-4), "raw"),  # 降水：均值近 0，而标准差远小于 1
        ((0.02, 1.01), (1e-4, 4e-4), "standard"),
        ((0.1, 5.8), (-0.05, 5.5), "raw"),  # 风：均值近 0，标准差说了算
        ((0.01, 1.0), (-0.05, 5.5), "standard"),
        ((0.1, 0.9), (0.0, 1.0), "both"),  # 统计量本来就近 0 和 1
        ((0.0, 1.0), (0.3, 2.2), "both"),
        ((278.0, 21.0), (5.0, 21.0), "neither"),  # 摄氏度的 json，开尔文的文件
        ((278.0, 21.0), (278.0, 2.1), "neither"),
        ((299.0, 21.0), (278.0, 21.0), "neither"),  # 均值差一个标准差
        ((1.0, 1.0), (278.0, 21.0), "neither"),
        ((278.0, 0.0), (278.0, 21.0), "neither"),  # 常数场
        ((2e5, 3e3), (2e4, 300.0), "neither"),  # 位势与位势高度
    ],
)
def test_judge(measured: tuple[float, float], stated: tuple[float, float], answer: str):
    assert judge(*measured, *stated) == answer


@pytest.mark.parametrize("standardized", [False, True])
def test_auto_decides_on_nine_channels(make_tree, tmp_path: Path, caplog: pytest.LogCaptureFixture, standardized: bool):
    caplog.set_level(logging.INFO, "ar_pred")
    tree = make_tree(tmp_path / "tree", NINE, **DAYS)
    if standardized:
        standardize_files(tree)
    data = open_data(config_of(tree))
    assert data.spec.standardized is standardized
    word = "already standardised" if standardized else "raw, will be standardised with mean_std.json"
    assert f"standardisation: files are {word} (measured 9 channels)" in caplog.text
    starts = data.segments["train"][0][:20].tolist()  # 送进模型的，两种情形都该是标准化的，而且相同
    fields = data.windows.__getitems__(starts).history.numpy()
    expected = (tree.fields - tree.fields.mean((0, 2, 3), keepdims=True)) / tree.fields.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(fields[:, 0], expected[:20], rtol=1e-3, atol=2e-4)


def test_explicit_choice_is_taken(make_tree, tmp_path: Path):
    tree = make_tree(tmp_path / "tree", ("t2m",), **DAYS)
    assert open_data(config_of(tree, standardize="yes")).spec.standardized is False
    assert open_data(config_of(tree, standardize="no")).spec.standardized is True


def test_a_channel_near_0_and_1_follows_the_others(make_tree, tmp_path: Path):
    tree = make_tree(tmp_path / "tree", ("tp", "t2m"), **DAYS)
    standardize_files(tree)
    set_statistics(tree.root, "tp", 0.0, 1.0)
    assert open_data(config_of(tree)).spec.standardized is True
    set_statistics(tree.root, "t2m", 0.0, 1.0)
    with pytest.raises(ValueError, match="auto cannot decide: mean_std.json holds about mean 0 and std 1 for every"):
        open_data(config_of(tree))
    assert open_data(config_of(tree, standardize="no")).spec.standardized is True


def test_neither_fits_is_refused_with_the_numbers(make_tree, tmp_path: Path):
    tree = make_tree(tmp_path / "tree", ("t2m", "tp"), **DAYS)
    set_statistics(tree.root, "t2m", 6.85, 12.0)  # 摄氏度
    said = (
        r"auto cannot decide \(t2m: neither fits \(measured mean 2[78]\d\.?\d*, std 1\d.*; mean_std.json 6.85, 12\)\)"
    )
    with pytest.raises(ValueError, match=said + ".*set data.standardize to yes"):
        open_data(config_of(tree))


def test_contradicting_channels_are_refused(make_tree, tmp_path: Path):
    tree = make_tree(tmp_path / "tree", ("t2m", "tp", "u10"), **DAYS)
    standardize_files(tree, "u10")
    with pytest.raises(ValueError, match=r"auto cannot decide \(t2m: raw .*; u10: standard .*\)"):
        open_data(config_of(tree))


def test_only_the_training_dates_are_measured(make_tree, tmp_path: Path):
    tree = make_tree(tmp_path / "tree", ("t2m",), **DAYS)
    for hour in tree.hours[24:]:
        rewrite(field_path(tree.root, "t2m", hour), lambda f: f * 100)
    assert open_data(config_of(tree)).spec.standardized is False


def test_bad_files_in_the_sample_are_passed_over(make_tree, tmp_path: Path):
    tree = make_tree(tmp_path / "tree", ("t2m",), **DAYS)
    for hour in tree.hours[:24:2]:
        damage(tree, "t2m", hour, "not a number")
    assert open_data(config_of(tree)).spec.standardized is False


@pytest.mark.parametrize("choice", ["auto", "yes", "no"])
def test_wrong_grid_in_the_config_is_said_at_once(make_tree, tmp_path: Path, choice: str):
    tree = make_tree(tmp_path / "tree", ("t2m",), **DAYS)
    config = config_of(tree, standardize=choice, latitude={"first": 80.0, "step": -10.0, "count": 16})
    said = "t2m: none of the 16 files tried can be used ("
    with pytest.raises(ValueError, match=re.escape(said) + r".*2000-\d{4}\.npy: shape \(4, 8\), expected \(16, 8\)\)"):
        open_data(config)


def test_spec_converts_there_and_back(make_tree, tmp_path: Path):
    tree = make_tree(tmp_path / "tree", ("t2m", "z_level_00"), **DAYS)
    spec = open_data(config_of(tree)).spec
    fields = torch.from_numpy(tree.fields)
    scaled = spec.to_standard(fields)
    assert scaled.mean((0, 2, 3)).abs().max() < 1e-3
    assert (scaled.std((0, 2, 3)) - 1).abs().max() < 1e-2
    torch.testing.assert_close(spec.to_physical(scaled), fields, rtol=1e-6, atol=0)
    assert type(spec).from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
