"""Stable Diffusion 的 VAE，作阶段一：场 ⇄ 潜变量，边长减到 1/8，一张图 4 个潜通道；网络是 diffusers 的 AutoencoderKL。

论文：Rombach et al. 2022（CVPR），High-Resolution Image Synthesis with Latent Diffusion Models，附录 G。
与原版不同之处：
* 图有 3 个通道，场有 C 个。`channels: repeat`（默认）把每个变量当作一张图，重复成 3 个通道，出来取平均，
  潜变量是 C·4 个通道；`adapter` 用学出来的 1 × 1 卷积 C → 3 与 3 → C，全部变量合成一张图，潜变量只有 4 个通道。
* 损失只有 L1 或均方误差（可加经向频谱的振幅）与 KL，没有感知损失与判别器：它们是为照片准备的。
  误差在标准化空间里算，KL 的权重照原版：两者都对一张图求和，这里同除以一张图的数的个数。
* 潜变量按这份数据自己的统计量逐通道标准化，不用照片上的 0.18215。
后验的采样只在训练的损失里；encode 取众数，验证的损失也是，量的就是用起来的样子。

字母：N 帧数，C 通道，H×W 网格，h×w 潜变量的边长，c 潜通道，n 图的张数（repeat 为 N·C，adapter 为 N）。
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn

from models.layers.draws import Draws
from models.layers.frames import frames_of
from models.layers.images import RGB, Adapter, Channels
from models.layers.latents import LatentScaling, in_chunks, resize
from models.layers.losses import zonal_amplitudes
from models.layers.pretrained import RANDOM, load_pretrained
from models.layers.scaling import ChannelScaling, Scaling
from util.batch import Batch, DataSpec, Predict
from util.strict import PositiveInt, Strict, validate


class Architecture(Strict):
    """AutoencoderKL 的结构，键名照 diffusers；默认值是 Stable Diffusion 的，它的宽度是 [128, 256, 512, 512]。"""

    block_out_channels: list[PositiveInt] = Field(min_length=1)
    """channels of each level; sides halve from one to the next"""
    layers_per_block: PositiveInt = 2
    """residual blocks of each level"""
    latent_channels: PositiveInt = 4
    """channels of the latents of an image"""
    norm_num_groups: PositiveInt = 32
    """groups of the normalisation; must divide the channels"""
    mid_block_add_attention: bool = True
    """attention at the deepest level"""
    use_quant_conv: bool = True
    """1 x 1 convolution after the encoder"""
    use_post_quant_conv: bool = True
    """1 x 1 convolution before the decoder"""

    @model_validator(mode="after")
    def _normalises(self) -> Architecture:
        odd = [width for width in self.block_out_channels if width % self.norm_num_groups]
        if odd:
            raise ValueError(f"norm_num_groups = {self.norm_num_groups} does not divide block_out_channels {odd}")
        return self

    @property
    def factor(self) -> int:
        """边长减到几分之一。"""
        return 2 ** (len(self.block_out_channels) - 1)

    def options(self) -> dict[str, Any]:
        """造 AutoencoderKL 的全部选项；这里没有列出的与它的默认值相同。"""
        levels = len(self.block_out_channels)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
        return {"in_channels": RGB, "out_channels": RGB, "act_fn": "silu", **blocks, **self.model_dump()}


class Config(Strict):
    """SD VAE 的选项；通道数与网格来自 data 段。

    architecture 只与 weights = random 一起写；预训练的结构在它自己的 config.json 里。
    """

    weights: str
    """Hugging Face id or folder of an AutoencoderKL; random: write its architecture"""
    architecture: Architecture | None = Field(None, validate_default=True)
    """of weights: random; pretrained ones bring their own"""
    channels: Channels = "repeat"
    scaling: Scaling = "minmax"
    image_size: list[PositiveInt] | None = Field(None, min_length=2, max_length=2)
    """[height, width] that fields are resized to and back; null: not"""
    freeze_encoder: bool = False
    """the encoder does not learn"""
    freeze_decoder: bool = False
    """the decoder does not learn"""
    vae_batch_size: PositiveInt = 16
    """most images encoded or decoded at once; memory only"""
    loss: Literal["l1", "mse"] = "l1"
    """of the reconstruction, in standardised space"""
    spectral_weight: float = Field(0.0, ge=0)
    """weight of the error of zonal spectra"""
    kl_weight: float = Field(1e-6, ge=0)
    """weight of the KL divergence"""

    @field_validator("architecture")
    @classmethod
    def _needed(cls, value: Architecture | None, info: ValidationInfo) -> Architecture | None:
        random = info.data.get("weights") == RANDOM
        if random and value is None:
            raise ValueError("weights = random needs an architecture, e.g. {block_out_channels: [32, 64]}")
        if not random and value is not None:
            raise ValueError("goes with weights = random only; pretrained weights bring their own config.json")
        return value


class Model(nn.Module):
    """Autoencoder、Pretrained、Portable；OnePass：minmax 的极值要先看一遍训练窗口。

    Raises:
        ValueError: 网格不能逐次减半；预训练的权重不在、不全、不是这种结构。
    """

    encodes: Predict = "state"
    starts_anew = ("latents.",)

    def __init__(self, config: Config, spec: DataSpec, first_stage: None = None) -> None:
        super().__init__()
        self.config = config
        self.channels = spec.channels
        self.vae, self.architecture = build_vae(config)
        self.size = check_size(config, self.architecture, spec)
        self.grid = (spec.height, spec.width)
        self.adapter = Adapter(spec.num_channels) if config.channels == "adapter" else None
        self.images = 1 if self.adapter else spec.num_channels  # 一帧几张图
        height, width = (side // self.architecture.factor for side in self.size)
        self.latent_shape = (self.images * self.architecture.latent_channels, height, width)
        self.scaling = ChannelScaling(spec.num_channels, config.scaling)
        self.needs_pass = self.scaling.active
        self.latents = LatentScaling((self.latent_shape[0], 1, 1))
        self.frozen_are_trained = config.weights != RANDOM
        # 1 × 1 卷积起步时，至多三个变量原样进出；再多的混在一起
        self.all_are_trained = self.frozen_are_trained and (self.adapter is None or spec.num_channels <= RGB)
        for part, frozen in ((self._encoder(), config.freeze_encoder), (self._decoder(), config.freeze_decoder)):
            for layer in part:
                layer.requires_grad_(not frozen)

    def _encoder(self) -> list[nn.Module]:
        return [layer for layer in (self.vae.encoder, self.vae.quant_conv) if layer is not None]

    def _decoder(self) -> list[nn.Module]:
        return [layer for layer in (self.vae.post_quant_conv, self.vae.decoder) if layer is not None]

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """encode 用到的全部参数，1 × 1 卷积也在内；阶段二由此冻结。"""
        layers = self._encoder() + ([self.adapter.into] if self.adapter else [])
        return chain.from_iterable(layer.parameters() for layer in layers)

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        """decode 用到的全部参数。"""
        layers = self._decoder() + ([self.adapter.out] if self.adapter else [])
        return chain.from_iterable(layer.parameters() for layer in layers)

    def freeze(self, encoder: bool, decoder: bool) -> None:
        """encode、decode 各自用到的参数学不学。"""
        for parameters, frozen in ((self.encoder_parameters(), encoder), (self.decoder_parameters(), decoder)):
            for parameter in parameters:
                parameter.requires_grad_(not frozen)

    @property
    def blocks(self) -> list[nn.Module]:
        """编码器、解码器的残差块。"""
        encoder, decoder = self.vae.encoder, self.vae.decoder
        levels = [*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks]
        return [block for level in levels for block in level.resnets]

    @property
    def latents_known(self) -> bool:
        """潜变量的统计量求出来没有。"""
        return bool(self.latents.known)

    def portable_options(self) -> dict[str, Any]:
        """结构写明，不再读权重的文件夹。"""
        options = {**self.config.model_dump(), "weights": RANDOM, "architecture": self.architecture.model_dump()}
        return {"name": "sd_vae", **options}

    def accumulate(self, batch: Batch) -> None:
        """记下一批训练窗口里各通道的极值；zscore 时不必。"""
        self.scaling.observe(batch)

    def solve(self) -> None:
        """极值边看边记，这里只查它们分得开：见 ChannelScaling.check。"""
        self.scaling.check(self.channels)

    def observe_latents(self, batch: Batch) -> None:
        """收下一批训练窗口各帧的潜变量；插值得来的帧也算，阶段二照样编码它们。"""
        with torch.no_grad():
            moments = self._moments(frames_of(batch))  # (n, 2·4, h, w)
            self.latents.observe(self._stacked(moments.chunk(2, 1)[0]))

    def solve_latents(self) -> None:
        """见 LatentScaling.solve。"""
        self.latents.solve()

    def encode(self, fields: Tensor) -> Tensor:
        """(N, C, H, W) 标准化的场 → (N, c, h, w) 标准化的潜变量：后验的众数，不采样。"""
        return self.latents(self._stacked(self._moments(fields).chunk(2, 1)[0]))

    def decode(self, latents: Tensor) -> Tensor:
        """(N, c, h, w) 标准化的潜变量 → (N, C, H, W) 标准化的场。"""
        return self._fields(self.latents.inverse(latents).unflatten(1, (self.images, -1)).flatten(0, 1))

    def _moments(self, fields: Tensor) -> Tensor:
        """(N, C, H, W) → 后验的均值与对数方差 (n, 2·4, h, w)。"""
        fields = self.scaling(fields)
        images = fields if self.adapter else fields.flatten(0, 1)[:, None]  # (n, C 或 1, H, W)
        return in_chunks(self._encode_images, images, self.config.vae_batch_size)

    def _encode_images(self, images: Tensor) -> Tensor:
        images = resize(images, self.size)  # 放大也分块做：大的图不同时都在内存里
        images = self.adapter.into(images) if self.adapter else images.expand(-1, RGB, -1, -1)
        return self.vae.encode(images).latent_dist.parameters

    def _stacked(self, latents: Tensor) -> Tensor:
        """(n, 4, h, w) → (N, c, h, w)：一帧各张图的潜变量叠进通道。"""
        return latents.unflatten(0, (-1, self.images)).flatten(1, 2)

    def _fields(self, latents: Tensor) -> Tensor:
        """还没有标准化的 (n, 4, h, w) → (N, C, H, W)，标准化空间。"""
        images = in_chunks(self._decode_images, latents, self.config.vae_batch_size)
        return self.scaling.inverse(images if self.adapter else images[:, 0].unflatten(0, (-1, self.images)))

    def _decode_images(self, latents: Tensor) -> Tensor:
        images = self.vae.decode(latents).sample  # (n, 3, *size)
        images = self.adapter.out(images) if self.adapter else images.mean(1, keepdim=True)
        return resize(images.float(), self.grid)  # 半精度的图先换回来再还原

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """窗口里有效的场的重建误差（标准化空间），加频谱振幅的误差与 KL；eval 时不采样。"""
        fields = frames_of(batch)  # (N, C, H, W)
        valid = batch.valid.flatten(0, 1)  # (N, C)
        mean, logvar = self._moments(fields).float().chunk(2, 1)  # (n, 4, h, w)
        logvar = logvar.clamp(-30, 20)  # 与 diffusers 的 DiagonalGaussianDistribution 相同
        noise = Draws(batch).normal_like(mean) if self.training else 0.0
        made = self._fields(mean + (0.5 * logvar).exp() * noise)
        image_valid = valid.flatten() if self.adapter is None else valid.any(1)  # (n,)
        pixels = self.size[0] * self.size[1] * RGB
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)) / pixels
        terms = {
            "reconstruction": _masked_mean(self._error(made, fields), valid),
            "kl": _masked_mean(divergence, image_valid),
        }
        loss = terms["reconstruction"] + self.config.kl_weight * terms["kl"]
        if self.config.spectral_weight:
            terms["spectral"] = _masked_mean(self._error(zonal_amplitudes(made), zonal_amplitudes(fields)), valid)
            loss = loss + self.config.spectral_weight * terms["spectral"]
        return {"loss": loss, **terms}

    def _error(self, made: Tensor, truth: Tensor) -> Tensor:
        """(N, C, H, W) → 每个场的误差 (N, C)。"""
        difference = made - truth
        return (difference.abs() if self.config.loss == "l1" else difference.square()).mean((-2, -1))


def build_vae(config: Config) -> tuple[Any, Architecture]:
    """按 YAML 写明的结构随机造，或读预训练的权重；一并返回结构。

    Raises:
        ValueError: 见 load_pretrained；config.json 里是另一种结构。
    """
    if config.architecture is not None:
        return AutoencoderKL(**config.architecture.options()), config.architecture
    vae: Any = load_pretrained(AutoencoderKL, config.weights)
    where = f"model.weights = {config.weights}: config.json"
    held = {key: list(v) if isinstance(v, tuple) else v for key, v in vae.config.items()}
    architecture = validate(Architecture, {key: held[key] for key in Architecture.model_fields}, where)
    for key, value in architecture.options().items():
        if held[key] != value:
            raise ValueError(f"{where}: {key} = {held[key]}; sd_vae knows only {value}")
    return vae, architecture


def check_size(config: Config, architecture: Architecture, spec: DataSpec) -> tuple[int, int]:
    """编码器看到的边长。

    Raises:
        ValueError: 不是缩小倍数的整数倍；给出最近的、行得通的大小。
    """
    height, width = config.image_size or (spec.height, spec.width)
    factor = architecture.factor
    if height % factor or width % factor:
        near = [-(-side // factor) * factor for side in (height, width)]
        raise ValueError(
            f"model.image_size = {config.image_size or 'null'}: the VAE sees {height} x {width}, but both sides must "
            f"be multiples of {factor}; sizes that work: {near}, {[2 * side for side in near]}"
        )
    return height, width


def _masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """只算有效的；一个也没有时为 0。"""
    return (values * valid).sum() / valid.sum().clamp(min=1)
