"""多尺度 VQVAE：公开的参数个数、网络与写开的相比、阶段一的约定与编号、损失、边界、短短一次训练后逐尺度的误差。"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.optim import make_optimizer
from models import build_config, open_first_stage
from models.interface import Autoencoder, OnePass, Portable, TokenAutoencoder, is_codec
from models.layers.frames import frames_of
from models.layers.vqvae_gan import Halve, SelfAttention
from models.vqvae import Model
from tests.models.layers.numpy_layers import conv, group_norm, values
from tests.models.small import make_model, small_batch, small_spec
from util.batch import Batch
from util.training_config import TrainConfig

TINY: dict[str, Any] = {
    "name": "vqvae", "width": 8, "multipliers": [1, 2], "blocks": 1, "groups": 4,
    "latent_dim": 4, "vocabulary": 32, "scales": 4, "restart": 0.1, "vae_batch_size": 64,
}  # fmt: skip
SPEC = small_spec(channels=2, grid=(8, 16), frames_in=1)
SQUARES = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]


def make(seed: int = 0, **options: Any) -> Any:
    """码铺开到编码的大小；评测模式。"""
    torch.manual_seed(seed)
    model = make_model({**TINY, **options}, SPEC)
    with torch.no_grad():
        model.quantizer.codes.normal_(0, 0.3)
    return model.eval()


def fields(count: int = 3, seed: int = 0) -> Tensor:
    return frames_of(small_batch(SPEC, count=count, seed=seed))


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_published_size() -> None:
    """ch 160、4096 个 32 维的码、256 × 256 的三个通道；数取自公开的权重。"""
    with torch.device("meta"):
        model = make_model({"name": "vqvae", "scales": SQUARES}, small_spec(3, (256, 256)))
    assert size(model) == 108_948_355
    assert size(model.encoder) == 44_107_872 and size(model.decoder) == 64_653_923
    assert size(model.quantizer.codebook) == 131_072 and size(model.quantizer.phi) == 36_992
    assert size(model.quant_conv) == size(model.post_quant_conv) == 9_248
    assert model.latent_shape == (32, 16, 16) and sum(model.quantizer.lengths) == 680


@pytest.mark.parametrize(("width", "count"), [(32, 4_612_867), (64, 17_702_179), (96, 39_454_531), (128, 69_869_923)])
def test_the_sizes_of_narrower_ones(width: int, count: int) -> None:
    with torch.device("meta"):
        assert (
            size(make_model({"name": "vqvae", "width": width, "scales": SQUARES}, small_spec(3, (256, 256)))) == count
        )


def test_self_attention_is_the_written_out_sum() -> None:
    torch.manual_seed(0)
    layer, x = SelfAttention(6, groups=3), torch.randn(2, 6, 2, 3)
    q, k, v = np.split(conv(group_norm(values(x), layer.norm), layer.qkv).reshape(2, 18, 6), 3, axis=1)  # (2, 6, h·w)
    scores = np.exp(np.einsum("nci,ncj->nij", q, k) / np.sqrt(6))
    mixed = np.einsum("nij,ncj->nci", scores / scores.sum(2, keepdims=True), v).reshape(2, 6, 2, 3)
    np.testing.assert_allclose(values(layer(x)), values(x) + conv(mixed, layer.out), atol=1e-5)


@pytest.mark.parametrize("padding", ["zeros", "circular_lon"])
def test_halving_pads_the_right_and_the_bottom(padding: Any) -> None:
    torch.manual_seed(0)
    layer, x = Halve(2, padding), torch.randn(1, 2, 4, 6)
    wide = np.pad(values(x), ((0, 0), (0, 0), (0, 1), (0, 1)))
    if padding == "circular_lon":
        wide[:, :, :-1, -1] = values(x)[..., 0]
    made = np.zeros((1, 2, 2, 3)) + values(layer.bias)[:, None, None]
    for out, i, y, z in np.ndindex(2, 2, 3, 3):
        made[:, out] += values(layer.weight)[out, i, y, z] * wide[:, i, y : y + 4 : 2, z : z + 6 : 2]
    np.testing.assert_allclose(values(layer(x)), made, atol=1e-6)


def test_circular_networks_turn_with_the_globe() -> None:
    """转整数个潜变量的格；双三次放大不循环，所以只查编码与解码的网络。"""
    model, x = make(padding="circular_lon"), fields()
    f = model._continuous(x)
    torch.testing.assert_close(model._continuous(x.roll(4, -1)), f.roll(2, -1), rtol=1e-4, atol=1e-5)
    made = model.decode_latents(f)
    torch.testing.assert_close(model.decode_latents(f.roll(2, -1)), made.roll(4, -1), rtol=1e-4, atol=1e-5)
    zeros = make()
    assert not zeros._continuous(x.roll(4, -1)).allclose(zeros._continuous(x).roll(2, -1), atol=1e-3)


def test_it_is_an_autoencoder_of_tokens() -> None:
    model = make()
    assert isinstance(model, TokenAutoencoder) and isinstance(model, Autoencoder) and isinstance(model, Portable)
    assert not isinstance(make_model({"name": "persistence"}, SPEC), TokenAutoencoder)
    assert model.latent_shape == (4, 4, 8)
    tokens = model.encode_tokens(fields())
    assert [tuple(t.shape) for t in tokens] == [(6, n) for n in model.quantizer.lengths]
    assert all(t.dtype == torch.int64 and set(t.flatten().tolist()) <= set(range(32)) for t in tokens)
    assert is_codec(model)


def test_tokens_and_latents_decode_to_the_same_fields() -> None:
    model = make()
    model.observe_latents(small_batch(SPEC))
    model.solve_latents()
    assert model.latents_known
    batch = small_batch(SPEC, seed=5)
    x = frames_of(batch)
    tokens, latents = model.encode_tokens(x), model.encode(x)
    assert latents.shape == (len(x), *model.latent_shape)
    f_hat = model.quantizer.reconstruct(tokens)
    assert torch.equal(latents, model.latents(f_hat))
    assert torch.equal(model.decode_tokens(tokens), model.decode_latents(f_hat))
    torch.testing.assert_close(model.decode(latents), model.decode_tokens(tokens), rtol=1e-4, atol=1e-5)
    forward = model.quantizer(model._continuous(x))  # 损失里走的
    assert torch.equal(forward.f_hat, f_hat)
    made = model.decode_latents(forward.f_hat)
    assert model.loss(batch)["l2"].item() == pytest.approx((made - x).square().mean().item(), rel=1e-5)


def test_latent_statistics_are_those_of_f_hat() -> None:
    model = make()
    batches = [small_batch(SPEC, seed=seed) for seed in range(2)]
    for batch in batches:
        model.observe_latents(batch)
    model.solve_latents()
    f_hat = torch.cat([model.quantizer.reconstruct(model.encode_tokens(frames_of(b))) for b in batches])
    np.testing.assert_allclose(values(model.latents.mean).ravel(), values(f_hat).mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(values(model.latents.std).ravel(), values(f_hat).std((0, 2, 3)), rtol=1e-4)


def test_chunks_change_nothing() -> None:
    one, other, x = make(), make(vae_batch_size=2), fields()
    for a, b in zip(one.encode_tokens(x), other.encode_tokens(x), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(one.encode(x), other.encode(x))
    torch.testing.assert_close(one.loss(small_batch(SPEC))["loss"], other.loss(small_batch(SPEC))["loss"])


def test_the_loss_is_the_weighted_sum_over_valid_fields() -> None:
    model, batch = make(l1_weight=0.5, l2_weight=2.0, spectral_weight=0.3), small_batch(SPEC)
    batch.valid[0, 0, 1] = batch.valid[2, 1, 0] = False
    terms = {name: value.item() for name, value in model.loss(batch).items()}
    x = frames_of(batch)
    made = values(model.decode_tokens(model.encode_tokens(x)))
    keep, truth = batch.valid.flatten(0, 1).numpy(), values(x)
    spectra = [np.abs(np.fft.rfft(v, norm="ortho")) for v in (made, truth)]
    expected = {
        "l1": np.abs(made - truth).mean((2, 3))[keep].mean(),
        "l2": ((made - truth) ** 2).mean((2, 3))[keep].mean(),
        "spectral": np.abs(spectra[0] - spectra[1]).mean((2, 3))[keep].mean(),
    }
    for name, value in expected.items():
        assert terms[name] == pytest.approx(value, rel=1e-4)
    whole = 0.5 * expected["l1"] + 2 * expected["l2"] + 0.3 * expected["spectral"] + terms["vq"]
    assert terms["loss"] == pytest.approx(whole, rel=1e-4)
    left = ["residual_1x1", "residual_1x2", "residual_2x4", "residual_4x8"]
    assert [name for name in terms if name.startswith("residual")] == left
    f = model._continuous(x)
    rest = (f - model.quantizer.quantize(f)).square().mean() / f.square().mean()
    assert terms["residual_4x8"] == pytest.approx(rest.item(), rel=1e-4)
    assert "spectral" not in make().loss(batch)


def changes_of(batches: list[Batch]) -> np.ndarray:
    """(N, C, H, W) 相邻两帧之差，两帧的每个通道都有效的。"""
    kept = []
    for batch in batches:
        window, valid = torch.cat([batch.history, batch.future], 1).double().numpy(), batch.valid.numpy()
        for b, t in np.ndindex(len(window), window.shape[1] - 1):
            if valid[b, t : t + 2].all():
                kept.append(window[b, t + 1] - window[b, t])
    return np.stack(kept)


def test_it_can_encode_the_changes_between_frames() -> None:
    """先看一遍求差的均值与标准差；进出都是标准化的场之差，损失在差自己的尺度上。"""
    spec = small_spec(channels=2, grid=(8, 16), frames_in=2)  # 三帧，两个差
    torch.manual_seed(0)
    model = make_model({**TINY, "encodes": "tendency"}, spec).eval()
    assert isinstance(make(), OnePass) and not make().needs_pass and model.needs_pass
    with torch.no_grad():
        model.quantizer.codes.normal_(0, 0.3)
    batches = [small_batch(spec, seed=seed) for seed in range(3)]
    batches[0].valid[1, 1, 0] = False
    for batch in batches:
        model.accumulate(batch)
    model.solve()
    seen = changes_of(batches)
    mean, std = seen.mean((0, 2, 3), keepdims=True)[0], seen.std((0, 2, 3), keepdims=True)[0]
    np.testing.assert_allclose(values(model.inputs.mean), mean, atol=1e-6)
    np.testing.assert_allclose(values(model.inputs.std), std, rtol=1e-5)
    changes = torch.from_numpy(seen).float()
    plain = make()  # 同样的网络，看的是标准化过的差
    plain.load_state_dict(
        {**model.state_dict(), "inputs.mean": torch.zeros(2, 1, 1), "inputs.std": torch.ones(2, 1, 1)}
    )
    scaled = torch.from_numpy((seen - mean) / std).float()
    for a, b in zip(model.encode_tokens(changes), plain.encode_tokens(scaled), strict=True):
        assert torch.equal(a, b)
    made = model.decode_tokens(model.encode_tokens(changes))
    np.testing.assert_allclose(
        values(made), values(plain.decode_tokens(plain.encode_tokens(scaled))) * std + mean, atol=1e-5
    )
    torch.testing.assert_close(model.decode(model.encode(changes)), made, rtol=1e-4, atol=1e-5)
    error = (values(made) - seen) / std
    batch = batches[1]
    assert model.loss(batch)["l2"].item() == pytest.approx((error[-12:-6] ** 2).mean(), rel=1e-4)
    assert len(changes_of([batch])) == 6 == len(changes_of([batches[2]]))


def test_the_codebook_does_not_decay() -> None:
    """没有用到的码没有梯度，衰减会把它缩向原点。"""
    config = TrainConfig(epochs=1, batch_size=1, optimizer="adamw", lr=1e-3, weight_decay=0.05)
    model = make()
    codes = model.quantizer.codebook.weight
    decayed, kept = make_optimizer(model, config).param_groups
    assert any(p is codes for p in kept["params"]) and not any(p is codes for p in decayed["params"])
    assert make(codebook="ema").no_decay == []


def test_changes_that_cannot_be_scaled_are_said() -> None:
    model, batch = make_model({**TINY, "encodes": "tendency"}, SPEC), small_batch(SPEC)
    still = batch._replace(future=batch.history)
    model.accumulate(batch._replace(valid=torch.zeros_like(batch.valid)))
    with pytest.raises(ValueError, match=r"model\.encodes = tendency: no change between frames is free of"):
        model.solve()
    model.accumulate(still)
    with pytest.raises(ValueError, match=r"model\.encodes = tendency: the tendencies have no spread"):
        model.solve()


@pytest.mark.parametrize(
    ("name", "options"),
    [("latent_unet", {}), ("latent_diffusion", {}), ("dit", {"size": None, "dim": 16, "depth": 1, "heads": 2})],
)
def test_latent_models_refuse_a_first_stage_of_changes(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"model\.first_stage encodes tendencies, not fields; only var"):
        make_model({"name": name, "first_stage": {**TINY, "encodes": "tendency"}, **options}, SPEC)


def test_freezing_each_side() -> None:
    model = make()
    sides = (("encoder", "quant_conv", "quantizer"), ("post_quant_conv", "decoder"))
    for encoder, decoder in ((True, True), (True, False), (False, True), (False, False)):
        model.freeze(encoder, decoder)
        for frozen, names in zip((encoder, decoder), sides, strict=True):
            for name, p in model.named_parameters():
                if name.split(".")[0] in names:
                    assert p.requires_grad is not frozen, name


def test_gradients_reach_the_encoder_through_encode() -> None:
    """阶段二微调编码器。"""
    model = make()
    model.decode(model.encode(fields())).square().mean().backward()
    for side in (model.encoder, model.quant_conv, model.post_quant_conv, model.decoder):
        assert all(p.grad is not None and p.grad.any() for p in side.parameters())


def test_portable_options_rebuild_it_inside_a_second_stage() -> None:
    model = make()
    other = open_first_stage(model.portable_options(), SPEC)
    assert isinstance(other, Model)
    other.load_state_dict(model.state_dict())
    for a, b in zip(model.encode_tokens(fields()), other.eval().encode_tokens(fields()), strict=True):
        assert torch.equal(a, b)
    second = make_model({"name": "latent_unet", "first_stage": TINY, "base_channels": 8, "depth": 1}, SPEC)
    assert second.loss(small_batch(SPEC))["loss"].isfinite()
    before = {name: value.clone() for name, value in second.first_stage.state_dict().items()}
    second.train().loss(small_batch(SPEC))
    assert all(torch.equal(value, before[name]) for name, value in second.first_stage.state_dict().items())


def test_scales_can_be_a_number_sides_or_pairs() -> None:
    listed = [[1, 1], [1, 2], [2, 4], [4, 8]]
    assert make().quantizer.scales == make(scales=listed).quantizer.scales == tuple(map(tuple, listed))
    square = make_model({**TINY, "scales": [1, 2, [3, 4], 8]}, small_spec(grid=(16, 16)))
    assert square.quantizer.scales == ((1, 1), (2, 2), (3, 4), (8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multipliers": [1, 1, 1, 2, 2]}, r"model\.multipliers = \[1, 1, 1, 2, 2\] halves the grid 4 times; 8 x 16 "),
        ({"scales": [1, 2, 4]}, r"model\.scales = \(1, 1\) \(2, 2\) \(4, 4\): the last one must be the latent grid"),
        ({"scales": [1, [2, 4, 1], [4, 8]]}, r"model\.scales = .*: every scale is a side or a pair"),
        ({"scales": [0, 4]}, r"model\.scales = \[0, 4\]: every scale is a side or a pair \[h, w\], at least 1"),
        ({"scales": 9}, r"model\.scales = 9: a latent grid of 4 x 8 has room for 2 to 8 scales"),
        ({"scales": 3}, r"model\.phi = 4: 3 scales use only"),
    ],
)
def test_what_it_cannot_do_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as found:
        make_model({**TINY, **options}, SPEC)
    assert re.fullmatch(r".*(model|data)\.\w+ = .+", str(found.value))


def test_groups_must_divide_the_widths() -> None:
    with pytest.raises(ValueError, match=r"groups = 3 does not divide the widths \[8, 16\]"):
        build_config({**TINY, "groups": 3})


def waves(seed: int, count: int = 8) -> Tensor:
    """几个不同波长、相位随机的波。"""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.arange(8)[:, None], torch.arange(16)
    made = torch.zeros(count, 2, 8, 16)
    for wave in (1, 2, 3):
        phase, slope = torch.rand(2, count, 2, 1, 1, generator=generator) * 6.28
        made += torch.sin(2 * torch.pi * wave * columns / 16 + slope * rows / 8 + phase) / wave
    return made


def test_after_a_short_training_every_scale_leaves_less() -> None:
    """训练时没有见过的波：潜变量剩下的误差逐个尺度变小，只用头几个尺度解码的场也越来越像。"""
    model = make().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.5, 0.9))
    batch = small_batch(SPEC, count=4)
    terms: dict[str, Tensor] = {}
    for step in range(250):
        x = waves(step).unflatten(0, (4, 2))
        model.at_step(step, 250)
        terms = model.loss(batch._replace(history=x[:, :1], future=x[:, 1:]))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    model.eval()
    x = waves(10_000, 64)
    with torch.no_grad():
        f = model._continuous(x)
        left = [float((f - h).square().mean() / f.square().mean()) for _, _, h in model.quantizer._walk(f)]
        tokens = model.encode_tokens(x)
        errors = [float((model.decode_tokens(tokens[:k]) - x).square().mean()) for k in range(1, 5)]
    assert all(b < a for a, b in pairwise(left)), left
    assert all(b < a for a, b in pairwise(errors)), errors
    assert errors[-1] < 0.5 * float(x.var()) and float(terms["usage"]) > 0.5
