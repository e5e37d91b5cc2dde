"""指标：可平均的统计量加最后一步的函数；均方根只在全部误差平均之后开方。

这里的函数对（起报时间，时效，通道）逐对给出可平均的统计量，最后一步在 final.py。
场一律是标准化的 float32，结果是 float64；CPU 与 CUDA 都能算，各参数须在同一设备上。
NaN 不藏：一对场里有 NaN，用到它的统计量就是 NaN。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

IMAGE_RANGE = 6.0  # SSIM、PSNR 把 z 看成图像 z / 6 + 1/2：±3 个标准差是 [0, 1]
WINDOW, K1, K2 = 7, 0.01, 0.03  # SSIM 的窗边长与两个稳定常数
PIECE = 2**20  # 双精度与排序的中间结果一次最多这么多个数，内存不随批量增长


def area_mean(fields: Tensor, weights: Tensor) -> Tensor:
    """(..., H, W)、(H,) → (...) float64：加权的区域平均；用双精度求和，但不把整批场复制成双精度。"""
    width = fields.shape[-1]
    sums = in_pieces(lambda rows: rows.sum(-1, dtype=torch.float64), fields.reshape(-1, width))
    return (sums.view(fields.shape[:-1]) * weights).sum(-1) / (weights.sum() * width)


def pair_statistics(
    forecast: Tensor, truth: Tensor, normal: Tensor, weights: Tensor, thresholds: Tensor
) -> dict[str, Tensor]:
    """一批预报的可平均统计量，每个 (B, C) float64，标准化单位；误差、SSIM、距平相关都取集合平均。

    forecast: (B, M, C, H, W)；truth: (B, C, H, W)；normal: (B, C, H, W)，有效时刻的气候态；
    weights: (H,)；thresholds: (C, K) 标准化的阈值，没有的填 NaN，K 可以是 0。

    square、absolute、error：e²、|e|、e 的加权平均；plain_square、plain_absolute：不加权；ssim；
    forecast_anomaly、truth_anomaly、anomaly_product：距平（减气候态）的平方与乘积的平均；
    forecast_activity、truth_activity：距平绕自己区域平均的加权方差，预报的是各成员的平均；
    crps：公平的 CRPS，M = 1 时即 absolute；variance：成员的无偏方差，只在 M > 1 时有；
    brier_k：第 k 个阈值的 (p − o)²，阈值为 NaN 的通道是 NaN。
    """
    mean = add_members(forecast) / forecast.shape[1]
    statistics = errors(mean, truth, weights) | anomalies(forecast, mean, truth, normal, weights)
    statistics["ssim"] = in_pieces(structural_similarity, mean, truth)
    if forecast.shape[1] == 1:
        statistics["crps"] = statistics["absolute"]
    else:
        squares = add_members(forecast, lambda member: (member - mean).square())
        statistics["variance"] = area_mean(squares / (forecast.shape[1] - 1), weights)
        statistics["crps"] = area_mean(in_pieces(fair_crps, forecast, truth), weights)
    broken = statistics["square"].isnan()
    for k, threshold in enumerate(thresholds.to(truth).unbind(1)):
        score = brier(forecast, truth, threshold[:, None, None], weights)
        statistics[f"brier_{k}"] = score.masked_fill(broken | threshold.isnan(), torch.nan)
    return statistics


def errors(mean: Tensor, truth: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """误差的加权与不加权平均；参数与键见 pair_statistics。"""
    error = mean - truth
    square, absolute, plain = error.square(), error.abs(), torch.ones_like(weights)
    return {
        "square": area_mean(square, weights),
        "absolute": area_mean(absolute, weights),
        "error": area_mean(error, weights),
        "plain_square": area_mean(square, plain),
        "plain_absolute": area_mean(absolute, plain),
    }


def anomalies(forecast: Tensor, mean: Tensor, truth: Tensor, normal: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """距平相关系数与活动度的各部分。

    区域方差先减平均再平方：两个大数相减会给出负的方差。活动度逐个成员算，因为集合平均本来就该平滑。
    """

    def activity(anomaly: Tensor) -> Tensor:
        centre = area_mean(anomaly, weights)[..., None, None].to(anomaly.dtype)
        return area_mean((anomaly - centre).square(), weights)

    a, b = mean - normal, truth - normal
    return {
        "forecast_anomaly": area_mean(a.square(), weights),
        "truth_anomaly": area_mean(b.square(), weights),
        "anomaly_product": area_mean(a * b, weights),
        "forecast_activity": add_members(forecast, lambda member: activity(member - normal)) / forecast.shape[1],
        "truth_activity": activity(b),
    }


def structural_similarity(x: Tensor, y: Tensor) -> Tensor:
    """(B, C, H, W) 两批 → (B, C) 平均 SSIM（Wang et al. 2004, 式 13；均匀窗、样本协方差，同 scikit-image 的默认）。

    只平均整个落在图内的窗；不足 7 格的边取放得下的最大奇数。窗内方差是两个大数之差，所以用双精度，
    并且对 z / 6 算（平移不改变方差），平均值才加 1/2。
    """
    u, v = x.double() / IMAGE_RANGE, y.double() / IMAGE_RANGE
    maps, cells = torch.stack([u, v, u * u, v * v, u * v]), 1
    for dim in (-2, -1):
        side = min(WINDOW, maps.shape[dim] - 1 + maps.shape[dim] % 2)
        maps, cells = window_sum(maps, side, dim), cells * side
    mu, mv, uu, vv, uv = maps / cells
    unbiased = cells / max(cells - 1, 1)  # 只有一格的窗没有方差：只剩亮度一项
    variance = (uu - mu * mu + vv - mv * mv) * unbiased
    covariance = (uv - mu * mv) * unbiased
    mu, mv = mu + 0.5, mv + 0.5
    light = (2 * mu * mv + K1**2) / (mu * mu + mv * mv + K1**2)
    return (light * (2 * covariance + K2**2) / (variance + K2**2)).mean((-2, -1))


def window_sum(fields: Tensor, side: int, dim: int) -> Tensor:
    """沿 dim 每 side 格的和：平移相加，比卷积快十几倍。"""
    length = fields.shape[dim] - side + 1
    total = fields.narrow(dim, 0, length).clone()
    for start in range(1, side):
        total += fields.narrow(dim, start, length)
    return total


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


def brier(forecast: Tensor, truth: Tensor, threshold: Tensor, weights: Tensor) -> Tensor:
    """(B, C)：(p − o)² 的加权平均，p 是超过阈值的成员的比例（Brier 1950）。"""
    share = add_members(forecast, lambda member: (member > threshold).to(truth.dtype)) / forecast.shape[1]
    return area_mean((share - (truth > threshold).to(truth.dtype)).square(), weights)


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
    rows = max(1, PIECE * len(fields[0]) // max(1, fields[0].numel()))
    return torch.cat([function(*piece) for piece in zip(*(f.split(rows) for f in fields), strict=True)])


def perplexity(shares: Tensor) -> Tensor:
    """各码所占的份额 (K,)，和为 1 → e 的熵次方：1 是只用一个码，K 是均匀地用。"""
    return torch.special.entr(shares).sum().exp()
