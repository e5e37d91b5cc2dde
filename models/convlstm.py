"""ConvLSTM 家族：门由卷积算出的 LSTM，时间上递推，空间上只看邻近的格点。

论文：Shi et al. 2015, Convolutional LSTM Network (arXiv:1506.04214)。与它不同：没有窥孔（c 不进各个门），
如后来通行的写法；遗忘门没有额外的偏置。h、c 从零开始。

convlstm  编码：几层 ConvLSTM 读完历史；顶层最后的 h → 卷积 → SiLU → 卷积，一次给出全部 T_out 帧。
seq2seq   编码相同；解码是一个 ConvLSTM 单元，从顶层的 (h, c) 出发：输入最后一帧，此后输入自己的上一个预测
          （训练时按 teacher_forcing 换成真值，Bengio et al. 2015），每步 h → 卷积 → 下一帧。

来源没有写明、由这里定下的：输出的卷积与单元同样大小；两层之间是 SiLU（ReLU 在通道少时会整层死掉，实测）。
成员的噪声（models/layers/noise.py）没有归一化层可调制，是各单元的门的输入通道：全球同一个数，1 × 1 的卷积就是线性层。

字母：B 批，C 通道，H×W 网格，D = hidden。
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from models.layers.forcings import Inputs
from models.layers.frames import to_state
from models.layers.members import Generators
from models.layers.noise import NoiseOption, forecast_members, modulation
from models.layers.padding import PaddedConv2d, Padding, check_padding
from util.batch import Batch, DataSpec, Predict
from util.strict import PositiveInt, Share, Strict

Cell = tuple[Tensor, Tensor]  # (h, c)，各 (B, D, H, W)


class Config(Strict):
    """predict 的差：convlstm 与最后一帧历史之差，seq2seq 与解码这一步的输入之差。

    noise 与 teacher_forcing 不合用：真值没有成员。
    """

    variant: Literal["convlstm", "seq2seq"] = "convlstm"
    """convlstm: all frames at once; seq2seq: frame by frame, fed with its own forecast"""
    hidden: int = Field(64, ge=2)
    """channels of h and c"""
    layers: PositiveInt = 2
    """layers of the encoder"""
    kernel: PositiveInt = 3
    """side of the convolutions, odd"""
    padding: Padding = "zeros"
    predict: Predict = "state"
    teacher_forcing: Share = 0.0
    """seq2seq, training: chance that a step is fed with the truth; not with noise"""
    noise: NoiseOption = None

    @field_validator("kernel")
    @classmethod
    def _odd(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError(f"must be odd, so that the grid keeps its size; nearest: {kernel - 1}, {kernel + 1}")
        return kernel

    @field_validator("teacher_forcing")
    @classmethod
    def _has_a_decoder(cls, share: float, info: ValidationInfo) -> float:  # 只在写了这个键时才查
        if info.data.get("variant", "seq2seq") != "seq2seq":  # variant 自己就写错时，只报 variant
            raise ValueError("only variant = seq2seq feeds frames back; remove the key or choose that variant")
        return share

    @field_validator("noise")
    @classmethod
    def _has_no_truth(cls, noise: NoiseOption, info: ValidationInfo) -> NoiseOption:
        if noise is not None and info.data.get("teacher_forcing"):
            raise ValueError("members follow their own frames; leave out model.teacher_forcing or model.noise")
        return noise


class ConvLSTMCell(nn.Module):
    """一步：四个门由 [输入, h] 的一次卷积算出，通道依次是 i、f、o、g。

    c' = σ(f)·c + σ(i)·tanh(g)，h' = σ(o)·tanh(c')。
    """

    def __init__(self, channels: int, hidden: int, kernel: int, padding: Padding, noise: NoiseOption = None) -> None:
        super().__init__()
        self.gates = PaddedConv2d(channels + hidden, 4 * hidden, kernel, padding)
        self.noise_gates = None if noise is None else modulation(noise.size, 4 * hidden)

    def forward(self, x: Tensor, state: Cell, noise: Tensor | None = None) -> Cell:
        """x (B, C, H, W)、(h, c)、噪声 (B, size) → 下一个 (h, c)。"""
        h, c = state
        gates = self.gates(torch.cat([x, h], 1))  # (B, 4·D, H, W)
        if self.noise_gates is not None:
            gates = gates + self.noise_gates(noise)[..., None, None]
        i, f, o, g = gates.chunk(4, 1)  # 各 (B, D, H, W)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class Model(nn.Module):
    """(B, T_in, C, H, W) → (B, T_out, C, H, W)。

    Raises:
        ValueError: circular_lon 的卷积比经度的一圈还宽。
    """

    can_forecast = True
    takes_forcings = True

    def __init__(self, config: Config, spec: DataSpec, first_stage: None = None) -> None:
        super().__init__()
        check_padding(config.padding, spec)
        _check_kernel(config, spec)
        self.config, self.spec, self.probabilistic = config, spec, config.noise is not None
        channels, hidden, kernel, padding = spec.num_channels, config.hidden, config.kernel, config.padding
        cell = partial(ConvLSTMCell, hidden=hidden, kernel=kernel, padding=padding, noise=config.noise)
        self.inputs = Inputs(spec)
        widths = [self.inputs.channels] + [hidden] * (config.layers - 1)
        self.encoder = nn.ModuleList(cell(n) for n in widths)
        if config.variant == "seq2seq":
            self.decoder = cell(self.inputs.fields)
            self.head = nn.Sequential(PaddedConv2d(hidden, channels, kernel, padding))
        else:
            self.head = nn.Sequential(
                PaddedConv2d(hidden, hidden // 2, kernel, padding),
                nn.SiLU(),
                PaddedConv2d(hidden // 2, spec.frames_out * channels, kernel, padding),
            )

    @property
    def blocks(self) -> list[nn.Module]:
        """各层的一步。"""
        return [module for module in self.modules() if isinstance(module, ConvLSTMCell)]

    def encode(self, history: Tensor, noise: Tensor | None = None) -> Cell:
        """历史接上外强迫 (B, T_in, channels, H, W)、噪声 (B, size) → 顶层最后的 (h, c)。"""
        zeros = history.new_zeros(len(history), self.config.hidden, *history.shape[-2:])  # (B, D, H, W)
        states = [(zeros, zeros)] * len(self.encoder)
        for x in history.unbind(1):  # (B, C, H, W)
            for layer, cell in enumerate(self.encoder):
                states[layer] = cell(x, states[layer], noise)
                x = states[layer][0]  # (B, D, H, W)
        return states[-1]

    def forward(
        self,
        history: Tensor,
        time: Tensor | None = None,
        truth: Tensor | None = None,
        forced: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """truth (B, T_out, C, H, W)、forced (B, T_out, C, 1, 1)：seq2seq 在 forced 为真处以真值作下一步的输入。"""
        state = self.encode(self.inputs(history, time), noise)
        if self.config.variant == "convlstm":
            made = self.head(state[0]).unflatten(1, (self.spec.frames_out, -1))  # (B, T_out, C, H, W)
            return to_state(made, self.inputs.base(history), self.config.predict)
        frame, made = history[:, -1:], []  # (B, 1, C, H, W)
        for step in range(self.spec.frames_out):
            state = self.decoder(self.inputs.fed_back(frame)[:, 0], state, noise)
            frame = to_state(self.head(state[0])[:, None], self.inputs.base(frame), self.config.predict)
            made.append(frame)
            if truth is not None and forced is not None:
                frame = torch.where(forced[:, step : step + 1], truth[:, step : step + 1], frame)
        return torch.cat(made, 1)  # (B, T_out, C, H, W)

    def forced_forecast(self, batch: Batch) -> Tensor:
        """训练时的预报 (B, 1, T_out, C, H, W)：seq2seq 按 teacher_forcing 看见真值。"""
        if not self.config.teacher_forcing:
            return self.forecast(batch.history, batch.time)
        valid = batch.valid[:, -self.spec.frames_out :]  # (B, T_out, C)
        drawn = torch.rand(valid.shape[:2], device=valid.device) < self.config.teacher_forcing
        forced = drawn[:, :, None] & valid  # 插值得来的场不是真值，可能用了更晚的场
        return self(batch.history, batch.time, batch.future, forced[..., None, None])[:, None]

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generators | None = None
    ) -> Tensor:
        """(B, T_in, C, H, W) → (B, M, T_out, C, H, W)，标准化空间；没有噪声而 M > 1 是 ValueError。"""
        return forecast_members(self, "convlstm", self.config.noise, history, time, num_members, generator)


def _check_kernel(config: Config, spec: DataSpec) -> None:
    widest = 2 * spec.width + 1
    if config.padding == "circular_lon" and config.kernel > widest:
        raise ValueError(
            f"model.kernel = {config.kernel} reaches around {spec.width} longitudes more than once with "
            f"model.padding = circular_lon; kernels that work there: odd numbers up to {widest}"
        )
