"""LSTM：三种变体与写开的 NumPy 循环相比；参数个数与公式相比。"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor, nn

from models import build_config, build_model
from tests.models.small import small_batch, small_spec, terms_of
from util.batch import DataSpec

Array = NDArray[np.float64]
SPEC = small_spec(channels=2, grid=(3, 4), frames_in=5, frames_out=3)
FEATURES = 24
HEADS = ("linear", "mlp")
every_variant = pytest.mark.parametrize("variant", ["lstm", "bidirectional", "seq2seq"])


def make(spec: DataSpec = SPEC, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_model({"name": "lstm", "hidden": 6, **options}, spec)


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def run_layer(lstm: nn.LSTM, name: str, frames: list[Array], h: Array, c: Array) -> tuple[list[Array], Array, Array]:
    """一层、一个方向走完 frames（每个 (F,)）；门的次序 i、f、g、o 是 PyTorch 文档写明的。"""
    input_weight, weight, input_bias, bias = (
        array(getattr(lstm, f"{kind}_{name}")) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    seen = []
    for frame in frames:
        i, f, g, o = np.split(input_weight @ frame + input_bias + weight @ h + bias, 4)
        c = expit(f) * c + expit(i) * np.tanh(g)
        h = expit(o) * np.tanh(c)
        seen.append(h)
    return seen, h, c


def written_out(model: Any, history: Array) -> Array:
    """一个窗口 (T_in, C, H, W) → (T_out, C, H, W)。"""
    frames, last, states = [frame.ravel() for frame in history], np.zeros(0), []
    directions = ["", "_reverse"] if model.variant == "bidirectional" else [""]
    for layer in range(model.encoder.num_layers):
        both, ends = [], []
        for direction in directions:
            order = frames[::-1] if direction else frames
            zero = np.zeros(model.encoder.hidden_size)
            seen, h, c = run_layer(model.encoder, f"l{layer}{direction}", order, zero, zero)
            both.append(seen[::-1] if direction else seen)
            ends.append(h)
            states.append((h, c))
        frames, last = [np.concatenate(parts) for parts in zip(*both, strict=True)], np.concatenate(ends)
    weight, bias = array(model.head.weight), array(model.head.bias)
    if model.variant != "seq2seq":
        return (weight @ last + bias).reshape(-1, *history.shape[1:])
    frame, made = history[-1].ravel(), []
    for _ in range(model.frames_out):
        top = frame
        for layer, (h, c) in enumerate(states):
            _, top, c = run_layer(model.decoder, f"l{layer}", [top], h, c)
            states[layer] = top, c
        frame = weight @ top + bias
        made.append(frame)
    return np.stack(made).reshape(-1, *history.shape[1:])


@every_variant
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_model_equals_a_numpy_loop(variant: str, layers: int) -> None:
    model = make(variant=variant, layers=layers, dropout=0.0).double().eval()
    batch = small_batch(SPEC, count=2)
    made = array(model.forecast(batch.history.double(), batch.time)[:, 0])
    for window, history in enumerate(array(batch.history)):
        np.testing.assert_allclose(made[window], written_out(model, history), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("variant", "directions", "recurrences"), [("lstm", 1, 1), ("bidirectional", 2, 1), ("seq2seq", 1, 2)]
)
def test_parameters_follow_the_formula(variant: str, directions: int, recurrences: int) -> None:
    """每层每个方向 4D(输入 + D + 2)，输出层 输入·输出 + 输出。"""
    hidden, out = 6, FEATURES * (1 if variant == "seq2seq" else SPEC.frames_out)
    layers = sum(4 * hidden * (inputs + hidden + 2) for inputs in (FEATURES, directions * hidden))
    expected = recurrences * directions * layers + directions * hidden * out + out
    assert sum(p.numel() for p in make(variant=variant).parameters()) == expected


def test_the_head_of_the_source() -> None:
    """C = 1、12 → 4、32 × 64：参数个数与来源的代码相同；两个 Linear 之间是 ReLU。"""
    spec = small_spec(channels=1, grid=(32, 64), frames_in=12, frames_out=4)
    made = {head: build_model({"name": "lstm", "head": head}, spec) for head in HEADS}
    assert {head: sum(p.numel() for p in model.parameters()) for head, model in made.items()} == {
        "linear": 2_304_000,
        "mlp": 1_787_968,
    }
    head: Any = make(head="mlp", dropout=0.0).double().head
    top = torch.randn(2, 6, dtype=torch.float64)
    inner = np.maximum(array(top) @ array(head[0].weight).T + array(head[0].bias), 0)
    np.testing.assert_allclose(array(head(top)), inner @ array(head[3].weight).T + array(head[3].bias), rtol=1e-10)


@every_variant
@pytest.mark.parametrize("head", HEADS)
def test_gradients_reach_every_parameter(variant: str, head: str) -> None:
    model = make(variant=variant, head=head).train()
    for seed in range(4):  # dropout 每次关掉不同的几路
        terms_of(model, small_batch(SPEC, seed=seed))["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_dropout_acts_in_training_only() -> None:
    model, history = make(dropout=0.5), small_batch(SPEC).history
    assert not torch.equal(model.train()(history), model(history))
    assert torch.equal(model.eval()(history), model(history))


def test_dropout_with_one_layer_is_refused() -> None:
    for dropout in ({}, {"dropout": 0.2}):
        with pytest.raises(ValueError, match=r"model\.dropout = 0\.2: acts between layers, and model\.layers = 1"):
            build_config({"name": "lstm", "layers": 1, **dropout})
    build_config({"name": "lstm", "layers": 1, "dropout": 0.0})
