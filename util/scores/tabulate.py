"""从 statistics.nc 到成绩：可平均的统计量先在共同的（起报时间，时效，通道）上平均，最后才开方、相除。

不确定性用按日期分块的自助法（Künsch 1989）：把起报时间分成一周一块，整块地重抽，块内的天气相关不被打散；
两个模型用同一组重抽，差值的区间才不被共同的天气放大。
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from util.atomic import replacing
from util.scores.bootstrap import Blocks, block_sums, skill
from util.scores.common import Array, Common, Contender, common_pairs, unit_of
from util.scores.metrics import IMAGE_RANGE


def final_scores(means: Mapping[str, Array], std: Array, members: int) -> dict[str, Array]:
    """统计量的平均 (..., C)（标准化单位）→ 成绩（物理单位）。

    均方根、相关、比值都在这里才算，从不平均（Jolliffe & Stephenson 2012, 第 5 章）；
    离散度与误差之比含有限成员数的修正 (M+1)/M（Fortin et al. 2014）。
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = {
            "rmse": np.sqrt(means["square"]) * std,
            "mae": means["absolute"] * std,
            "bias": means["error"] * std,
            "acc": means["anomaly_product"] / np.sqrt(means["forecast_anomaly"] * means["truth_anomaly"]),
            "activity_ratio": np.sqrt(means["forecast_activity"] / means["truth_activity"]),
            "ssim": means["ssim"],
            "psnr": 10 * np.log10(IMAGE_RANGE**2 / means["plain_square"]),
            "mse_unweighted": means["plain_square"] * std**2,
            "mae_unweighted": means["plain_absolute"] * std,
            "crps": means["crps"] * std,
        }
        if members > 1:
            scores["spread"] = np.sqrt(means["variance"]) * std
            scores["spread_skill"] = np.sqrt((members + 1) / members * means["variance"] / means["square"])
    return scores


def tabulate(sources: Sequence[Contender], baselines: Sequence[str], references: Sequence[str] = ()) -> dict[str, Any]:
    """各模型在共同的场上的成绩、相对各基线的技巧、场数：普通值，NaN 写成 None。

    Args:
        baselines: 作为基线的 label。
        references: 除基线外还要与哪些模型作差（几个运行比较时的第一个），区间同样是成对重抽的。
    """
    common = common_pairs(sources)
    blocks = {s.label: block_sums(s, common) for s in sources}
    counts = common.keep.sum(0)  # (L, C)
    scores = {s.label: _score_one(s, common, blocks[s.label]) for s in sources}
    table: dict[str, Any] = {
        "channels": common.channels,
        "units": {c: unit_of(sources[0].file, c) for c in common.channels},
        "lead_hours": common.leads,
        "initial_times": len(common.hours),
        "bootstrap_blocks": len(next(iter(blocks.values())).counts),
        "pairs": {c: counts[:, i].tolist() for i, c in enumerate(common.channels)},
        "left_out": {c: (len(common.hours) - counts[:, i]).tolist() for i, c in enumerate(common.channels)},
        "scores": scores,
        "skill": {},
        "mean_rmse_ratio": {},
    }
    for label in scores:
        if label in baselines:
            continue
        others = [base for base in (*baselines, *references) if base in blocks and base != label]
        table["skill"][label] = {base: _skill_one(blocks[label], blocks[base], common) for base in others}
    for base in (b for b in baselines if b in scores):
        others = [label for label in scores if label not in baselines]
        table["mean_rmse_ratio"][base] = {label: _mean_ratio(scores[label], scores[base]) for label in others}
    return table


def _score_one(source: Contender, common: Common, blocks: Blocks) -> dict[str, dict[str, list[float | None]]]:
    """通道 → 成绩 → 每个时效一个数。"""
    with np.errstate(invalid="ignore"):
        counts = blocks.counts.sum(0)
        means = {name: total.sum(0) / counts for name, total in blocks.sums.items()}  # (L, C)
    scores = final_scores(means, blocks.std, source.members)
    result: dict[str, dict[str, list[float | None]]] = {c: {} for c in common.channels}
    for i, channel in enumerate(common.channels):
        result[channel] = {name: plain(values[:, i]) for name, values in scores.items()}
        for k, threshold in enumerate(source.file.threshold[source.file.channels.index(channel)]):
            if math.isfinite(threshold):
                result[channel][f"brier>{threshold:.12g}"] = plain(means[f"brier_{k}"][:, i])
    return result


def _skill_one(model: Blocks, base: Blocks, common: Common) -> dict[str, Any]:
    found = {"rmse": skill(model, base, "square", 0.5), "crps": skill(model, base, "crps", 1.0)}
    return {
        channel: {m: {key: plain(values[:, i]) for key, values in one.items()} for m, one in found.items()}
        for i, channel in enumerate(common.channels)
    }


def _mean_ratio(model: Mapping[str, Any], base: Mapping[str, Any]) -> list[float | None]:
    """各通道 RMSE 之比的平均，每个时效一个数。"""
    pairs = [np.array([model[c]["rmse"], base[c]["rmse"]], dtype=float) for c in model]  # None → NaN
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.array([one / two for one, two in pairs])  # (C, L)
    good = np.isfinite(ratios)
    return plain(np.where(good, ratios, 0).sum(0) / np.where(good.any(0), good.sum(0), np.nan))


def plain(values: Array) -> list[float | None]:
    """JSON 里没有 NaN 与无穷，写 null。"""
    return [float(v) if math.isfinite(v) else None for v in values]


UNITLESS = ("acc", "activity_ratio", "ssim", "spread_skill")


def write_csv(path: Path, table: Mapping[str, Any]) -> None:
    """整齐的长表：每行一个数，model,channel,lead_hours,metric,value,low,high,unit。"""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "channel", "lead_hours", "metric", "value", "low", "high", "unit"])
        for row in _rows(table):
            writer.writerow(["" if value is None else value for value in row])


def _rows(table: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    leads = table["lead_hours"]
    for model, channels in table["scores"].items():
        for channel, metrics in channels.items():
            for metric, values in metrics.items():
                unit = metric_unit(metric, table["units"][channel])
                for lead, value in zip(leads, values, strict=True):
                    yield model, channel, lead, metric, value, None, None, unit
    for model, bases in table["skill"].items():
        for base, channels in bases.items():
            for channel, metrics in channels.items():
                for metric, found in metrics.items():
                    for key, kind, unit in (("", "skill", "1"), ("difference_", "difference", table["units"][channel])):
                        value = found["value" if not key else "difference"]
                        empty = [None] * len(leads)
                        low, high = found.get(f"{key}low", empty), found.get(f"{key}high", empty)
                        for row in zip(leads, value, low, high, strict=True):
                            yield model, channel, row[0], f"{metric}_{kind}_vs_{base}", *row[1:], unit


def metric_unit(metric: str, unit: str) -> str:
    """一项成绩的单位；1 表示没有。"""
    if metric in UNITLESS or metric.startswith("brier"):
        return "1"
    if metric in ("psnr", "log_spectral_distance"):
        return "dB"
    return f"({unit})2" if metric == "mse_unweighted" else unit
