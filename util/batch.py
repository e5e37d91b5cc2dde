"""数据与模型之间的两个约定：DataSpec（数据是什么）和 Batch（一批窗口）；末了是场的缓冲区，numpy 与 torch 两面看。"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

_used: deque[np.ndarray] = deque(maxlen=3)  # empty_fields 给过的：手里的一批、早到的一批、下一批

Predict = Annotated[
    Literal["state", "tendency"],
    Field(description="the network gives the fields, or their change from the last frame it sees (needs fewer steps)"),
]


class Seeds(NamedTuple):
    """一批窗口的损失里的随机数由什么定：只看运行的种子、轮次与窗口、第几步，与怎样切成小批、分给几个进程无关。

    windows: (B,) 各窗口自己的；places: (B,) 各窗口在 [0, 1) 里的位置，合起来均匀，要分层抽的由它错开；
    step: 全局批共用的。
    """

    windows: tuple[int, ...]
    places: tuple[float, ...]
    step: int


class Batch(NamedTuple):
    """一批时间窗口，已按 spec 的统计量标准化；用 NamedTuple，Fabric 能直接搬运和转换精度。

    history: (B, T_in, C, H, W) float32；future: (B, T_out, C, H, W) float32；
    time: (B, T_in + T_out) int64，1970 年以来的 UTC 小时；
    valid: (B, T_in + T_out, C) bool，为假的场不作训练目标，也不计分（插值得来，或被同窗的插值用作来源）。
    seeds: 训练与验证时引擎给的；没有时损失的随机数取自全局发生器。
    """

    history: Tensor
    future: Tensor
    time: Tensor
    valid: Tensor
    seeds: Seeds | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """history、future、time、valid。"""
        return self.history, self.future, self.time, self.valid


def encoded_fields(batch: Batch, encodes: Predict) -> tuple[Tensor, Tensor]:
    """阶段一逐个看的场 (N, C, H, W) 与 valid (N, C)：各帧，或相邻两帧之差（两帧都有效才有效）。"""
    frames, valid = torch.cat([batch.history, batch.future], 1), batch.valid
    if encodes == "tendency":
        frames, valid = frames.diff(dim=1), valid[:, 1:] & valid[:, :-1]
    return frames.flatten(0, 1), valid.flatten(0, 1)


class Wire(NamedTuple):
    """一批窗口在路上的样子：存着的精度、存着的单位；到了设备上才由 receive 变成 Batch，路上的字节最少。

    fields: (B, T_in + T_out, C, H, W)；time、valid 同 Batch。
    """

    fields: Tensor
    time: Tensor
    valid: Tensor


@dataclass(frozen=True)
class DataSpec:
    """数据的完整说明；存进每个检查点，没有训练数据也能预报。

    channels 如 ("t2m", "z_level_00")；units 与 pressures（hPa，单层变量为 None）按通道对齐；
    latitudes、longitudes 单位为度，按文件里的顺序；mean、std 为物理单位；
    standardized 表示磁盘上的文件已经标准化；forcings、diagnostic（通道名）见 models/layers/forcings.py。
    starts_every_hours：窗口每隔几小时一个起点，比 interval_hours 密时才有；
    lead_hours：一次预报可以走的几种时效，升序，只有一种（interval_hours）时没有；
    static：forcings 里读来的各场 (H, W)，按自己的均值与标准差标准化；造模型时用，检查点里的随权重走，不算在说明里。
    """

    channels: tuple[str, ...]
    units: tuple[str, ...]
    pressures: tuple[float | None, ...]
    latitudes: tuple[float, ...]
    longitudes: tuple[float, ...]
    frames_in: int
    frames_out: int
    interval_hours: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    standardized: bool
    forcings: tuple[str, ...] = ()
    diagnostic: tuple[str, ...] = ()
    starts_every_hours: int | None = None
    lead_hours: tuple[int, ...] | None = None
    static: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        sizes = {len(self.channels), len(self.units), len(self.pressures), len(self.mean), len(self.std)}
        assert sizes == {len(self.channels)}, f"per-channel fields disagree in length: {sizes}"

    @property
    def num_channels(self) -> int:
        return len(self.channels)

    @property
    def height(self) -> int:
        return len(self.latitudes)

    @property
    def width(self) -> int:
        return len(self.longitudes)

    @property
    def window(self) -> int:
        """窗口长度 t。"""
        return self.frames_in + self.frames_out

    @property
    def every_hours(self) -> int:
        """数据里相邻两个时刻（窗口的起点）隔几小时。"""
        return self.starts_every_hours or self.interval_hours

    @property
    def jumps(self) -> tuple[int, ...]:
        """lead_hours 各是几帧；没有就是空的。"""
        return tuple(hours // self.interval_hours for hours in self.lead_hours or ())

    def ahead(self, steps: int) -> int:
        """滚 steps 步的目标有几帧；lead_hours 的到最远的一个。"""
        return max(steps * self.frames_out, *self.jumps, 0)

    def leads(self, steps: int) -> list[int]:
        """前 steps 个时效，小时。"""
        return [self.lead(i) for i in range(steps)]

    def lead(self, place: Any) -> Any:
        """第 place 个时效（从零数；也可以是数组），小时。"""
        return self.interval_hours * (place + 1)

    @property
    def closes_circle(self) -> bool:
        """经度首尾相接；区域网格和只有一列的网格不是。"""
        step = abs(self.longitudes[-1] - self.longitudes[0]) / max(1, self.width - 1)
        return abs(step * self.width - 360) < step / 2

    def to_physical(self, fields: Tensor) -> Tensor:
        """标准化的 (..., C, H, W) 还原为物理单位。"""
        mean, std = (torch.tensor(v, dtype=fields.dtype, device=fields.device) for v in (self.mean, self.std))
        return fields * std[:, None, None] + mean[:, None, None]

    def to_standard(self, fields: Tensor) -> Tensor:
        """物理单位的 (..., C, H, W) 标准化。"""
        mean, std = (torch.tensor(v, dtype=fields.dtype, device=fields.device) for v in (self.mean, self.std))
        return (fields - mean[:, None, None]) / std[:, None, None]

    def standardize_(self, fields: Tensor) -> None:
        """物理单位的 (..., C, H, W) float32 就地标准化；与读取进程里的逐位相同，都是 float32 的一减一除。"""
        mean, std = _statistics(self, fields.device)
        fields.sub_(mean).div_(std)

    def receive(self, wire: Wire, raw: bool) -> Batch:
        """到了设备上的一批 → Batch；raw 为真时先标准化，float32 的就地改。"""
        fields = wire.fields.float()
        if raw:
            self.standardize_(fields)
        return Batch(fields[:, : self.frames_in], fields[:, self.frames_in :], wire.time, wire.valid)

    def to_dict(self) -> dict[str, Any]:
        """只含普通列表、数字和字符串，weights_only=True 能读回；没有的（None）不写，与从前的相同。"""
        values = {part.name: getattr(self, part.name) for part in fields(self) if part.compare}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items() if v is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataSpec:
        given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**given)

    @property
    def bare(self) -> DataSpec:
        """只有场：没有外强迫，各通道都喂回来，一次走一步。"""
        return replace(self, forcings=(), diagnostic=(), static={}, lead_hours=None)


@cache
def _statistics(spec: DataSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """均值与标准差 (C, 1, 1) float32，留在设备上：每批再送一次会使主机等设备。"""
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=device)[:, None, None] for values in (spec.mean, spec.std)
    )
    return mean, std


def window_time(time: Tensor | None, spec: DataSpec) -> Tensor | None:
    """历史的时刻 (B, T_in) 接上目标的时刻 → (B, T_in + T_out)。"""
    if time is None:
        return None
    ahead = torch.arange(1, spec.frames_out + 1, device=time.device) * spec.interval_hours
    return torch.cat([time, time[:, -1:] + ahead], 1)


def next_history(history: Tensor, made: Tensor) -> Tensor:
    """自己的输出 (N, T_out, C, H, W) 接在历史 (N, T_in, C, H, W) 之后，取末 T_in 帧：下一步的历史。"""
    return torch.cat([history[:, made.shape[1] :], made[:, -history.shape[1] :]], 1)


def empty_fields(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """内存里的一块：用过、别处都放下了的，大小相同就再用，不然几十 MB 的每一批都要重新要一遍页，比抄进去还久。

    新的由 numpy 要来：它请系统给大页，头一次写进去时少几千次缺页。
    """
    kind = np.dtype(np.uint16) if dtype == torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype
    for _ in range(len(_used)):
        block = _used.popleft()
        free = sys.getrefcount(block) == 2  # 只剩这里的名字与这一次的参数：没有张量、没有它们的视图还看着它
        _used.append(block)
        if free and (block.shape, block.dtype) == (shape, kind):
            return as_tensor(block)
    _used.append(np.empty(shape, dtype=kind))  # 满了就挤掉最早的
    return as_tensor(_used[-1])


def as_array(fields: Tensor) -> np.ndarray:
    """同一块内存；numpy 没有 bfloat16，给它 uint16 的位模式。"""
    return fields.view(torch.uint16).numpy() if fields.dtype == torch.bfloat16 else fields.numpy()


def as_tensor(fields: np.ndarray) -> Tensor:
    """as_array 的逆。"""
    tensor = torch.from_numpy(fields)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
