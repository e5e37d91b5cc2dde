"""训练的目标：缺省的与从前逐位相同；权重的和、各样距离与写开的循环；切成小批不变；学不了的一行说清。"""

from __future__ import annotations

import json
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.imagined import imagined_spec
from engine.memory.step import step_peak
from engine.objective import Objective, channel_weights, check_objective, make_objective, objective_loss
from engine.one_pass import measured_changes
from engine.seeds import training_seeds
from engine.training import loop
from engine.training.state import build_state, train_step
from engine.training.validation import baseline_losses
from tests.engine.runs import SMALL_MODEL, checkpoint, train_here, write_run
from tests.models.small import changed, make_model, small_batch, small_spec, terms_of
from util.batch import Batch, DataSpec
from util.config import load_config
from util.data.batches import all_starts
from util.data.dataset import open_data
from util.grid import latitude_weights
from util.training_config import Distance, ObjectiveConfig, TrainConfig

CPU = torch.device("cpu")
DIRECT: dict[str, dict[str, Any]] = {
    "cnn": {"name": "cnn", "width": 4},
    "pixel_unet": {"name": "pixel_unet", "base_channels": 8, "depth": 1, "scaling": "zscore"},
    "simvp": {"name": "simvp", "hid_S": 8, "hid_T": 16, "N_S": 2, "N_T": 2},
    "convlstm": {"name": "convlstm", "hidden": 4, "layers": 1, "predict": "tendency"},
    "weather_transformer": {"name": "weather_transformer", "dim": 16, "heads": 2, "depth": 1, "decoder_depth": 1},
    "lstm": {"name": "lstm", "hidden": 8},
    "sequence_transformer": {"name": "sequence_transformer", "dim": 16, "heads": 2, "depth": 1},
}
NOISY = {**DIRECT["cnn"], "noise": {"size": 4}}
DIFFUSION = {
    "name": "latent_diffusion", "base_channels": 8, "multipliers": [1], "depth": 1, "attention_levels": [],
}  # fmt: skip
DIT = {"name": "dit", "size": None, "dim": 16, "depth": 1, "heads": 2, "patch": 4}
PASTNET = {
    "name": "pastnet", "width": 8, "res_units": 4, "res_layers": 1, "latent_dim": 8, "codebook_size": 16, "hid_T": 16,
    "N_T": 2, "patch": [4, 4], "fourier_dim": 4,
}  # fmt: skip
VQVAE = {
    "name": "vqvae", "width": 8, "groups": 4, "multipliers": [1, 2], "blocks": 1, "latent_dim": 4, "vocabulary": 16,
    "scales": 4,
}  # fmt: skip
OWN = {"ar_pred": SMALL_MODEL, "latent_diffusion": DIFFUSION, "dit": DIT, "pastnet": PASTNET}
LEVELS = replace(
    small_spec(channels=4, frames_out=2),
    channels=("t2m", "z_level_00", "z_level_01", "u_level_00"),
    pressures=(None, 500.0, 1000.0, 250.0),
)


def some_invalid(spec: DataSpec, count: int = 3) -> Batch:
    batch = small_batch(spec, count)
    batch.valid[0, -1, 1] = batch.valid[1, -1, 0] = False
    return batch


def make(options: dict[str, Any], spec: DataSpec) -> Any:
    torch.manual_seed(0)
    return make_model(options, spec).train()


@pytest.mark.parametrize("name", DIRECT)
def test_the_default_is_bit_for_bit_the_loss_the_models_had(name: str) -> None:
    """那时的一句：有效目标场的均方误差；梯度也逐位相同。"""
    spec = small_spec(frames_out=2)
    model, batch = make(DIRECT[name], spec), some_invalid(spec)
    found = []
    for old in (True, False):
        torch.manual_seed(1)
        if old:
            valid = batch.valid[:, -spec.frames_out :, :, None, None].to(batch.future.dtype)
            error = (model(batch.history) - batch.future).square() * valid
            loss = error.mean((-2, -1)).sum() / valid.sum().clamp(min=1)
        else:
            terms = terms_of(model, batch)
            assert set(terms) == {"loss"}
            loss = terms["loss"]
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def expected_weights(config: ObjectiveConfig, changes: list[float]) -> np.ndarray:
    """(C, H)，与 LEVELS 的四个通道一个个地写开。"""
    each = {"equal": [1, 1, 1, 1], "tendency": [1 / change for change in changes]}
    named = [config.channels.get(n, 1.0) for n in ("t2m", "z", "z_level_01", "u_level_00")] if isinstance(
        config.channels, dict
    ) else each[config.channels]  # fmt: skip
    level = [1, 500 / 750, 1000 / 750, 1] if config.level == "pressure" else [1, 1, 1, 1]
    channels = np.array([a * b for a, b in zip(named, level, strict=True)])
    rows = latitude_weights(LEVELS.latitudes).numpy() if config.area else np.ones(LEVELS.height)
    weights = channels[:, None] * rows
    return weights / weights.mean()


@pytest.mark.parametrize(
    "options",
    [
        {"area": True},
        {"channels": "tendency"},
        {"level": "pressure"},
        {"channels": {"t2m": 3.0, "z": 0.5, "z_level_01": 2.0}, "level": "pressure", "area": True},
    ],
    ids=str,
)
def test_weights_have_mean_one_and_are_the_written_out_ones(options: dict[str, Any]) -> None:
    config, changes = ObjectiveConfig(**options), [0.5, 0.1, 0.2, 2.0]
    objective = make_objective(config, LEVELS, changes, CPU)
    expected = expected_weights(config, changes)
    assert objective.weights is not None
    found = objective.weights.expand(4, LEVELS.height).numpy()
    assert found.mean() == pytest.approx(1, rel=1e-6)
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-5)
    model, batch = make(DIRECT["cnn"], LEVELS), some_invalid(LEVELS)
    with torch.no_grad():
        made = model.forecast(batch.history, None)[:, 0].numpy()
        loss = objective_loss(model, batch, objective)["loss"].item()
    valid = batch.valid[:, LEVELS.frames_in :].numpy()
    errors = (made - batch.future.numpy()) ** 2 * expected[:, :, None]
    assert loss == pytest.approx(sum(errors[i].mean() for i in np.argwhere(valid).tolist() for i in [tuple(i)])
                                 / valid.sum(), rel=1e-4)  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_a_model_with_its_own_objective_weighs_its_errors(name: str) -> None:
    """损失对权重是线性的；全是 1 就是原来的；只有一个通道、一个纬度时，那里以外的目标变了也不变。"""
    spec = small_spec(channels=2, grid=(8, 12 if name == "pastnet" else 16))
    model, batch = make(OWN[name], spec).eval(), some_invalid(spec)
    batch = batch._replace(seeds=training_seeds(1, 1, 1, [0, 1, 2], [0, 1, 2]))
    extra = 0.25 * model.loss(batch)["commitment"].item() if name == "pastnet" else 0.0

    def loss(weights: Tensor | None, batch: Batch = batch) -> float:
        return model.loss(batch, weights)["loss"].item() - extra

    first, second = torch.rand(2, 2, spec.height)
    assert loss(torch.ones(2, spec.height)) == pytest.approx(loss(None), rel=1e-6)
    assert loss(first) + loss(second) == pytest.approx(loss(first + second), rel=1e-5)
    alone = torch.zeros(2, spec.height)
    alone[1, 3] = 2.0 * spec.height
    assert loss(alone) != pytest.approx(loss(None), rel=1e-3)
    if name in ("ar_pred", "pastnet"):  # 扩散的目标也是输入
        other = batch.future.clone()
        other[:, :, 0] += 1
        other[:, :, 1, :3] += 1
        assert loss(alone, batch._replace(future=other)) == pytest.approx(loss(alone), rel=1e-6)


OBJECTIVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "weights": (DIRECT["lstm"], {"area": True, "channels": {"t2m": 3.0}}),
    "own": (SMALL_MODEL, {"area": True, "channels": {"t2m": 3.0}}),
    "sum": (DIRECT["lstm"], {"distance": {"mae": 0.8, "mse": 0.2, "gradient": 0.1}}),
    "amse": (DIRECT["lstm"], {"distance": "amse"}),
    "balanced": (DIRECT["lstm"], {"channels": "balanced", "level": "pressure"}),
    "through the forecast": (SMALL_MODEL, {"distance": "huber", "area": True}),
    "members": ({**SMALL_MODEL, "noise": {"size": 4}}, {"distance": "crps", "members": 3}),
}


@pytest.fixture
def config(make_tree, tmp_path) -> Path:
    tree = make_tree(tmp_path / "tree", ("t2m", "u10"), (8, 16), "2000-01-01", "2000-02-20")
    return write_run(tmp_path, tree, train={"epochs": 1})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_cut_does_not_change_the_step(config: Path, name: str) -> None:
    """一批 8 个窗口、其中有插值的场，整个走与切成四份走：损失、各项、梯度的范数到舍入为止相同。"""
    model, objective = OBJECTIVES[name]
    overrides = [f"model={json.dumps({'dropout': 0.0, **model})}", f"train.objective={json.dumps(objective)}"]
    run = load_config(str(config), overrides)
    spec, fabric = imagined_spec(run.data), Fabric(accelerator="cpu", devices=1)
    whole = some_invalid(spec, count=8)
    found = []
    for parts in (1, 4):
        torch.manual_seed(0)
        state = build_state(fabric, run, spec, 10)
        micro = [
            changed(whole, itemgetter(mine))._replace(seeds=training_seeds(42, 1, 3, list(range(8)), mine.tolist()))
            for mine in torch.arange(8).chunk(parts)
        ]
        found.append(train_step(fabric, state, run, micro).terms())
    names = {"sum": objective.get("distance"), "balanced": ("loss_t2m", "loss_u10")}.get(name, ())
    assert set(found[0]) == {"loss", "grad_norm", *names}
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_balanced_channels_weigh_alike_and_resume_alike(config: Path, tmp_path, monkeypatch) -> None:
    """权重是各通道的距离的滑动平均的倒数，从第二步起；验证时同重；停下再接与没停过的逐位相同。"""
    monkeypatch.setattr(loop, "finish", lambda run: None)
    run = load_config(str(config), [f"model={json.dumps(DIRECT['cnn'])}", "train.objective={channels: balanced}"])
    spec, fabric = imagined_spec(run.data), Fabric(accelerator="cpu", devices=1)
    state = build_state(fabric, run, spec, 10)
    batch, means = small_batch(spec), np.ones(2)
    batch.future[:, :, 1] *= 5
    for step in range(3):
        terms = train_step(fabric, state, run, [batch]).terms()
        each = np.array([terms["loss_t2m"], terms["loss_u10"]])
        weights = 1 / means / (1 / means).mean()
        assert each[1] > 5 * each[0] and terms["loss"] == pytest.approx((weights * each).sum(), rel=1e-4)
        means = each if step == 0 else 0.99 * means + 0.01 * each
    model = state.model.eval()
    assert torch.equal(objective_loss(model, batch, state.objective)["loss"], terms_of(model, batch)["loss"])
    options = (f"model={json.dumps(DIRECT['cnn'])}", "train.objective={channels: balanced}", "data.eval_stride=9")
    assert train_here(config, *options, "run.name=halves", "train.preflight=true") == 0
    assert train_here(config, *options, "run.name=halves", "train.epochs=2", resume="auto") == 0
    assert train_here(config, *options, "run.name=whole", "train.epochs=2") == 0
    ends = [checkpoint(tmp_path, name) for name in ("halves", "whole")]
    assert ends[0]["progress"]["balance"] == ends[1]["progress"]["balance"]
    torch.testing.assert_close(ends[0]["model"], ends[1]["model"], rtol=0, atol=0)


def test_a_sum_is_the_sum_of_its_terms() -> None:
    spec = small_spec()
    model, batch = make(DIRECT["cnn"], spec).eval(), some_invalid(spec)
    weights: dict[Distance, float] = {"mae": 0.8, "mse": 0.2, "gradient": 0.1}
    terms = objective_loss(model, batch, make_objective(ObjectiveConfig(distance=weights), spec, None, CPU))
    assert terms["loss"].item() == pytest.approx(sum(w * terms[name].item() for name, w in weights.items()), rel=1e-6)
    assert terms["loss"].requires_grad and not terms["mae"].requires_grad


def test_members_of_the_loss_belong_to_the_windows() -> None:
    """有种子时每次相同；没有时取自全局。"""
    spec = small_spec()
    model, batch = make(NOISY, spec).eval(), small_batch(spec)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    objective = make_objective(ObjectiveConfig(distance="crps", members=4), spec, None, CPU)
    seeded = batch._replace(seeds=training_seeds(1, 1, 1, [0, 1, 2], [0, 1, 2]))
    losses = [objective_loss(model, seeded, objective)["loss"] for _ in range(2)]
    assert torch.equal(*losses)
    assert not torch.equal(objective_loss(model, batch, objective)["loss"], losses[0])


def test_the_default_has_no_weights_with_shapes_alone_either() -> None:
    """估内存时张量没有值：各通道是不是同重，不能问张量。"""
    with FakeTensorMode():
        assert make_objective(ObjectiveConfig(), LEVELS, None, CPU).weights is None
        weighed = make_objective(ObjectiveConfig(area=True, channels={"z": 2.0}), LEVELS, None, CPU).weights
        assert weighed is not None and weighed.shape == (4, LEVELS.height)


def test_more_members_need_more_memory() -> None:
    spec, train = small_spec(), TrainConfig(epochs=1, batch_size=2)
    peaks = [
        step_peak(NOISY, spec, train.model_copy(update={"objective": objective}), 2).sizes["activations"]
        for objective in (ObjectiveConfig(), ObjectiveConfig(distance="crps", members=4))
    ]
    assert peaks[1] > 3 * peaks[0]


def test_persistence_is_measured_with_the_same_distance_and_weights(config: Path) -> None:
    """crps 的确定性预报就是平均绝对误差，按面积加权。"""
    run = load_config(str(config), ["train.objective={distance: crps, area: true}", "data.eval_stride=5"])
    data = open_data(run.data)
    objective = make_objective(run.train.objective, data.spec, None, CPU)
    model = make(NOISY, data.spec)
    found = baseline_losses(model, objective, data, run, Fabric(accelerator="cpu", devices=1), lambda: None)[
        "persistence"
    ]
    rows, errors = latitude_weights(data.spec.latitudes).numpy(), []
    for start in all_starts(data.segments["val"], data.spec.window, 5):
        batch = data.windows.__getitems__([start])
        difference = np.abs(batch.future[0, 0].double().numpy() - batch.history[0, -1].double().numpy())
        errors += [(field * rows[:, None]).mean() for field in difference]
    assert found == pytest.approx(np.mean(errors), rel=1e-5)


def test_changes_are_measured_once_and_weigh_the_channels(config: Path, tmp_path, monkeypatch, caplog) -> None:
    """与 NumPy 从目录树算的相同；随进度存下，续训不再量，接着的训练与没停过的相同。"""
    caplog.set_level("INFO")
    options = ("train.objective={channels: tendency, area: true}", "data.eval_stride=9")
    run = load_config(str(config), options)
    data = open_data(run.data)
    frames = [data.windows.__getitems__([s]) for s in all_starts(data.segments["train"], data.spec.window)]
    steps = np.stack([np.diff(np.concatenate([b.history[0], b.future[0]]), axis=0)[0] for b in frames])  # 每个差一次
    (hours,) = data.segments["train"]
    last = frames[-1]
    steps = np.concatenate([steps, np.diff(np.concatenate([last.history[0], last.future[0]]), axis=0)[1:]])
    found = measured_changes(data, run, lambda: None)
    assert len(steps) == len(hours) - 1
    assert found == pytest.approx(steps.std((0, 2, 3)).tolist(), rel=1e-4)

    calls, measure = [], loop.measured_changes
    monkeypatch.setattr(loop, "measured_changes", lambda *given: calls.append(1) or measure(*given))
    monkeypatch.setattr(loop, "finish", lambda run: None)
    assert train_here(config, *options, "run.name=weighed") == 0
    assert train_here(config, *options, "run.name=weighed", "train.epochs=2", resume="auto") == 0
    assert train_here(config, *options, "run.name=straight", "train.epochs=2") == 0
    assert len(calls) == 2  # 两个新的运行各一次
    ends = [checkpoint(tmp_path, name) for name in ("weighed", "straight")]
    assert ends[0]["progress"]["changes"] == pytest.approx(found)
    torch.testing.assert_close(ends[0]["model"], ends[1]["model"], rtol=0, atol=0)
    share = [1 / change for change in found]
    said = f"weights of the channels: t2m {2 * share[0] / sum(share):.3g}, u10 {2 * share[1] / sum(share):.3g}"
    assert said in caplog.messages


@pytest.mark.parametrize(
    ("model", "objective", "message"),
    [
        (
            DIRECT["cnn"],
            {"distance": "crps"},
            "train.objective.distance = crps needs members, and cnn is",
        ),
        (
            DIFFUSION,
            {"distance": "mae"},
            "train.objective.distance = mae: latent_diffusion has an objective",
        ),
        (PASTNET, {"distance": "mae"}, "train.objective.distance = mae: pastnet has an objective of its own"),
        (
            SMALL_MODEL,
            {"channels": "balanced"},
            "train.objective.channels = balanced needs the distance of each channel",
        ),
        (VQVAE, {"area": True}, "train.objective: vqvae is an autoencoder and has an objective of its own"),
        (
            {"name": "var", "first_stage": VQVAE, "depth": 1, "width": 16, "heads": 2},
            {"area": True},
            "train.objective: the loss of var is not an error of fields",
        ),
    ],
)
def test_what_a_model_cannot_learn_is_one_line(model: dict[str, Any], objective: dict[str, Any], message: str) -> None:
    made = make(model, small_spec(channels=1, grid=(8, 12 if model is PASTNET else 16)))
    check_objective(ObjectiveConfig(), made, model["name"])
    with pytest.raises(ValueError, match=f"^{message}") as error:
        check_objective(ObjectiveConfig(**objective), made, model["name"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{distance: mea}", r"train\.objective\.distance = 'mea': no such distance: 'mea'; nearest: "),
        ("{distance: {mae: 0.8, l2: 0.2}}", "no such distance: 'l2'"),
        ("{distance: {mae: -1.0}}", r"the weight of mae is -1\.0; it must be a number above 0"),
        ("{distance: {}}", "name at least one distance"),
        ("{channels: latitude}", "write one of equal, tendency, balanced, or weights like"),
        ("{channels: {t2m: 0}}", "the weight of t2m is 0; it must be a number above 0"),
        ("{members: 4}", "members = 4 has no meaning without the distance crps or energy"),
        ("{distance: crps, members: 1}", r"train\.objective\.members = 1: input should be greater than or equal to 2"),
        ("{space: minmax}", r"unknown key train\.objective\.space"),
    ],
)
def test_a_wrong_key_is_named(config: Path, written: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(str(config), [f"train.objective={written}"])


def test_what_the_data_does_not_allow_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^train\.objective\.channels has 't2n', which .*; nearest: t2m"):
        channel_weights(ObjectiveConfig(channels={"t2n": 2.0}), LEVELS, None)
    regional = replace(LEVELS, longitudes=tuple(float(i) for i in range(LEVELS.width)))
    with pytest.raises(ValueError, match="amse, which needs longitudes that close the circle"):
        make_objective(ObjectiveConfig(distance="amse"), regional, None, CPU)
    assert make_objective(ObjectiveConfig(), regional, None, CPU).weights is None
    assert Objective().weights is None
