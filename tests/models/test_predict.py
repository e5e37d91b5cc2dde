"""各模型共用的两个选项：predict: tendency 是网络的输出加最后一帧；circular_lon 只给绕地球一圈的网格。"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.reference.configs import listed
from models import build_config, build_model
from tests.models.small import small_batch, small_spec
from util.config import load_config

SPEC = small_spec(channels=2, grid=(16, 32), frames_in=4, frames_out=2)
MODELS = {path.stem: load_config(path, smoke=True).model for path in listed(".")}
REMOVED_GROUP = {"ar_pred_video_vanilla"}  # 它的 predict 说的是被拿掉的区块，tests/models/test_ar_pred_forward.py 查


def models_with(key: str) -> list[str]:
    """哪些 YAML 的模型有这个选项，又预报。"""
    return [
        name
        for name, options in MODELS.items()
        if options["name"] not in REMOVED_GROUP
        and key in type(build_config(options)).model_fields
        and options.get("task") != "reconstruct"
    ]


def build(name: str, spec: Any = SPEC, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_model({**MODELS[name], **options}, spec).eval()


def in_the_scale_of_the_fields(name: str) -> bool:
    """阶段二的差在潜变量里、按自己的统计量缩放，各自的测试里查。"""
    return "first_stage" not in type(build_config(MODELS[name])).model_fields


@pytest.mark.parametrize("name", [name for name in models_with("predict") if in_the_scale_of_the_fields(name)])
def test_tendency_is_added_to_the_last_frame(name: str) -> None:
    """头一帧；逐帧解码的以后各帧加在自己的上一帧上。"""
    state, tendency = build(name, predict="state"), build(name, predict="tendency")
    tendency.load_state_dict(state.state_dict())
    history = small_batch(SPEC).history
    with torch.inference_mode():
        made, change = (model.forecast(history, None)[:, 0] for model in (tendency, state))
    torch.testing.assert_close(made[:, 0], change[:, 0] + history[:, -1])
    if MODELS[name].get("variant") != "seq2seq":
        torch.testing.assert_close(made, change + history[:, -1:])


def test_scaled_tendency_is_added_in_the_scale_of_the_model() -> None:
    """差在 [-1, 1] 的尺度里加，还原之后是差乘半个值域。"""
    tendency, state = (build("pixel_unet", predict=p) for p in ("tendency", "state"))
    for model in (tendency, state):
        model.scaling.low.copy_(torch.tensor([-3.0, -2.0]))
        model.scaling.high.copy_(torch.tensor([5.0, 1.0]))
    history = small_batch(SPEC).history
    centre = torch.tensor([1.0, -0.5])[:, None, None]  # 值域的中点，也就是输出 0 对应的场
    with torch.inference_mode():
        torch.testing.assert_close(tendency(history), state(history) - centre + history[:, -1:])


def test_each_decoded_frame_starts_from_the_one_before() -> None:
    model = build("convlstm_seq2seq", predict="tendency")
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
    region = replace(SPEC, longitudes=tuple(200.0 + 2.5 * i for i in range(32)))
    build(name, region)
    with pytest.raises(
        ValueError, match=r"circular_lon needs longitudes that close the circle; these 32 run from 200 "
    ):
        build(name, region, padding="circular_lon")
