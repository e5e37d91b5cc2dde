"""序列 Transformer 家族：三种网络各与 torch.nn 的层拼成的同一网络相等；参数个数；spatial 的提醒与拒绝；配置的错误。"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.evaluation.cost import flops_per_sample
from models import build_config
from models.layers.position import sincos_codes
from models.layers.transformer import sinusoid
from models.sequence_transformer import MAX_TOKENS, WARN_TOKENS
from tests.models.layers.torch_layers import randomize, torch_decoder, torch_encoder
from tests.models.small import make_model, small_batch, small_spec

VARIANTS = ["transformer", "seq2seq", "spatial"]
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def small(variant: str, **options: Any) -> dict[str, Any]:
    sizes = {"dim": 12, "heads": 3, "depth": 2, "dropout": 0.0}
    decoder = {"decoder_depth": 2} if variant == "seq2seq" else {}
    return {"name": "sequence_transformer", "variant": variant, **sizes, **decoder, **options}


def encode(encoder: Any, tokens: Tensor, codes: Tensor) -> Tensor:
    x = tokens @ encoder.embed.weight.T + encoder.embed.bias + codes.double()
    for layer in encoder.layers:
        x = torch_encoder(layer)(x)
    return x


def reference(variant: str, model: Any, history: Tensor, frames_out: int) -> Tensor:
    """(B, T, C, H, W) → (B, τ, C, H, W)，层取自 torch.nn，展平与拼回用循环写开。"""
    network, (batch, frames, channels, height, width) = model.network, history.shape
    out = torch.empty(batch, frames_out, channels, height, width, dtype=history.dtype)
    if variant == "spatial":
        points = [(i, j) for i in range(height) for j in range(width)]
        tokens = torch.stack([history[:, :, :, i, j].flatten(1) for i, j in points], 1)  # (B, N, T·C)
        x = network.head(encode(network.encoder, tokens, sincos_codes(torch.tensor(points), 12)))
        for n, (i, j) in enumerate(points):
            out[:, :, :, i, j] = x[:, n].unflatten(1, (frames_out, channels))
        return out
    codes = sinusoid(frames + frames_out, 12)
    x = encode(network.encoder, history.reshape(batch, frames, -1), codes[:frames])
    if variant == "seq2seq":
        query = (network.query + codes[frames:].double())[None].repeat(batch, 1, 1)
        for layer in network.decoder:
            query = torch_decoder(layer)(query, x)
        for t in range(frames_out):
            out[:, t] = network.head(query[:, t]).reshape(batch, channels, height, width)
        return out
    norm, _, half, _, _, last = network.head
    made = last(F.relu(half(F.layer_norm(x[:, frames - 1], (12,), norm.weight, norm.bias))))
    for t, frame in enumerate(made.chunk(frames_out, 1)):
        out[:, t] = frame.reshape(batch, channels, height, width)
    return out


@every_variant
def test_the_network_equals_the_one_built_from_torch_layers(variant: str) -> None:
    torch.manual_seed(0)
    spec = small_spec(channels=2, grid=(3, 5), frames_in=4, frames_out=2)
    model = make_model(small(variant), spec).double()
    randomize(model)
    history = small_batch(spec).history.double()
    with torch.no_grad():
        found, expected = model.forecast(history, None)[:, 0], reference(variant, model, history, 2)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@every_variant
def test_every_value_of_the_history_reaches_every_value_of_the_forecast(variant: str) -> None:
    torch.manual_seed(0)
    spec = small_spec(channels=2, grid=(4, 6), frames_in=3, frames_out=2)
    model = make_model(small(variant), spec).double()
    randomize(model)
    history = small_batch(spec, count=1).history.double()
    jacobian = torch.autograd.functional.jacobian(model, history)
    assert isinstance(jacobian, Tensor) and jacobian.shape == (1, 2, 2, 4, 6, 1, 3, 2, 4, 6)
    assert (jacobian != 0).all()


LAYER = {"encoder": 1, "decoder": 2}  # 几个注意力


def layer_count(kind: str, dim: int) -> int:
    attention, mlp = 4 * dim**2 + dim, 8 * dim**2 + 5 * dim
    return LAYER[kind] * attention + mlp + (LAYER[kind] + 1) * 2 * dim


@pytest.mark.parametrize("channels", [1, 9])
def test_parameter_counts_of_the_default_sizes(channels: int) -> None:
    """12 → 4，32 × 64。"""
    features, spec = channels * 32 * 64, small_spec(channels, (32, 64), 12, 4)
    encoder = layer_count("encoder", 128)
    expected = {
        "transformer": (features + 1) * 128 + 3 * encoder + 2 * 128 + 129 * 64 + 65 * 4 * features,
        "seq2seq": (features + 1) * 256
        + 4 * (layer_count("encoder", 256) + layer_count("decoder", 256) + 256)
        + 257 * features,
        "spatial": (12 * channels + 1) * 128 + 3 * encoder + 129 * 4 * channels,
    }
    for variant in VARIANTS:
        model = make_model({"name": "sequence_transformer", "variant": variant}, spec)
        assert sum(p.numel() for p in model.parameters()) == expected[variant], variant


def test_default_sizes_are_those_of_the_requirement() -> None:
    def made(variant: str) -> dict[str, Any]:
        return build_config({"name": "sequence_transformer", "variant": variant}).model_dump()

    first = {"dim": 128, "heads": 4, "depth": 3, "decoder_depth": None, "predict": "state"}
    assert made("transformer") == {"variant": "transformer", **first, "dropout": 0.2}
    assert made("spatial") == {"variant": "spatial", **first, "dropout": 0.0}
    assert made("seq2seq") == {
        "variant": "seq2seq", "dim": 256, "heads": 8, "depth": 4, "decoder_depth": 4, "dropout": 0.2,
        "predict": "state",
    }  # fmt: skip
    assert build_config({"name": "sequence_transformer"}).model_dump() == made("transformer")


@pytest.mark.parametrize(("grid", "warned"), [((64, 64), False), ((65, 64), True), ((128, 128), True)])
def test_spatial_warns_above_its_first_limit(
    grid: tuple[int, int], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert (grid[0] * grid[1] > WARN_TOKENS) == warned and grid[0] * grid[1] <= MAX_TOKENS
    with caplog.at_level(logging.WARNING, "ar_pred"):
        make_model(small("spatial"), small_spec(grid=grid))
    assert [r.levelname for r in caplog.records] == ["WARNING"] * warned
    if warned:
        assert f"{grid[0]} x {grid[1]} = {grid[0] * grid[1]} tokens" in caplog.text


@pytest.mark.parametrize(
    ("grid", "patch"), [((128, 256), [4, 8]), ((129, 128), [3, 8]), ((181, 360), [1, 8]), ((150, 270), [3, 9])]
)
def test_spatial_refuses_above_its_second_limit_and_names_what_works(grid: tuple[int, int], patch: list[int]) -> None:
    spec = small_spec(channels=1, grid=grid, frames_in=2)
    said = (
        f"model.variant = spatial makes every grid point a token: {grid[0]} x {grid[1]} = {grid[0] * grid[1]}, at most "
        "16384; variants that work on this grid: transformer, seq2seq; attention over patches: "
        f"model.name = weather_transformer with patch = {patch}"
    )
    with pytest.raises(ValueError, match="model.variant = spatial") as error:
        make_model(small("spatial"), spec)
    assert str(error.value) == said
    with torch.device("meta"):  # 说能用的真的能用；不占内存
        for options in (small("transformer"), small("seq2seq"), {"name": "weather_transformer", "patch": patch}):
            made = make_model(options, spec)(torch.empty(1, 2, 1, *grid))
            assert made.shape == (1, 1, 1, *grid)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"variant": "spacial"}, "nearest: spatial"),
        ({"variant": 3}, "model.variant = 3"),
        ({"variant": "transformer", "decoder_depth": 2}, "model.decoder_depth = 2: variant transformer has no decoder"),
        ({"variant": "spatial", "decoder_depth": 4}, "model.decoder_depth = 4: variant spatial has no decoder"),
        ({"variant": "seq2seq", "decoder_depth": None}, "model.decoder_depth = None: seq2seq needs one"),
        (
            {"variant": "seq2seq", "dim": 100},
            "model.heads = 8: does not divide model.dim = 100; heads that work: [1, 2",
        ),
        ({"heads": 3}, "model.heads = 3: does not divide model.dim = 128"),
        ({"dim": 1, "heads": 1}, "model.dim = 1: variant transformer has a layer of dim / 2"),
        ({"dim": 0}, "model.dim = 0"),
        ({"dropout": 1.0}, "model.dropout = 1.0"),
        ({"decoder_dept": 2}, "unknown key model.decoder_dept = 2; nearest: model.decoder_depth"),
    ],
)
def test_mistakes_in_the_config(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="model") as error:
        build_config({"name": "sequence_transformer", **options})
    assert said in str(error.value) and "\n" not in str(error.value)


@every_variant
def test_every_weight_is_counted_as_work(variant: str) -> None:
    spec = small_spec(grid=(4, 6), frames_in=4, frames_out=2)
    model = make_model(small(variant), spec).eval()
    assert flops_per_sample(model, spec) > 2 * sum(p.numel() for p in model.parameters() if p.ndim > 1)
