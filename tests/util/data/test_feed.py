"""送批：路上的样子到了设备上、留在设备上的一份，都与逐个窗口读的逐位相同；放不下的不开始。"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from tests.engine.runs import checkpoint, losses, train_here, write_run
from tests.models.small import changed as part_by_part
from tests.trees import DAYS, config_of, damage, standardize_files
from tests.util.packing.stores import assert_same, outcomes, pack_small, shuffled_windows, spoil
from util.calendar import parse_time
from util.config import DataConfig
from util.data import resident as residency
from util.data.batches import all_starts, epoch_starts, split_batches
from util.data.dataset import open_data
from util.data.feed import feed

T0 = parse_time("2000-01-01")
CPU = torch.device("cpu")
CHANNELS = ("t2m", "z_level_00", "z_level_01")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # 核少的机器上


@pytest.fixture
def tree(make_tree, tmp_path: Path):
    return make_tree(tmp_path / "tree", CHANNELS, **DAYS)


def resident(config: DataConfig) -> DataConfig:
    return config.model_copy(update={"residency": "device"})


@pytest.mark.parametrize("kind", ["raw", "standardised", "float32", "float16", "bfloat16"])
def test_the_wire_arrives_as_the_same_batch(tree, tmp_path: Path, kind: str):
    """目录树在路上是文件里的数，半精度的存档在路上是半精度。"""
    spoil(tree, 2, 6)
    if kind == "standardised":
        standardize_files(tree)
    config = config_of(tree)
    if kind in ("float32", "float16", "bfloat16"):
        config = pack_small(config, tmp_path / "store", kind)
    data = open_data(config)
    raw = data.windows.reader.wire().raw
    assert raw == (kind == "raw")
    for starts in shuffled_windows(data):
        wire = data.windows.wire(starts)
        assert wire.fields.dtype == (getattr(torch, kind) if kind.endswith("16") else torch.float32)
        if kind == "raw" and wire.valid.all():
            whole = [tree.fields[(np.array(starts) - T0) // 6 + i] for i in range(data.spec.window)]
            assert np.array_equal(wire.fields.numpy(), np.stack(whole, 1))
        assert_same([data.spec.receive(wire, raw)], [data.windows.__getitems__(starts)])


@pytest.mark.parametrize("source", ["tree", "float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(3))
def test_resident_windows_are_the_same(tree, tmp_path: Path, source: str, seed: int):
    """空缺、坏文件、历史里不能有未来：有空缺的窗口也相同。"""
    spoil(tree, seed, 8)
    config = config_of(tree, frames_in=1 + seed)
    if source != "tree":
        config = pack_small(config, tmp_path / "store", source)
    disk = open_data(config)
    there = [starts for starts in windows_of(disk, ("train", "val")) if _readable(disk, starts)]
    data = open_data(resident(config), device=CPU)
    assert data.resident is not None
    assert 0 < data.resident.whole.sum() < data.resident.whole.size
    assert data.resident.holds(data.windows, there, CPU)
    assert_same(list(feed(data, there, CPU)), [disk.windows.__getitems__(starts) for starts in there])


@pytest.mark.parametrize("way", ["disk", "workers", "device", "store"])
def test_longer_windows_are_slices_of_the_series(tree, tmp_path: Path, way: str):
    """滚动训练的窗口：目标三帧，每条读的路都与逐帧取出、接起来的逐位相同。"""
    config = config_of(tree)
    if way == "store":
        config = pack_small(config, tmp_path / "store")
    data = open_data(resident(config) if way == "device" else config, device=CPU)
    data = replace(data, config=data.config.model_copy(update={"workers": int(way == "workers")}))
    starts = epoch_starts(data.segments["train"], data.spec.window, "all", 42, 0, data.spec.window + 2)
    batches = split_batches(starts, 5)
    assert data.resident is None or data.resident.holds(data.windows.with_future(3), batches, CPU)
    for batch, hours in zip(feed(data, batches, CPU, 3), batches, strict=True):
        rows = (np.array(hours)[:, None] - T0) // 6 + np.arange(data.spec.window + 2)
        mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (data.spec.mean, data.spec.std))
        fields = torch.cat([batch.history, batch.future], 1).numpy()
        assert np.array_equal(fields, (tree.fields[rows] - mean) / std)
        assert batch.valid.all() and np.array_equal(batch.time.numpy(), np.array(tree.hours)[rows])


def test_processes_of_one_machine_share_one_copy(tree):
    """头一个填好，第二个接上的就是同一块内存，不再读盘。"""
    made = []

    def first(action):
        made.append(action())
        if len(made) == 1:  # 第二个在头一个放手之前接上
            made.append(open_data(resident(config_of(tree)), device=CPU, once=lambda action: made[0]).resident)
        return made[0]

    one = open_data(resident(config_of(tree)), device=CPU, once=first).resident
    other = made[1]
    assert one is not None and np.array_equal(one.whole, other.whole) and torch.equal(one.fields, other.fields)
    one.fields[0] = 7.0
    assert (other.fields[0] == 7.0).all() and other.fields.data_ptr() != one.fields.data_ptr()


def test_other_windows_come_from_disk(tree):
    """测试的窗口、更长的滚动评测不在设备上。"""
    config = resident(config_of(tree))
    data = open_data(config, device=CPU)
    assert data.resident is not None
    tests = windows_of(data, ("test",))
    assert not data.resident.holds(data.windows, tests, CPU)
    assert_same(list(feed(data, tests, CPU)), [data.windows.__getitems__(starts) for starts in tests])
    longer = [[int(data.segments["val"][-1][0]) - 6 * data.spec.frames_in]]
    assert len(list(feed(data, longer, CPU, frames_out=2))) == 1
    assert open_data(config).resident is None  # 只读一遍的用途


def test_what_does_not_fit_is_refused_with_the_numbers(tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "meminfo").write_text("MemTotal:  99 kB\nMemAvailable:      1 kB\n")
    monkeypatch.setattr(residency, "MEMINFO", tmp_path / "meminfo")
    with pytest.raises(ValueError, match=r"data.residency = device needs 0.00 GB, 0.00 GB are free on cpu"):
        open_data(resident(config_of(tree)), device=CPU)


def test_a_container_has_less_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 3000\ninactive_file 700\n")
    monkeypatch.setattr(residency, "CGROUP", tmp_path)
    assert residency.available_memory() == 5000 - 4000 + 700
    (tmp_path / "memory").mkdir()  # 第 1 版
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("3000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("2500\n")
    (tmp_path / "memory" / "memory.stat").write_text("total_inactive_file 100\n")
    assert residency.available_memory() == 3000 - 2500 + 100
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")  # 没有限
    (tmp_path / "memory.max").write_text("max\n")
    assert residency.available_memory() > 2**20


@pytest.mark.parametrize("source", ["tree", "store"])
def test_training_is_the_same(make_tree, tmp_path: Path, source: str):
    tree = make_tree(tmp_path / "tree", ("t2m",), (8, 16), "2000-01-01", "2000-02-20")
    for hour in (60, 66, 204):
        damage(tree, "t2m", T0 + hour, "removed")
    config = write_run(tmp_path, tree, train={"epochs": 2})
    assert train_here(config, "run.name=disk", "data.max_missing=0.5") == 0
    changes = ["data.residency=device", "data.max_missing=0.5"]
    if source == "store":
        config_tree = DataConfig(**{**tree.data, "frames_in": 3, "splits": _splits(config)})
        pack_small(config_tree, tmp_path / "store")
        changes += ["data.source=store", f"data.store={tmp_path / 'store'}"]
    assert train_here(config, "run.name=device", *changes) == 0
    for split in ("train", "val"):
        assert losses(tmp_path, "device", split) == losses(tmp_path, "disk", split)
    one, other = checkpoint(tmp_path, "disk")["model"], checkpoint(tmp_path, "device")["model"]
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("source", ["tree", "bfloat16"])
@pytest.mark.parametrize("workers", [0, 2])
def test_on_a_gpu(tree, tmp_path: Path, source: str, workers: int):
    spoil(tree, 1, 6)
    config = config_of(tree, workers=workers)
    if source != "tree":
        config = pack_small(config, tmp_path / "store", source)
    device = torch.device("cuda", 0)
    plain = open_data(config)
    batches = windows_of(plain, ("train", "val"))
    expected = [plain.windows.__getitems__(starts) for starts in batches]
    for changed in (config, resident(config)):
        found = list(feed(open_data(changed, device=device), batches, device))
        assert all(part.device == device for batch in found for part in batch.tensors)
        assert_same([part_by_part(batch, Tensor.cpu) for batch in found], expected)


def windows_of(data, splits: tuple[str, ...]) -> list[list[int]]:
    """这些划分的全部窗口，一批两个。"""
    starts = np.concatenate([all_starts(data.segments[split], data.spec.window) for split in splits])
    return split_batches(np.random.default_rng(0).permutation(starts), 2)


def _readable(data, starts: list[int]) -> bool:
    return not isinstance(outcomes(data, [starts])[0], str)


def _splits(path: Path) -> dict:
    return yaml.safe_load(path.read_text())["data"]["splits"]
