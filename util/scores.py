"""从 statistics.nc 到成绩：可平均的统计量先在共同的（起报时间，时效，通道）上平均，最后才开方、相除。

不确定性用按日期分块的自助法（Künsch 1989）：把起报时间分成一周一块，整块地重抽，块内的天气相关不被打散；
两个模型用同一组重抽，差值的区间才不被共同的天气放大。
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from util.atomic import replacing
from util.metrics import IMAGE_RANGE
from util.statistics import Statistics

BLOCK_HOURS = 7 * 24
RESAMPLES = 1000
FEWEST_BLOCKS = 20  # 再少，百分位自助法的「95 %」实际盖不到九成
READ_BYTES = 2**25
Array = np.ndarray


class Source(NamedTuple):
    """一个参加比较的模型：表上的名字、统计量所在的文件、文件里的名字。"""

    label: str
    file: Statistics
    model: str

    @property
    def members(self) -> int:
        return int(self.file.attributes["members"]) if self.model == self.file.attributes["model"] else 1


class Common(NamedTuple):
    """大家都有的部分：起报时间 (T,)、时效 (L,)、通道 (C,)，和哪些场人人有效 (T, L, C) bool。"""

    hours: Array
    leads: list[int]
    channels: list[str]
    keep: Array


class Blocks(NamedTuple):
    """一个模型每块的统计量之和 (N, L, C)、场数 (N, L, C)，和换回物理单位的标准差 (C,)。"""

    sums: dict[str, Array]
    counts: Array
    std: Array


def common_pairs(sources: Sequence[Source]) -> Common:
    """各文件的起报时间、时效、通道的交集，以及其中人人都有有效场的部分。

    Raises:
        ValueError: 网格或单位不同，或没有共同的部分。
    """
    files = list({id(s.file): s.file for s in sources}.values())
    first = files[0]
    for other in files[1:]:
        for axis in ("latitudes", "longitudes"):
            if not np.array_equal(getattr(first, axis), getattr(other, axis)):
                one, two = (_axis_text(getattr(f, axis)) for f in (first, other))
                raise ValueError(f"{first.path} has {axis} {one}, {other.path} {two}: scores do not compare")
    hours = first.hours
    leads, channels = first.leads.tolist(), first.channels
    for other in files[1:]:
        hours = np.intersect1d(hours, other.hours)
        leads = [lead for lead in leads if lead in set(other.leads.tolist())]
        channels = [c for c in channels if c in other.channels and _unit(first, c) == _unit(other, c)]
    for what, values in (("initial time", hours), ("lead time", leads), ("channel with the same unit", channels)):
        if not len(values):
            raise ValueError(
                f"no common {what} among {', '.join(str(f.path) for f in files)}; "
                "evaluate.py with the same --split, --steps and --stride 1 makes them comparable"
            )
    keep = np.ones((len(hours), len(leads), len(channels)), dtype=bool)
    common = Common(hours, leads, channels, keep)
    for source in sources:
        for place, values in _read(source, "square", common):
            keep[place] &= np.isfinite(values)
    if not keep.any():
        raise ValueError(f"no field is valid in all of {', '.join(str(f.path) for f in files)}: nothing to compare")
    return common


def _axis_text(values: Array) -> str:
    return f"{values[0]:g} to {values[-1]:g} ({len(values)})"


def _unit(file: Statistics, channel: str) -> str:
    return file.units[file.channels.index(channel)]


def _read(source: Source, name: str, common: Common) -> Iterator[tuple[Array, Array]]:
    """依次给出（共同时间里的位置，(n, L, C) 的值）；每次只读一段。"""
    file = source.file
    leads = [file.leads.tolist().index(lead) for lead in common.leads]
    channels = [file.channels.index(c) for c in common.channels]
    step = max(1, READ_BYTES // (8 * len(file.leads) * len(file.channels)))
    wanted = np.isin(file.hours, common.hours)
    for start in range(0, len(file.hours), step):
        rows = np.flatnonzero(wanted[start : start + step])
        if rows.size:
            values = file.read(name, source.model, slice(start, start + step))[rows][:, leads][:, :, channels]
            yield np.searchsorted(common.hours, file.hours[start + rows]), values


def block_sums(source: Source, common: Common, names: Sequence[str] | None = None) -> Blocks:
    """各统计量（names，默认全部）按块求和；这个模型没有的统计量（全是 NaN）不在其中。"""
    ids = np.unique((common.hours - common.hours[0]) // BLOCK_HOURS, return_inverse=True)[1]
    shape = (int(ids.max()) + 1, *common.keep.shape[1:])
    counts = np.zeros(shape)
    np.add.at(counts, ids, common.keep)
    sums = {}
    for name in names or source.file.names:
        total, present = np.zeros(shape), False
        for place, values in _read(source, name, common):
            keep = common.keep[place]
            present |= bool(np.isfinite(values[keep]).any())
            np.add.at(total, ids[place], np.where(keep, values, 0.0))
        if present:
            sums[name] = total
    std = source.file.std[[source.file.channels.index(c) for c in common.channels]]
    return Blocks(sums, counts, std)


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


def skill(model: Blocks, base: Blocks, name: str, power: float) -> dict[str, Array]:
    """相对 base 的技巧 1 − 模型/base 与差值 模型 − base（物理单位），各带 95 % 区间，都是 (L, C)。

    Args:
        name, power: 成绩 = (统计量的平均) 的 power 次方：RMSE 为 ("square", 0.5)。
    """

    def final(weights: Array, blocks: Blocks) -> Array:
        sums, counts = (np.tensordot(weights, a, axes=1) for a in (blocks.sums[name], blocks.counts))
        return (sums / counts) ** power * blocks.std

    number = len(model.counts)
    ones, draws = np.ones(number), np.random.default_rng(0).multinomial(number, [1 / number] * number, RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        one, two = final(ones, model), final(ones, base)
        result = {"value": 1 - one / two, "difference": one - two}
        if number >= FEWEST_BLOCKS:
            many, other = final(draws, model), final(draws, base)  # (R, L, C)
            for key, samples in (("", 1 - many / other), ("difference_", many - other)):
                result[f"{key}low"], result[f"{key}high"] = np.percentile(samples, [2.5, 97.5], axis=0)
    return result


def tabulate(sources: Sequence[Source], baselines: Sequence[str], references: Sequence[str] = ()) -> dict[str, Any]:
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
        "units": {c: _unit(sources[0].file, c) for c in common.channels},
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


def _score_one(source: Source, common: Common, blocks: Blocks) -> dict[str, dict[str, list[float | None]]]:
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
