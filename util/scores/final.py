"""最后一步：统计量的平均 → 成绩。METRICS 是全部成绩，加一项成绩就是在这里加一行。

统计量由 metrics.py 对每一对场给出；一行里有它在表与页面上的名字、单位、哪边为好，和怎样由平均算出来。
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from util.scores.metrics import IMAGE_RANGE

Array = np.ndarray
Unit = Literal["unit", "unit2", "dB", ""]  # 通道的单位、它的平方、分贝、没有
Best = Literal["lower", "higher", "zero", "one", "neutral"]
CSV_UNITS: dict[str, str] = {"unit": "{}", "unit2": "({})2", "dB": "dB", "": "1"}


class Means(NamedTuple):
    """统计量的平均，各 (..., C)，标准化单位；std (C,) 换回物理单位；members 是成员数。"""

    of: Mapping[str, Array]
    std: Array
    members: int


class PowerMean(NamedTuple):
    """成绩 = (统计量的平均) 的 power 次方 × 标准差（scaled）；这样的成绩，相对基线的技巧可以按块重抽。"""

    statistic: str
    power: float
    scaled: bool = True


@dataclass(frozen=True)
class Metric:
    """一项成绩；各栏的次序就是页面的 METRICS 里的次序。

    final: 平均 → (..., C)，物理单位；None：不由统计量来（谱）。members: 0 只看集合平均，否则是至少要几个成员。
    needs: 不总是有的统计量，没有就没有这项成绩（区域里没有 SSIM：它的窗跨过区域的边）。
    asked: 要它的统计量的是 --events；不是每个通道都有数。
    """

    name: str
    english: str
    chinese: str
    unit: Unit
    best: Best
    final: Callable[[Means], Array] | None = None
    members: int = 0
    skill: PowerMean | None = None
    needs: str | None = None
    asked: bool = False


def _root(name: str) -> Callable[[Means], Array]:
    return lambda m: np.sqrt(m.of[name]) * m.std


def _plain(name: str) -> Callable[[Means], Array]:
    return lambda m: m.of[name] * m.std


def _acc(m: Means) -> Array:
    return m.of["anomaly_product"] / np.sqrt(m.of["forecast_anomaly"] * m.of["truth_anomaly"])


def _spread_skill(m: Means) -> Array:
    """离散度与误差之比，含有限成员数的修正 (M+1)/M（Fortin et al. 2014）。"""
    return np.sqrt((m.members + 1) / m.members * m.of["variance"] / m.of["square"])


def _asked(
    name: str, english: str, chinese: str, unit: Unit, final: Callable[[str], Callable[[Means], Array]]
) -> Metric:
    skill = PowerMean(name, 1.0, scaled=unit == "unit")
    return Metric(name, english, chinese, unit, "lower", final(name), skill=skill, needs=name, asked=True)


METRICS = (  # 次序是页面的
    Metric("rmse", "RMSE", "均方根误差 RMSE", "unit", "lower", _root("square"), skill=PowerMean("square", 0.5)),
    Metric("mae", "MAE", "平均绝对误差 MAE", "unit", "lower", _plain("absolute")),
    Metric("bias", "Bias", "平均偏差", "unit", "zero", _plain("error")),
    Metric("acc", "ACC", "距平相关系数 ACC", "", "higher", _acc),
    Metric("crps", "CRPS", "连续分级概率评分 CRPS", "unit", "lower", _plain("crps"), 1, PowerMean("crps", 1.0)),
    Metric("spread", "Spread", "离散度", "unit", "neutral", _root("variance"), 2),
    Metric("spread_skill", "Spread–skill ratio", "离散度–误差比", "", "one", _spread_skill, 2),
    Metric(
        "activity_ratio", "Activity ratio", "活跃度比", "", "one",
        lambda m: np.sqrt(m.of["forecast_activity"] / m.of["truth_activity"]),
    ),
    Metric("log_spectral_distance", "Log-spectral distance", "对数谱距离", "dB", "lower"),
    Metric("ssim", "SSIM", "结构相似性 SSIM", "", "higher", lambda m: m.of["ssim"], needs="ssim"),
    Metric(
        "psnr", "PSNR", "峰值信噪比 PSNR", "dB", "higher",
        lambda m: 10 * np.log10(IMAGE_RANGE**2 / m.of["plain_square"]),
    ),
    Metric(
        "mse_unweighted", "MSE, unweighted", "均方误差（未加权）", "unit2", "lower",
        lambda m: m.of["plain_square"] * m.std**2,
    ),
    Metric("mae_unweighted", "MAE, unweighted", "平均绝对误差（未加权）", "unit", "lower", _plain("plain_absolute")),
    _asked("crps_lower", "CRPS, lower tail", "CRPS，低的一端", "unit", _plain),
    _asked("crps_upper", "CRPS, upper tail", "CRPS，高的一端", "unit", _plain),
    _asked("energy", "Energy score", "能量评分", "unit", _plain),
    _asked("variogram", "Variogram score", "变差函数评分", "unit", _plain),
    _asked("seeps", "SEEPS", "SEEPS（降水）", "", lambda name: lambda m: m.of[name]),
)  # fmt: skip


ASKED = {metric.name for metric in METRICS if metric.asked}


def final_scores(means: Means) -> dict[str, Array]:
    """各成绩 (..., C)，物理单位；不看成员的在前，缺统计量的不在其中。

    均方根、相关、比值都在这里才算，从不平均（Jolliffe & Stephenson 2012, 第 5 章）。
    """
    ordered = sorted(METRICS, key=lambda metric: metric.members > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {m.name: m.final(means) for m in ordered if m.final and _have(m, means)}


def _have(metric: Metric, means: Means) -> bool:
    return means.members >= metric.members and (metric.needs is None or metric.needs in means.of)


def metric_unit(metric: str, unit: str) -> str:
    """一项成绩的单位，unit 是通道的；1 表示没有。brier>阈值 没有单位。"""
    kinds = {m.name: m.unit for m in METRICS}
    return CSV_UNITS[kinds.get(metric, "")].format(unit)
