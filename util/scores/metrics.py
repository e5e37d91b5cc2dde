"""指标：可平均的统计量加最后一步的函数；均方根只在全部误差平均之后开方。

这里的函数对（起报时间，时效，通道）逐对给出可平均的统计量，最后一步在 final.py。
场一律是标准化的 float32，结果是 float64；CPU 与 CUDA 都能算，各参数须在同一设备上。
NaN 不藏：一对场里有 NaN，用到它的统计量就是 NaN。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from util.scores.regional import Cells, in_regions, truth_in_regions

IMAGE_RANGE = 6.0  # SSIM、PSNR 把 z 看成图像 z / 6 + 1/2：±3 个标准差是 [0, 1]
WINDOW, K1, K2 = 7, 0.01, 0.03  # SSIM 的窗边长与两个稳定常数
PIECE = 2**16  # 一个线程一次算这么多个格点：双精度的中间结果留在处理器的缓存里，内存也不随批量增长
DEVICE_PIECES = 128  # 显卡上一次算这么多段：那里怕的是核太碎


def area_mean(fields: Tensor, weights: Tensor) -> Tensor:
    """(..., H, W)、(H,) → (...) float64：加权的区域平均；用双精度求和，但不把整批场复制成双精度。"""
    width = fields.shape[-1]
    sums = in_pieces(lambda rows: rows.sum(-1, dtype=torch.float64), fields.reshape(-1, width))
    return _mean(sums.view(fields.shape[:-1]), weights, width)


def pair_statistics(
    forecasts: Mapping[str, Tensor],
    truth: Tensor,
    normal: Tensor,
    weights: Tensor,
    thresholds: Tensor,
    *,
    cells: Cells | None = None,
) -> dict[str, dict[str, Tensor]]:
    """各模型一批预报的可平均统计量，每个 (B, C) float64，标准化单位；误差、SSIM、距平相关都取集合平均。
    有 cells 时还有各区域的：名字接 BY_REGION，(B, C, R)；SSIM 的窗跨过区域的边，没有。

    一段一段地算，各模型在同一段上挨着算：只与真值有关的一半（Target）一段只算一次。

    forecasts: 名字 → (B, M, C, H, W)；truth: (B, C, H, W)；normal: (B, C, H, W)，有效时刻的气候态；
    weights: (H,)；thresholds: (C, K) 标准化的阈值，没有的填 NaN，K 可以是 0。

    square、absolute、error：e²、|e|、e 的加权平均；plain_square、plain_absolute：不加权；ssim；
    forecast_anomaly、truth_anomaly、anomaly_product：距平（减气候态）的平方与乘积的平均；
    forecast_activity、truth_activity：距平绕自己区域平均的加权方差，预报的是各成员的平均；
    crps：公平的 CRPS，M = 1 时即 absolute；variance：成员的无偏方差，只在 M > 1 时有；
    brier_k：第 k 个阈值的 (p − o)²，阈值为 NaN 的通道是 NaN。
    """
    found: dict[str, dict[str, Tensor]] = {name: {} for name in forecasts}
    for windows, channels in blocks(truth):
        target = make_target(truth[windows, channels], normal[windows, channels], weights, cells)
        for name, forecast in forecasts.items():
            block = _one_forecast(forecast[windows, :, channels], target, weights, thresholds[channels], cells)
            for key, values in block.items():
                shape = (*truth.shape[:2], *values.shape[2:])
                found[name].setdefault(key, values.new_empty(shape))[windows, channels] = values
    return found


def blocks(fields: Tensor) -> Iterator[tuple[slice, slice]]:
    """(B, C, H, W) 切成段：几个窗口的全部通道，放不下时一个窗口的几个通道，至少一个场。"""
    (windows, channels, *_), cells = fields.shape, fields[0, 0].numel()
    some = min(channels, max(1, _piece(fields) // cells))
    many = max(1, _piece(fields) // (cells * channels))
    for b in range(0, windows, many):
        for c in range(0, channels, some):
            yield slice(b, b + many), slice(c, c + some)


class Windows(NamedTuple):
    """SSIM 用到的，双精度：values (..., H, W) 是图像；整个落在图内的各窗的平均、平均的平方、方差 (..., h, w)。"""

    values: Tensor
    mean: Tensor
    square: Tensor
    variance: Tensor


class Target(NamedTuple):
    """一对场里只与真值有关的：truth、normal (B, C, H, W)，距平（双精度），窗，truth_anomaly、truth_activity。"""

    truth: Tensor
    normal: Tensor
    anomaly: Tensor
    windows: Windows
    statistics: dict[str, Tensor]


def make_target(truth: Tensor, normal: Tensor, weights: Tensor, cells: Cells | None = None) -> Target:
    """参数见 pair_statistics，是其中的一段。"""
    anomaly = (truth - normal).double()
    square = _mean(anomaly.square().sum(-1), weights, truth.shape[-1])
    about = {"truth_anomaly": square, "truth_activity": activity(anomaly, weights)}
    about |= truth_in_regions(anomaly, cells) if cells else {}
    return Target(truth, normal, anomaly, similarity_windows(truth), about)


def _one_forecast(
    forecast: Tensor, target: Target, weights: Tensor, thresholds: Tensor, cells: Cells | None
) -> dict[str, Tensor]:
    """一个模型的统计量；参数与键见 pair_statistics。"""
    truth, members = target.truth, forecast.shape[1]
    mean = add_members(forecast) / members
    statistics = errors(mean, truth, weights) | target.statistics | anomalies(forecast, mean, target, weights)
    statistics["ssim"] = structural_similarity(similarity_windows(mean), target.windows)
    points = dict(point_fields(forecast, mean, truth, thresholds))
    if members == 1:
        statistics["crps"] = statistics["absolute"]
    statistics |= {key: area_mean(field, weights) for key, field in points.items()}
    if cells:
        statistics |= in_regions(forecast, mean, truth, target.normal, points, cells)
    return statistics


def point_fields(forecast: Tensor, mean: Tensor, truth: Tensor, thresholds: Tensor) -> Iterator[tuple[str, Tensor]]:
    """逐格点的 (B, C, H, W)，整个网格与各区域都取它们的面积平均；键见 pair_statistics。"""
    members = forecast.shape[1]
    if members > 1:
        squares = add_members(forecast, lambda member: (member - mean).square())
        yield "variance", squares / (members - 1)
        yield "crps", fair_crps(forecast, truth)
    broken = (mean - truth).isnan()
    for k, threshold in enumerate(thresholds.to(truth)[..., None, None].unbind(1)):  # (C, 1, 1)
        yield f"brier_{k}", brier(forecast, truth, threshold).masked_fill(broken | threshold.isnan(), torch.nan)


def errors(mean: Tensor, truth: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """误差的加权与不加权平均；参数与键见 pair_statistics。"""
    error = (mean - truth).double()
    rows = {"square": error.square().sum(-1), "absolute": error.abs().sum(-1)}  # 各行的和 (..., H)
    plain = {f"plain_{name}": sums for name, sums in rows.items()}
    width = mean.shape[-1]
    return _means(rows | {"error": error.sum(-1)}, weights, width) | _means(plain, torch.ones_like(weights), width)


def anomalies(forecast: Tensor, mean: Tensor, target: Target, weights: Tensor) -> dict[str, Tensor]:
    """距平相关系数与活动度里与预报有关的各部分。活动度逐个成员算，因为集合平均本来就该平滑。"""
    anomaly = (mean - target.normal).double()
    rows = {
        "forecast_anomaly": anomaly.square().sum(-1),
        "anomaly_product": (anomaly * target.anomaly).sum(-1),
    }
    activities = add_members(forecast, lambda member: activity((member - target.normal).double(), weights))
    return _means(rows, weights, mean.shape[-1]) | {"forecast_activity": activities / forecast.shape[1]}


def activity(anomaly: Tensor, weights: Tensor) -> Tensor:
    """区域方差先减平均再平方：两个大数相减会给出负的方差。平均取到单精度，处处相同的场才恰好是零。"""
    centre = _mean(anomaly.sum(-1), weights, anomaly.shape[-1]).float()
    return _mean((anomaly - centre[..., None, None]).square().sum(-1), weights, anomaly.shape[-1])


def _means(rows: Mapping[str, Tensor], weights: Tensor, width: int) -> dict[str, Tensor]:
    """几样各行的和 (..., H) → 各自的加权平均；合在一起算。"""
    return dict(zip(rows, _mean(torch.stack([*rows.values()]), weights, width).unbind(), strict=True))


def _mean(rows: Tensor, weights: Tensor, width: int) -> Tensor:
    """各行的和 (..., H) → 加权的区域平均 (...)。"""
    return (rows * (weights / (weights.sum() * width))).sum(-1)


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """(..., H, W) 两批 → (...) 平均 SSIM。"""
    return structural_similarity(similarity_windows(x), similarity_windows(y))


def similarity_windows(fields: Tensor) -> Windows:
    """(..., H, W) → 图像与各窗的平均、方差；方差是两个大数之差，所以用双精度。"""
    values = fields.double() / IMAGE_RANGE + 0.5
    mean = window_mean(values)
    square = mean * mean
    return Windows(values, mean, square, window_mean(values * values) - square)


def structural_similarity(x: Windows, y: Windows) -> Tensor:
    """两批场的窗 → (...) 平均 SSIM（Wang et al. 2004, 式 13；均匀窗、样本协方差，同 scikit-image 的默认）。

    只平均整个落在图内的窗；不足 7 格的边取放得下的最大奇数。
    """
    cells = math.prod(map(_side, x.values.shape[-2:]))
    unbiased = cells / max(cells - 1, 1)  # 只有一格的窗没有方差：只剩亮度一项
    product = x.mean * y.mean
    covariance = (window_mean(x.values * y.values) - product).mul_(2 * unbiased)
    variance = (x.variance + y.variance).mul_(unbiased)
    likeness = product.mul_(2).add_(K1**2).mul_(covariance.add_(K2**2))
    return (likeness / (x.square + y.square).add_(K1**2).mul_(variance.add_(K2**2))).mean((-2, -1))


def window_mean(fields: Tensor) -> Tensor:
    """(..., H, W) → (..., h, w)：整个落在图内的各窗的平均，先沿纬度、再沿经度求和。

    摊成一行来加：平移一格是 1，平移一行是 W，都是连续的内存；跨过边界的和没有意义，最后只取窗内的。
    """
    *some, height, width = fields.shape
    sides = _side(height), _side(width)
    sums = window_sum(window_sum(fields.flatten(), sides[0], width), sides[1], 1)
    shape = (math.prod(some), height - sides[0] + 1, width - sides[1] + 1)
    return sums.as_strided(shape, (height * width, width, 1)).view(*some, *shape[1:]) / math.prod(sides)


def _side(size: int) -> int:
    return min(WINDOW, size - 1 + size % 2)


def window_sum(values: Tensor, side: int, stride: int) -> Tensor:
    """(N,) 每隔 stride 一个、连着 side 个的和。长的由短的两两相加：7 = 1 + 2 + 4，四次加法而不是六次。"""
    parts, start, width = [], 0, 1  # parts：相邻的几段，合起来是 side 个
    length = len(values) - (side - 1) * stride
    while width <= side:
        if side & width:
            parts.append(values[start * stride :][:length])
            start += width
        if 2 * width <= side:
            values = values[: -width * stride] + values[width * stride :]
        width *= 2
    return sum(parts[1:], start=parts[0])


def fair_crps(forecast: Tensor, truth: Tensor) -> Tensor:
    """(B, M, ...)、(B, ...) → (B, ...)：逐格点的公平 CRPS，期望与成员数无关（Ferro 2014；Zamo & Naveau 2018），M > 1。

    Σ|e_i| / M − Σ_{i<j} |e_i − e_j| / (M (M − 1))，e = 成员 − 实况；排好序后，第 i 个（从 0 数）
    在第二个和里的系数是 2i − M + 1，不必两两相减。
    """
    count = forecast.shape[1]
    ordered = sort_members([member - truth for member in forecast.unbind(1)])
    score = torch.zeros_like(truth)
    for i, error in enumerate(ordered):
        score += error.abs() / count - error * ((2 * i - count + 1) / (count * (count - 1)))
    return score


def sort_members(members: list[Tensor]) -> list[Tensor]:
    """逐格点从小到大：奇偶归并排序网络（Batcher 1968）。

    每次比较作用于整个场，比沿成员维的 torch.sort 快五倍以上，也没有 int64 的下标；有 NaN 的格点全成 NaN。
    """
    members = list(members)
    for low, high in comparators(len(members)):
        a, b = members[low], members[high]
        members[low], members[high] = torch.minimum(a, b), torch.maximum(a, b)
    return members


def comparators(count: int) -> Iterator[tuple[int, int]]:
    """count 个数的排序网络里依次要比较的位置：长 run 的有序段两两归并，归并时的间距逐次减半。"""
    run = 1
    while run < count:
        gap = run
        while gap >= 1:
            start = gap % run
            for low in range(start, count - gap):
                first = (low - start) % (2 * gap) < gap  # 是一次比较里靠前的那个
                if first and low // (2 * run) == (low + gap) // (2 * run):  # 只在同一对段里比较
                    yield low, low + gap
            gap //= 2
        run *= 2


def brier(forecast: Tensor, truth: Tensor, threshold: Tensor) -> Tensor:
    """逐格点的 (p − o)²，p 是超过阈值的成员的比例（Brier 1950）。"""
    share = add_members(forecast, lambda member: (member > threshold).to(truth.dtype)) / forecast.shape[1]
    return (share - (truth > threshold).to(truth.dtype)).square()


def rank_counts(forecast: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """(B, M, C, H, W)、(B, C, H, W) → (B, C, M + 1) float64：实况在成员里的名次，面积加权，各对之和为 1。

    名次是小于实况的成员数（Hamill 2001）；与成员相等时平分给跨过的各档，零降水才不会都挤进一档。
    """
    below = add_members(forecast, lambda member: (member < truth).to(torch.int32))
    above = below + add_members(forecast, lambda member: (member == truth).to(torch.int32))
    share = 1 / (above - below + 1).double()
    bins = [
        area_mean(share.where((below <= k) & (k <= above), 0.0), weights)  # (B, C)
        for k in range(forecast.shape[1] + 1)
    ]
    broken = area_mean(add_members(forecast) + truth, weights).isnan()
    return torch.stack(bins, -1).masked_fill(broken[..., None], torch.nan)


def zonal_spectrum(fields: Tensor, weights: Tensor, periodic: bool) -> Tensor:
    """(..., H, W) → (..., K) float64：纬向波数 1 … K 的功率，各纬度加权平均；加上波数 0 就是均方值（Parseval）。

    全球网格 K = W // 2，波数是绕纬圈的波数。区域网格两端不相接，直接变换会把大尺度的趋势混进短波，
    所以先作偶延拓，即离散余弦变换（Denis et al. 2002），K = W − 1，波数是区域内半波的个数。
    """
    if not periodic:
        fields = torch.cat([fields, fields.flip(-1)], -1)  # (..., H, 2W)
    length = fields.shape[-1]
    waves = torch.fft.rfft(fields, norm="forward")[..., 1:]  # (..., H, length // 2)
    power = 2 * (waves.real.square() + waves.imag.square())
    if not periodic:
        power = power[..., :-1]  # 偶延拓的最后一个波数恒为零
    elif length % 2 == 0:
        power[..., -1] /= 2  # 最短波没有共轭的另一半
    return (power.double() * weights[:, None]).sum(-2) / weights.sum()


def add_members(forecast: Tensor, term: Callable[[Tensor], Tensor] = lambda member: member) -> Tensor:
    """(B, M, ...)：Σ term(成员)，逐个成员相加，中间结果只有一个成员那么大，次序也不随批量变。"""
    first, *others = forecast.unbind(1)
    total = term(first)
    for member in others:
        total = total + term(member)
    return total


def in_pieces(function: Callable[..., Tensor], *fields: Tensor) -> Tensor:
    """沿第 0 维分成不超过 PIECE 个数的段（至少一行）逐段计算，再接起来。"""
    rows = max(1, _piece(fields[0]) * len(fields[0]) // max(1, fields[0].numel()))
    return torch.cat([function(*piece) for piece in zip(*(f.split(rows) for f in fields), strict=True)])


def _piece(fields: Tensor) -> int:
    return PIECE * (torch.get_num_threads() if fields.device.type == "cpu" else DEVICE_PIECES)


def perplexity(shares: Tensor) -> Tensor:
    """各码所占的份额 (K,)，和为 1 → e 的熵次方：1 是只用一个码，K 是均匀地用。"""
    return torch.special.entr(shares).sum().exp()
