"""训练走到哪里、用去多少：训练写它，检查点带着它，评测从检查点里读它。"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """循环走到哪里；batches 是本轮已用掉的全局批数，loss_sum / loss_count 是本轮训练损失的累计。

    persistence、climatology 是两个基线的验证损失，比不得的模型没有，没有存着的拟合的气候态也没有；
    changes 是各通道一步的变化的标准差，balance 是存档时各通道的距离的滑动平均，目标的权重要它们时才有。
    skipped 是跳过了几步不是有限值的。
    seconds、samples 是训练循环（含等数据，不含验证）用去的时间与窗口数，peak_memory 是峰值内存（字节），续训时累计。
    """

    epoch: int = 0
    step: int = 0
    batches: int = 0
    best: float | None = None
    best_step: int = -1
    persistence: float | None = None
    climatology: float | None = None
    changes: list[float] | None = None
    balance: list[float] | None = None
    stale: int = 0
    skipped: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    seconds: float = 0.0
    samples: int = 0
    peak_memory: int = 0
    device: str = ""
