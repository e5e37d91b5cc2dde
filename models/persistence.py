"""持续性预报：最后看到的一帧就是预报。一切模型都要拿来比的基线，也是写新模型的样板。"""

from __future__ import annotations

from torch import Tensor, nn

from models.layers.losses import refuse_members
from models.layers.members import Generators
from util.batch import DataSpec
from util.strict import Strict


class Config(Strict):
    """没有选项。"""


class Model(nn.Module):
    """没有参数；loss 只是预报的均方误差。"""

    probabilistic = False
    can_forecast = True

    def __init__(self, config: Config, spec: DataSpec, first_stage: None = None) -> None:
        super().__init__()
        self.frames_out = spec.frames_out

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generators | None = None
    ) -> Tensor:
        """(B, T_in, C, H, W) → (B, 1, T_out, C, H, W)；num_members > 1 是 ValueError。"""
        refuse_members("persistence", num_members)
        return history[:, None, -1:].expand(-1, -1, self.frames_out, -1, -1, -1)
