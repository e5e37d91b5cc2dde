"""RAE 的测试共用：小的随机编码器，存进文件夹再经真的路径读回。"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.models.small import make_model, small_batch

VIT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
}  # fmt: skip
WIDE: dict[str, Any] = {**VIT, "intermediate_size": 64}
TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 8,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
DECODER: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128
}  # fmt: skip
IMAGENET = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
HALF = np.full(3, 0.5), np.full(3, 0.5)


def whole_siglip() -> Any:
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=WIDE))


def whole_mae() -> Any:
    return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**WIDE, decoder_num_hidden_layers=1))


# 名字 → 编码器、存进文件夹的模型、其中的编码器、末层 LayerNorm、去掉几个 token、均值与标准差
KINDS: dict[str, tuple[str, Callable[[], Any], str, str, int, tuple[Any, Any]]] = {
    "dinov2": (
        "Dinov2withNorm", lambda: transformers.Dinov2Model(transformers.Dinov2Config(**VIT)), "", "layernorm", 1,
        IMAGENET,
    ),
    "registers": (
        "Dinov2withNorm",
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**VIT, num_register_tokens=4)
        ),
        "", "layernorm", 5, IMAGENET,
    ),
    "siglip": ("SigLIP2wNorm", whole_siglip, "vision_model", "post_layernorm", 0, HALF),
    "mae": ("MAEwNorm", whole_mae, "vit", "layernorm", 1, IMAGENET),
}  # fmt: skip


def save(kind: str, folder: Path) -> Any:
    """小的随机模型（参数都离开初值）存进文件夹；返回其中的编码器。"""
    _, make, part, _, _, _ = KINDS[kind]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return getattr(model, part) if part else model


def options(folder: Path | str, kind: str = "siglip", **more: Any) -> dict[str, Any]:
    return {
        "name": "rae", "encoder_cls": KINDS[kind][0], "encoder_config_path": str(folder),
        "encoder_input_size": [16, 32], "decoder_config_path": DECODER, "decoder_patch_size": 8, **more,
    }  # fmt: skip


def random_options(**more: Any) -> dict[str, Any]:
    return {**options("", **more), "encoder_config_path": WIDE, "weights": "random"}


def make(spec: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    model = make_model(random_options(**more), spec)
    if model.needs_pass:
        model.accumulate(small_batch(spec))
        model.solve()
    return model
