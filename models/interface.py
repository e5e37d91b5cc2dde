"""模型与引擎之间的约定，只有 Protocol：不给实现，也就不会积攒代码。"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Generator, Tensor

from util.batch import Batch


@runtime_checkable
class ForecastModel(Protocol):
    """预报模型。文件里与 `Model(config, spec, first_stage=None)` 并列一个严格的 `Config`。

    做不到的事（AR_pred 只能 T_out = 1、网格不能整除）在构造函数里以 ValueError 说明。
    """

    probabilistic: bool
    can_forecast: bool  # 这一配置能不能预报；AR_pred 的区块不是一帧时只能训练重建

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """训练目标：键 `loss` 参与求导，其余只记录；随机数取自全局发生器。"""
        ...

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generator | None = None
    ) -> Tensor:
        """(B, T_in, C, H, W) 标准化的历史 → (B, M, T_out, C, H, W)。

        time: (B, T_in + T_out) int64 UTC 小时；只给了输入文件而不知时刻时为 None。

        Raises:
            ValueError: 确定性模型要求 num_members > 1（集合预报用引擎的 --perturb）；需要时刻而没有。
        """
        ...


@runtime_checkable
class OnePass(Protocol):
    """先把训练数据看一遍的模型（气候态、岭回归、像素 U-Net 的极值）：在任何梯度步之前求解，续训时不再看。"""

    needs_pass: bool  # 这一配置要不要看；像素 U-Net 不缩放时不必

    def accumulate(self, batch: Batch) -> None:
        """收下一批步长为 1 的训练窗口。"""
        ...

    def solve(self) -> None:
        """看完之后求解，结果存为 buffer。"""
        ...
