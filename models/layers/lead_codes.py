"""时效作条件：一次预报走几小时（data.lead_hours 里的哪一个），写成每种一位的码，由网络各自线性地变成调制的向量。"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from util.batch import DataSpec


class LeadCodes(nn.Module):
    """由时刻看出，所以模型与引擎之间不必多一个参数；没有 lead_hours 时总是 None，一个参数也没有。"""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.past = spec.frames_in
        hours = torch.tensor(spec.lead_hours or (), dtype=torch.long)
        self.hours = nn.Buffer(hours, persistent=False) if spec.lead_hours else None

    def forward(self, time: Tensor | None) -> Tensor | None:
        """历史与目标的 UTC 小时 (B, T_in + 1) → (B, n) float32，时效的那一位是 1。

        Raises:
            ValueError: 不知道时刻。
        """
        if self.hours is None:
            return None
        if time is None:
            raise ValueError("data.lead_hours needs the time of the forecast: give --time beside --inputs")
        ahead = time[:, self.past] - time[:, self.past - 1]
        return (ahead[:, None] == self.hours).float()

    def joined(self, time: Tensor | None, noise: Tensor | None) -> Tensor | None:
        """码接上成员的噪声 (B, size)；哪一样没有就只有另一样。"""
        parts = [part for part in (self(time), noise) if part is not None]
        return torch.cat(parts, 1) if parts else None
