"""VAR 的条件：类别（一年里的月份，或原版的一千类），或过去的场。训练时随机丢掉，采样时就有了无条件的一支。

丢掉的历史只剩学来的底（base）与位置编码，不另设空的向量：有条件时它们也在，梯度因此总不缺。

字母：N 样本数，n 历史帧数，c×h×w 一帧的潜变量，P = h·w，D 宽度；C×H×W 一帧的场。
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from models.layers.multiscale import Scales, shrink
from models.layers.padding import PaddedConv2d, Padding
from models.layers.var_blocks import Condition

MONTHS = 12
TABLES = {"start_position", "position", "level", "base"}  # 加进去的编码：二维也不是矩阵，权重不衰减


class LabelCondition(nn.Module):
    """类别的嵌入既是尺度 1 的输入，也调制各层；末一行是没有类别。"""

    def __init__(self, num_labels: int, dim: int) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.table = nn.Embedding(num_labels + 1, dim)

    def forward(self, given: Tensor, keep: Tensor) -> Condition:
        """given (N,) int64 的类别；keep (N,) 为假的丢掉。"""
        vector = self.table(torch.where(keep, given, self.num_labels))
        return Condition(vector, vector)


class HistoryCondition(nn.Module):
    """过去各帧的潜变量（或 patches_of）叠进通道，四条路各有开关：

    * context：一个位置一个 token，排在最前，各尺度总看得见；
    * adaln、start：各位置过一层再平均成一个向量，调制各层，作尺度 1 的输入；
    * local：3 × 3 的邻域过一层，面积平均到各尺度，加到那里的输入上：哪个 token 对着哪里不必由注意力从头学。

    叠进通道而不是一帧一组 token：代价与帧数无关，同一位置的变化进同一个 token。

    Args:
        padding: 邻域的边界，与阶段一的相同。
    """

    def __init__(
        self,
        frames: int,
        frame_shape: tuple[int, int, int],
        scales: Scales,
        dim: int,
        context: bool,
        adaln: bool,
        start: bool,
        local: bool,
        padding: Padding = "zeros",
    ) -> None:
        super().__init__()
        channels, height, width = frame_shape
        self.scales, self.adaln, self.start = scales, adaln, start
        self.base = nn.Parameter(torch.randn(dim) * math.sqrt(1 / (3 * dim)))
        self.embed = nn.Linear(frames * channels, dim) if context else None
        self.position = nn.Parameter(torch.empty(height * width, dim)) if context else None
        self.features = nn.Sequential(nn.Linear(frames * channels, dim), nn.GELU()) if adaln or start else None
        self.pool = nn.Linear(dim, dim, bias=False) if adaln or start else None
        around = PaddedConv2d(frames * channels, dim, 3, padding)
        self.around = nn.Sequential(around, nn.GELU()) if local else None
        self.local = nn.Linear(dim, dim, bias=False) if local else None

    def forward(self, given: Tensor, keep: Tensor) -> Condition:
        """given (N, n, c, h, w)；keep (N,) 为假的丢掉。"""
        kept = keep.to(given.dtype)[:, None]  # (N, 1)
        places = given.flatten(1, 2).flatten(2).mT  # (N, P, n·c)
        base = self.base.expand(len(given), -1)
        vector, context, local = base, None, None
        if self.features is not None and self.pool is not None:
            vector = base + kept * self.pool(self.features(places).mean(1))
        if self.embed is not None and self.position is not None:
            context = kept[..., None] * self.embed(places) + self.position
        if self.around is not None and self.local is not None:
            around = self.around(given.flatten(1, 2))  # (N, D, h, w)
            parts = [shrink(around, scale).flatten(2).mT for scale in self.scales]
            local = kept[..., None] * self.local(torch.cat(parts, 1))  # (N, L, D)
        return Condition(vector if self.start else base, vector if self.adaln else base, context, local)


def patches_of(frames: Tensor, scaling: nn.Module, height: int, width: int) -> Tensor:
    """(N, n, C, H, W) 标准化的场 → (N, n, C·H·W / (height·width), height, width)：相邻两帧之差与最后一帧，切成块。

    阶段一只编码差，给不出场的潜变量，所以条件直接取自格点。先作差：差比场小得多，叠着的场里看不见。

    Args:
        scaling: 差的标准化。
    """
    seen = torch.cat([scaling(frames.diff(dim=1)), frames[:, -1:]], 1)
    return rearrange(seen, "b n c (h p) (w q) -> b n (c p q) h w", h=height, w=width)


def month_of(hours: Tensor) -> Tensor:
    """1970 年以来的 UTC 小时（int64）→ 月份 0…11，公历。

    年从三月一日数起，闰日就在年末；400 年一个周期，146097 天。
    """
    days = hours // 24 + 719_468  # 从公元 0 年 3 月 1 日数起
    in_era = days % 146_097
    year = (in_era - in_era // 1460 + in_era // 36_524 - in_era // 146_096) // 365
    in_year = in_era - (365 * year + year // 4 - year // 100)
    return ((5 * in_year + 2) // 153 + 2) % MONTHS  # 三月起每 5 个月 153 天
