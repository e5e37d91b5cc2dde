"""几个数据集作为一个：接起来的、并起来的与本来就是一棵树的逐位相同；对不上的一行说清。"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.trees import DAYS, SPLITS, config_of, damage, standardize_files
from tests.util.packing.stores import compare, pack_small
from util.calendar import parse_time
from util.commands.statistics import main as statistics_command
from util.config import DataConfig, load_config
from util.data.dataset import open_data
from util.data.tree_files import field_path, read_mean_std, write_field, write_mean_std
from util.variables import channel_folder

CHANNELS = ("t2m", "z_level_00", "z_level_01")
T0 = parse_time("2000-01-01")


@pytest.fixture
def tree(make_tree, tmp_path: Path):
    return make_tree(tmp_path / "whole", CHANNELS, **DAYS)


def take(tree: Any, root: Path, channels: Sequence[str], hours: Sequence[int]) -> None:
    """从整棵树里抄出一部分；统计量是它自己那些时刻的。"""
    for channel in channels:
        for hour in hours:
            source = field_path(tree.root, channel, hour)
            if source.is_file():
                (target := field_path(root, channel, hour)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
        values = np.stack([tree.fields[tree.hours.index(h), tree.channels.index(channel)] for h in hours])
        write_mean_std(root, channel, float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64)))


def run_file(tree: Any, folder: Path, sets: dict[str, dict[str, Any]], **changes: Any) -> Path:
    """各数据集一份 YAML，和用它们的运行 YAML。"""
    common = {**tree.data, "splits": SPLITS, "max_missing": 0.5, "pressure_hpa": [50.0, 1000.0]}
    paths = []
    for name, values in sets.items():
        values = {key: value for key, value in {**common, **values}.items() if value is not None}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"root": str(folder / name), **values}))
        paths.append(str(folder / f"{name}.yaml"))
    run = {"data": {"set": paths, "frames_in": 3, **changes}, "model": {"name": "persistence"}}
    (folder / "run.yaml").write_text(yaml.safe_dump({**run, "train": {"epochs": 0, "batch_size": 2}}))
    return folder / "run.yaml"


def in_time(tree: Any, folder: Path, **changes: Any) -> Path:
    """前七天在 a，第六天起在 b：两天重叠；统计量合起来算好。"""
    take(tree, folder / "a", CHANNELS, tree.hours[:28])
    take(tree, folder / "b", CHANNELS, tree.hours[20:])
    path = run_file(tree, folder, {name: {"root": str(folder / name)} for name in "ab"}, **changes)
    return path


def joint_statistics(tree: Any, folder: Path) -> Path:
    """in_time，连同合起来的统计量；整棵树也用它们。"""
    path = in_time(tree, folder, statistics=str(folder / "together"))
    assert statistics_command(["--config", str(path), "--workers", "1", "--write"]) == 0
    for channel in CHANNELS:
        write_mean_std(tree.root, channel, *read_mean_std(folder / "together", channel))
    return path


def test_statistics_are_of_all_the_training_dates(tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """NumPy 一次算的；不是头一个数据集的。划分取得训练日期跨过两个数据集。"""
    splits = {"train": ["2000-01-01", "2000-01-08"], "val": ["2000-01-09", "2000-01-10"], "test": SPLITS["test"]}
    splits["test"] = ["2000-01-11", "2000-01-12"]
    path = in_time(tree, tmp_path, statistics=str(tmp_path / "together"), splits=splits)
    config = load_config(path).data
    with pytest.raises(ValueError, match=r"data.statistics: no .*data_sets.json; python dataset.py statistics"):
        open_data(config)
    words = ["--config", str(path), "--workers", "1", "--write"]
    assert statistics_command([*words, "--tendency"]) == 0
    for c, channel in enumerate(CHANNELS):
        values = tree.fields[:32, c].astype(np.float64)
        found = json.loads((tmp_path / "together" / channel_folder(channel) / "mean_std.json").read_text())
        np.testing.assert_allclose((found["mean"][0], found["std"][0]), (values.mean(), values.std()), rtol=1e-12)
        np.testing.assert_allclose(found["tendency_std"][0], np.diff(values, axis=0).std(), rtol=1e-12)
    assert open_data(config).spec.mean[0] == read_mean_std(tmp_path / "together", "t2m")[0]
    with pytest.raises(ValueError, match="exists already; give --overwrite"):
        statistics_command(words)
    shorter = config.splits.model_copy(update={"train": ["2000-01-01", "2000-01-07"]})
    with pytest.raises(ValueError, match="the statistics there are of .*2000-01-08.*wanted are those of .*2000-01-07"):
        open_data(config.model_copy(update={"splits": shorter}))


def test_joined_in_time_is_the_whole_tree(tree, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """说明、段、每一个窗口逐位相同：缺的、坏的、空缺正在接缝上的都有；打成一个存档也相同。"""
    caplog.set_level(logging.INFO, "ar_pred")
    damage(tree, "t2m", tree.hours[4], "removed")
    damage(tree, "z_level_00", tree.hours[31], "not a number")
    for hour in tree.hours[27:29]:
        damage(tree, "z_level_01", hour, "removed")
    config = load_config(joint_statistics(tree, tmp_path)).data
    whole = config_of(tree)
    single, joined = compare(whole, config)
    assert joined.spec == single.spec
    assert "32 fields are in several data sets" not in caplog.text
    assert "data set a: 2000-01-01T00 to 2000-01-07T18" in caplog.text
    assert "train: fields from {'a': 71, 'b': 0}" in caplog.text
    packed = pack_small(config, tmp_path / "store")
    compare(whole, packed)


def test_merged_in_channels(tree, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """通道各在一处，统计量各用各的；次序由运行 YAML 的 variables 定。"""
    take(tree, tmp_path / "upper", CHANNELS[1:], tree.hours)
    take(tree, tmp_path / "surface", CHANNELS[:1], tree.hours)
    sets = {
        "upper": {"variables": {"z": "all"}, "root": str(tmp_path / "upper")},
        "surface": {"variables": {"t2m": "single"}, "root": str(tmp_path / "surface"), "pressure_hpa": None},
    }
    config = load_config(run_file(tree, tmp_path, sets)).data
    assert open_data(config).spec.channels == ("z_level_00", "z_level_01", "t2m")
    again = load_config(run_file(tree, tmp_path, sets, variables={"t2m": "single", "z": ["level_01"]})).data
    compare(config_of(tree, variables={"t2m": "single", "z": ["level_01"]}), again)


def as_stores(config: DataConfig, folder: Path) -> DataConfig:
    """各数据集先打成存档。"""
    parts = {}
    for name, part in config.part_configs().items():
        pack_small(part, folder / f"{name}_store")
        parts[name] = config.parts[name].model_copy(update={"source": "store", "store": str(folder / f"{name}_store")})
    return config.model_copy(update={"parts": parts})


def test_stores(tree, tmp_path: Path):
    """并通道的存档与树相同；树与存档不混着读；接起来的存档，统计量不同的不读。"""
    take(tree, tmp_path / "upper", CHANNELS[1:], tree.hours)
    take(tree, tmp_path / "surface", CHANNELS[:1], tree.hours)
    sets = {"surface": {"variables": {"t2m": "single"}}, "upper": {"variables": {"z": "all"}}}
    sets = {name: {**values, "root": str(tmp_path / name)} for name, values in sets.items()}
    config = load_config(run_file(tree, tmp_path, sets)).data
    stores = as_stores(config, tmp_path)
    compare(config_of(tree), stores)
    mixed = config.model_copy(update={"parts": {**config.parts, "upper": stores.parts["upper"]}})
    with pytest.raises(ValueError, match="data.set: surface, upper are trees and stores"):
        open_data(mixed)


@pytest.mark.parametrize("same", [True, False])
def test_stores_joined_in_time(tree, tmp_path: Path, same: bool):
    for name, hours in (("a", tree.hours[:28]), ("b", tree.hours[20:])):
        take(tree, tmp_path / name, CHANNELS, hours)
        for channel in CHANNELS if same else ():
            write_mean_std(tmp_path / name, channel, *read_mean_std(tree.root, channel))
    early = ["2000-01-01", "2000-01-04"], ["2000-01-05", "2000-01-05"], ["2000-01-06", "2000-01-07"]
    late = ["2000-01-06", "2000-01-07"], ["2000-01-08", "2000-01-09"], SPLITS["test"]
    config = load_config(run_file(tree, tmp_path, {name: {"root": str(tmp_path / name)} for name in "ab"})).data
    parts = {}
    for name, part in config.part_configs().items():
        days: dict[str, Any] = dict(zip(("train", "val", "test"), early if name == "a" else late, strict=True))
        splits = part.splits.model_copy(update=days)
        pack_small(part.model_copy(update={"splits": splits}), tmp_path / f"{name}_store")
        parts[name] = config.parts[name].model_copy(
            update={"source": "store", "store": str(tmp_path / f"{name}_store")}
        )
    joined = config.model_copy(update={"parts": parts})
    if same:
        compare(config_of(tree), joined)
    else:
        with pytest.raises(ValueError, match=r"t2m: mean, std are .* in a, .* in b; they are read as one"):
            open_data(joined)


def test_overlaps_are_compared(tree, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "ar_pred")
    config = load_config(joint_statistics(tree, tmp_path)).data
    open_data(config)
    said = "24 fields are in several data sets, with equal values; the first is read"
    assert said in caplog.text
    hour = tree.hours[22]
    path = field_path(tmp_path / "b", "z_level_00", hour)
    write_field(path, np.load(path) + 1)
    with pytest.raises(
        ValueError, match=r"1 of 24 fields .* differ, first z_level_00 at 2000-01-06T12 in a and b; remove it from one"
    ):
        open_data(config)
    path.unlink()
    open_data(config)


def refused(tree: Any, folder: Path, message: str, sets: dict[str, dict[str, Any]], **changes: Any) -> None:
    with pytest.raises(ValueError, match=message):
        open_data(load_config(run_file(tree, folder, sets, **changes)).data)


def test_what_does_not_fit(tree, tmp_path: Path):
    in_time(tree, tmp_path)
    a, b = ({"root": str(tmp_path / name)} for name in "ab")
    refused(
        tree, tmp_path, "t2m: mean, std are .* in a, .* in b; they are read as one: set data.stat", {"a": a, "b": b}
    )
    grid = {"latitude": {"first": 60.0, "step": -40.0, "count": 4}}
    refused(tree, tmp_path, "data.latitude = .* in a, .* in b; data sets .* must agree$", {"a": a, "b": {**b, **grid}})
    refused(tree, tmp_path, "data.latitude", {"a": a, "b": {**b, **grid}}, latitude=tree.data["latitude"])
    late = {**b, "first_hour": 3}
    refused(tree, tmp_path, "data.first_hour = 0 in a, 3 in b; .* or the run YAML decides", {"a": a, "b": late})
    units = [{"units": {"t2m": unit}} for unit in ("K", "degC")]
    refused(tree, tmp_path, "data.units", {"a": {**a, **units[0]}, "b": {**b, **units[1]}})
    refused(tree, tmp_path, "data.variables.tp = single: not in any", {"a": a, "b": b}, variables={"tp": "single"})
    refused(
        tree,
        tmp_path,
        "no data set of data.set holds t2m in that year|needs? 1999",
        {"a": a, "b": b},
        splits={**SPLITS, "train": ["1999-12-01", "2000-01-06"]},
    )
    refused(tree, tmp_path, "root = 'x': there are several data sets, .*data.parts.a.root", {"a": a, "b": b}, root="x")
    refused(tree, tmp_path, "statistics is for several data sets", {"a": a}, statistics="x")
    run = run_file(tree, tmp_path, {"a": a, "b": b})
    with pytest.raises(ValueError, match="data.set names several data sets; data.statistics=FOLDER says where"):
        statistics_command(["--config", str(run), "--workers", "1", "--write"])


def test_standardised_files_need_common_statistics(tree, tmp_path: Path):
    """各自标准化过的不能接起来；用同样两个数标准化的可以。"""
    whole = [read_mean_std(tree.root, channel) for channel in CHANNELS]
    standardize_files(tree)
    path = in_time(tree, tmp_path, statistics=str(tmp_path / "together"))
    with pytest.raises(ValueError, match="t2m: the files are standardised already"):
        statistics_command(["--config", str(path), "--workers", "1", "--write"])
    for name in "ab":
        for channel, pair in zip(CHANNELS, whole, strict=True):
            write_mean_std(tmp_path / name, channel, *pair)
    config = load_config(path).data.model_copy(update={"statistics": None})
    single, joined = compare(config_of(tree), config)
    assert joined.spec.standardized
    assert joined.spec == single.spec


def test_where_they_are_can_be_overridden(tree, tmp_path: Path):
    path = in_time(tree, tmp_path)
    (tmp_path / "b").rename(tmp_path / "moved")
    config = load_config(path, [f"data.parts.b.root={tmp_path / 'moved'}"]).data
    assert config.roots == [str(tmp_path / "a"), str(tmp_path / "moved")]
    assert list(config.parts) == ["a", "b"]
    assert DataConfig(**json.loads(json.dumps(config.model_dump()))) == config  # 检查点里存的
