"""集合的成员：评测与预报都从这里得到。每个起报时间的每个成员有自己的种子，与分批、抽稀、进程数、成员总数都无关。"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Generator, Tensor

from engine.forecasting.perturbation import perturb
from engine.forecasting.rollout import roll
from engine.seeds import seed_of
from models.interface import Forecaster
from util.batch import DataSpec


@dataclass(frozen=True)
class Ensemble:
    """怎样的集合：几个成员；初值扰动的标准差（标准化单位）与相关长度（度），确定性模型由它得到集合；运行的种子。"""

    members: int
    noise: float
    smooth: float
    seed: int


def ensemble(
    model: Forecaster,
    history: Tensor,
    time: Tensor | None,
    steps: int,
    spec: DataSpec,
    wanted: Ensemble,
    limit: int | None = None,
) -> Iterator[Tensor]:
    """(B, T_in, C, H, W) 标准化的历史 → 依次 steps 个 (B, M, C, H, W)，每个时效一个。

    一个成员的随机数（初值扰动、模型的抽样、滚动之后接着的抽样）取自同一个发生器，种子由运行的种子、起报时间、成员的
    序号定：要 4 个成员就是要 10 个时的前 4 个。

    Args:
        time: (B, T_in)，历史各帧的 UTC 小时；不知道时为 None，种子里的起报时间换成 0（1970-01-01T00）。
        limit: 一次调用至多几个样本（窗口 × 成员），显存由它封顶；None 为一次全部。
    """
    hours = [0] * len(history) if time is None else time[:, -1].tolist()
    seeds = [member_seed(wanted.seed, hour, member) for hour in hours for member in range(wanted.members)]
    generators = [Generator().manual_seed(seed) for seed in seeds]  # B·M 个，窗口在前、成员在后
    if wanted.noise > 0 and wanted.members > 1:  # 只有一个成员时就是不加扰动的那一个
        history = perturb(history, wanted.noise, generators, spec, wanted.smooth)  # (B·M, T_in, C, H, W)
        time = None if time is None else time.repeat_interleave(wanted.members, 0)
    for frame in roll(model, history, time, steps, spec, generators, limit):  # 扰动之后是 (B·M, 1, C, H, W)
        yield frame.flatten(0, 1).unflatten(0, (-1, wanted.members))


def member_seed(seed: int, hour: int, member: int) -> int:
    """运行的种子、起报时间（UTC 小时）、成员的序号 → 种子。"""
    return seed_of(seed, hour, member)


def check_members(model: Forecaster, name: str, members: int, noise: float, smooth: float) -> None:
    """成员数与扰动说得通。

    Raises:
        ValueError: 确定性模型要几个成员而没有扰动；有扰动而只有一个成员；要平滑而没有扰动。
    """
    if members > 1 and not model.probabilistic and noise == 0:
        raise ValueError(f"{name} is deterministic: --members {members} needs --perturb, e.g. --perturb 0.05")
    if members == 1 and noise > 0:
        raise ValueError(f"--perturb {noise:g} with one member changes nothing: member 0 is unperturbed; add --members")
    if smooth > 0 and noise == 0:
        raise ValueError(f"--smooth {smooth:g} shapes the noise of --perturb, which is 0")
