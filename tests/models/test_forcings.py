"""各模型与外强迫：多的只是第一层；目标时刻的进得了网络；diagnostic 的通道不进；接不住的一行说清。"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.forecasting.program import traced
from models import build_model
from models.layers.forcings import Inputs, axes_of, solar
from tests.models.small import TINY, count, make_model, small_batch, small_spec
from util.batch import Batch, DataSpec

SPEC = small_spec(channels=3, grid=(8, 16), frames_in=3)
ALL = ("solar", "day_of_year", "hour_of_day", "latitude", "longitude", "static/oro")
MODELS: dict[str, dict[str, Any]] = {  # 小的；一个名字一种
    "cnn": {"width": 4},
    "pixel_unet": {"base_channels": 8, "depth": 2},
    "simvp": {"hid_S": 8, "hid_T": 32, "N_T": 2, "translator": "gsta"},
    "convlstm": {"hidden": 4, "layers": 1, "variant": "seq2seq"},
    "weather_transformer": {"dim": 8, "heads": 2, "depth": 1, "decoder_depth": 1, "dropout": 0.0},
    "ar_pred_video_vanilla": {k: v for k, v in TINY.items() if k != "name"},
    "lstm": {"hidden": 8, "variant": "seq2seq"},
    "sequence_transformer": {"dim": 8, "heads": 2, "depth": 1, "dropout": 0.0},
    "pastnet": {
        "width": 8, "res_units": 4, "res_layers": 1, "latent_dim": 8, "codebook_size": 16, "hid_T": 16, "N_T": 2,
        "patch": [4, 4], "fourier_dim": 8,
    },
}  # fmt: skip
CLOSED = "linear_regression"  # 没有梯度步：在它自己的测试里
every_model = pytest.mark.parametrize("name", MODELS)


def forced(name: str, spec: DataSpec) -> Any:
    torch.manual_seed(0)
    return make_model({"name": name, **MODELS[name]}, spec).eval()


def forecast(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.forecast(batch.history, batch.time)


@every_model
def test_only_the_first_layer_grows(name: str) -> None:
    spec = replace(SPEC, forcings=ALL)
    plain, more = forced(name, SPEC), forced(name, spec)
    shapes, wider = ({k: v.shape for k, v in m.state_dict().items()} for m in (plain, more))
    assert wider.pop("inputs.static") == (1, 8, 16) and wider.keys() == shapes.keys()
    different = [key for key in shapes if shapes[key] != wider[key]]
    extra = Inputs(spec).channels - SPEC.num_channels
    assert extra == 1 + 3 + 2 * 5
    assert len(different) == (2 if name == "pastnet" else 1)  # 两条支路各有第一层
    grown = 0
    for key in different:
        axis = next(i for i, (a, b) in enumerate(zip(shapes[key], wider[key], strict=True)) if a != b)
        wide = wider[key][axis] - shapes[key][axis]
        assert wide % extra == 0
        grown += wide * shapes[key].numel() // shapes[key][axis]
    assert count(more) - count(plain) == grown


@every_model
def test_the_time_of_the_target_is_seen(name: str) -> None:
    model, batch = forced(name, replace(SPEC, forcings=("solar",))), small_batch(SPEC)
    later = batch._replace(time=batch.time + 24 * 90)
    assert not torch.allclose(forecast(model, batch), forecast(model, later))
    with pytest.raises(ValueError, match=r"^data\.forcings = \['solar'\] need the time of the forecast: give --time"):
        model.forecast(batch.history, None)
    program, facts = traced(model, SPEC, name)
    assert facts["needs_time"] and facts["whole"]
    torch.testing.assert_close(program.module()(batch.history[:1], batch.time[:1]), forecast(model, batch)[:1])


@every_model
@pytest.mark.parametrize("predict", ["state", "tendency"])
def test_a_diagnostic_channel_is_forecast_but_not_seen(name: str, predict: str) -> None:
    torch.manual_seed(0)
    model = make_model({"name": name, **MODELS[name], "predict": predict}, replace(SPEC, diagnostic=("c1",))).eval()
    batch = small_batch(SPEC)
    made = forecast(model, batch)
    history = batch.history.clone()
    history[:, :, 1] = 1000.0
    assert made.shape == (3, 1, 1, 3, 8, 16)
    assert torch.equal(forecast(model, batch._replace(history=history)), made)


def test_what_only_the_sun_explains_is_learnt() -> None:
    """目标就是目标时刻的太阳，历史是噪声：看得见太阳的学得会，看不见的不会。"""
    spec, losses = small_spec(channels=1, grid=(4, 8), frames_in=2), []
    batches = [small_batch(spec, count=16, seed=seed) for seed in range(4)]
    batches = [b._replace(future=4 * solar(b.time[:, 2:], axes_of(spec), 6)[0][:, :, None] - 1) for b in batches]
    for forcings in (("solar",), ()):
        torch.manual_seed(0)
        model = make_model(
            {"name": "cnn", "variant": "deep", "width": 8, "blocks": 1}, replace(spec, forcings=forcings)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(120):
            optimizer.zero_grad()
            b = batches[step % 3]
            (model.forecast(b.history, b.time)[:, 0] - b.future).square().mean().backward()
            optimizer.step()
        losses.append(float((forecast(model.eval(), batches[3])[:, 0] - batches[3].future).square().mean()))
    assert losses[0] < 0.02 and losses[1] > 0.5, losses


def test_ar_pred_has_the_forcings_of_the_frame_it_removes() -> None:
    """拿掉的不论是哪一帧，它的时刻的外强迫都在留下的一帧里；末一帧带着头一帧的，预报不受影响。"""
    spec, batch = replace(SPEC, forcings=("day_of_year",)), small_batch(SPEC)
    inputs, frames = Inputs(spec), torch.cat([batch.history, batch.future], 1)
    made, own = inputs(frames, batch.time, wraps=True), inputs(frames, batch.time)
    assert torch.equal(made[:, :-1], own[:, :-1]) and torch.equal(made[:, -1, :5], own[:, -1, :5])
    assert torch.equal(made[:, -1, 5:], made[:, 0, 3:5])
    history = inputs(batch.history, batch.time, wraps=True)
    assert torch.equal(history, inputs(batch.history, batch.time))


def test_ar_pred_is_trained_on_what_it_forecasts() -> None:
    """评测时的损失就是预报的均方误差：外强迫、diagnostic、差都进了两处。"""
    spec, batch = replace(SPEC, forcings=ALL, diagnostic=("c1",)), small_batch(SPEC)
    model = make_model({**TINY, "predict": "tendency"}, spec).eval()
    torch.testing.assert_close(model.loss(batch)["loss"], (forecast(model, batch)[:, 0] - batch.future).square().mean())


def test_the_others_refuse_and_name_those_that_can() -> None:
    """这里的 MODELS 是全部接得住的。"""
    for spec, what in (
        (replace(SPEC, forcings=("solar", "latitude")), "data.forcings = solar, latitude"),
        (replace(SPEC, diagnostic=("c2",)), "data.roles = c2"),
    ):
        with pytest.raises(ValueError, match="persistence cannot take them") as caught:
            build_model({"name": "persistence"}, spec)
        works = ", ".join(sorted([*MODELS, CLOSED]))
        assert str(caught.value) == f"{what}: persistence cannot take them; models that can: {works}"
