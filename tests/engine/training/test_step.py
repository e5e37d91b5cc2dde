"""一步训练：模型 loss 的各项都记下；坏的一步、打印形状都不动 BatchNorm 的平均与码本。"""

from __future__ import annotations

import csv
import json
import math
from operator import itemgetter

import pytest
import torch
from lightning.fabric import Fabric

from engine.seeds import training_seeds
from engine.training import loop
from engine.training.preflight import imagined_spec
from engine.training.state import NonFinite, build_state, train_step
from models import vqvae
from models.interface import OnePass, Scheduled
from tests.engine.runs import SMALL_MODEL, train_here, write_run
from tests.models.small import changed, small_batch
from util.config import load_config

SIZES = {"width": 8, "res_units": 4, "res_layers": 1, "latent_dim": 8, "codebook_size": 16}
MEMORY = {"name": "pastnet", "task": "reconstruct", **SIZES}
VQVAE = {
    "name": "vqvae", "width": 8, "groups": 4, "multipliers": [1, 2], "blocks": 1, "latent_dim": 4, "vocabulary": 16,
    "scales": 4, "restart": 0.1,
}  # fmt: skip
VAR = {"name": "var", "first_stage": VQVAE, "depth": 1, "width": 16, "heads": 2}
DRAWING = {  # 损失里有随机数的：拿掉的区块、遮挡、query；扩散的时间、噪声；时效、丢掉的条件；编码的抽样、噪声
    "ar_pred": {**SMALL_MODEL, "query": "resampled"},
    "latent_diffusion": {
        "name": "latent_diffusion", "base_channels": 8, "multipliers": [1], "depth": 1, "attention_levels": [],
    },
    "dit": {"name": "dit", "size": None, "dim": 16, "depth": 1, "heads": 2, "patch": 4},
    "var": {**VAR, "condition_dropout": 0.4},
    "sd_vae": {
        "name": "sd_vae", "weights": "random", "architecture": {"block_out_channels": [8, 16], "norm_num_groups": 4},
        "scaling": "zscore",
    },
}  # fmt: skip


@pytest.fixture
def config(make_tree, tmp_path):
    tree = make_tree(tmp_path / "tree", ("t2m",), (8, 16), "2000-01-01", "2000-02-20")
    return write_run(tmp_path, tree, train={"epochs": 1})


def test_every_term_of_the_loss_is_recorded(config, tmp_path):
    train_here(config, f"model={MEMORY}", "run.name=terms", "train.accumulate=2")
    with (tmp_path / "log/terms/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train" and row["step"] == "1"]
    terms = {row["name"]: float(row["value"]) for row in rows}
    assert {"mse", "commitment", "perplexity"} < terms.keys()
    assert terms["loss"] == pytest.approx(terms["mse"] + 0.25 * terms["commitment"], rel=1e-5)
    assert 1 <= terms["perplexity"] <= 16


def test_gradient_norm_is_of_the_whole_update(config, tmp_path):
    """累积几个小批，只在更新的那一步有一个范数：平均的梯度的，裁剪之前的。"""
    run = load_config(str(config), [f"model={MEMORY}", "train.accumulate=2", "train.clip_norm=1e-3"])
    spec = imagined_spec(run.data)
    fabric = Fabric(accelerator="cpu", devices=1)
    batches = [small_batch(spec, seed=seed) for seed in (1, 2)]
    torch.manual_seed(0)
    state = build_state(fabric, run, spec, 10)
    state.model.train()
    loss = torch.stack([state.model.loss(batch)["loss"] / 2 for batch in batches]).sum()
    gradients = torch.autograd.grad(loss, list(state.model.parameters()))
    expected = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    torch.manual_seed(0)
    again = build_state(fabric, run, spec, 10)
    assert train_step(fabric, again, run, batches)["grad_norm"] == pytest.approx(expected, rel=1e-4)
    train_here(config, f"model={MEMORY}", "run.name=norms", "train.accumulate=2", "log.every_steps=1")
    with (tmp_path / "log/norms/metrics.csv").open() as file:
        rows = [row["name"] for row in csv.DictReader(file) if row["split"] == "train"]
    assert rows.count("grad_norm") == rows.count("loss") > 0


def test_mixed_precision_computes_in_half(config):
    """一个设备时也是；权重与损失仍是单精度。"""
    run = load_config(str(config), ["train.precision=bf16-mixed"])
    spec, fabric = imagined_spec(run.data), Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    state = build_state(fabric, run, spec, 10)
    made = []
    linear = next(m for m in state.module.modules() if isinstance(m, torch.nn.Linear))
    linear.register_forward_hook(lambda _module, _inputs, output: made.append(output.dtype))
    train_step(fabric, state, run, [small_batch(spec)])
    assert made == [torch.bfloat16] and {p.dtype for p in state.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("model", [MEMORY, VQVAE], ids=["pastnet", "vqvae"])
def test_a_bad_step_changes_nothing(config, model):
    run = load_config(str(config), [f"model={model}"])
    spec = imagined_spec(run.data)
    state = build_state(Fabric(accelerator="cpu", devices=1), run, spec, 10)
    if isinstance(state.model, vqvae.Model):
        state.model.quantizer.codebook.alive.fill_(0.0)  # 码人人该换
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    bad = small_batch(spec)
    bad.history[0, 0, 0, 0, 0] = math.inf
    for batches in ([bad], [bad, small_batch(spec)], [small_batch(spec), bad]):
        with pytest.raises(NonFinite, match="loss"):
            train_step(Fabric(accelerator="cpu", devices=1), state, run, batches)
        after = state.model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
    train_step(Fabric(accelerator="cpu", devices=1), state, run, [small_batch(spec)])
    assert all(value.isfinite().all() for value in state.model.state_dict().values())


@pytest.mark.parametrize("name", DRAWING)
def test_draws_belong_to_the_windows_not_to_the_cut(config, name):
    """同一个全局批，整个走、切成两份、四份走：损失与梯度的范数相同，到舍入为止；换一轮就是别的数。"""
    run = load_config(str(config), [f"model={json.dumps(DRAWING[name])}"])
    spec = imagined_spec(run.data)
    fabric = Fabric(accelerator="cpu", devices=1)
    whole, starts = small_batch(spec, count=8), list(range(8))

    def walk(parts: int, epoch: int = 1) -> tuple[float, float]:
        torch.manual_seed(0)
        state = build_state(fabric, run, spec, 10)
        with torch.no_grad():
            for parameter in state.model.parameters():  # 从零起步的也要看得见条件
                parameter.add_(0.1 * torch.randn_like(parameter))
        if isinstance(state.model, OnePass):
            state.model.accumulate(whole)
            state.model.solve()
        batches = []
        for mine in torch.arange(8).chunk(parts):
            seeds = training_seeds(42, epoch, 3, starts, mine.tolist())
            batches.append(changed(whole, itemgetter(mine))._replace(seeds=seeds))
        terms = train_step(fabric, state, run, batches)
        return terms["loss"], terms["grad_norm"]

    expected = walk(1)
    assert [walk(parts) for parts in (2, 4)] == [pytest.approx(expected, rel=1e-4)] * 2
    assert walk(1, epoch=2) != expected


def test_scheduled_models_hear_the_step_not_the_micro_batch(config):
    """累积的几个小批是同一步；续训从存下的步数接着说。"""
    model = {**VAR, "progressive": {"first_scales": 1, "until": 0.6, "warmup_steps": 2}}
    run = load_config(str(config), [f"model={model}", "train.accumulate=2"])
    spec = imagined_spec(run.data)
    fabric = Fabric(accelerator="cpu", devices=1)
    state = build_state(fabric, run, spec, 10)
    assert isinstance(state.model, Scheduled)
    batches = [small_batch(spec, seed=seed) for seed in (1, 2)]
    found = []
    for step in range(10):
        state.progress.step = step
        found.append(sum(name.startswith("loss_scale") for name in train_step(fabric, state, run, batches)))
    assert found == [1, 1, 2, 2, 3, 3, 4, 4, 4, 4]  # 三个新的尺度在 10 步的 0.6 里均匀地加入
    again = build_state(fabric, run, spec, 10)
    again.progress.step = 4
    assert sum(name.startswith("loss_scale") for name in train_step(fabric, again, run, batches)) == 3


def test_extremes_are_seen_once_and_only_when_used(config, monkeypatch):
    """续训时缩放不再变；zscore 不必看一遍训练数据。"""
    seen = []

    def counted(model, *arguments):
        seen.append(arguments[0].config.root)
        return fit_one_pass(model, *arguments)

    fit_one_pass = loop.fit_one_pass
    monkeypatch.setattr(loop, "fit_one_pass", counted)
    unet = {"name": "pixel_unet", "base_channels": 8, "depth": 1}
    train_here(config, f"model={unet}", "run.name=unet")
    assert len(seen) == 1
    train_here(config, f"model={unet}", "run.name=unet", "train.epochs=2", resume="auto")
    train_here(config, f"model={ {**unet, 'scaling': 'zscore'} }", "run.name=zscore")
    assert len(seen) == 1


def test_the_shape_table_changes_nothing(config, monkeypatch):
    """第一步之前的权重与 buffer 就是初值。"""
    seen = []

    def first_step(fabric, state, run, batches):
        seen.append({name: value.clone() for name, value in state.model.state_dict().items()})
        return train_step(fabric, state, run, batches)

    monkeypatch.setattr(loop, "train_step", first_step)
    train_here(config, f"model={MEMORY}", "run.name=first")
    assert torch.equal(seen[0]["memory.counts"], torch.ones(16))
    assert all(not value.any() for name, value in seen[0].items() if name.endswith("num_batches_tracked"))
    assert any(name.endswith("num_batches_tracked") for name in seen[0])
