"""成绩表的样子：tabulate.py 造，metrics.json、comparison.json 与两个 CSV 写的就是它。"""

from __future__ import annotations

from dataclasses import dataclass

Numbers = list[float | None]  # 每个时效一个数；None 是没有定义的（没有有效的场、零除以零）
WHOLE = "all"  # 整个网格、全部时间


@dataclass(frozen=True)
class Skill:
    """相对一个基线的技巧 1 − 模型/基线 与差 模型 − 基线（物理单位），各 L 个；起报时间太少时没有区间。"""

    value: Numbers
    difference: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    difference_low: Numbers | None = None
    difference_high: Numbers | None = None


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """各模型在共同的场上的成绩，物理单位；L 个时效，C 个通道，键的次序就是表的次序。

    scores: 模型 → 通道 → 成绩的名字（METRICS 与 brier>阈值）→ L 个数。
    skill: 被评的模型 → 基线 → 通道 → rmse、crps、--events 的各项。
    mean_rmse_ratio: 基线 → 被评的模型 → L 个各通道 RMSE 之比的平均。
    pairs、left_out: 通道 → 每个时效计了、没有计多少场。
    """

    channels: list[str]
    units: dict[str, str]
    lead_hours: list[int]
    initial_times: int
    bootstrap_blocks: int
    pairs: dict[str, list[int]]
    left_out: dict[str, list[int]]
    scores: dict[str, dict[str, dict[str, Numbers]]]
    skill: dict[str, dict[str, dict[str, dict[str, Skill]]]]
    mean_rmse_ratio: dict[str, dict[str, Numbers]]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """一个区域、一段时间（季、月、钟点，按有效时间）里的成绩；各栏的意思、通道与时效同 ScoreTable。"""

    region: str
    period: str
    bootstrap_blocks: int
    pairs: dict[str, list[int]]
    scores: dict[str, dict[str, dict[str, Numbers]]]
    skill: dict[str, dict[str, dict[str, dict[str, Skill]]]]
    mean_rmse_ratio: dict[str, dict[str, Numbers]]
