"""一次评测是什么：命令行的选项、要走的窗口、在评的模型与基线、一批窗口的结果。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.cases.collect import CaseFound
from engine.cases.plan import Plan
from engine.evaluation.glimpse import Glimpse
from engine.verification.verifier import Verifier
from models.interface import ForecastModel
from util.batch import DataSpec
from util.data.batches import all_starts
from util.data.dataset import WeatherData
from util.strict import nearest


@dataclass(frozen=True)
class Options:
    """一次评测的选项，与命令行同名。

    thresholds: 通道 → 物理单位的阈值；regions: 分区评分的 YAML；by: season、month、hour；
    events: 事件的 YAML，空的是全部缺省，None 不问；cases: 个例的 YAML；
    set: 改过的模型选项；overrides: 数据在哪里、怎样读，见 checkpoint_config；
    verify: 检查点核对校验和；compile: 模型的块编译了再走。
    """

    split: str = "test"
    stride: int = 1
    steps: int | None = None
    members: int = 1
    perturb: float = 0.0
    smooth: float = 0.0
    thresholds: Mapping[str, tuple[float, ...]] | None = None
    save: tuple[str, ...] = ()
    overwrite: bool = False
    points: tuple[str, ...] = ()
    regions: Path | None = None
    by: tuple[str, ...] = ()
    events: str | None = None
    cases: Path | None = None
    set: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    verify: bool = True
    compile: bool = False


@dataclass(frozen=True)
class Task:
    """评测一个划分要用的全部：judged 是被评的模型的名字，其余是基线。"""

    models: Mapping[str, ForecastModel]
    judged: str
    data: WeatherData
    options: Options
    steps: int
    starts: np.ndarray
    batch_size: int
    seed: int
    glimpse: Glimpse
    thresholds: Tensor  # (C, K) 物理单位，不足 K 个的补 NaN
    regions: Mapping[str, np.ndarray]  # 名字 → (H, W) bool
    verifier: Verifier | None = None
    cases: tuple[Plan, ...] = ()

    @property
    def spec(self) -> DataSpec:
        return self.data.spec

    @property
    def init_hours(self) -> np.ndarray:
        """各窗口的起报时间（最后一帧历史），UTC。"""
        back = (self.spec.frames_in - 1) * self.spec.interval_hours
        return self.starts + back - self.data.config.utc_offset_hours


class Pair(NamedTuple):
    """真值与预报（集合取平均），同样的形状，物理单位；插值得来的真值为 NaN。"""

    truth: np.ndarray
    forecast: np.ndarray


class Fields(NamedTuple):
    """一批里要存盘的场，物理单位。"""

    forecast: np.ndarray | None  # (B, M, L, C, H, W)；只存 Zarr 时各进程自己写了，不必送到零号进程
    truth: np.ndarray  # (B, L, C, H, W)
    valid: np.ndarray  # (B, L, C) bool
    history: np.ndarray | None  # (B, T_in, C, H, W)，要存 npy 时才有


class BlownUp(NamedTuple):
    """滚着滚着不再有限的一次预报：起报时间的序号，头一个这样的时效的序号。"""

    model: str
    row: int
    lead: int


class Scored(NamedTuple):
    """一批窗口的结果，都在内存里；row 是第一个窗口的序号。"""

    row: int
    statistics: dict[str, dict[str, np.ndarray]]  # 模型 → 统计量 → (B, L, C) 或各区域的 (B, L, C, R)，无效的场为 NaN
    spectra: dict[str, np.ndarray]  # 模型与 truth → (L, C, K) 有效场之和
    ranks: np.ndarray | None  # (L, C, M + 1) 有效场之和
    events: dict[tuple[str, str], np.ndarray]  # （哪一种和，模型或 truth）→ (L, C, …)，见 Verifier.lead
    blown_up: list[BlownUp]
    series: Pair  # (B, L', C', P)
    pictures: dict[tuple[str, int], Pair]  # 哪一组地图、起报时间的序号 → (L', C', h, w)
    fields: Fields | None  # 什么也不存时没有
    seconds: dict[str, float]  # 模型 → 预报所用的时间
    cases: tuple[CaseFound | None, ...] = ()  # 各个例的，次序照 Task.cases；这一批里没有的是 None


def find_starts(data: WeatherData, split: str, steps: int, stride: int) -> np.ndarray:
    """一个划分的窗口起点。

    Raises:
        ValueError: 没有一段够长。
    """
    spec = data.spec
    starts = all_starts(data.segments[split], spec.frames_in + steps, stride)
    if not starts.size:
        longest = max(s.size for s in data.segments[split])
        raise ValueError(
            f"split {split}: the longest run without a gap has {longest} samples, a window needs frames_in + steps = "
            f"{spec.frames_in} + {steps}; --steps {longest - spec.frames_in} is the most"
        )
    return starts


def threshold_tensor(thresholds: Mapping[str, tuple[float, ...]] | None, spec: DataSpec) -> Tensor:
    """通道 → 阈值，排成 (C, K) float64，物理单位，不足 K 个的补 NaN。

    Raises:
        ValueError: 没有这个通道。
    """
    thresholds = thresholds or {}
    for channel in thresholds:
        if channel not in spec.channels:
            raise ValueError(f"--thresholds: no channel {channel!r}; {nearest(channel, spec.channels, 'channels')}")
    count = max(map(len, thresholds.values()), default=0)
    padded = torch.full((spec.num_channels, count), float("nan"), dtype=torch.float64)
    for channel, values in thresholds.items():
        padded[spec.channels.index(channel), : len(values)] = torch.tensor(values, dtype=torch.float64)
    return padded


def standardize_thresholds(thresholds: Tensor, spec: DataSpec) -> Tensor:
    """(C, K) 物理单位 → 标准化 float32，与读取器逐位同样的算法：恰好落在阈值上的数不能因舍入成了超过。"""
    mean, std = (torch.tensor(v, dtype=torch.float32)[:, None] for v in (spec.mean, spec.std))
    return (thresholds.float() - mean) / std
