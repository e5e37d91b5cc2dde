"""气候态预报：每个格点、每个钟点的多年平均加两个年周期谐波，由训练日期拟合；不足一年时只取每个钟点的平均。

钟点是数据里有的：6 小时的 4 个（一步走 24 小时也是），5 小时的 24 个（各天不同），36 小时的两个，48 小时的一个。
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.layers.losses import refuse_members
from models.layers.members import Generators
from util.batch import Batch, DataSpec
from util.calendar import YEAR_HOURS
from util.strict import Strict

NUM_TERMS = 5  # 1，cos，sin，cos 2，sin 2


class Config(Strict):
    """没有选项。"""


class Model(nn.Module):
    """OnePass：看一遍训练窗口（只用每个窗口的最后一帧，步长 1 时每个时刻恰好一次），解最小二乘。"""

    probabilistic = False
    can_forecast = True
    needs_pass = True

    def __init__(self, config: Config, spec: DataSpec, first_stage: None = None) -> None:
        super().__init__()
        self.spec = spec
        self.clock = math.gcd(24, spec.every_hours)  # 相邻两个钟点隔几小时
        slots = 24 // self.clock
        shape = (slots, spec.num_channels, NUM_TERMS, spec.height, spec.width)
        self.coefficients = nn.Buffer(torch.zeros(shape))
        self.gram = torch.zeros(slots, spec.num_channels, NUM_TERMS, NUM_TERMS, dtype=torch.float64)
        self.moment: Tensor | None = None  # (S, C, F, H, W)，拟合时才分配
        self.first, self.last = math.inf, -math.inf

    def accumulate(self, batch: Batch) -> None:
        """累加正规方程；无效的场不计。"""
        if self.moment is None:
            self.moment = torch.zeros(self.coefficients.shape, dtype=torch.float64)
        hours = batch.time[:, -1].cpu()  # (B,)
        fields, valid = batch.future[:, -1].cpu().double(), batch.valid[:, -1].cpu()  # (B, C, H, W)、(B, C)
        terms, slots = self._terms(hours), self._slots(hours)  # (B, F)、(B,)
        for slot in slots.unique().tolist():
            here = slots == slot
            weight = terms[here, None] * valid[here, :, None]  # (n, C, F)
            self.gram[slot] += torch.einsum("ncf,ng->cfg", weight, terms[here])
            self.moment[slot] += torch.einsum("ncf,nchw->cfhw", weight, fields[here])
        self.first, self.last = min(self.first, float(batch.time.min())), max(self.last, float(hours.max()))

    def solve(self) -> None:
        """解出系数；训练不足一年时谐波与平均分不开，只解平均。"""
        assert self.moment is not None, "solve() before any accumulate()"
        used = NUM_TERMS if self.last - self.first + self.spec.interval_hours >= 365 * 24 else 1
        inverse = torch.linalg.pinv(self.gram[:, :, :used, :used], hermitian=True)
        solution = torch.einsum("scfg,scghw->scfhw", inverse, self.moment[:, :, :used])
        self.coefficients.zero_()
        self.coefficients[:, :, :used] = solution.to(self.coefficients)
        self.moment = None

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generators | None = None
    ) -> Tensor:
        """→ (B, 1, T_out, C, H, W)；只看时刻，不看历史。

        Raises:
            ValueError: num_members > 1；不知道时刻。
        """
        refuse_members("climatology", num_members)
        if time is None:
            raise ValueError("climatology needs the time of the forecast: give --time beside --inputs")
        hours = time[:, -self.spec.frames_out :].flatten()  # (B·T_out,)
        terms = self._terms(hours).to(self.coefficients)
        fields = torch.einsum("nf,ncfhw->nchw", terms, self.coefficients[self._slots(hours)])
        return fields.unflatten(0, (len(time), 1, self.spec.frames_out)).to(history.dtype)

    def _slots(self, hours: Tensor) -> Tensor:
        return hours % 24 // self.clock

    def _terms(self, hours: Tensor) -> Tensor:
        """(N,) → (N, F) float64。"""
        angle = hours.double() * (2 * math.pi / YEAR_HOURS)
        return torch.stack([angle * 0 + 1, angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin()], dim=-1)
