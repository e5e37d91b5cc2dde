"""像素 U-Net：把历史的时间叠进通道，一个 U-Net 直接给出全部未来帧。

主干在 models/layers/unet.py，论文与不同之处写在那里。
`scaling: minmax`（默认）按训练日期上各通道的极值缩到 [-1, 1] 再进网络，出来时还原；输出不截断。
`data.lead_hours`：时效的码调制各归一化层（与成员的噪声同一处），一个网络报几种时效。
损失在标准化空间里算，各通道的分量与别的模型相同，不因某一通道有极端值（降水）而变轻。

字母：B 批，T_in / T_out 帧数，C 通道，H×W 网格，b = base_channels。
"""

from __future__ import annotations

from torch import Tensor, nn

from models.layers.forcings import Inputs
from models.layers.frames import to_state
from models.layers.halving import check_halvings
from models.layers.lead_codes import LeadCodes
from models.layers.members import Generators
from models.layers.noise import Noise, NoiseOption, condition_norms, forecast_members
from models.layers.padding import Padding, check_padding
from models.layers.scaling import ChannelScaling, Scaling
from models.layers.unet import UNet, Width
from util.batch import Batch, DataSpec, Predict
from util.strict import PositiveInt, Strict


class Config(Strict):
    """像素 U-Net 的选项；帧数与通道数来自 data 段。"""

    base_channels: Width = 64
    depth: PositiveInt = 4
    """halvings; 2^depth must divide both sides of the grid"""
    scaling: Scaling = "minmax"
    padding: Padding = "zeros"
    predict: Predict = "state"
    noise: NoiseOption = None


class Model(nn.Module):
    """缩放、U-Net、还原。OnePass：minmax 的极值要先看一遍训练窗口。

    Raises:
        ValueError: 网格不能整除 2^depth。
    """

    can_forecast = True
    takes_forcings = True
    takes_leads = True

    def __init__(self, config: Config, spec: DataSpec, first_stage: None = None) -> None:
        super().__init__()
        check_padding(config.padding, spec)
        check_halvings("depth", config.depth, (spec.height, spec.width))
        self.predict: Predict = config.predict
        self.noise, self.probabilistic = config.noise, config.noise is not None
        self.channels = spec.channels
        self.frames_out = spec.frames_out
        self.scaling = ChannelScaling(spec.num_channels, config.scaling)
        self.needs_pass = self.scaling.active
        self.inputs = Inputs(spec)
        sizes = spec.frames_in * self.inputs.channels, spec.frames_out * spec.num_channels
        self.net = UNet(*sizes, config.base_channels, config.depth, config.padding)
        self.leads = LeadCodes(spec)
        size = len(spec.jumps) + (0 if config.noise is None else config.noise.size)
        condition_norms(self, Noise(size=size) if size else None)

    def accumulate(self, batch: Batch) -> None:
        """记下一批训练窗口里各通道的极值；zscore 时不必。"""
        self.scaling.observe(batch)

    def solve(self) -> None:
        """极值边看边记，这里只查它们分得开：见 ChannelScaling.check。"""
        self.scaling.check(self.channels)

    @property
    def blocks(self) -> list[nn.Module]:
        """U-Net 的各块。"""
        return self.net.blocks

    def forward(self, history: Tensor, time: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """(B, T_in, C, H, W)、时刻 → (B, T_out, C, H, W)，标准化空间。"""
        scaled = self.scaling(history)
        seen = self.inputs(scaled, time).flatten(1, 2)
        made = self.net(seen, self.leads.joined(time, noise)).unflatten(1, (self.frames_out, -1))  # (B, T_out, C, H, W)
        return self.scaling.inverse(to_state(made, self.inputs.base(scaled), self.predict))

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generators | None = None
    ) -> Tensor:
        """(B, T_in, C, H, W) → (B, M, T_out, C, H, W)；没有噪声而 M > 1 是 ValueError。"""
        return forecast_members(self, "pixel_unet", self.noise, history, time, num_members, generator)
