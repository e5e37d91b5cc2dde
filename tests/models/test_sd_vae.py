"""SD VAE：编码与解码同 diffusers 写开的相比；潜变量的统计量；损失的各项；不靠文件夹的重建；写错的配置。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from models import open_first_stage
from models.interface import Autoencoder, Portable, can_forecast, is_codec
from models.layers.draws import Draws
from tests.engine.runs import ROOT
from tests.models.small import SMALL_VAE, make_model, outputs_of, small_batch, small_spec
from util.batch import Batch, DataSpec
from util.checkpoint import load_checkpoint, save_checkpoint

SIZES = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}  # 边长减半一次
PUBLISHED = {"block_out_channels": [128, 256, 512, 512]}
SPEC = small_spec()  # 3 个通道，8 × 16，3 → 1


def make(spec: DataSpec = SPEC, seed: int = 0, **options: Any) -> Any:
    """极值看过了的小模型，eval。"""
    torch.manual_seed(seed)
    if "weights" not in options:
        options = {"weights": "random", "architecture": SIZES, **options}
    model = make_model({"name": "sd_vae", **options}, spec).eval()
    model.accumulate(small_batch(spec, seed=9))
    model.solve()
    return model


def fields_of(batch: Batch) -> Tensor:
    return torch.cat([batch.history, batch.future], 1).flatten(0, 1)  # (N, C, H, W)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """像下载来的那样的文件夹。"""
    torch.manual_seed(5)
    AutoencoderKL(**SMALL_VAE).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_the_full_size_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        spec = small_spec(9, (32, 64))
        model = make_model({"name": "sd_vae", "weights": "random", "architecture": PUBLISHED}, spec)
    parts = (model.vae.encoder, model.vae.decoder, model.vae.quant_conv, model.vae.post_quant_conv)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counts == [34_163_592, 49_490_179, 72, 20]
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    assert model.latent_shape == (9 * 4, 4, 8)


def test_it_is_an_autoencoder_and_makes_no_forecast() -> None:
    model = make()
    assert all(isinstance(model, kind) for kind in (Autoencoder, Portable))
    assert is_codec(model) and not can_forecast(model)


@pytest.mark.parametrize("channels", ["repeat", "adapter"])
def test_encode_and_decode_are_those_of_diffusers(channels: str) -> None:
    model, fields = make(channels=channels), fields_of(small_batch(SPEC, count=1))
    low, high = (v[:, None, None] for v in (model.scaling.low, model.scaling.high))
    scaled = (fields - low) / (high - low) * 2 - 1
    latents, made = [], []
    for frame in scaled:
        if channels == "adapter":  # 起步时三个变量恰是三个图通道
            z = model.vae.encode(frame[None]).latent_dist.mode()
            latents.append(z)
            made.append(model.vae.decode(z).sample)
            continue
        zs = [model.vae.encode(torch.stack([field] * 3)[None]).latent_dist.mode() for field in frame]
        latents.append(torch.cat(zs, 1))
        made.append(torch.cat([model.vae.decode(z).sample.mean(1, keepdim=True) for z in zs], 1))
    found = model.encode(fields)
    assert found.shape == (4, *model.latent_shape) == (4, 12 if channels == "repeat" else 4, 4, 8)
    torch.testing.assert_close(found, torch.cat(latents), rtol=1e-4, atol=1e-5)
    expected = (torch.cat(made) + 1) / 2 * (high - low) + low
    torch.testing.assert_close(model.decode(found), expected, rtol=1e-4, atol=1e-5)


def test_the_vae_sees_minus_one_to_one_and_the_way_back_is_exact() -> None:
    batch = small_batch(SPEC, seed=9)  # 就是求极值的那一批
    for channels in ("repeat", "adapter"):
        model, seen = make(channels=channels), []
        model.vae.encoder.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model.encode(fields_of(batch))
        images = torch.cat(seen)
        assert images.min() == -1 and images.max() == 1
    restored = model.scaling.inverse(model.scaling(fields_of(batch)))
    torch.testing.assert_close(restored, fields_of(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_adapter_starts_as_a_mean_of_variables(count: int) -> None:
    """三个以内来回不变；多了的几个共用一个图通道，不出 [-1, 1]。"""
    adapter = make(small_spec(count), channels="adapter").adapter
    fields = torch.rand(2, count, 4, 8) * 2 - 1
    images = adapter.into(fields)
    assert images.shape == (2, 3, 4, 8) and images.abs().max() <= 1
    expected = [fields[:, [i for i in range(count) if i % 3 == j or (count < 3 and i == j % count)]] for j in range(3)]
    torch.testing.assert_close(images, torch.stack([part.mean(1) for part in expected], 1))
    if count <= 3:
        torch.testing.assert_close(adapter.out(images), fields)


@pytest.mark.parametrize("channels", ["repeat", "adapter"])
def test_chunks_change_nothing_and_bound_what_the_vae_sees(channels: str) -> None:
    whole, parts = (make(channels=channels, vae_batch_size=size) for size in (1000, 5))
    fields = fields_of(small_batch(SPEC))
    with outputs_of(parts.vae.encoder) as encoded, outputs_of(parts.vae.decoder) as decoded:
        latents = parts.encode(fields)
        made = parts.decode(latents)
    images = 36 if channels == "repeat" else 12
    sizes = [5] * (images // 5) + [images % 5]
    assert [len(out) for out in encoded] == [len(out) for out in decoded] == sizes
    torch.testing.assert_close(latents, whole.encode(fields), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made, whole.decode(latents), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", ["repeat", "adapter"])
def test_latents_leave_with_mean_zero_and_unit_variance(channels: str) -> None:
    model, batches = make(channels=channels), [small_batch(SPEC, seed=seed) for seed in range(3)]
    before = model.decode(model.encode(fields_of(batches[0])))
    assert not model.latents_known
    for batch in batches:
        model.observe_latents(batch)
    model.solve_latents()
    assert model.latents_known
    latents = torch.cat([model.encode(fields_of(batch)) for batch in batches]).transpose(0, 1).flatten(1)  # (c, 所有)
    torch.testing.assert_close(latents.mean(1), torch.zeros(len(latents)), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std(1, correction=0), torch.ones(len(latents)), rtol=1e-4, atol=0)
    torch.testing.assert_close(model.decode(model.encode(fields_of(batches[0]))), before, rtol=1e-4, atol=1e-4)


def test_image_size_is_what_the_vae_sees_and_comes_back() -> None:
    model, fields, seen = make(image_size=[16, 24]), fields_of(small_batch(SPEC)), []
    model.vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    latents = model.encode(fields)
    assert {shape[1:] for shape in seen} == {(3, 16, 24)}
    assert latents.shape == (12, *model.latent_shape) == (12, 12, 8, 12)
    assert model.decode(latents).shape == fields.shape


@pytest.mark.parametrize("kind", ["l1", "mse"])
@pytest.mark.parametrize("channels", ["repeat", "adapter"])
def test_loss_is_the_written_out_mean_over_valid_fields(kind: str, channels: str) -> None:
    model = make(channels=channels, loss=kind, spectral_weight=0.5, kl_weight=0.1)
    batch = small_batch(SPEC, count=2)
    batch.valid[0, 1, 2] = False
    batch.valid[1, 3] = False
    fields, valid = fields_of(batch), batch.valid.flatten(0, 1).numpy()
    made = model.decode(model.encode(fields)).numpy()
    terms = {name: float(value) for name, value in model.loss(batch).items()}

    def mean_error(a: np.ndarray, b: np.ndarray) -> float:
        kept = [(a[n, c] - b[n, c]).ravel() for n, c in zip(*np.nonzero(valid), strict=True)]
        error = np.concatenate(kept)
        return float(np.mean(np.abs(error) if kind == "l1" else error**2))

    truth = fields.numpy()
    assert terms["reconstruction"] == pytest.approx(mean_error(made, truth), rel=1e-4)
    amplitudes = [np.abs(np.fft.rfft(x, axis=-1)) / np.sqrt(16) for x in (made, truth)]
    assert terms["spectral"] == pytest.approx(mean_error(*amplitudes), rel=1e-4)
    posterior = DiagonalGaussianDistribution(model._moments(fields))
    each = posterior.kl() / (3 * 8 * 16)  # 同除以一张图的数的个数
    kept = torch.from_numpy(valid.ravel() if channels == "repeat" else valid.any(1))
    assert terms["kl"] == pytest.approx(float(each[kept].mean()), rel=1e-4)
    total = terms["reconstruction"] + 0.5 * terms["spectral"] + 0.1 * terms["kl"]
    assert terms["loss"] == pytest.approx(total, rel=1e-5)


def test_invalid_fields_leave_no_trace_when_each_variable_is_an_image() -> None:
    model, batch = make(spectral_weight=1.0, kl_weight=1.0), small_batch(SPEC)
    batch.valid[0, -1, 1] = False
    changed = batch.future.clone()
    changed[0, -1, 1] += 100
    assert torch.equal(model.loss(batch)["loss"], model.loss(batch._replace(future=changed))["loss"])
    assert float(model.loss(batch._replace(valid=torch.zeros_like(batch.valid)))["loss"]) == 0


def test_the_posterior_is_sampled_in_training_only() -> None:
    model, batch = make().train(), small_batch(SPEC)
    torch.manual_seed(3)
    found = model.loss(batch)["reconstruction"]
    torch.manual_seed(3)
    posterior = DiagonalGaussianDistribution(model._moments(fields_of(batch)))
    made = model._fields(posterior.mean + posterior.std * Draws(batch).normal_like(posterior.mean))
    torch.testing.assert_close(found, (made - fields_of(batch)).abs().mean())
    assert not torch.equal(found, model.loss(batch)["reconstruction"])
    assert torch.equal(model.encode(fields_of(batch)), model.encode(fields_of(batch)))
    model.eval()
    assert torch.equal(model.loss(batch)["loss"], model.loss(batch)["loss"])


@pytest.mark.parametrize("channels", ["repeat", "adapter"])
def test_encoder_and_decoder_share_out_the_parameters_and_freeze_apart(channels: str) -> None:
    model = make(channels=channels, freeze_encoder=True)
    encoder, decoder = ({id(p) for p in part()} for part in (model.encoder_parameters, model.decoder_parameters))
    assert not encoder & decoder and encoder | decoder == {id(p) for p in model.parameters()}
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"decoder", "post_quant_conv"} | ({"into", "out"} if channels == "adapter" else set())
    model = make(channels=channels, freeze_encoder=True, freeze_decoder=True)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == ({"adapter"} if channels == "adapter" else set())  # 1 × 1 卷积是新的，总要学


def test_the_frozen_half_gets_no_gradient_and_the_other_all_of_it() -> None:
    with torch.enable_grad():
        model = make(freeze_encoder=True).train()
        model.loss(small_batch(SPEC))["loss"].backward()
    assert all(p.grad is None for p in model.encoder_parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.decoder_parameters())


def test_pretrained_weights_come_from_the_folder(folder: Path) -> None:
    model = make(weights=str(folder))
    saved = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.vae.state_dict().items())
    assert model.frozen_are_trained and not make().frozen_are_trained
    assert model.all_are_trained and not make().all_are_trained


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_adapter_starts_as_the_identity_only_up_to_three_channels(folder: Path, channels: int) -> None:
    """再多的变量就混在一起，要训练。"""
    spec = small_spec(channels)
    model = make(spec, weights=str(folder), channels="adapter")
    fields = fields_of(small_batch(spec))
    assert torch.allclose(model.adapter.out(model.adapter.into(fields)), fields, atol=1e-6) == (channels <= 3)
    assert model.all_are_trained == (channels <= 3) and model.frozen_are_trained


@pytest.mark.parametrize("channels", ["repeat", "adapter"])
def test_the_checkpoint_rebuilds_it_without_the_folder(folder: Path, tmp_path: Path, channels: str) -> None:
    model, batch = make(weights=str(folder), channels=channels, image_size=[16, 16]), small_batch(SPEC)
    model.observe_latents(batch)
    model.solve_latents()
    save_checkpoint(tmp_path / "one.ckpt", {"options": model.portable_options(), "model": model.state_dict()})
    folder.rename(tmp_path / "gone")
    content = load_checkpoint(tmp_path / "one.ckpt")
    again = make_model(content["options"], SPEC).eval()
    again.load_state_dict(content["model"])
    assert again.portable_options() == model.portable_options() and again.latents_known
    latents = model.encode(fields_of(batch))
    assert torch.equal(again.encode(fields_of(batch)), latents)
    assert torch.equal(again.decode(latents), model.decode(latents))


def test_a_folder_of_another_structure_is_refused(folder: Path, tmp_path: Path) -> None:
    AutoencoderKL(**{**SMALL_VAE, "down_block_types": ["AttnDownEncoderBlock2D"] * 2}).save_pretrained(
        tmp_path / "other"
    )
    with pytest.raises(
        ValueError, match=r"^model.weights = .*: config.json: down_block_types = \['AttnDown.*knows only"
    ):
        make(weights=str(tmp_path / "other"))


def test_the_small_one_is_a_first_stage_by_its_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stage = open_first_stage("config/sd_vae_small.yaml", small_spec(grid=(16, 32)))
    assert isinstance(stage, Autoencoder) and isinstance(stage, Portable)


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        (
            {"weights": "random"},
            (8, 16),
            "model.architecture = None: weights = random needs an architecture, e.g. {block",
        ),
        ({"weights": "random", "architecture": PUBLISHED}, (12, 16), "model.image_size = null: the VAE sees 12 x 16"),
        (
            {"weights": "random", "architecture": PUBLISHED},
            (12, 16),
            "multiples of 8; sizes that work: [16, 16], [32, 32]",
        ),
        ({"weights": "random", "architecture": SIZES, "image_size": [9, 16]}, (8, 16), "model.image_size = [9, 16]: "),
        (
            {"weights": "nowhere/at/all"},
            (8, 16),
            "model.weights = nowhere/at/all: no such folder; wanted there: config",
        ),
        ({"weights": "a/b", "architecture": SIZES}, (8, 16), "model.architecture: goes with weights = random only"),
        (
            {"weights": "random", "architecture": {**SIZES, "norm_num_groups": 5}},
            (8, 16),
            "model.architecture: norm_num_groups = 5 does not divide block_out_channels [8, 16]",
        ),
        (
            {"weights": "random", "architecture": {**SIZES, "latent_channel": 4}},
            (8, 16),
            "nearest: model.architecture.latent_",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_rule(options: dict[str, Any], grid: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  下一行逐字比对
        make_model({"name": "sd_vae", **options}, small_spec(grid=grid))
    assert message in str(error.value) and "\n" not in str(error.value)
