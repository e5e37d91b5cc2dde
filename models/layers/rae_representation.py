"""预训练的表示编码器（DINOv2、SigLIP2、MAE），经 transformers；RAE 的编码器，也是直接预报的主干。

论文：Zheng et al. 2025，Diffusion Transformers with Representation Autoencoders，§3。
* 末层 LayerNorm 去掉仿射：每个 token 在通道上均值 0、方差 1。
* CLS 与 register 的输出去掉，只留图像块的 token，排成 (c, h, w)。
* MAE 不遮：mask_ratio 0，噪声递增，次序不变。
* 与预训练不同的大小（也可以是矩形），位置编码由各模型自己插值。
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from models.layers.pretrained import CONFIG, LIBRARIES, find_folder, load_pretrained
from util.strict import nearest

EncoderName = Literal["Dinov2withNorm", "SigLIP2wNorm", "MAEwNorm"]
Weights = Literal["pretrained", "random"]
KEY = "model.encoder_config_path"
PREPROCESSOR = "preprocessor_config.json"


class Family(NamedTuple):
    """kinds: config.json 的 model_type → transformers 里的类名去掉 Model、Config；norm：末层 LayerNorm 的名字。"""

    kinds: dict[str, str]
    norm: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FAMILIES: dict[str, Family] = {
    "Dinov2withNorm": Family(
        {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}, "layernorm", *IMAGENET
    ),
    # google/siglip2-base-patch16-256 的 model_type 是 siglip：固定大小的 SigLIP2 沿用 SigLIP 的结构，只读图像那一半
    "SigLIP2wNorm": Family(
        {"siglip": "SiglipVision", "siglip_vision_model": "SiglipVision"}, "post_layernorm", (0.5,) * 3, (0.5,) * 3
    ),
    "MAEwNorm": Family({"vit_mae": "ViTMAE"}, "layernorm", *IMAGENET),
}


class RepresentationEncoder(nn.Module):
    """[0, 1] 的图像 → 图像块的表示。

    Args:
        name: FAMILIES 里的一个。
        source: Hugging Face 的 id 或本地文件夹（weights 为 pretrained）；或结构本身（weights 为 random）。
        size: 图像的 (高, 宽)。

    Raises:
        ValueError: 权重读不到或属于别的编码器；结构有不认识的键；source 与 weights 不配；大小不能整除。
    """

    def __init__(
        self, name: EncoderName, source: str | Mapping[str, Any], weights: Weights, size: tuple[int, int]
    ) -> None:
        super().__init__()
        family = FAMILIES[name]
        self.net, mean, std = _open(name, source, weights)
        config = self.net.config
        bare = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)
        setattr(self.net, family.norm, bare)
        self.options: dict[str, Any] = {} if name == "Dinov2withNorm" else {"interpolate_pos_encoding": True}
        if name == "SigLIP2wNorm":
            self.net.use_head, self.net.head = False, nn.Identity()  # 汇成一个向量的头用不着
        if name == "MAEwNorm":
            config.mask_ratio = 0.0
            codes = self.net.embeddings.position_embeddings.detach()  # 固定的正余弦：解冻也不学
            del self.net.embeddings.position_embeddings
            self.net.embeddings.position_embeddings = nn.Buffer(codes)
        if name == "Dinov2withNorm":
            self.net.embeddings.mask_token = None  # 预训练时才用
        self.name: EncoderName = name
        self.extra = 0 if name == "SigLIP2wNorm" else 1 + getattr(config, "num_register_tokens", 0)  # CLS 与 register
        self.width: int = config.hidden_size
        self.size = size
        self.grid = token_grid(size, config.patch_size)
        self.mean, self.std = (nn.Buffer(torch.tensor(values)[:, None, None]) for values in (mean, std))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, *size)，[0, 1] → (N, c, h, w) float32。"""
        return self.tokens((images - self.mean) / self.std)

    def tokens(self, pixels: Tensor) -> Tensor:
        """同上，pixels 已按 mean、std 标准化。"""
        options = dict(self.options)
        if self.name == "MAEwNorm":
            count = self.grid[0] * self.grid[1]
            options["noise"] = torch.linspace(0, 1, count, device=pixels.device).expand(len(pixels), -1)
        hidden = self.net(pixels, **options).last_hidden_state[:, self.extra :]  # (N, h·w, c)
        return hidden.transpose(1, 2).unflatten(2, self.grid).float()

    def architecture(self) -> dict[str, Any]:
        """造得出同样大小的网络的 source（配 weights = random），普通值。"""
        values = self.net.config.to_dict()
        return {key: values[key] for key in sorted(_declared(type(self.net.config))) if key in values}


def token_grid(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """图像 (高, 宽) 分成几行几列图像块。

    Raises:
        ValueError: 不能整除。
    """
    for length in size:
        if length % patch:
            near = length // patch * patch
            works = f"{near} or {near + patch}" if near else str(patch)
            raise ValueError(
                f"model.encoder_input_size = {list(size)}: {length} is not a multiple of the encoder's patch {patch}; "
                f"{works} would do"
            )
    return size[0] // patch, size[1] // patch


def _open(name: EncoderName, source: str | Mapping[str, Any], weights: Weights) -> tuple[Any, Any, Any]:
    """网络，与它的图像的均值、标准差。"""
    family = FAMILIES[name]
    if isinstance(source, str) != (weights == "pretrained"):
        shown = source if isinstance(source, str) else dict(source)
        raise ValueError(
            f"{KEY} = {shown} with model.weights = {weights}: pretrained takes a Hugging Face id or a folder, random "
            "takes the architecture, e.g. {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, …}"
        )
    if not isinstance(source, str):
        return _build(name, source), family.mean, family.std
    folder = find_folder(source, LIBRARIES["transformers"][0], KEY)
    kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    if kind not in family.kinds:
        fits = [other for other, its in FAMILIES.items() if kind in its.kinds]
        raise ValueError(
            f"model.encoder_cls = {name}: {source} holds a model of type {kind}, "
            + (f"which is {fits[0]}" if fits else f"not {' or '.join(family.kinds)}")
        )
    net = load_pretrained(getattr(transformers, f"{family.kinds[kind]}Model"), str(folder), KEY)
    return net, *_pixel_statistics(folder, family)


def _pixel_statistics(folder: Path, family: Family) -> tuple[Any, Any]:
    """文件夹里写着的均值与标准差；没有写就是这一族公布的。"""
    path = folder / PREPROCESSOR
    written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return written.get("image_mean", family.mean), written.get("image_std", family.std)


def _build(name: EncoderName, architecture: Mapping[str, Any]) -> Any:
    kinds = list(FAMILIES[name].kinds.values())
    stem = kinds["num_register_tokens" in architecture] if name == "Dinov2withNorm" else kinds[0]
    config = getattr(transformers, f"{stem}Config")
    known = _declared(config)
    for key in architecture:
        if key not in known:
            raise ValueError(f"{KEY} = {dict(architecture)}: {stem} has no {key}; {nearest(key, known, 'keys')}")
    try:
        return getattr(transformers, f"{stem}Model")(config(**architecture))
    except (StrictDataclassError, ValueError) as error:  # 类型不对、宽度不能整除头数
        reason = " ".join(str(error).split())  # 它们的报错有好几行
        raise ValueError(f"{KEY} = {dict(architecture)}: {reason}") from None


def _declared(config: type[Any]) -> set[str]:
    """一种结构自己的键；各种模型共有的（输出什么、生成的参数）不在内，图像总是三个通道。"""
    common = {field.name for field in fields(transformers.PreTrainedConfig)} | {"num_channels"}
    return {field.name for field in fields(config) if not field.name.startswith("_")} - common
