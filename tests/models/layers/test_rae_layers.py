"""RAE 的层：三种编码器经真的路径读回、token 去得对、值域写开了核对；解码器与 transformers 的 ViT-MAE 逐数相同。"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder

from models.layers.rae_autoencoder import DecoderSize, RAEWrapper, ViTDecoder, named_decoder
from models.layers.rae_representation import RepresentationEncoder
from tests.models.tiny_rae import DECODER, IMAGENET, KINDS, WIDE, save

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
every_kind = pytest.mark.parametrize("kind", KINDS)


def images(count: int = 2, size: tuple[int, int] = (16, 32)) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def wrapper(folder: Path, kind: str, size: list[int]) -> RAEWrapper:
    name: Any = KINDS[kind][0]
    return RAEWrapper(name, str(folder), size, DECODER, decoder_patch_size=8).eval()


@every_kind
@pytest.mark.parametrize("size", [(32, 32), (16, 48)], ids=["as pretrained", "rectangle"])
def test_features_are_the_encoders_own_tokens_without_affine(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    """transformers 自己的 last_hidden_state，去掉 CLS 与 register，再把末层的仿射解开。"""
    _, _, _, norm, extra, (mean, std) = KINDS[kind]
    net, x = save(kind, tmp_path), images(size=size)
    pixels = torch.tensor(((x.numpy() + 1) / 2 - mean[:, None, None]) / std[:, None, None], dtype=torch.float32)
    more: dict[str, Any] = {} if KINDS[kind][0] == "Dinov2withNorm" else {"interpolate_pos_encoding": True}
    if kind == "mae":
        net.config.mask_ratio = 0.0
        more["noise"] = torch.arange(size[0] * size[1] // 64).float().expand(2, -1)
    with torch.no_grad():
        own = net(pixels, **more).last_hidden_state[:, extra:]
        affine = getattr(net, norm)
        bare = (own - affine.bias) / affine.weight  # (2, N, 32)
        found = wrapper(tmp_path, kind, list(size)).encode(x)
    assert found.shape == (2, 32, size[0] // 8, size[1] // 8)
    for row in range(size[0] // 8):
        for column in range(size[1] // 8):
            torch.testing.assert_close(
                found[:, :, row, column], bare[:, row * size[1] // 8 + column], rtol=2e-3, atol=2e-4
            )
    torch.testing.assert_close(found.mean(1), torch.zeros_like(found[:, 0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.var(1, correction=0), torch.ones_like(found[:, 0]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("written", [None, {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}])
def test_fields_become_the_encoders_pixels(written: dict[str, list[float]] | None, tmp_path: Path) -> None:
    """[-1, 1] → [0, 1] → 编码器的均值与标准差；文件夹里写着的优先。放大是 PyTorch 的双三次。"""
    save("dinov2", tmp_path)
    mean, std = IMAGENET
    if written is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
        mean, std = (np.array(written[key]) for key in ("image_mean", "image_std"))
    rae = wrapper(tmp_path, "dinov2", [16, 32])
    seen: list[Tensor] = []
    rae.encoder.net.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    x = images(size=(8, 16))
    with torch.no_grad():
        rae.encode(x)
    large = nn.functional.interpolate(x, (16, 32), mode="bicubic", align_corners=False).numpy()
    expected = ((large + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(seen[0].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_ranges_round_trip(tmp_path: Path) -> None:
    """解码器若原样交回编码器看到的像素，decode 就是 encode 的逆。"""
    save("dinov2", tmp_path)
    rae = wrapper(tmp_path, "dinov2", [16, 32])
    seen: list[Tensor] = []
    rae.encoder.net.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    x = images()
    with torch.no_grad():
        latents = rae.encode(x)
        rae.decoder.register_forward_hook(lambda *_: seen[0])
        torch.testing.assert_close(rae.decode(latents), x, rtol=0, atol=1e-6)
        assert rae.decode(latents, (8, 24)).shape == (2, 3, 8, 24)


def test_the_signature_of_the_requirement() -> None:
    """基本大小的随机编码器，256 的输入：(B, 768, 16, 16)；解码回 256，或任意大小。"""
    with torch.device("meta"):
        rae = RAEWrapper(
            encoder_cls="SigLIP2wNorm",
            encoder_config_path={**BASE, "image_size": 256, "patch_size": 16},
            encoder_input_size=256,
            decoder_config_path="vit_mae-base",
            decoder_patch_size=16,
            freeze_encoder=True,
            freeze_decoder=False,
            weights="random",
        )
        latents = rae.encode(torch.empty(2, 3, 32, 64))
        assert latents.shape == (2, 768, 16, 16)
        assert rae.decode(latents).shape == (2, 3, 256, 256)
        assert rae.decode(latents, (32, 64)).shape == (2, 3, 32, 64)
    assert {name for name, p in rae.named_parameters() if p.requires_grad} == {
        f"decoder.{name}" for name, _ in rae.decoder.named_parameters()
    }
    assert sum(p.numel() for p in rae.parameters() if p.requires_grad) == 86_237_952
    rae.train()
    assert rae.decoder.training and not rae.encoder.training and not rae.encoder.net.training


@pytest.mark.parametrize(
    ("name", "count"), [("vit_mae-base", 86_237_952), ("vit_mae-large", 303_887_104), ("vit_mae-xl", 415_056_640)]
)
def test_decoder_sizes(name: str, count: int) -> None:
    """768 宽的 token → 16 × 16 的块；数取自公开的结构（不含固定的位置编码）。"""
    size: Any = named_decoder(name)
    with torch.device("meta"):
        assert sum(p.numel() for p in ViTDecoder(768, size, (16, 16), 16, 3).parameters()) == count


def test_dinov2_giant() -> None:
    giant = {
        "hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "mlp_ratio": 4, "patch_size": 14,
        "image_size": 518, "use_swiglu_ffn": True,
    }  # fmt: skip
    with torch.device("meta"):
        encoder = RepresentationEncoder("Dinov2withNorm", giant, "random", (518, 518))
        assert encoder(torch.empty(1, 3, 518, 518)).shape == (1, 1536, 37, 37)
    assert encoder.grid == (37, 37) and encoder.width == 1536


def test_decoder_is_the_vit_mae_decoder_without_masking() -> None:
    """transformers 的解码器换上同样的权重；它的 CLS 也过嵌入，这里令两者相同。像素逐个摆回去。"""
    torch.manual_seed(0)
    ours = ViTDecoder(32, DecoderSize(**DECODER), (4, 4), 8, 3)
    sizes: dict[str, Any] = {f"decoder_{key}": value for key, value in DECODER.items()}
    config = transformers.ViTMAEConfig(**WIDE, **sizes)
    config._attn_implementation = "eager"
    theirs = ViTMAEDecoder(config, 16).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        cls = torch.randn(1, 1, 32)
        ours.cls.copy_(ours.embed(cls))
        theirs.decoder_embed.load_state_dict(ours.embed.state_dict())
        theirs.decoder_norm.load_state_dict(ours.norm.state_dict())
        theirs.decoder_pred.load_state_dict(ours.head.state_dict())
        for layer, block in zip(theirs.decoder_layers, ours.blocks, strict=True):
            copy_layer(layer, block)
        tokens = torch.randn(2, 16, 32)
        order = torch.arange(16).expand(2, -1)
        found = theirs(torch.cat([cls.expand(2, -1, -1), tokens], 1), order).logits  # (2, 16, 8·8·3)
        made = ours(tokens.transpose(1, 2).unflatten(2, (4, 4)))
    assert made.shape == (2, 3, 32, 32)
    expected = np.empty((2, 3, 32, 32), np.float32)
    for n, row, column in np.ndindex(2, 32, 32):
        token, place = row // 8 * 4 + column // 8, (row % 8 * 8 + column % 8) * 3
        expected[n, :, row, column] = found[n, token, place : place + 3]
    np.testing.assert_allclose(made.numpy(), expected, rtol=1e-4, atol=1e-5)


def copy_layer(layer: Any, block: Any) -> None:
    layer.layernorm_before.load_state_dict(block.norm1.state_dict())
    layer.layernorm_after.load_state_dict(block.norm2.state_dict())
    layer.mlp.fc1.load_state_dict(block.mlp[0].state_dict())
    layer.mlp.fc2.load_state_dict(block.mlp[3].state_dict())
    layer.attention.o_proj.load_state_dict(block.attention.out.state_dict())
    weights, biases = block.attention.qkv.weight.chunk(3), block.attention.qkv.bias.chunk(3)
    for name, weight, bias in zip("qkv", weights, biases, strict=True):
        getattr(layer.attention, f"{name}_proj").load_state_dict({"weight": weight, "bias": bias})


def test_latents_of_another_grid_are_interpolated() -> None:
    torch.manual_seed(0)
    decoder = ViTDecoder(32, DecoderSize(**DECODER), (4, 4), 8, 3)
    latents = torch.randn(1, 32, 2, 2)
    spread = nn.functional.interpolate(latents, (4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(decoder(latents), decoder(spread))
