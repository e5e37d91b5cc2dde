"""潜空间 U-Net：历史各帧由阶段一编码，时间叠进通道，一个 U-Net 给出全部未来帧的潜变量，再逐帧解码。

阶段一是 models.interface.Autoencoder（sd_vae、rae），由检查点来，潜变量已按训练数据标准化；主干与像素 U-Net 相同
（models/layers/unet.py）。阶段一总在 eval()：没有丢弃，没有噪声；学不学只看 freeze_encoder、freeze_decoder。

* `loss_space: fields`：解码之后与场相比，只算有效的场；梯度穿过解码器，内存随它而大。
  `latent`：与未来帧的潜变量相比，不必解码，便宜；一帧里有一个通道无效，整帧就不算，因为潜变量混着各个通道。
  这时阶段一必须全冻结：目标是编码器自己给的，一起学会塌成常数，解码器则没有梯度。
* `predict: tendency`：U-Net 给出的是潜变量与最后一帧之差。

字母：B 批，T_in / T_out 帧数，C 通道，H×W 网格，c×h×w 一帧的潜变量，b = base_channels。
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from models.interface import Autoencoder
from models.layers.frames import to_state
from models.layers.halving import check_halvings
from models.layers.latents import require_states
from models.layers.losses import refuse_members, target_mse
from models.layers.members import Generators
from models.layers.padding import Padding, check_padding
from models.layers.unet import UNet, Width
from util.batch import Batch, DataSpec, Predict
from util.strict import PositiveInt, Strict


class Config(Strict):
    """潜空间 U-Net 的选项；潜变量的大小来自阶段一。"""

    first_stage: str | dict[str, Any]
    """checkpoint of the autoencoder"""
    base_channels: Width = 128
    depth: PositiveInt = 3
    """halvings of the latents"""
    predict: Predict = "state"
    loss_space: Literal["fields", "latent"] = "fields"
    """fields: after decoding; latent: cheaper, needs both halves frozen"""
    freeze_encoder: bool = True
    """the encoder does not learn"""
    freeze_decoder: bool = True
    """the decoder does not learn"""
    padding: Padding = "zeros"

    @model_validator(mode="after")
    def _target_stays(self) -> Config:
        if self.loss_space == "latent" and not (self.freeze_encoder and self.freeze_decoder):
            raise ValueError(
                "loss_space = latent needs freeze_encoder and freeze_decoder: the target is the encoder's own, and the "
                "decoder gets no gradient; use loss_space = fields to fine-tune the first stage"
            )
        return self


class Model(nn.Module):
    """阶段一、U-Net。Portable：检查点里内嵌阶段一的选项与权重。

    Raises:
        ValueError: 潜变量的边长不能整除 2^depth。
    """

    probabilistic = False
    can_forecast = True
    field_loss = False

    def __init__(self, config: Config, spec: DataSpec, first_stage: Autoencoder) -> None:
        super().__init__()
        check_padding(config.padding, spec)
        require_states(first_stage)
        channels, height, width = first_stage.latent_shape
        hint = size_hint(first_stage, spec, 2**config.depth)
        check_halvings("depth", config.depth, (height, width), what="latent", hint=hint)
        self.config = config
        self.weighs_fields = config.loss_space == "fields"
        self.frames_out = spec.frames_out
        first_stage.freeze(encoder=config.freeze_encoder, decoder=config.freeze_decoder)
        self.first_stage = first_stage
        self.net = UNet(
            spec.frames_in * channels, spec.frames_out * channels, config.base_channels, config.depth, config.padding
        )
        self.train()

    def train(self, mode: bool = True) -> Model:
        """阶段一总在 eval()。"""
        super().train(mode)
        self.first_stage.eval()
        return self

    def portable_options(self) -> dict[str, Any]:
        """阶段一的检查点换成它自己的选项。"""
        return {"name": "latent_unet", **self.config.model_dump(), "first_stage": self.first_stage.portable_options()}

    @property
    def blocks(self) -> list[nn.Module]:
        """U-Net 的各块。"""
        return self.net.blocks

    def forward(self, history: Tensor) -> Tensor:
        """(B, T_in, C, H, W) → 未来各帧的潜变量 (B, T_out, c, h, w)。"""
        latents = self.encode(history)
        made = self.net(latents.flatten(1, 2)).unflatten(1, (self.frames_out, -1))
        return to_state(made, latents, self.config.predict)

    def encode(self, frames: Tensor) -> Tensor:
        """(B, T, C, H, W) → (B, T, c, h, w)。"""
        return self.first_stage.encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    def decode(self, latents: Tensor) -> Tensor:
        """(B, T, c, h, w) → (B, T, C, H, W)。"""
        return self.first_stage.decode(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])

    def loss(self, batch: Batch, weights: Tensor | None = None) -> dict[str, Tensor]:
        """有效目标的均方误差，在标准化的场里，或在标准化的潜变量里。"""
        made = self(batch.history)
        if self.config.loss_space == "fields":
            return {"loss": target_mse(self.decode(made), batch, weights)}
        with torch.no_grad():
            truth = self.encode(batch.future)
        whole = batch.valid[:, -self.frames_out :].all(-1)  # (B, T_out)
        error = (made.float() - truth.float()).square().mean((-3, -2, -1)) * whole
        return {"loss": error.sum() / whole.sum().clamp(min=1)}

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generators | None = None
    ) -> Tensor:
        """(B, T_in, C, H, W) → (B, 1, T_out, C, H, W)；num_members > 1 是 ValueError。"""
        refuse_members("latent_unet", num_members)
        return self.decode(self(history))[:, None]


def size_hint(first_stage: Autoencoder, spec: DataSpec, multiple: int) -> str:
    """潜变量太小时的另一条路：阶段一的 image_size 放大到哪一个倍数，边长就能整除。"""
    _, height, width = first_stage.latent_shape
    hint = f", or a first stage with a latent whose sides are multiples of {multiple}"
    options = first_stage.portable_options()
    if "image_size" not in options:  # 潜变量的大小由别的选项定（RAE 的编码器输入）
        return hint
    rows, columns = options["image_size"] or (spec.height, spec.width)
    times = next(n for n in range(1, multiple + 1) if n * height % multiple == 0 and n * width % multiple == 0)
    return f"{hint}: train it with model.image_size = [{times * rows}, {times * columns}]"
