"""成员的噪声：调制的算式，没有噪声时什么也没有，成员各用各的向量，丢弃激活不改变梯度。"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from engine.blocks import checkpoint_blocks
from models.layers.noise import NoiseNorm
from tests.models.small import TINY, make_model, rollout, small_batch, small_spec

MODELS: dict[str, dict[str, Any]] = {
    "cnn": {"name": "cnn", "width": 8},
    "cnn deep": {"name": "cnn", "variant": "deep", "width": 8, "blocks": 1},
    "pixel_unet": {"name": "pixel_unet", "base_channels": 8, "depth": 1, "scaling": "zscore"},
    "simvp": {"name": "simvp", "hid_S": 8, "hid_T": 16, "N_T": 2},
    "simvp gsta": {"name": "simvp", "translator": "gsta", "hid_S": 8, "hid_T": 16, "N_T": 2},
    "convlstm": {"name": "convlstm", "hidden": 8},
    "convlstm seq2seq": {"name": "convlstm", "variant": "seq2seq", "hidden": 8},
    "weather_transformer": {
        "name": "weather_transformer", "patch": [4, 4], "dim": 16, "depth": 1, "decoder_depth": 1, "dropout": 0.0,
    },
    "ar_pred": TINY,
}  # fmt: skip
each_model = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
MODULATION = re.compile(r"modulate|noise_gates")
SPEC = small_spec()
HISTORY = small_batch(SPEC, count=2).history


def noisy(options: dict[str, Any], start: float | None = None) -> Any:
    """噪声 4 维的模型；start: 调制放大到看得清的初值。"""
    torch.manual_seed(0)
    model = make_model({**options, "noise": {"size": 4}}, SPEC)
    if start is not None:
        for name, weight in model.named_parameters():
            if MODULATION.search(name):
                nn.init.normal_(weight, std=start)
            elif name.startswith(("head.weight", "decoder.head.weight")):  # 输出层从 0.001 起，看不出差别
                nn.init.normal_(weight)
    return model


def generators(count: int) -> list[Generator]:
    """count 个样本的，第 i 个总是同一串。"""
    return [Generator().manual_seed(i) for i in range(count)]


@pytest.mark.parametrize("last", [True, False])
def test_scale_and_shift_are_linear_in_the_noise(last: bool) -> None:
    x, noise = torch.randn(2, 6, 3, 4), torch.randn(2, 5)
    norm = nn.LayerNorm(4) if last else nn.GroupNorm(2, 6)
    layer = NoiseNorm(norm, 5)
    nn.init.normal_(layer.modulate.weight)
    weights, plain = layer.modulate.weight.detach().numpy(), norm(x).detach().numpy()
    wanted = np.empty_like(plain)
    for b in range(2):
        values = weights @ noise[b].numpy()
        scale, shift = np.split(values, 2)
        for c in range(len(scale)):
            place = (b, ..., c) if last else (b, c)
            wanted[place] = plain[place] * (1 + scale[c]) + shift[c]
    np.testing.assert_allclose(layer(x, noise).detach().numpy(), wanted, rtol=1e-5, atol=1e-5)


@each_model
def test_no_modulation_is_the_model_without_noise(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain, conditioned = make_model(options, SPEC), noisy(options, start=0.0)
    weights = [value for name, value in conditioned.state_dict().items() if not MODULATION.search(name)]
    plain.load_state_dict(dict(zip(plain.state_dict(), weights, strict=True)))
    assert not plain.probabilistic and conditioned.probabilistic
    assert torch.equal(plain.eval().forecast(HISTORY, None), conditioned.eval().forecast(HISTORY, None))
    with pytest.raises(ValueError, match="is deterministic: 2 members"):
        plain.forecast(HISTORY, None, 2)


@each_model
def test_each_member_follows_its_own_vector(options: dict[str, Any]) -> None:
    model = noisy(options, start=0.3).eval()
    with torch.no_grad():
        made = model.forecast(HISTORY, None, 3, generators(6))  # (2, 3, 1, C, H, W)
        alone = torch.cat([model.forecast(HISTORY[i // 3][None], None, 1, [g]) for i, g in enumerate(generators(6))])
        rolled = rollout(model, HISTORY[:1], None, 2, SPEC, generators(3))  # (1, 3, 2, C, H, W)
        again = rollout(model, HISTORY[:1], None, 2, SPEC, generators(3), limit=1)
    assert made.shape == (2, 3, *alone.shape[2:])
    torch.testing.assert_close(made.flatten(0, 1), alone[:, 0])
    assert made.std(1).mean() > 0.01
    torch.testing.assert_close(rolled, again, rtol=1e-4, atol=1e-4)  # 一批几个，矩阵乘的次序不同


@each_model
def test_it_starts_near_the_deterministic_network(options: dict[str, Any]) -> None:
    made = noisy(options).forecast(HISTORY, None, 4, generators(8))
    assert 0 < made.std(1).mean() < 0.05 * made.std()


@each_model
def test_recomputed_activations_see_the_same_noise(options: dict[str, Any]) -> None:
    """两步的滚动：反向时，第二步的噪声早已换过。"""

    def run(discard: bool) -> tuple[Tensor, list[Tensor]]:
        model, own = noisy(options, start=0.3), generators(4)
        if discard:
            checkpoint_blocks(model)
        first = model.forecast(HISTORY, None, 2, own).flatten(0, 1)  # (B·M, 1, C, H, W)
        later = torch.cat([HISTORY.repeat_interleave(2, 0)[:, 1:], first], 1)
        loss = model.forecast(later, None, 1, own).square().mean()
        loss.backward()
        return loss.detach(), [weight.grad for weight in model.parameters() if weight.grad is not None]

    for kept, recomputed in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(recomputed, kept)
