"""潜空间 U-Net：编码、主干、解码写开来；两种损失；冻结与一起微调；潜变量太小时的报错。"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.codecs.tiny_codec import register
from tests.models.small import make_model, small_batch, small_spec
from util.batch import DataSpec

CODEC = {"name": "tiny_codec", "width": 4}
SMALL = {"name": "latent_unet", "first_stage": CODEC, "base_channels": 8, "depth": 1}
SPEC = small_spec(channels=2, grid=(8, 16), frames_in=3, frames_out=2)


@pytest.fixture(autouse=True)
def codec(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def small(spec: DataSpec = SPEC, **options: Any) -> Any:
    """阶段一的统计量已经有了。"""
    torch.manual_seed(0)
    model = make_model({**SMALL, **options}, spec)
    with torch.no_grad():
        model.first_stage.observe_latents(small_batch(spec, seed=9))
    model.first_stage.solve_latents()
    return model


def test_parameter_count_is_that_of_the_written_out_layers() -> None:
    """默认大小：12 → 4 帧、4 个潜通道、深 3；只比阶段一多出这些。"""
    spec = small_spec(1, (32, 64), frames_in=12, frames_out=4)
    model = make_model({"name": "latent_unet", "first_stage": CODEC}, spec)
    total = 0
    for inside, out in [(48, 128), (128, 256), (256, 512), (512, 1024)]:  # 下去，最后一个是瓶颈
        total += 9 * inside * out + out + 9 * out * out + out + 2 * 2 * out
    for inside, out in [(1024, 512), (512, 256), (256, 128)]:  # 上来：转置卷积，拼上跳接，再两次卷积
        total += 4 * inside * out + out + 9 * 2 * out * out + out + 9 * out * out + out + 2 * 2 * out
    total += 128 * 16 + 16
    assert sum(p.numel() for p in model.net.parameters()) == total
    stage = sum(p.numel() for p in model.first_stage.parameters())
    assert sum(p.numel() for p in model.parameters()) == total + stage


@pytest.mark.parametrize("predict", ["state", "tendency"])
def test_forward_is_encode_unet_decode_frame_by_frame(predict: str) -> None:
    model, batch = small(predict=predict).eval(), small_batch(SPEC, count=2)
    stage = model.first_stage
    with torch.no_grad():
        frames = [stage.encode(batch.history[:, i]) for i in range(3)]  # 各 (B, 4, 2, 4)
        made = model.net(torch.cat(frames, 1))  # (B, 2·4, 2, 4)，时间在外，通道在内
        later = [made[:, 4 * i : 4 * i + 4] + (frames[-1] if predict == "tendency" else 0) for i in range(2)]
        expected = torch.stack([stage.decode(latent) for latent in later], 1)[:, None]
        torch.testing.assert_close(model.forecast(batch.history, batch.time), expected, rtol=1e-5, atol=1e-5)
    assert frames[0].shape == (2, 4, 2, 4)


def test_the_two_losses_are_their_definitions() -> None:
    batch = small_batch(SPEC)
    batch.valid[1, 3, 0] = False  # 目标第 0 帧的一个通道
    batch.valid[0, 0] = False  # 历史里的不算
    fields, latent = small().eval(), small(loss_space="latent").eval()
    with torch.no_grad():
        error = (fields.forecast(batch.history, None)[:, 0] - batch.future).square().mean((-2, -1))  # (B, T_out, C)
        kept = [error[b, t, c] for b in range(3) for t in range(2) for c in range(2) if (b, t, c) != (1, 0, 0)]
        assert float(fields.loss(batch)["loss"]) == pytest.approx(float(torch.stack(kept).mean()), rel=1e-5)
        truth = torch.stack([latent.first_stage.encode(batch.future[:, i]) for i in range(2)], 1)
        gap = (latent(batch.history) - truth).square().mean((-3, -2, -1))  # (B, T_out)
        whole = [gap[b, t] for b in range(3) for t in range(2) if (b, t) != (1, 0)]  # 潜变量混着通道：整帧不算
        assert float(latent.loss(batch)["loss"]) == pytest.approx(float(torch.stack(whole).mean()), rel=1e-5)
        changed = batch.future.clone()
        changed[1, 0] += 100
        assert torch.equal(latent.loss(batch._replace(future=changed))["loss"], latent.loss(batch)["loss"])


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("decoder", [True, False])
def test_gradients_reach_what_is_not_frozen(encoder: bool, decoder: bool) -> None:
    model = small(freeze_encoder=encoder, freeze_decoder=decoder).train()
    before = {name: value.clone() for name, value in model.first_stage.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.loss(small_batch(SPEC))["loss"].backward()
    optimizer.step()
    frozen = {"encoder": encoder, "decoder": decoder}
    for name, p in model.first_stage.named_parameters():
        held = frozen[name.partition(".")[0]]
        assert p.requires_grad != held and (p.grad is None) == held
        assert torch.equal(p, before[name]) == held
    assert all(p.grad is not None and p.grad.any() for p in model.net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.first_stage.named_buffers())


def test_the_first_stage_stays_in_eval() -> None:
    model = small(freeze_encoder=False, freeze_decoder=False)
    assert not model.first_stage.training
    model.train()
    assert model.training and model.net.training and not model.first_stage.training
    model.first_stage.extra = nn.Dropout(0.5)
    assert not model.train().first_stage.extra.training
    assert not model.eval().training


def test_the_options_it_saves_rebuild_it_from_nothing_else(tmp_path) -> None:
    torch.save({}, tmp_path / "pretrained.pt")
    model = small(first_stage={**CODEC, "weights": str(tmp_path / "pretrained.pt")}, freeze_decoder=False)
    options = model.portable_options()
    (tmp_path / "pretrained.pt").unlink()
    again = make_model(options, SPEC)
    again.load_state_dict(model.state_dict())
    batch = small_batch(SPEC)
    assert torch.equal(again.eval().forecast(batch.history, None), model.eval().forecast(batch.history, None))
    flags = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in again.parameters()] == flags and again.portable_options() == options


def test_a_latent_too_small_for_the_depth_names_what_works() -> None:
    """32 × 64 减到 1/4 是 8 × 16；深 4 要 16 的倍数。"""
    spec = small_spec(1, (32, 64))
    with pytest.raises(ValueError) as error:  # noqa: PT011  下一行逐字比对
        small(spec, depth=4)
    assert str(error.value) == (
        "model.depth = 4 halves the latent 8 x 16 4 times, which 8 in latitude does not allow; values that work: "
        "[1, 2, 3], or a first stage with a latent whose sides are multiples of 16: train it with "
        "model.image_size = [64, 128]"
    )
    with pytest.raises(ValueError, match=r"model.image_size = \[256, 512\]"):  # 眼下的大小是 128 × 256
        small(spec, depth=4, first_stage={**CODEC, "image_size": [128, 256]})


def test_at_32_x_64_the_stable_diffusion_latent_allows_depth_two() -> None:
    architecture = {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4}  # 减到 1/8
    vae = {"name": "sd_vae", "weights": "random", "architecture": architecture, "scaling": "zscore"}
    spec = small_spec(1, (32, 64))
    assert make_model({**SMALL, "depth": 2, "first_stage": vae}, spec).first_stage.latent_shape == (4, 4, 8)
    with pytest.raises(ValueError, match=r"the latent 4 x 8 3 times.*work: \[1, 2\].*image_size = \[64, 128\]"):
        make_model({**SMALL, "depth": 3, "first_stage": vae}, spec)
    vae["image_size"] = [64, 128]
    assert make_model({**SMALL, "depth": 3, "first_stage": vae}, spec).first_stage.latent_shape == (4, 8, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_space": "latent", "freeze_encoder": False}, "model: loss_space = latent needs freeze_encoder and"),
        ({"loss_space": "latent", "freeze_decoder": False}, "use loss_space = fields to fine-tune the first stage"),
        ({"loss_space": "latents"}, "nearest: latent"),
        ({"base_channels": 20}, "must be a multiple of the 8 normalisation groups"),
        ({"first_stage": None}, "model.first_stage = None"),
        ({"first_stage": {"name": "persistence"}}, "model.first_stage = persistence: not an autoencoder"),
    ],
)
def test_a_wrong_setting_is_named_with_its_rule(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  下一行逐字比对
        small(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("channels", ["repeat", "adapter"])
def test_the_vae_freezes_and_thaws_whole_halves(channels: str) -> None:
    """第二阶段的选项盖过 VAE 自己的：1 × 1 卷积随它那一半。"""
    architecture = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    vae = {"name": "sd_vae", "weights": "random", "architecture": architecture, "channels": channels}
    vae |= {"scaling": "zscore", "freeze_decoder": True}
    for encoder, decoder in ((True, True), (True, False), (False, True), (False, False)):
        options = {**SMALL, "first_stage": vae, "freeze_encoder": encoder, "freeze_decoder": decoder}
        model = make_model(options, SPEC).train()
        model.loss(small_batch(SPEC, count=1))["loss"].backward()
        stage = model.first_stage
        for parameters, frozen in ((stage.encoder_parameters(), encoder), (stage.decoder_parameters(), decoder)):
            assert all((p.grad is None) == frozen for p in parameters)
