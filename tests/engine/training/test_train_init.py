"""train.init：新的运行从另一个检查点的权重起步；续训不读它；对不上时一行说清。"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric

from engine.imagined import imagined_spec
from engine.training.preflight import smoke
from engine.training.start import Initial, read_initial
from engine.training.state import build_state
from tests.engine.runs import checkpoint, losses, train_here, write_run
from tests.models.small import small_spec
from util.checkpoint import forecast_weights, load_checkpoint, save_checkpoint
from util.config import RunConfig, load_config

pytestmark = pytest.mark.usefixtures("unrendered")
SIZES = {"width": 8, "res_units": 4, "res_layers": 1, "latent_dim": 8, "codebook_size": 16}
MEMORY = {"name": "pastnet", "task": "reconstruct", **SIZES}
FORECAST = {"name": "pastnet", **SIZES, "hid_T": 16, "N_T": 2, "patch": [4, 4], "fourier_dim": 8}


@pytest.fixture(scope="module")
def tree(make_tree, tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree") / "tree", ("t2m",), (8, 16), "2000-01-01", "2000-02-20")


@pytest.fixture
def run(tree, tmp_path) -> Path:
    return write_run(tmp_path, tree, train={"epochs": 1})


def start(config: RunConfig, initial: Initial | None = None) -> Any:
    """build_state 造出的起点。"""
    torch.manual_seed(0)
    return build_state(Fabric(accelerator="cpu", devices=1), config, imagined_spec(config.data), 10, initial)


def saved(path: Path, model: Any, **others: Any) -> str:
    about = {"run": "x", "config": {"model": {}, "train": {}, "data": {}}, "spec": small_spec().to_dict()}
    about |= {"progress": {"epoch": 0, "step": 0, "batches": 0}, "random": []}
    about |= dict.fromkeys(("ema", "optimizer", "scheduler"))
    save_checkpoint(path, {"model": model, **about, **others})
    return str(path)


def test_memory_bank_pretraining_starts_the_forecast(run, tmp_path, monkeypatch, caplog):
    """整条路：预训练 → 由它起步、冻结 → 第一步之前的权重就是它的 → 原文件没有了也能续训。"""
    train_here(run, f"model={MEMORY}", "run.name=memory")
    path = tmp_path / "checkpoints/memory/best.ckpt"
    frozen = f"model={ {**FORECAST, 'freeze_memory': True} }"
    train_here(run, frozen, "run.name=forecast", f"train.init={path}")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    memory, forecast = load_checkpoint(path), checkpoint(tmp_path, "forecast")
    assert (memory["init"], forecast["init"]) == ("", sha256)
    kept = [name for name in memory["model"] if name.startswith(("encoder.", "memory."))]
    assert len(kept) > 10 and all(torch.equal(forecast["model"][name], memory["model"][name]) for name in kept)
    assert not torch.equal(forecast["model"]["decoder.0.weight"], memory["model"]["decoder.0.weight"])  # 它接着训练
    new = forecast["model"].keys() - memory["model"].keys()
    assert {name.partition(".")[0] for name in new} == {"propagation", "fourier"}
    taken = len(memory["model"])
    assert f"(sha256 {sha256}): {taken} tensors taken, {len(new)} of the model start anew" in caplog.text
    path.unlink()
    train_here(run, frozen, "run.name=forecast", f"train.init={path}", "train.epochs=2", resume="auto")
    assert checkpoint(tmp_path, "forecast")["init"] == sha256
    assert len(losses(tmp_path, "forecast")) == 2 * 8
    with pytest.raises(ValueError, match=r"train.init = '.*best.ckpt' in the checkpoint, None now"):
        train_here(run, frozen, "run.name=forecast", "train.epochs=3", resume="auto")


def test_model_and_ema_start_from_it(run, tmp_path):
    config = load_config(run, [f"model={FORECAST}", "train.ema_decay=0.5"])
    source = start(config).model
    with torch.no_grad():
        for tensor in source.state_dict().values():
            tensor.add_(1)
    initial = read_initial(saved(tmp_path / "source.ckpt", source.state_dict()))
    state = start(config, initial)
    for model in (state.model, state.best_model):
        assert all(torch.equal(value, initial.weights[name]) for name, value in model.state_dict().items())
    assert state.best_model is not state.model


def test_a_source_with_ema_gives_its_ema(tmp_path):
    content = {"model": {"a": torch.zeros(1)}, "ema": {"n_averaged": torch.tensor(3), "module.a": torch.ones(1)}}
    assert forecast_weights(content) == {"a": torch.ones(1)}
    assert read_initial(saved(tmp_path / "ema.ckpt", **content)).weights == {"a": torch.ones(1)}


def test_without_it_nothing_changes(run, tmp_path):
    """只有同名的被换掉，其余的随机初值与没有 train.init 时相同。"""
    config = load_config(run, [f"model={FORECAST}"])
    plain = start(config).model.state_dict()
    name = "decoder.0.weight"
    made = start(config, read_initial(saved(tmp_path / "one.ckpt", {name: plain[name] + 1}))).model.state_dict()
    assert torch.equal(made.pop(name), plain.pop(name) + 1)
    assert all(torch.equal(made[key], plain[key]) for key in plain)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"memory.codes": torch.zeros(9, 8)}, r"memory.codes is \(9, 8\) there, \(16, 8\) here"),
        ({"other": torch.zeros(1)}, "none of its 1 tensors is in this model"),
    ],
)
def test_what_does_not_fit_is_one_line(run, tmp_path, weights, message):
    path = saved(tmp_path / "bad.ckpt", weights)
    with pytest.raises(ValueError, match=f"train.init = .*bad.ckpt: {message}"):
        train_here(run, f"model={FORECAST}", "run.name=bad", f"train.init={path}")


def test_a_missing_file_is_said_before_the_data_are_opened(run, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.training.run.open_data", lambda *_: pytest.fail("opened"))
    saved(tmp_path / "near.ckpt", {})
    with pytest.raises(ValueError, match=r"no checkpoint .*none.ckpt; there: near.ckpt"):
        train_here(run, f"model={FORECAST}", f"train.init={tmp_path / 'none.ckpt'}")


def test_other_data_are_warned_of(run, tmp_path, caplog):
    """同样的形状、别的通道：权重照用（可以是有意的），但要说。"""
    config = load_config(run, [f"model={FORECAST}"])
    spec = imagined_spec(config.data)
    weights = start(config).model.state_dict()
    start(config, read_initial(saved(tmp_path / "same.ckpt", weights, spec=spec.to_dict())))
    assert "was trained with other" not in caplog.text
    other = replace(spec, channels=("u10",)).to_dict()
    start(config, read_initial(saved(tmp_path / "other.ckpt", weights, spec=other)))
    assert "was trained with other channels: ['u10'], here ['t2m']" in caplog.text


def test_frozen_parameters_must_come_from_somewhere(run):
    with pytest.raises(
        ValueError, match=r"\d+ parameters of pastnet are frozen at their random start; give train.init"
    ):
        train_here(run, f"model={ {**FORECAST, 'freeze_memory': True} }", "run.name=frozen")


def test_smoke_looks_at_the_file_and_a_baseline_is_refused(run, tmp_path):
    path = tmp_path / "climatology.ckpt"
    save_checkpoint(path, {"model": {"coefficients": torch.zeros(1)}})
    for name, message in (("none.ckpt", "no checkpoint"), (path.name, "holds a baseline, not a training")):
        with pytest.raises(ValueError, match=message):
            smoke(load_config(run, [f"model={FORECAST}", f"train.init={tmp_path / name}"]))


def test_a_model_without_gradient_steps_refuses_it(run, tmp_path):
    path = saved(tmp_path / "any.ckpt", {"coefficients": torch.zeros(1)})
    with pytest.raises(ValueError, match="any.ckpt: climatology takes no gradient steps; remove it"):
        train_here(run, "model={name: climatology}", f"train.init={path}")
