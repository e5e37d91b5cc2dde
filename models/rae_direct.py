"""RAE 直接预报（Stage 1 direct）：历史过冻结的预训练主干，ViT 解码器直接给出全部未来帧；没有扩散。

历史叠进通道，1 × 1 的 in_adapter 变成三个通道，缩放到主干的输入大小，得到 token；解码器见 layers/rae_autoencoder.py。
与重建（models/rae.py）不同：in_adapter 的输出就是主干看到的像素，不再减均值、除标准差，那是照片的；
解码器的输出层给 T_out·C 个通道，就是模型里的尺度，也不乘回去。
`python -m engine.studies.stage1_direct` 写成绩、图，以及阶段 B 要的半精度权重。

字母：B 批，T_in / T_out 帧数，C 通道，H×W 网格，c×h×w 主干的 token。
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor, nn

from models.layers.frames import to_state
from models.layers.images import RGB
from models.layers.latents import resize
from models.layers.losses import field_errors, refuse_members
from models.layers.members import Generators
from models.layers.rae_autoencoder import RAEOptions
from models.layers.scaling import ChannelScaling, Scaling
from util.batch import Batch, DataSpec, Predict


class Config(RAEOptions):
    """直接预报的选项；帧数与通道数来自 data 段。"""

    freeze_backbone: bool = True
    """the pretrained backbone does not learn"""
    train_in_adapter: bool = True
    """the layer before it learns; false: it comes from train.init"""
    scaling: Scaling = "minmax"
    predict: Predict = "state"
    mse_weight: float = Field(0.0, ge=0)
    """loss = L1 + this times the mean square"""


class Model(nn.Module):
    """Portable；OnePass：minmax 的极值要先看一遍训练窗口。

    Raises:
        ValueError: 预训练的权重不在或不是这种编码器；输入大小不能整除图像块。
    """

    probabilistic = False
    can_forecast = True
    field_loss = False
    weighs_fields = True

    def __init__(self, config: Config, spec: DataSpec, first_stage: None = None) -> None:
        super().__init__()
        self.config = config
        self.channels = spec.channels
        self.frames_out = spec.frames_out
        self.grid = (spec.height, spec.width)
        self.in_adapter = nn.Conv2d(spec.frames_in * spec.num_channels, RGB, 1)
        self.backbone = config.encoder()
        self.decoder = config.decoder(self.backbone, spec.frames_out * spec.num_channels)
        self.scaling = ChannelScaling(spec.num_channels, config.scaling)
        self.needs_pass = self.scaling.active
        self.in_adapter.requires_grad_(config.train_in_adapter)
        self.backbone.requires_grad_(not config.freeze_backbone)
        pretrained = config.weights == "pretrained" or not config.freeze_backbone
        self.frozen_are_trained = pretrained and config.train_in_adapter

    def train(self, mode: bool = True) -> Model:
        super().train(mode)
        if self.config.freeze_backbone:
            self.backbone.eval()
        return self

    def portable_options(self) -> dict[str, Any]:
        """主干的结构写明，不再读权重的文件夹。"""
        return {"name": "rae_direct", **self.config.portable(self.backbone)}

    def accumulate(self, batch: Batch) -> None:
        """记下一批训练窗口里各通道的极值；zscore 时不必。"""
        self.scaling.observe(batch)

    def solve(self) -> None:
        """极值边看边记，这里只查它们分得开：见 ChannelScaling.check。"""
        self.scaling.check(self.channels)

    @property
    def blocks(self) -> list[nn.Module]:
        """解码器的各层。"""
        return list(self.decoder.blocks)

    def forward(self, history: Tensor) -> Tensor:
        """(B, T_in, C, H, W) → (B, T_out, C, H, W)，标准化空间。"""
        scaled = self.scaling(history)
        pixels = self.in_adapter(scaled.flatten(1, 2)).float()  # (B, 3, H, W)；半精度的不能缩放
        tokens = self.backbone.tokens(resize(pixels, self.backbone.size))  # (B, c, h, w)
        made = resize(self.decoder(tokens), self.grid).unflatten(1, (self.frames_out, -1))
        return self.scaling.inverse(to_state(made, scaled, self.config.predict))

    def loss(self, batch: Batch, weights: Tensor | None = None) -> dict[str, Tensor]:
        """有效目标场的 L1，加 mse_weight 份均方误差（标准化空间）。"""
        mae, mse = field_errors(self(batch.history), batch.future, batch.valid[:, -self.frames_out :], weights)
        return {"loss": mae + self.config.mse_weight * mse, "mae": mae, "mse": mse}

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generators | None = None
    ) -> Tensor:
        """(B, T_in, C, H, W) → (B, 1, T_out, C, H, W)；num_members > 1 是 ValueError。"""
        refuse_members("rae_direct", num_members)
        return self(history)[:, None]
