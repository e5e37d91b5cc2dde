"""models/ 下每个文件都要守的约定；新模型只要放进文件与 YAML，就自动受检。大小取自它的 YAML 的 smoke 段。"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import build_config, build_model, model_names
from models.interface import ForecastModel, OnePass
from tests.small import small_batch, small_spec
from util.batch import Batch, DataSpec
from util.config import Strict, apply_overrides, read_mapping

CONFIGS = Path(__file__).parent.parent / "config"
EXAMPLES = {path.stem: read_mapping(path) for path in sorted(CONFIGS.glob("*.yaml"))}
SPEC = small_spec(channels=2, grid=(32, 64))
every_model = pytest.mark.parametrize("name", model_names())


def options_of(name: str) -> dict[str, Any]:
    """与模型同名的 YAML 缩小之后的 model 段。"""
    assert name in EXAMPLES, f"models/{name}.py has no config/{name}.yaml"
    return apply_overrides(EXAMPLES[name], EXAMPLES[name].get("smoke", []))["model"]


def make(name: str, spec: DataSpec = SPEC) -> Any:
    torch.manual_seed(0)
    model = build_model(options_of(name), spec)
    if isinstance(model, OnePass):
        for seed in range(4):
            model.accumulate(small_batch(spec, count=4, seed=seed))
        model.solve()
    return model


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def smooth_batch(spec: DataSpec) -> Batch:
    """几个行波；记得住的那种数据。"""
    batch = small_batch(spec, count=2)
    rows, columns = torch.arange(spec.height)[:, None], torch.arange(spec.width)
    step = torch.arange(spec.window)[:, None, None, None]
    speed = torch.tensor([1.0, 2.0])[:, None, None, None, None]  # (B, 1, 1, 1, 1)
    phase = torch.arange(spec.num_channels)[:, None, None]
    fields = torch.sin((columns - 4 * speed * step) * 0.2 + rows * 0.1 + phase)  # (B, t, k, H, W)
    return batch._replace(history=fields[:, : spec.frames_in], future=fields[:, spec.frames_in :])


@every_model
def test_file_holds_a_strict_config_and_a_forecast_model(name: str) -> None:
    config = build_config(options_of(name))
    model = make(name)
    assert isinstance(config, Strict)
    assert isinstance(model, ForecastModel) and isinstance(model, nn.Module)
    assert list(inspect.signature(type(model)).parameters) == ["config", "spec", "first_stage"]
    assert isinstance(model.probabilistic, bool) and isinstance(model.can_forecast, bool)
    with pytest.raises(ValueError, match=r"unknown key model\.no_such_key = 1"):
        build_config({**options_of(name), "no_such_key": 1})


@every_model
def test_forecast_has_the_agreed_shape_and_repeats(name: str) -> None:
    model, batch = make(name).eval(), small_batch(SPEC)
    with torch.inference_mode():
        made = [_forecast(model, batch, seed) for seed in (1, 1)]
    assert made[0].shape == (3, 1, 1, 2, 32, 64)
    assert made[0].dtype == torch.float32 and made[0].isfinite().all()
    assert torch.equal(made[0], made[1])


@every_model
def test_members_come_from_the_model_or_from_perturb(name: str) -> None:
    model, batch = make(name).eval(), small_batch(SPEC)
    if model.probabilistic:
        assert _forecast(model, batch, 0, members=3).shape == (3, 3, 1, 2, 32, 64)
    else:
        with pytest.raises(ValueError, match="--perturb"):
            model.forecast(batch.history, batch.time, 3)


def _forecast(model: Any, batch: Batch, seed: int, members: int = 1) -> Tensor:
    return model.forecast(batch.history, batch.time, members, torch.Generator().manual_seed(seed))


@every_model
def test_more_frames_out_work_or_are_refused_in_the_constructor(name: str) -> None:
    spec = small_spec(channels=2, grid=(32, 64), frames_out=2)
    refusal, model = "", None
    try:
        model = make(name, spec).eval()
    except ValueError as error:
        refusal = str(error)
    if model is None:
        assert "data.frames_out = 2" in refusal
    else:
        with torch.inference_mode():
            assert _forecast(model, small_batch(spec), 0).shape == (3, 1, 2, 2, 32, 64)


@every_model
def test_loss_is_one_finite_number_that_ignores_invalid_targets(name: str) -> None:
    model, batch = make(name).eval(), small_batch(SPEC)
    valid = batch.valid.clone()
    valid[0, -1, 1] = False
    batch = batch._replace(valid=valid)
    changed = batch.future.clone()
    changed[0, 0, 1] += 100
    with torch.no_grad():
        torch.manual_seed(0)
        loss = model.loss(batch)["loss"]
        torch.manual_seed(0)
        assert torch.equal(model.loss(batch._replace(future=changed))["loss"], loss)
    assert loss.shape == () and loss.isfinite()


@every_model
def test_every_trainable_parameter_gets_a_gradient(name: str) -> None:
    model = make(name).train()
    if not trainable(model):
        return
    for seed in range(4):  # 随机拿掉的区块不同，几次之后都轮得到
        model.loss(small_batch(SPEC, seed=seed))["loss"].backward()
    missing = [n for n, p in trainable(model) if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not missing


@every_model
def test_training_overfits_one_batch(name: str) -> None:
    model, batch = make(name), smooth_batch(SPEC)
    if not trainable(model):
        return
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with torch.no_grad():
        before = model.eval().loss(batch)["loss"].item()
    model.train()
    for _ in range(500):
        optimizer.zero_grad()
        model.loss(batch)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        after = model.eval().loss(batch)["loss"].item()
    assert after < 0.2 * before


@every_model
def test_state_dict_carries_the_whole_model(name: str) -> None:
    one, batch = make(name).eval(), small_batch(SPEC)
    torch.manual_seed(1)
    other = build_model(options_of(name), SPEC).eval()
    other.load_state_dict(one.state_dict())
    with torch.inference_mode():
        assert torch.equal(_forecast(one, batch, 0), _forecast(other, batch, 0))


def test_an_unknown_model_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no such model; nearest: persistence"):
        build_model({"name": "persistance"}, SPEC)
    with pytest.raises(ValueError, match="no such model; models: ar_pred_video_vanilla, climatology"):
        build_model({}, SPEC)
