"""编码的内在维数：`python -m engine.studies.intrinsic_dimension --checkpoint CKPT [--windows N] [--neighbours K]`。

PastNet 的编码器把一帧的每个位置变成 D 个数；这些数实际上在几维的流形上变化，就是码该有多少维（latent_dim）的依据。
码要多少个（codebook_size）没有公式：看同样的这些编码实际用到几个（困惑度），留一倍的余地。
极大似然估计：Levina & Bickel 2004，Maximum Likelihood Estimation of Intrinsic Dimension；
各点的平均按 MacKay & Ghahramani 2005 的更正：平均的是倒数，近邻少时才不偏大。
维数高而点少时偏小（16 维、2000 点得 13）。
公开的代码把 T 帧的编码接成一个点来估计，那是整段历史的维数，与一帧的码无从相比；这里只取每个窗口的最后一帧历史。
邻居取 20 个，不取公开代码的 1000 个：几千个点里的 1000 个邻居已不是「附近」，偏小得更多
（Levina & Bickel 用 10 到 20）。
窗口在训练日期上等距地取：相邻的时刻彼此就是最近的邻居，量到的会是时间这一维。
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from util.cli import Parser, run_command

if TYPE_CHECKING:  # --help 不必等 torch
    import torch
    from torch import Tensor

    from models.interface import Memorising
    from util.data.dataset import WeatherData

ROWS = 1024  # 一次算多少行到全部点的距离


class Estimate(NamedTuple):
    """全部窗口的估计，与前一半、后一半窗口各自的；points、features 是 (n, D)；perplexity：这些编码用到几个码。"""

    dimension: float
    halves: tuple[float, float]
    points: int
    features: int
    perplexity: float


def intrinsic_dimension(points: Tensor, neighbours: int) -> float:
    """(n, F) 的点 → 内在维数：n·(K − 1) / Σ_i Σ_{j<K} ln(T_K(i) / T_j(i))，T_j 是到第 j 近的点的距离。

    Raises:
        ValueError: 不同的点不多于 K 个；有的点近得分不开。
    """
    import torch

    points = points.double()
    points = (points - points.mean(0)).unique(dim=0)  # 居中：大数相减会吃掉近邻的距离
    if len(points) <= neighbours:
        raise ValueError(
            f"{len(points)} different latents, {neighbours} neighbours of each need more: raise --windows or lower "
            "--neighbours"
        )
    total = 0.0
    for first in range(0, len(points), ROWS):
        distances = torch.cdist(points[first : first + ROWS], points)  # (≤ ROWS, n)
        distances.diagonal(first).fill_(torch.inf)  # 自己不是自己的邻居
        logs = distances.topk(neighbours, largest=False).values.log()  # (≤ ROWS, K) 由近到远
        total += float((logs[:, -1:] - logs[:, :-1]).sum())
    if not 0 < total < float("inf"):
        raise ValueError("the latents are too close together (or too evenly spaced) to tell their distances apart")
    return len(points) * (neighbours - 1) / total


def measure(
    model: Memorising, data: WeatherData, windows: int, neighbours: int, batch_size: int, device: torch.device
) -> Estimate:
    """训练日期上等距的 windows 个窗口的最后一帧历史，经模型的 latents 得到的点的内在维数。

    Raises:
        ValueError: 训练日期里没有这么多窗口；点太少。
    """
    import numpy as np
    import torch

    from util.data.batches import all_starts, split_batches
    from util.data.feed import feed
    from util.scores.metrics import perplexity

    starts = all_starts(data.segments["train"], data.spec.window)
    if windows > len(starts):
        raise ValueError(f"--windows {windows}: data.splits.train has {len(starts)}")
    chosen = starts[np.linspace(0, len(starts) - 1, windows).round().astype(int)]
    loader = feed(data, split_batches(chosen, batch_size), device)
    last = data.spec.frames_in - 1
    with torch.inference_mode():
        found = [model.latents(batch.history[:, last:].to(device), batch.time[:, last:].to(device)) for batch in loader]
        points = torch.cat(found).cpu()  # (n, D)
        index = torch.cat([model.memory.nearest(part.to(device)) for part in points.split(ROWS)])
        used = float(perplexity(model.memory.shares(index)))
    middle = windows // 2 * (len(points) // windows)
    halves = (intrinsic_dimension(points[:middle], neighbours), intrinsic_dimension(points[middle:], neighbours))
    count, width = points.shape
    return Estimate(intrinsic_dimension(points, neighbours), halves, count, width, used)


def advise_width(estimate: float, latent_dim: int, step: int) -> str:
    """估计与 latent_dim 相比说明什么；latent_dim 须为 step 的倍数。编码只有 latent_dim 个数，估计不会大出多少。"""
    enough = max(step, -int(-estimate // step) * step)  # 不小于估计的最小的倍数
    if latent_dim <= enough:
        return f"the latents fill model.latent_dim = {latent_dim}: {latent_dim + step} may keep more"
    return f"model.latent_dim = {latent_dim} has room to spare: {enough} would do"


def advise_size(used: float, codebook_size: int) -> str:
    """困惑度与 codebook_size 相比说明什么。"""
    about = f"codes in use (perplexity) {used:.1f} of model.codebook_size = {codebook_size}: "
    if used > codebook_size / 2:
        return about + f"{2 * codebook_size} may keep more"
    return about + f"{2 * math.ceil(used)} would do"


def measure_checkpoint(path: str, windows: int, neighbours: int) -> int:
    """命令本身：检查点 → 模型与它的训练数据 → 估计，打印出来。

    Raises:
        ValueError: 检查点、数据不对，或模型没有可量的编码。
    """
    import torch

    from engine.loading import check_same_data, checkpoint_config, load_forecaster
    from models.interface import Memorising
    from util.config import eval_batch_size
    from util.data.dataset import open_data
    from util.files.training_checkpoint import load_training
    from util.logger import setup_logging

    setup_logging(None)
    content = load_training(path)
    config = checkpoint_config(content, path)
    device = torch.device("cuda" if torch.cuda.is_available() and config.run.device != "cpu" else "cpu")
    model, spec = load_forecaster(content, device)
    if not isinstance(model, Memorising):
        raise ValueError(f"{path}: {config.model['name']} has no latents to measure; pastnet has")
    data = open_data(config.data)
    check_same_data(spec, data.spec, path)
    found = measure(model, data, windows, neighbours, eval_batch_size(config), device)
    first, second = found.halves
    print(f"{found.points} latents of {found.features} numbers, {windows} frames, {neighbours} neighbours")
    print(f"intrinsic dimension {found.dimension:.1f} (halves of the windows: {first:.1f}, {second:.1f})")
    codebook_size, latent_dim = model.memory.codes.shape
    print(advise_width(found.dimension, latent_dim, model.latent_step))
    print(advise_size(found.perplexity, codebook_size))
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m engine.studies.intrinsic_dimension",
        description="Estimate the intrinsic dimension of PastNet's latents on the training dates.",
    )
    parser.add_argument("--checkpoint", required=True, help="e.g. checkpoints/RUN/best.ckpt")
    parser.add_argument(
        "--windows", type=int, default=32, help="training windows, evenly spaced (default: %(default)s)"
    )
    parser.add_argument("--neighbours", type=int, default=20, help="neighbours of a point (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """命令行入口，返回退出码。

    Raises:
        ValueError: 参数写错，或见 measure_checkpoint。
    """
    arguments = parse_arguments(argv)
    for name, least in (("windows", 2), ("neighbours", 2)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name} {getattr(arguments, name)}: must be at least {least}")
    return measure_checkpoint(arguments.checkpoint, arguments.windows, arguments.neighbours)


if __name__ == "__main__":
    run_command(main)
