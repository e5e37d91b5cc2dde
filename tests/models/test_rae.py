"""RAE 的重建与直接预报：形状、统计量、有效的场、噪声、冻结、检查点自带一切；用户的错误一行。"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.interface import Autoencoder, Portable, Pretrained, is_codec
from tests.engine.runs import ROOT
from tests.models.small import make_model, small_batch, small_spec
from tests.models.tiny_rae import DECODER, KINDS, WIDE, make, options, random_options, save
from util.checkpoint import load_checkpoint, save_checkpoint

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize(("channels", "count"), [("repeat", 4), ("adapter", 1)])
def test_codec(channels: str, count: int) -> None:
    """形状；统计量逐点：看过的帧编码之后，每个数均值 0、方差 1；encode 不因分块、训练模式而变。"""
    spec = small_spec(channels=4)
    model, batch = make(spec, channels=channels), small_batch(spec)
    codec: object = model
    assert isinstance(codec, Autoencoder) and isinstance(codec, Portable)
    assert model.latent_shape == (count * 32, 2, 4) and not model.latents_known
    frames = torch.cat([batch.history, batch.future], 1).flatten(0, 1)  # (12, 4, 8, 16)
    model.observe_latents(batch)
    model.solve_latents()
    assert model.latents_known
    with torch.no_grad():
        latents = model.encode(frames)
        assert latents.shape == (12, *model.latent_shape)
        torch.testing.assert_close(latents.mean(0), torch.zeros(model.latent_shape), rtol=0, atol=1e-4)
        torch.testing.assert_close(latents.std(0, correction=0), torch.ones(model.latent_shape), rtol=0, atol=1e-4)
        assert torch.equal(model.train().encode(frames), model.eval().encode(frames))
        made = model.decode(latents)
        assert made.shape == frames.shape
        torch.testing.assert_close(model.decode(latents[3:5]), made[3:5], rtol=1e-4, atol=1e-5)
    assert is_codec(model)


def test_repeat_treats_each_variable_alone() -> None:
    """repeat：潜变量里第 i 个变量的那一段只由它而来；解码也是。"""
    spec = small_spec(channels=2)
    model, fields = make(spec).eval(), small_batch(spec).history[:, 0]
    changed = fields.clone()
    changed[:, 1] += torch.randn(fields.shape[-2:])
    with torch.no_grad():
        one, other = model.encode(fields), model.encode(changed)
        assert torch.equal(one[:, :32], other[:, :32]) and not torch.equal(one[:, 32:], other[:, 32:])
        assert torch.equal(model.decode(one)[:, 0], model.decode(other)[:, 0])
        # 写开：第 0 个变量重复成三个通道，出来取平均
        low, high = model.scaling.low[0], model.scaling.high[0]
        image = ((fields[:, :1] - low) / (high - low) * 2 - 1).repeat(1, 3, 1, 1)
        torch.testing.assert_close(model.rae.encode(image), one[:, :32], rtol=1e-4, atol=1e-5)
        back = model.rae.decode(one[:, :32], (8, 16)).mean(1)
        torch.testing.assert_close((back + 1) / 2 * (high - low) + low, model.decode(one)[:, 0], rtol=1e-4, atol=1e-5)


def test_loss_counts_valid_fields_only_and_noise_comes_with_training() -> None:
    spec = small_spec(channels=2)
    model, batch = make(spec, mse_weight=0.5).eval(), small_batch(spec)
    batch.valid[0, 1, 0] = batch.valid[2, 3] = False
    with torch.no_grad():
        terms = model.loss(batch)
        frames = torch.cat([batch.history, batch.future], 1)  # (3, 4, 2, 8, 16)
        made = model.decode(model.encode(frames.flatten(0, 1))).unflatten(0, (3, 4)).numpy()
    errors = [
        (np.abs(made[i] - frames.numpy()[i]).mean(), np.square(made[i] - frames.numpy()[i]).mean())
        for i in np.ndindex(3, 4, 2) if batch.valid[i]
    ]  # fmt: skip
    assert len(errors) == 21
    mae, mse = np.mean(errors, 0)
    assert terms["mae"].item() == pytest.approx(mae, rel=1e-4) and terms["mse"].item() == pytest.approx(mse, rel=1e-4)
    assert terms["loss"].item() == pytest.approx(mae + 0.5 * mse, rel=1e-4)
    with torch.no_grad():
        assert model.train().loss(batch)["loss"] != terms["loss"]
        quiet = make(spec, mse_weight=0.5, noise_tau=0.0).train()
        assert torch.equal(quiet.loss(batch)["loss"], quiet.eval().loss(batch)["loss"])


def test_noise_is_uniform_in_its_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    """σ ~ U(0, τ)，一张图一个；解码器看到的减去没有噪声的，就是它。"""
    spec = small_spec(channels=2, frames_in=31)
    model, batch = make(spec, noise_tau=0.8).train(), small_batch(spec)
    seen: list[Tensor] = []
    monkeypatch.setattr(
        model, "_fields", lambda features: seen.append(features) or batch.future.new_zeros(96, 2, 8, 16)
    )
    with torch.no_grad():
        model.loss(batch)
        model.eval().loss(batch)
    strength = (seen[0] - seen[1]).flatten(1).std(1)  # (192,)，每张图 32·2·4 个数
    assert strength.max() < 0.9 and strength.min() < 0.1
    assert strength.mean().item() == pytest.approx(0.4, abs=0.06)
    assert strength.std().item() == pytest.approx(0.8 / 12**0.5, abs=0.04)


def test_chunks_bound_what_is_encoded_at_once() -> None:
    spec = small_spec(channels=2)
    model, batch = make(spec, vae_batch_size=5).eval(), small_batch(spec)
    sizes: list[int] = []
    for part in (model.rae.encoder, model.rae.decoder):
        part.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    with torch.no_grad():
        model.loss(batch)
    assert sizes == [5, 5, 5, 5, 4] * 2


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("decoder", [True, False])
def test_freezing(encoder: bool, decoder: bool) -> None:
    """选项与 freeze() 相同；冻结的没有梯度、总在 eval()，其余的有；1 × 1 卷积只由 freeze() 冻结。"""
    spec = small_spec(channels=2)
    built = make(spec, freeze_encoder=encoder, freeze_decoder=decoder, channels="adapter").train()
    parts = {"rae.encoder.": encoder, "rae.decoder.": decoder}
    for name, parameter in built.named_parameters():
        held = next((frozen for prefix, frozen in parts.items() if name.startswith(prefix)), False)
        assert parameter.requires_grad != held, name
    built.freeze(encoder, decoder)
    built.train()
    assert built.rae.encoder.net.training != encoder and built.rae.decoder.training != decoder
    if not (encoder and decoder):
        built.loss(small_batch(spec))["loss"].backward()
    parts |= {"images.adapter.into.": encoder, "images.adapter.out.": decoder}
    for name, parameter in built.named_parameters():
        held = next(frozen for prefix, frozen in parts.items() if name.startswith(prefix))
        assert (parameter.grad is not None) != held, name


@pytest.mark.parametrize(
    ("more", "trained"),
    [({}, False), ({"freeze_encoder": False}, True), ({"freeze_encoder": False, "freeze_decoder": True}, False)],
)
def test_frozen_random_weights_are_not_trained(more: dict[str, Any], trained: bool, tmp_path: Path) -> None:
    spec = small_spec()
    assert make(spec, **more).frozen_are_trained == trained
    save("siglip", tmp_path)
    model = make_model(options(tmp_path, **more), spec)
    assert model.frozen_are_trained == (not more.get("freeze_decoder", False))
    assert not isinstance(model, Pretrained)  # 解码器的输出层总是随机的


@pytest.mark.parametrize("name", ["rae", "rae_direct"])
@every_kind
def test_checkpoint_works_without_the_pretrained_folder(kind: str, name: str, tmp_path: Path) -> None:
    """文件夹删了，由检查点里的选项与权重造出同样的模型；图像的均值、标准差也在里面。"""
    spec, folder = small_spec(channels=2), tmp_path / "weights"
    save(kind, folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    torch.manual_seed(0)
    model, batch = make_model(options(folder, kind, name=name), spec).eval(), small_batch(spec)
    model.accumulate(batch)
    model.solve()
    content = {"options": model.portable_options(), "model": model.state_dict()}
    save_checkpoint(tmp_path / "x.ckpt", content)
    shutil.rmtree(folder)
    held = load_checkpoint(tmp_path / "x.ckpt")
    torch.manual_seed(1)
    again = make_model(held["options"], spec).eval()
    again.load_state_dict(held["model"])
    assert again.portable_options() == held["options"]
    with torch.no_grad():
        assert torch.equal(again.loss(batch)["loss"], model.loss(batch)["loss"])
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {n for n, p in again.named_parameters() if not p.requires_grad} == frozen != set()


def test_direct_is_written_out() -> None:
    """历史叠进通道 → 1 × 1 → 缩放 → 主干 → 解码器 → 缩放 → 未来帧。"""
    spec = small_spec(channels=2, frames_in=3, frames_out=2)
    model, batch = make(spec, name="rae_direct", scaling="zscore").eval(), small_batch(spec)
    with torch.no_grad():
        stacked = torch.cat([batch.history[:, i] for i in range(3)], 1)  # (3, 6, 8, 16)
        weight, bias = model.in_adapter.weight[:, :, 0, 0], model.in_adapter.bias
        mixed = torch.einsum("oi,bihw->bohw", weight, stacked) + bias[:, None, None]
        large = nn.functional.interpolate(mixed, (16, 32), mode="bicubic", align_corners=False)
        tokens = model.backbone.net(large, interpolate_pos_encoding=True).last_hidden_state
        made = model.decoder(tokens.transpose(1, 2).unflatten(2, (2, 4)))  # (3, 2·2, 16, 32)
        small = nn.functional.interpolate(made, (8, 16), mode="bilinear", align_corners=False, antialias=True)
        forecast = model.forecast(batch.history, batch.time)
    assert forecast.shape == (3, 1, 2, 2, 8, 16)
    torch.testing.assert_close(forecast[:, 0], torch.stack([small[:, :2], small[:, 2:]], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", [True, False])
@pytest.mark.parametrize("adapter", [True, False])
def test_direct_trains_what_it_should(backbone: bool, adapter: bool) -> None:
    spec = small_spec(channels=2)
    model = make(spec, name="rae_direct", freeze_backbone=backbone, train_in_adapter=adapter).train()
    assert model.frozen_are_trained == (adapter and not backbone)
    assert model.backbone.net.training != backbone
    model.loss(small_batch(spec))["loss"].backward()
    trained = {"decoder.": True, "in_adapter.": adapter, "backbone.": not backbone}
    for name, parameter in model.named_parameters():
        expected = next(value for prefix, value in trained.items() if name.startswith(prefix))
        assert (parameter.grad is not None) == expected, name


def test_decoder_starts_from_the_direct_forecasts(tmp_path: Path) -> None:
    spec, path = small_spec(channels=2), tmp_path / "decoder.safetensors"
    direct = make(spec, name="rae_direct")
    with torch.no_grad():
        for parameter in direct.decoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    save_file({name: value.half() for name, value in direct.decoder.state_dict().items()}, path)
    model, fresh = make(spec, decoder_weights=str(path)), make(spec)
    for name, value in model.rae.decoder.state_dict().items():
        source = fresh.rae.decoder if name.startswith("head.") else direct.decoder
        torch.testing.assert_close(value, source.state_dict()[name], rtol=1e-3, atol=1e-3)
    assert model.portable_options()["decoder_weights"] is None
    with pytest.raises(ValueError, match=r"model\.decoder_weights = .*: blocks\.0\..* is \(\d+.*\) there, \(\d+"):
        make(spec, decoder_weights=str(path), decoder_config_path={**DECODER, "intermediate_size": 32})
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="not a safetensors file"):
        make(spec, decoder_weights=str(path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"weights": "pretrained"},
            r"with model\.weights = pretrained: pretrained takes a Hugging Face id or a folder",
        ),
        ({"encoder_config_path": "x/y"}, r"= x/y with model\.weights = random: .*random takes the architecture"),
        ({"encoder_config_path": {"hiden_size": 8}}, "SiglipVision has no hiden_size; nearest: hidden_size"),
        ({"encoder_config_path": {**WIDE, "hidden_size": "x"}}, r"expected int, got str"),
        ({"encoder_config_path": {**WIDE, "hidden_size": 31}}, r"model\.encoder_config_path = .* divisible"),
        ({"encoder_input_size": 20}, r"model\.encoder_input_size = \[20, 20\]: 20 is not .* patch 8; 16 or 24"),
        ({"decoder_config_path": "vit_mae-bse"}, "no such decoder; nearest: vit_mae-base"),
        ({"decoder_config_path": {**DECODER, "num_attention_heads": 3}}, "does not divide"),
        ({"decoder_weights": "none.safetensors"}, r"no such file; python -m engine\.studies\.stage1_direct writes it"),
        ({"encoder_cls": "CLIP"}, r"model\.encoder_cls"),
    ],
)
def test_mistakes_are_one_line(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_model({**random_options(), **more}, small_spec())
    assert "\n" not in str(error.value)


def test_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    save("dinov2", tmp_path)
    with pytest.raises(ValueError, match=r"encoder_cls = SigLIP2wNorm: .* type dinov2, which is Dinov2withNorm"):
        make_model(options(tmp_path, "siglip"), small_spec())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"model\.encoder_config_path = .*: no config\.json and no model\.safetensors"):
        make_model(options(tmp_path / "empty"), small_spec())


def test_latent_unet_runs_on_its_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """阶段二可以用它：预报的形状；阶段一冻结，检查点里的选项造得出同样的模型。"""
    monkeypatch.chdir(ROOT)
    spec = small_spec(channels=2)
    more = {"first_stage": "config/rae.yaml", "base_channels": 8, "depth": 1}
    model, batch = make_model({"name": "latent_unet", **more}, spec), small_batch(spec)
    model.loss(batch)["loss"].backward()
    assert all((p.grad is None) == name.startswith("first_stage.") for name, p in model.named_parameters())
    assert model.forecast(batch.history, batch.time).shape == (3, 1, 1, 2, 8, 16)
    make_model(model.portable_options(), spec).load_state_dict(model.state_dict())
