"""RAE（表示自编码器），作阶段一：冻结的预训练编码器给出潜变量，训练出来的 ViT 解码器把它变回场。

论文：Zheng et al. 2025，Diffusion Transformers with Representation Autoencoders；层见 layers/rae_autoencoder.py。
与原版不同之处：
* 图有 3 个通道，场有 C 个：`channels` 见 models/layers/images.py，repeat 时潜变量有 C·768 个通道，adapter 时 768。
* 损失只有 L1（可加均方误差），在标准化空间里算；没有 LPIPS 与判别器，它们是为照片准备的，且各要一份别的权重。
* 编码器的输入大小、图像块可选，潜变量的 h × w 由此而来；场先缩放到输入大小，解码之后缩放回网格。

`noise_tau`：训练时潜变量加 σ·N(0, 1)，σ ~ U(0, τ)，一张图一个。解码器日后要解的是预报、生成出来的潜变量，
不是编码器给的，所以默认与原版相同，0.8；只要重建得准（不做阶段二），写 0。

字母：N 帧数，C 通道，H×W 网格，c×h×w 一帧的潜变量，n 图的张数。
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.layers.draws import Draws
from models.layers.frames import frames_of
from models.layers.images import Channels, FieldImages
from models.layers.latents import LatentScaling, in_chunks
from models.layers.losses import field_errors
from models.layers.rae_autoencoder import RAEOptions, RAEWrapper
from models.layers.scaling import ChannelScaling, Scaling
from util.batch import Batch, DataSpec, Predict
from util.strict import PositiveInt

HEAD = "head."  # 解码器的输出层


class Config(RAEOptions):
    """RAE 的选项；通道数与网格来自 data 段。"""

    freeze_encoder: bool = True
    """the encoder does not learn"""
    freeze_decoder: bool = False
    """the decoder does not learn"""
    decoder_weights: str | None = None
    """decoder_fp16.safetensors of engine.studies.stage1_direct that the decoder starts from; null: anew"""
    channels: Channels = "repeat"
    scaling: Scaling = "minmax"
    noise_tau: float = Field(0.8, ge=0)
    """training: noise of a standard deviation drawn below it is added to the latents; 0: none"""
    mse_weight: float = Field(0.0, ge=0)
    """loss = L1 + this times the mean square"""
    vae_batch_size: PositiveInt = 16
    """most images encoded or decoded at once; memory only"""


class Model(nn.Module):
    """Autoencoder、Portable；OnePass：minmax 的极值要先看一遍训练窗口。

    Raises:
        ValueError: 预训练的权重不在或不是这种编码器；输入大小不能整除图像块。
    """

    encodes: Predict = "state"
    starts_anew = ("latents.",)

    def __init__(self, config: Config, spec: DataSpec, first_stage: None = None) -> None:
        super().__init__()
        self.config = config
        self.channels = spec.channels
        self.grid = (spec.height, spec.width)
        shared = {key: getattr(config, key) for key in RAEOptions.model_fields}
        self.rae = RAEWrapper(**shared, freeze_encoder=config.freeze_encoder, freeze_decoder=config.freeze_decoder)
        if config.decoder_weights is not None:
            start_decoder(self.rae.decoder, config.decoder_weights)
        self.images = FieldImages(spec.num_channels, config.channels)
        self.latent_shape = (self.images.count * self.rae.encoder.width, *self.rae.encoder.grid)
        self.scaling = ChannelScaling(spec.num_channels, config.scaling)
        self.needs_pass = self.scaling.active
        self.latents = LatentScaling(self.latent_shape)
        pretrained = config.weights == "pretrained" or not config.freeze_encoder
        self.frozen_are_trained = pretrained and not config.freeze_decoder

    @property
    def blocks(self) -> list[nn.Module]:
        """解码器的各层。"""
        return list(self.rae.decoder.blocks)

    @property
    def latents_known(self) -> bool:
        """潜变量的统计量求出来没有。"""
        return bool(self.latents.known)

    def portable_options(self) -> dict[str, Any]:
        """编码器的结构写明，不再读权重的文件夹。"""
        return {"name": "rae", **self.config.portable(self.rae.encoder), "decoder_weights": None}

    def freeze(self, encoder: bool, decoder: bool) -> None:
        """encode、decode 各自用到的参数学不学，1 × 1 卷积也在内。"""
        self.rae.freeze(encoder, decoder)
        if self.images.adapter:
            self.images.adapter.into.requires_grad_(not encoder)
            self.images.adapter.out.requires_grad_(not decoder)

    def accumulate(self, batch: Batch) -> None:
        """记下一批训练窗口里各通道的极值；zscore 时不必。"""
        self.scaling.observe(batch)

    def solve(self) -> None:
        """极值边看边记，这里只查它们分得开：见 ChannelScaling.check。"""
        self.scaling.check(self.channels)

    def observe_latents(self, batch: Batch) -> None:
        """收下一批训练窗口各帧的潜变量；插值得来的帧也算，阶段二照样编码它们。"""
        with torch.no_grad():
            self.latents.observe(self.images.stack(self._features(frames_of(batch))))

    def solve_latents(self) -> None:
        """见 LatentScaling.solve。"""
        self.latents.solve()

    def encode(self, fields: Tensor) -> Tensor:
        """(N, C, H, W) 标准化的场 → (N, c, h, w) 逐点标准化的潜变量。"""
        return self.latents(self.images.stack(self._features(fields)))

    def decode(self, latents: Tensor) -> Tensor:
        """(N, c, h, w) 标准化的潜变量 → (N, C, H, W) 标准化的场。"""
        return self._fields(self.images.unstack(self.latents.inverse(latents)))

    def _features(self, fields: Tensor) -> Tensor:
        """(N, C, H, W) → 编码器给出的 (n, 768, h, w)。"""
        return in_chunks(self.rae.encode, self.images.images(self.scaling(fields)), self.config.vae_batch_size)

    def _fields(self, features: Tensor) -> Tensor:
        """(n, 768, h, w) → (N, C, H, W)，标准化空间。"""
        images = in_chunks(lambda part: self.rae.decode(part, self.grid), features, self.config.vae_batch_size)
        return self.scaling.inverse(self.images.fields(images).float())

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """窗口里有效的场的重建误差（标准化空间）：L1，加 mse_weight 份均方误差；噪声只在训练时加。"""
        fields = frames_of(batch)  # (N, C, H, W)
        features = self._features(fields)
        if self.training and self.config.noise_tau:
            draws = Draws(batch)
            images = len(features) // draws.count
            sigma = self.config.noise_tau * draws.uniform(images, 1, 1, 1).flatten(0, 1)  # (n, 1, 1, 1)
            features = features + sigma * draws.normal_like(features)
        mae, mse = field_errors(self._fields(features), fields, batch.valid.flatten(0, 1))
        return {"loss": mae + self.config.mse_weight * mse, "mae": mae, "mse": mse}


def start_decoder(decoder: nn.Module, path: str) -> None:
    """解码器从直接预报的权重起步（engine.studies.stage1_direct 写的）；输出层除外，那里给的是全部未来帧。

    Raises:
        ValueError: 文件不在、坏了，或是另一种大小的解码器。
    """
    if not Path(path).is_file():
        raise ValueError(
            f"model.decoder_weights = {path}: no such file; python -m engine.studies.stage1_direct writes it"
        )
    try:
        held = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"model.decoder_weights = {path}: not a safetensors file ({error})") from None
    own = {name: tuple(value.shape) for name, value in decoder.state_dict().items() if not name.startswith(HEAD)}
    for name, shape in own.items():
        found = tuple(held[name].shape) if name in held else "absent"
        if found != shape:
            raise ValueError(f"model.decoder_weights = {path}: {name} is {found} there, {shape} here")
    decoder.load_state_dict({name: held[name].float() for name in own}, strict=False)
