"""LSTM 家族：每一帧拉平成一个向量，只在时间上递推；格点之间的远近无从知道，是对照用的。

论文：Hochreiter & Schmidhuber 1997；seq2seq：Sutskever et al. 2014 (arXiv:1409.3215)，输入不倒序。

lstm           读完历史，顶层最后的 h → Linear，一次给出全部 T_out 帧。
bidirectional  正反两个方向各读一遍历史；两个方向各自读完之后的 h 拼起来 → Linear。只读过去的帧。
seq2seq        编码相同；解码是另一个 LSTM，从编码的 (h, c) 出发：输入最后一帧，此后输入自己的上一个预测；
               h → Linear → 下一帧。
`head: mlp` 把末了的 Linear 换成 Linear(D → D/2) – ReLU – Dropout – Linear，来源代码里的写法（默认照需求，是 Linear）：
C = 1、12 → 4、32 × 64 时 1,787,968 个参数，Linear 是 2,304,000 个。

bidirectional 取的是反向 LSTM 读完全部历史（到第一帧）之后的 h；若取它在最后一帧处的输出，它只看过一帧，
循环的权重得不到梯度。

字母：B 批，C 通道，H×W 网格，F = C·H·W，D = hidden。
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from models.layers.forcings import Inputs
from models.layers.losses import refuse_members
from models.layers.members import Generators
from util.batch import DataSpec, Predict
from util.strict import PositiveInt, Strict


class Config(Strict):
    """head 见文件开头，mlp 里的 Dropout 也是 dropout。predict 的差：seq2seq 与解码这一步的输入，其余与最后一帧历史。"""

    variant: Literal["lstm", "bidirectional", "seq2seq"] = "lstm"
    """lstm and bidirectional give all frames at once; seq2seq frame by frame"""
    hidden: PositiveInt = 128
    """width of each direction"""
    layers: PositiveInt = 2
    """layers of LSTM cells"""
    dropout: float = Field(0.2, ge=0, lt=1, validate_default=True)
    """between layers; 0.0 with one layer"""
    head: Literal["linear", "mlp"] = "linear"
    """linear: one layer; mlp: Linear, ReLU, Dropout, Linear"""
    predict: Predict = "state"

    @field_validator("dropout")
    @classmethod
    def _between_layers(cls, dropout: float, info: ValidationInfo) -> float:
        if dropout and info.data.get("layers") == 1:
            raise ValueError("acts between layers, and model.layers = 1; write dropout: 0.0")
        return dropout


class Model(nn.Module):
    """(B, T_in, C, H, W) → (B, T_out, C, H, W)；网格与帧数不限；参数随 F = C·H·W 线性增长。"""

    probabilistic = False
    can_forecast = True
    takes_forcings = True

    def __init__(self, config: Config, spec: DataSpec, first_stage: None = None) -> None:
        super().__init__()
        self.variant, self.frames_out = config.variant, spec.frames_out
        self.tendency = config.predict == "tendency"
        self.directions = 2 if config.variant == "bidirectional" else 1
        self.inputs = Inputs(spec)
        points = spec.height * spec.width
        features = spec.num_channels * points
        self.encoder = self._lstm(config, self.inputs.channels * points)
        if config.variant == "seq2seq":
            self.decoder = self._lstm(config, self.inputs.fields * points)
            self.head = self._head(config, config.hidden, features)
        else:
            self.head = self._head(config, self.directions * config.hidden, spec.frames_out * features)

    def _lstm(self, config: Config, features: int) -> nn.LSTM:
        return nn.LSTM(
            features,
            config.hidden,
            config.layers,
            batch_first=True,
            dropout=config.dropout,
            bidirectional=self.directions == 2,
        )

    def _head(self, config: Config, width: int, outputs: int) -> nn.Module:
        if config.head == "linear":
            return nn.Linear(width, outputs)
        half = width // 2
        return nn.Sequential(nn.Linear(width, half), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(half, outputs))

    def forward(self, history: Tensor, time: Tensor | None = None) -> Tensor:
        _, (h, c) = self.encoder(self.inputs(history, time).flatten(2))  # 各 (layers · directions, B, D)
        last = history[:, -1:]  # (B, 1, C, H, W)
        if self.variant == "seq2seq":
            return self._decode(last, (h, c))
        top = h[-self.directions :].transpose(0, 1).flatten(1)  # (B, directions · D)
        made = self.head(top).unflatten(1, (self.frames_out, *history.shape[2:]))  # (B, T_out, C, H, W)
        return made + self.inputs.base(last) if self.tendency else made  # 写在这里而不调函数：编译在 LSTM 处断开

    def _decode(self, frame: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        """最后一帧 (B, 1, C, H, W) 与编码的 (h, c) → (B, T_out, C, H, W)；外强迫由编码带着，这里只喂回场。"""
        made, grid = [], frame.shape[2:]
        for _ in range(self.frames_out):
            top, state = self.decoder(self.inputs.fed_back(frame).flatten(2), state)  # (B, 1, D)
            new = self.head(top).unflatten(2, grid)  # (B, 1, C, H, W)
            frame = new + self.inputs.base(frame) if self.tendency else new
            made.append(frame)
        return torch.cat(made, 1)

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generators | None = None
    ) -> Tensor:
        """(B, T_in, C, H, W) → (B, 1, T_out, C, H, W)，标准化空间；num_members > 1 是 ValueError。"""
        refuse_members("lstm", num_members)
        return self(history, time)[:, None]
