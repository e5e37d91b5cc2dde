"""测试用的最小阶段一：4 × 4 一块的线性编码；没有别的库，几百个参数。weights 是一个文件时从那里读，像预训练的文件夹。"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from models.layers.latents import LatentScaling
from models.layers.scaling import ChannelScaling, Scaling
from tests.engine.codecs import tiny_codec
from util.batch import Batch, DataSpec
from util.strict import Strict


class Config(Strict):
    weights: str = "random"
    width: int = 4
    scaling: Scaling = "zscore"
    image_size: list[int] | None = None  # 只给 latent_unet 的报错看
    freeze_encoder: bool = False
    freeze_decoder: bool = False


class Model(nn.Module):
    """(N, C, H, W) ⇄ (N, width, H/4, W/4)。"""

    encodes = "state"
    starts_anew = ("latents.",)

    def __init__(self, config: Config, spec: DataSpec, first_stage: None = None) -> None:
        super().__init__()
        self.config, self.channels = config, spec.channels
        self.latent_shape = (config.width, spec.height // 4, spec.width // 4)
        self.encoder = nn.Conv2d(spec.num_channels, config.width, 4, stride=4)
        self.decoder = nn.ConvTranspose2d(config.width, spec.num_channels, 4, stride=4)
        self.scaling = ChannelScaling(spec.num_channels, config.scaling)
        self.needs_pass = self.scaling.active
        self.latents = LatentScaling((config.width, 1, 1))
        self.frozen_are_trained = self.all_are_trained = config.weights != "random"
        if self.frozen_are_trained:
            self.load_state_dict(torch.load(config.weights, weights_only=True), strict=False)
        self.freeze(config.freeze_encoder, config.freeze_decoder)

    @property
    def latents_known(self) -> bool:
        return bool(self.latents.known)

    def freeze(self, encoder: bool, decoder: bool) -> None:
        self.encoder.requires_grad_(not encoder)
        self.decoder.requires_grad_(not decoder)

    def portable_options(self) -> dict[str, Any]:
        return {"name": "tiny_codec", **self.config.model_dump(), "weights": "random"}

    def accumulate(self, batch: Batch) -> None:
        self.scaling.observe(batch)

    def solve(self) -> None:
        self.scaling.check(self.channels)

    def observe_latents(self, batch: Batch) -> None:
        self.latents.observe(self.encoder(self.scaling(_frames(batch))))

    def solve_latents(self) -> None:
        self.latents.solve()

    def encode(self, fields: Tensor) -> Tensor:
        return self.latents(self.encoder(self.scaling(fields)))

    def decode(self, latents: Tensor) -> Tensor:
        return self.scaling.inverse(self.decoder(self.latents.inverse(latents)))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        fields, valid = _frames(batch), batch.valid.flatten(0, 1)[..., None, None]
        return {"loss": ((self.decode(self.encode(fields)) - fields).square() * valid).mean()}


def _frames(batch: Batch) -> Tensor:
    return torch.cat([batch.history, batch.future], 1).flatten(0, 1)


def register(patch: pytest.MonkeyPatch) -> None:
    """YAML 里可以写 model.name = tiny_codec。"""
    names = [*models.model_names(), "tiny_codec"]
    patch.setitem(sys.modules, "models.tiny_codec", tiny_codec)
    patch.setattr(models, "model_names", lambda: names)
