"""RAE（表示自编码器）：预训练的表示编码器，与一个训练出来的 ViT 解码器。

论文：Zheng et al. 2025，Diffusion Transformers with Representation Autoencoders；
解码器的结构：He et al. 2022（CVPR），Masked Autoencoders Are Scalable Vision Learners，没有遮。
与公开的实现不同：解码器的 CLS 以 0.02 起步，不从零起步。零向量过 LayerNorm（ε = 1e-12）时它的梯度放大一百万倍，
按全体梯度的范数裁剪时，别的参数就不动了。

字母：N 图像数，c × h × w 潜变量（c 是编码器的宽度），D 解码器的宽度，p 解码器的块的边长。
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from torch import Tensor, nn

from models.layers.attention import GroupAttention, check_heads
from models.layers.images import RGB
from models.layers.latents import resize
from models.layers.rae_representation import EncoderName, RepresentationEncoder, Weights
from models.layers.transformer import FeedForward
from util.strict import PositiveInt, Strict, nearest, validate

EPSILON = 1e-12  # ViT-MAE 的 LayerNorm
START = 0.02  # 初值的标准差，如 ViT-MAE
MAX_PERIOD = 10_000.0


class DecoderSize(Strict):
    """解码器的大小；键与 transformers 的相同。"""

    hidden_size: int = Field(ge=4, multiple_of=4)  # 位置编码：行与列、正弦与余弦，各占四分之一
    """width"""
    num_hidden_layers: PositiveInt
    """layers"""
    num_attention_heads: PositiveInt
    """attention heads; must divide hidden_size"""
    intermediate_size: PositiveInt
    """width inside an MLP"""

    @field_validator("num_attention_heads")
    @classmethod
    def _divides(cls, heads: int, info: ValidationInfo) -> int:
        return check_heads(heads, info.data.get("hidden_size", 0), "decoder_config_path.hidden_size")


def _size(width: int, depth: int, heads: int, hidden: int) -> DecoderSize:
    return DecoderSize(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=hidden)


DECODERS = {
    "vit_mae-base": _size(768, 12, 12, 3072),
    "vit_mae-large": _size(1024, 24, 16, 4096),
    "vit_mae-xl": _size(1152, 28, 16, 4096),
}


def named_decoder(given: object) -> object:
    """DECODERS 里的名字 → 大小；别的原样。"""
    if not isinstance(given, str):
        return given
    if given not in DECODERS:
        raise ValueError(f"no such decoder; {nearest(given, DECODERS, 'decoders')}, or write the sizes")
    return DECODERS[given]


def square(given: object) -> object:
    """一个边长是正方形；[高, 宽] 原样。"""
    return [given, given] if isinstance(given, int) else given


class RAEOptions(Strict):
    """重建（rae）与直接预报（rae_direct）共有的选项；名字与需求里 RAEWrapper 的参数相同。"""

    encoder_cls: EncoderName = "SigLIP2wNorm"
    """kind of the pretrained encoder"""
    encoder_config_path: str | dict[str, Any] = "google/siglip2-base-patch16-256"
    """its Hugging Face id or folder; with weights: random its architecture"""
    weights: Weights = "pretrained"
    """random: untrained, for tests"""
    encoder_input_size: Annotated[
        list[PositiveInt], BeforeValidator(square), Field(min_length=2, max_length=2, validate_default=True)
    ] = Field([256, 256])
    """side or [height, width] of its images, a multiple of its patches"""
    decoder_config_path: Annotated[DecoderSize, BeforeValidator(named_decoder)] = DECODERS["vit_mae-base"]
    """vit_mae-base, vit_mae-large, vit_mae-xl, or the four sizes"""
    decoder_patch_size: PositiveInt = 16
    """side of the patches that the decoder gives"""

    def encoder(self) -> RepresentationEncoder:
        height, width = self.encoder_input_size
        return RepresentationEncoder(self.encoder_cls, self.encoder_config_path, self.weights, (height, width))

    def decoder(self, encoder: RepresentationEncoder, channels: int) -> ViTDecoder:
        return ViTDecoder(encoder.width, self.decoder_config_path, encoder.grid, self.decoder_patch_size, channels)

    def portable(self, encoder: RepresentationEncoder) -> dict[str, Any]:
        """不必读预训练权重的同样的选项。"""
        return {**self.model_dump(), "encoder_config_path": encoder.architecture(), "weights": "random"}


class DecoderBlock(nn.Module):
    """ViT 的一层：先归一化，q、k、v 有偏置。"""

    def __init__(self, size: DecoderSize) -> None:
        super().__init__()
        width = size.hidden_size
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=EPSILON) for _ in range(2))
        self.attention = GroupAttention(width, size.num_attention_heads, dropout=0.0, qkv_bias=True)
        self.mlp = FeedForward(width, size.intermediate_size, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1 + h·w, D) → 同形。"""
        x = x + self.attention(self.norm1(x), None)
        return x + self.mlp(self.norm2(x))


class ViTDecoder(nn.Module):
    """潜变量的每个位置是一个 token，变成 p × p 的一块像素。

    Args:
        inputs: c。
        grid: (h, w)；别的网格的潜变量先双线性插值到这里。
        channels: 像素的通道数。
    """

    def __init__(self, inputs: int, size: DecoderSize, grid: tuple[int, int], patch: int, channels: int) -> None:
        super().__init__()
        width = size.hidden_size
        self.grid, self.patch = grid, patch
        self.embed = nn.Linear(inputs, width)
        self.cls = nn.Parameter(torch.randn(1, 1, width) * START)
        self.positions = nn.Buffer(position_codes(grid, width), persistent=False)
        self.blocks = nn.ModuleList(DecoderBlock(size) for _ in range(size.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.head = nn.Linear(width, patch * patch * channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=START)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, latents: Tensor) -> Tensor:
        """(N, c, h, w) → (N, channels, h·p, w·p) float32。"""
        if tuple(latents.shape[-2:]) != self.grid:
            latents = F.interpolate(latents, self.grid, mode="bilinear", align_corners=False)
        x = self.embed(latents.flatten(2).transpose(1, 2)) + self.positions  # (N, h·w, D)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        pixels = self.head(self.norm(x[:, 1:])).float()  # (N, h·w, p·p·channels)
        h, w = self.grid
        return rearrange(pixels, "n (h w) (p q k) -> n k (h p) (w q)", h=h, w=w, p=self.patch, q=self.patch)


def position_codes(grid: tuple[int, int], dim: int) -> Tensor:
    """(h·w, dim)：前一半是列、后一半是行，各自正弦在前；底数 10000，如 MAE。CLS 没有位置。"""
    rates = MAX_PERIOD ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.arange(side, dtype=torch.float64)[:, None] * rates for side in grid)
    row, column = (torch.cat([angles.sin(), angles.cos()], 1) for angles in (rows, columns))  # (h, dim/2)、(w, dim/2)
    h, w = grid
    both = [column[None].expand(h, -1, -1), row[:, None].expand(-1, w, -1)]
    return torch.cat(both, -1).flatten(0, 1).float()


class RAEWrapper(nn.Module):
    """图像 ⇄ 潜变量；图像是 [-1, 1] 的 (N, 3, H, W)，里面换成 [0, 1]，再按编码器自己的均值、标准差。

    参数与需求的相同。encoder_config_path 是 Hugging Face 的 id、本地文件夹，或（weights 为 random 时）结构；
    encoder_input_size 是边长或 [高, 宽]；decoder_config_path 是 DECODERS 里的名字或各个大小。

    Raises:
        ValueError: 见 RAEOptions 与 RepresentationEncoder。
    """

    def __init__(
        self,
        encoder_cls: EncoderName = "SigLIP2wNorm",
        encoder_config_path: str | Mapping[str, Any] = "google/siglip2-base-patch16-256",
        encoder_input_size: int | Sequence[int] = 256,
        decoder_config_path: str | Mapping[str, Any] | DecoderSize = "vit_mae-base",
        decoder_patch_size: int = 16,
        freeze_encoder: bool = True,
        freeze_decoder: bool = False,
        weights: Weights = "pretrained",
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        given = {
            "encoder_cls": encoder_cls,
            "encoder_config_path": encoder_config_path,
            "encoder_input_size": encoder_input_size,
            "decoder_config_path": decoder_config_path,
            "decoder_patch_size": decoder_patch_size,
            "weights": weights,
        }
        options: RAEOptions = validate(RAEOptions, given, "RAEWrapper", "model")
        self.encoder = options.encoder()
        self.decoder = options.decoder(self.encoder, RGB)
        self.freeze(freeze_encoder, freeze_decoder)
        if device is not None:
            self.to(device)

    def freeze(self, encoder: bool, decoder: bool) -> None:
        """各自学不学；冻结的一半不求导，总在 eval()。"""
        self.encoder.requires_grad_(not encoder)
        self.decoder.requires_grad_(not decoder)
        self.frozen = [part for part, held in (("encoder", encoder), ("decoder", decoder)) if held]
        self.train(self.training)

    def train(self, mode: bool = True) -> RAEWrapper:
        super().train(mode)
        for part in self.frozen:
            getattr(self, part).eval()
        return self

    def encode(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, c, h, w)，如 (N, 768, 16, 16)：每个 token 在通道上均值 0、方差 1，还没有按数据标准化。"""
        return self.encoder(resize((images.float() + 1) / 2, self.encoder.size))

    def decode(self, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(N, c, h, w) → (N, 3, *size)；没有给大小时是解码器自己的 (h·p, w·p)。"""
        images = self.decoder(latents) * self.encoder.std + self.encoder.mean  # [0, 1]，不截断
        return (images if size is None else resize(images, size)) * 2 - 1
