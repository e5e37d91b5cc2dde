"""一步训练：模型 loss 的各项都记下；坏的一步、打印形状都不动 BatchNorm 的平均与码本。"""

from __future__ import annotations

import copy
import csv
import json
import math
from operator import itemgetter

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.imagined import imagined_spec
from engine.seeds import training_seeds
from engine.training import loop
from engine.training.state import NonFinite, build_state, train_step
from models import linear_regression, vqvae
from models.interface import OnePass, Scheduled
from tests.engine.runs import SMALL_MODEL, train_here, write_run
from tests.models.small import changed, small_batch, terms_of
from util.batch import Batch, Seeds
from util.config import load_config

SIZES = {"width": 8, "res_units": 4, "res_layers": 1, "latent_dim": 8, "codebook_size": 16}
MEMORY = {"name": "pastnet", "task": "reconstruct", **SIZES}
VQVAE = {
    "name": "vqvae", "width": 8, "groups": 4, "multipliers": [1, 2], "blocks": 1, "latent_dim": 4, "vocabulary": 16,
    "scales": 4, "restart": 0.1,
}  # fmt: skip
VAR = {"name": "var", "first_stage": VQVAE, "depth": 1, "width": 16, "heads": 2}
WAITING = {
    getattr(torch.ops.aten, name) for name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")
}
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
    loss = torch.stack([terms_of(state.model, batch)["loss"] / 2 for batch in batches]).sum()
    gradients = torch.autograd.grad(loss, list(state.model.parameters()))
    expected = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    torch.manual_seed(0)
    again = build_state(fabric, run, spec, 10)
    assert train_step(fabric, again, run, batches).terms()["grad_norm"] == pytest.approx(expected, rel=1e-4)
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
def test_a_bad_step_and_those_after_it_change_nothing(config, model):
    """坏的一步晚一步才读出来：它自己与已经走了的下一步，权重、EMA、优化器、buffer 都不动。"""
    run = load_config(str(config), [f"model={model}", "train.ema_decay=0.9"])
    spec, fabric = imagined_spec(run.data), Fabric(accelerator="cpu", devices=1)
    state = build_state(fabric, run, spec, 10)
    assert state.ema is not None and state.adam is not None
    if isinstance(state.model, vqvae.Model):
        state.model.quantizer.codebook.alive.fill_(0.0)  # 码人人该换
    good, bad = small_batch(spec), small_batch(spec)
    bad.history[0, 0, 0, 0, 0] = math.inf
    for i, batches in enumerate(([bad], [bad, good], [good, bad])):
        if i == 2:  # 走过好的一步之后
            train_step(fabric, state, run, [good]).terms()
        if isinstance(state.model, Scheduled):
            state.model.at_step(0, 10)  # 好的一步记下的码，这时就换
        held = {**state.model.state_dict(), **state.ema.state_dict(), **flat(state.adam)}
        before = {name: value.clone() for name, value in held.items()}
        broken, after = train_step(fabric, state, run, batches), train_step(fabric, state, run, [good])
        with pytest.raises(NonFinite, match="loss"):
            broken.terms()
        assert after.terms()["loss"] > 0
        for name, value in before.items():
            assert torch.equal(held[name], value), name
        state.bad.fill_(0)


def flat(adam: torch.optim.Optimizer) -> dict[str, Tensor]:
    """优化器的状态：矩与步数。"""
    return {f"{i} {key}": v for i, held in enumerate(adam.state.values()) for key, v in held.items()}


@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_update_is_the_written_out_one(config, clip):
    """平均的梯度，clip_grad_norm_，逐个张量的 AdamW，EMA 的公式。"""
    options = ["train.optimizer=adamw", "train.weight_decay=0.1", "train.ema_decay=0.9", "train.accumulate=2"]
    run = load_config(str(config), [*options, f"train.clip_norm={json.dumps(clip)}"])
    spec, fabric = imagined_spec(run.data), Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(0)
    state = build_state(fabric, run, spec, 10)
    model = copy.deepcopy(state.model)
    groups = [{"params": [], "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]
    for p in model.parameters():
        groups[p.ndim < 2]["params"].append(p)
    adam = torch.optim.AdamW(groups, lr=1e-3, foreach=False)
    averages, current = list[Tensor](), list[Tensor]()
    for step in range(3):
        seeds = Seeds((1, 2), (0.0, 0.5), step)
        batches = [small_batch(spec, 2, seed=2 * step + i)._replace(seeds=seeds) for i in (0, 1)]
        loss = torch.stack([terms_of(model, batch)["loss"] for batch in batches]).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
        adam.step()
        adam.zero_grad()
        current = [p.detach().clone() for p in model.parameters()]
        averages = [0.9 * a + 0.1 * c for a, c in zip(averages, current, strict=True)] if averages else current
        found = train_step(fabric, state, run, batches).terms()
        assert found == pytest.approx({"loss": float(loss.detach()), "grad_norm": float(norm)}, rel=1e-4)
    assert state.ema is not None
    for mine, theirs in ((state.module, current), (state.ema.module, averages)):
        torch.testing.assert_close(list(mine.parameters()), [nn.Parameter(v) for v in theirs], rtol=1e-5, atol=1e-5)


class NoWaiting(TorchDispatchMode):
    """主机要等设备才知道的（.item()、bool、float、有几个非零）都不许。"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in WAITING, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["pastnet", *DRAWING])
def test_no_step_waits_for_the_device(config, name):
    model = {"pastnet": MEMORY, **DRAWING}[name]
    run = load_config(str(config), [f"model={json.dumps(model)}", "train.ema_decay=0.9", "train.clip_norm=1"])
    spec, fabric = imagined_spec(run.data), Fabric(accelerator="cpu", devices=1)
    state = build_state(fabric, run, spec, 10)
    batch = small_batch(spec, count=2)
    if isinstance(state.model, OnePass):
        state.model.accumulate(batch)
        state.model.solve()
    with NoWaiting():
        steps = [train_step(fabric, state, run, [batch._replace(seeds=Seeds((1, 2), (0.0, 0.5), i))]) for i in range(2)]
    assert all(step.terms()["loss"] > 0 for step in steps)


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
        terms = train_step(fabric, state, run, batches).terms()
        return terms["loss"], terms["grad_norm"]

    expected = walk(1)
    assert [walk(parts) for parts in (2, 4)] == [pytest.approx(expected, rel=1e-4)] * 2
    assert walk(1, epoch=2) != expected


UNET = {"name": "pixel_unet", "base_channels": 8, "depth": 1, "scaling": "zscore"}


@pytest.mark.parametrize("model", [SMALL_MODEL, UNET], ids=["ar_pred", "pixel_unet"])
def test_interpolated_fields_do_not_tell_the_cut(config, model):
    """一份里一个有效的目标也没有：损失、裁剪前后的梯度仍与整批的相同；一个有效的也没有时不动。"""
    run = load_config(str(config), [f"model={json.dumps(model)}", "train.clip_norm=0.01"])
    spec, fabric = imagined_spec(run.data), Fabric(accelerator="cpu", devices=1)
    whole = small_batch(spec, count=8)
    whole.valid[:2] = False
    whole.valid[5, :, 0] = False
    nothing = whole._replace(valid=torch.zeros_like(whole.valid))

    def walk(parts: int, batch: Batch) -> list[torch.Tensor]:
        torch.manual_seed(0)
        state = build_state(fabric, run, spec, 10)
        micro = [
            changed(batch, itemgetter(mine))._replace(seeds=training_seeds(42, 1, 3, list(range(8)), mine.tolist()))
            for mine in torch.arange(8).chunk(parts)
        ]
        terms = train_step(fabric, state, run, micro).terms()
        assert set(terms) == {"loss", "grad_norm"}
        assert state.adam is not None
        gradients = [held["exp_avg"] for held in state.adam.state.values()]  # 裁剪过的梯度的十分之一
        return [torch.tensor([terms["loss"], terms["grad_norm"]]), *gradients]

    for parts in (2, 4):
        torch.testing.assert_close(walk(parts, whole), walk(1, whole), rtol=1e-4, atol=1e-7)
        assert walk(parts, nothing)[0].tolist() == [0, 0]


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
        found.append(sum(name.startswith("loss_scale") for name in train_step(fabric, state, run, batches).names))
    assert found == [1, 1, 2, 2, 3, 3, 4, 4, 4, 4]  # 三个新的尺度在 10 步的 0.6 里均匀地加入
    again = build_state(fabric, run, spec, 10)
    again.progress.step = 4
    assert sum(name.startswith("loss_scale") for name in train_step(fabric, again, run, batches).names) == 3


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


def test_a_penalty_is_chosen_on_the_validation_split(config, monkeypatch):
    """步长 1 的训练窗口求解，步长 1 的验证窗口挑惩罚，各看一遍。"""
    seen: dict[str, list[int]] = {"accumulate": [], "judge": []}

    for name, hours in seen.items():
        plain = getattr(linear_regression.Model, name)

        def counted(model, batch, plain=plain, hours=hours):
            hours += batch.time[:, 0].tolist()
            plain(model, batch)

        monkeypatch.setattr(linear_regression.Model, name, counted)
    train_here(config, "model={name: linear_regression, max_frames: 200}", "train.epochs=0", "data.eval_stride=3")
    hours = [np.array(seen[name]) for name in seen]
    for found, days in zip(hours, (31, 10), strict=True):
        assert len(found) == 4 * days - 3  # 6 小时一帧，一个窗口 4 帧
        assert (np.diff(np.sort(found)) == 6).all()
    assert hours[0].max() < hours[1].min()


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
