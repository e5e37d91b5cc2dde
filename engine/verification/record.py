"""metrics.json 的 events 一节写成什么样；不引入 torch，读它的命令才轻。"""

from __future__ import annotations

from dataclasses import dataclass

from util.scores.table import Numbers

Scores = dict[str, dict[str, dict[str, dict[str, Numbers]]]]


@dataclass(frozen=True)
class EventScores:
    """metrics.json 的 events：L 个数一列，一个时效一个；没有定义的是 null。

    training_times: 气候（分位数、干湿）看了几个训练时刻。
    scores: 模型 → 通道 → 事件（>q0.98 是高于距平的 98 % 分位数，>273.15 是 --thresholds）→ 成绩。
    error_exceedance: 模型 → 通道 → 误差（物理单位）→ 面积的份额。
    effective_wavenumber: zonal、spherical → 模型 → 通道 → 功率头一次低于真值一半的波数。
    drift: 模型与 truth → 通道 → mean、variance；kinetic_energy: 模型与 truth → 一对风 → ½⟨u² + v²⟩。
    hours_to_climatology、hours_to_useful 见 result.py 的 lost。
    """

    training_times: int
    scores: Scores
    error_exceedance: dict[str, dict[str, dict[str, Numbers]]]
    effective_wavenumber: dict[str, dict[str, dict[str, list[int | None]]]]
    drift: dict[str, dict[str, dict[str, Numbers]]]
    kinetic_energy: dict[str, dict[str, Numbers]]
    hours_to_climatology: dict[str, dict[str, int | None]]  # RMSE 头一次不小于气候态的时效
    hours_to_useful: dict[str, dict[str, int | None]]  # ACC 头一次低于 0.6 的时效
