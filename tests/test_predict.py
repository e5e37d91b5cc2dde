"""各模型共用的两个选项：predict: tendency 是网络的输出加最后一帧；circular_lon 只给绕地球一圈的网格。"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from models import build_model, model_names
from tests.small import small_batch, small_spec

SPEC = small_spec(channels=2, grid=(8, 16), frames_in=4, frames_out=2)
SIZES: dict[str, dict[str, Any]] = {
    "cnn": {"width": 4},
    "convlstm": {"hidden": 4},
    "lstm": {"hidden": 4, "layers": 1, "dropout": 0.0},
    "pastnet": {"patch": [4, 4], "hid_T": 16, "N_T": 2},
    "pixel_unet": {"base_channels": 8, "depth": 2, "scaling": "zscore"},
    "sequence_transformer": {"dim": 8, "heads": 2, "depth": 1},
    "simvp": {"hid_S": 8, "hid_T": 16, "N_T": 2},
    "weather_transformer": {"patch": [4, 4], "dim": 16, "depth": 1, "decoder_depth": 1},
}


def models_with(key: str) -> list[str]:
    own = {"ar_pred_video_vanilla"}  # 它的 predict 说的是被拿掉的区块
    names = [name for name in model_names() if name not in own]
    return [name for name in names if key in importlib.import_module(f"models.{name}").Config.model_fields]


def build(name: str, spec: Any = SPEC, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_model({"name": name, **SIZES[name], **options}, spec).eval()


@pytest.mark.parametrize("name", models_with("predict"))
def test_tendency_is_added_to_the_last_frame(name: str) -> None:
    state, tendency = build(name), build(name, predict="tendency")
    tendency.load_state_dict(state.state_dict())
    history = small_batch(SPEC).history
    with torch.inference_mode():
        made, change = (model.forecast(history, None)[:, 0] for model in (tendency, state))
    torch.testing.assert_close(made, change + history[:, -1:])


def test_scaled_tendency_is_added_in_the_scale_of_the_model() -> None:
    """差在 [-1, 1] 的尺度里加，还原之后是差乘半个值域。"""
    tendency, state = (build("pixel_unet", scaling="minmax", predict=p) for p in ("tendency", "state"))
    for model in (tendency, state):
        model.scaling.low.copy_(torch.tensor([-3.0, -2.0]))
        model.scaling.high.copy_(torch.tensor([5.0, 1.0]))
    history = small_batch(SPEC).history
    centre = torch.tensor([1.0, -0.5])[:, None, None]  # 值域的中点，也就是输出 0 对应的场
    with torch.inference_mode():
        torch.testing.assert_close(tendency(history), state(history) - centre + history[:, -1:])


def test_each_decoded_frame_starts_from_the_one_before() -> None:
    model = build("convlstm", variant="seq2seq", predict="tendency")
    history = small_batch(SPEC).history
    with torch.inference_mode():
        state, frame, made = model.encode(history), history[:, -1], []
        for _ in range(SPEC.frames_out):
            state = model.decoder(frame, state)
            frame = frame + model.head(state[0])
            made.append(frame)
        torch.testing.assert_close(model(history), torch.stack(made, 1))


@pytest.mark.parametrize("name", models_with("padding"))
def test_regions_cannot_be_circular(name: str) -> None:
    region = replace(SPEC, longitudes=tuple(200.0 + 2.5 * i for i in range(16)))
    build(name, region)
    with pytest.raises(
        ValueError, match=r"circular_lon needs longitudes that close the circle; these 16 run from 200 "
    ):
        build(name, region, padding="circular_lon")
