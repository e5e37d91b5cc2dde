"""估计的内存：与真的分配过的对得上；每份 YAML 都估得出；放得下的最大的批与逐个试的相同。"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from engine.commands import train_command
from engine.imagined import imagined_spec, random_batch
from engine.memory.estimate import FRAGMENTATION, Estimate, Machine, changed, estimate, resident_bytes
from engine.memory.fitting import epoch_windows, largest_batch
from engine.memory.live import KINDS, LARGE, LiveTensors
from engine.memory.step import step_peak
from engine.memory.table import memory_line
from engine.reference.configs import listed
from engine.training.state import build_state, train_step
from models import build_model
from tests.engine.runs import ROOT
from util.config import DataConfig, RunConfig, load_config
from util.data.dataset import open_data

CPU = torch.device("cpu")
CONFIGS = listed(".")
EMPTY = Machine(CPU, "a machine", 10**12, 0)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


# 只有 AVX2 的处理器，oneDNN 没有 bf16 的卷积，ATen 展开成矩阵乘，另要一块估计里没有的缓冲区
HALF = ("train.precision=bf16-mixed",) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ()


def small(name: str, *changes: str) -> RunConfig:
    return load_config(ROOT / "config" / f"{name}.yaml", ["data.workers=0", "train.preflight=false", *changes], True)


def allocated(config: RunConfig) -> int:
    """真的训练两步，分配器手里最多时有几字节：由 torch.profiler 记的每一次要与还数出来。"""
    fabric = Fabric(accelerator="cpu", devices=1, precision=config.train.precision)
    spec, size = imagined_spec(config.data), config.train.windows // config.train.accumulate
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        state = build_state(fabric, config, spec, total_steps=1_000_000)
        state.progress.step = state.total_steps - 1  # 由粗到细的模型到这时是全部的尺度
        batches = [random_batch(spec, size) for _ in range(config.train.accumulate)]
        for _ in range(2):
            train_step(fabric, state, config, batches).terms()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()  # type: ignore[attr-defined]
            most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("quickstart", ("train.accumulate=2", "train.ema_decay=0.9")),
        ("pixel_unet", ()),
        ("cnn", HALF),  # 有 BatchNorm：改过的 buffer 另留一份
        ("var", ()),
    ],
)
def test_tensors_are_those_of_a_real_step(name: str, changes: tuple[str, ...]) -> None:
    config = small(name, *changes)
    found = estimate(config, EMPTY)
    tensors = found.total - found.parts["framework"] - found.parts["fragmentation"]
    assert tensors == pytest.approx(allocated(config), rel=0.03)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_config_is_estimated(path: Path) -> None:
    config, before = load_config(path, smoke=True), torch.random.get_rng_state()
    peak = step_peak(config.model, imagined_spec(config.data), config.train, 1)
    assert peak.sizes["batch"] > 0
    assert 2 * peak.trainable <= peak.sizes["optimizer"] <= 2.1 * peak.trainable  # Adam 的两个矩，各参数另有一个步数
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_saved_for_the_backward_is_counted_once() -> None:
    """y = (relu(x W))²：relu 的输出给两处用，只算一份；视图不另算；参数不是激活。"""
    with FakeTensorMode(), LiveTensors() as live:
        x, w = torch.randn(8, 16), torch.randn(16, 32, requires_grad=True)
        live.mark("parameters", [w])
        live.mark("batch", [x])
        live.reset()
        with saved_tensors_hooks(live.saved, lambda tensor: tensor):
            hidden = (x @ w).relu()
            loss = hidden.view(-1).square().sum()
        assert live.sizes["activations", False] == 8 * 32 * 4
        assert live.sizes["parameters", False] == 16 * 32 * 4
        loss.backward()
        del hidden
        assert live.sizes["activations", False] == 0
        big = torch.empty(LARGE, dtype=torch.uint8)
        assert live.sizes["temporary", True] == LARGE == live.peak["temporary", True]
        del big
    assert live.sizes["temporary", True] == 0


def test_parts_beyond_the_tensors(make_tree: Any, tmp_path: Path) -> None:
    config = small("quickstart")
    base = estimate(config, EMPTY).parts
    one = changed(config, accumulate=2, batch_size=2 * config.train.windows)
    assert estimate(one, EMPTY).parts["batch"] == 2 * base["batch"]  # 一次更新的几个小批一起在
    fed = estimate(config.model_copy(update={"data": config.data.model_copy(update={"workers": 3})}), EMPTY)
    assert fed.parts["waiting"] == 3 * 2 * base["batch"]
    checked = estimate(changed(config, preflight=True, ema_decay=0.9), EMPTY).parts
    assert checked["preflight"] == checked["parameters"] + checked["average"]
    model = build_model(config.model, imagined_spec(config.data))
    assert isinstance(model, nn.Module)
    buffers, weights = (sum(v.nbytes for v in values) for values in (model.buffers(), model.parameters()))
    assert (checked["average"], checked["parameters"]) == (
        weights + buffers,
        weights + 2 * buffers,
    )  # 每步另留一份 buffer
    spread = config.model_copy(update={"run": config.run.model_copy(update={"devices": 2})})
    assert estimate(spread, EMPTY).parts["buckets"] == pytest.approx(base["optimizer"] / 2, rel=0.01)
    assert base["fragmentation"] == pytest.approx(
        FRAGMENTATION["cpu"] * (base["gradients"] + base["activations"] + base["temporary"]), abs=1
    )

    tree = make_tree(tmp_path / "tree", ("t2m",), (8, 16), "2000-01-01", "2000-02-20")
    splits = {"train": ["2000-01-01", "2000-01-31"], "val": ["2000-02-01", "2000-02-10"], "test": ["2000-02-11"] * 2}
    data = DataConfig(**{**tree.data, "splits": splits}, frames_in=3, residency="device")
    kept = open_data(data, device=CPU).resident
    assert kept is not None
    assert resident_bytes(data, imagined_spec(data), cuda=False) == kept.fields.nbytes


@pytest.mark.parametrize("pieces", [[(50, 3)], [(900, 1), (0, 10)], [(700, 2), (300, 20), (0, 41)], [(5000, 1)]])
@pytest.mark.parametrize(("least", "below"), [(1, None), (4, None), (1, 30)])
def test_the_largest_batch_is_the_one_found_one_by_one(
    monkeypatch: pytest.MonkeyPatch, pieces: list[tuple[int, int]], least: int, below: int | None
) -> None:
    """内存随批是几段直线的最大值（前向之末、更新之时各是一段）。"""
    config = changed(small("quickstart"), accumulate=least)

    def needs(config: RunConfig, machine: Machine) -> Estimate:
        return Estimate({"all": max(a + b * config.train.windows for a, b in pieces)}, machine.size)

    monkeypatch.setattr("engine.memory.fitting.estimate", needs)
    machine = EMPTY._replace(size=2000)
    sizes = range(least, below or epoch_windows(config) + 1, least)
    fits = [n for n in sizes if needs(changed(config, batch_size=n), machine).fits]
    assert largest_batch(config, machine, below) == max(fits, default=0)


def test_sharded_parts_are_shared_out() -> None:
    whole, shared = (
        estimate(small("quickstart", "run.devices=4", "train.batch_size=8", f"run.strategy={name}"), EMPTY).parts
        for name in ("ddp", "fsdp")
    )
    for name in ("parameters", "optimizer"):
        assert 0 < shared[name] == whole[name] // 4
    assert (whole["buckets"] > 0, shared["buckets"], shared["activations"]) == (True, 0, whole["activations"])


def test_the_table_and_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    config, changes = str(ROOT / "config" / "cnn.yaml"), ["run.device=cpu", "train.batch_size=4", "data.workers=0"]
    assert train_command(["--config", config, "--estimate", *changes]) == 0
    title, head, *rows, last = capsys.readouterr().out.splitlines()
    assert title.startswith("cnn on CPU, ") and title.endswith(" MB; a step needs, in MB:")
    assert [tuple(row.removeprefix("*").split()[:3]) for row in rows] == [
        (precision, kept, size)
        for precision in ("32-true", "bf16-mixed")
        for kept in ("none", "blocks")
        for size in ("2", "4", "8")
    ]
    assert [row.startswith("*") for row in rows] == [n == 1 for n in range(12)]
    assert re.fullmatch(r"largest train.batch_size that fits into 90% of it: \d+ .*", last)
    found = estimate(load_config(config, changes), EMPTY)
    own = dict(zip(head.split(), rows[1].removeprefix("*").split(), strict=False))
    shown = {name: f"{found.parts[name] / 1e6:,.0f}" for name in KINDS}
    assert {name: own[name] for name in KINDS} == shown
    assert f" activations {shown['activations']}, " in memory_line(found, 4, EMPTY)


def test_a_loss_that_looks_at_values_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("persistence")
    monkeypatch.setattr("models.persistence.Model.forecast", lambda self, history, *_: history.nonzero().sum())
    with pytest.raises(ValueError, match=r"memory of persistence cannot be estimated, with shapes alone .*: Dynamic"):
        step_peak(config.model, imagined_spec(config.data), config.train, 1)
