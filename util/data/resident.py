"""数据留在哪里（data.residency）。

device：训练与验证的全部时刻留在设备上，窗口在那里按行取，读取进程、搬运都省了。有空缺的窗口（插值的规则随窗口而变）
仍由 WindowDataset 读好送来，所以与 disk 逐位相同。设备就是处理器时，一台机器上的几个训练进程共用一份。
memory：训练开始之前把存档里要用的部分顺序读一遍，留在操作系统的页缓存里。存档是映射着读的，那一份由一台机器上的
全部读取进程、全部训练进程共用，不必另抄一份；第一轮就不再是随机读盘。页没有锁住（mlock 的限额通常只有几 MB）：
别的程序要内存时，系统可以丢掉一些，再用到时从盘上读，数不会错。
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from util.batch import Batch, DataSpec, Wire, as_array, empty_fields
from util.data.reader import FieldReader
from util.data.store_origin import Store
from util.data.windows import WindowDataset
from util.files.zarr_metadata import FILE_TYPES, chunk_name

BLOCK_BYTES = 128 * 2**20  # 搬上设备时一次的大小
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
LIMITS = {  # 第 2 版、第 1 版：文件夹 → 限额、用了多少的文件，memory.stat 里可以让出的那一项
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
SHARE = 0.9  # 数据至多占空着的这么多；余下的给模型，够不够由预检说
T = TypeVar("T")
log = logging.getLogger("ar_pred")


class OncePerMachine(Protocol):
    """几个进程一起训练时，一台机器上只由一个做的事，结果同机的各个都有。"""

    def __call__(self, action: Callable[[], T]) -> T: ...


def alone(action: Callable[[], T]) -> T:
    """只有一个进程。"""
    return action()


@dataclass(frozen=True)
class Resident:
    """设备上的一份。

    hours: (N,) 升序，文件名的历法；whole: (N,) 各通道都有文件；fields: (N, C, H, W) 已标准化，精度是存着的精度。
    """

    spec: DataSpec
    hours: np.ndarray
    whole: np.ndarray
    fields: Tensor

    def holds(self, windows: WindowDataset, batches: Sequence[Sequence[int]], device: torch.device) -> bool:
        """这些窗口的每个时刻都在，且就在这个设备上。"""
        if self.fields.device != device or not batches:
            return False
        hours = np.unique(windows.hours([start for starts in batches for start in starts]))
        return bool(np.isin(hours, self.hours, assume_unique=True).all())

    def batch(self, windows: WindowDataset, starts: Sequence[int]) -> Batch:
        """设备上的一批 (B, t, C, H, W)。"""
        hours = windows.hours(starts)  # (B, t)
        rows = np.searchsorted(self.hours, hours)
        device = self.fields.device
        index = upload(torch.from_numpy(rows.ravel()), device)
        fields = self._gather(index).unflatten(0, rows.shape).float()  # (B, t, C, H, W)
        valid = torch.ones(fields.shape[:3], dtype=torch.bool, device=device)
        broken = np.flatnonzero(~self.whole[rows].all(axis=1)).tolist()
        if broken:
            read = windows.__getitems__([starts[i] for i in broken])
            places = torch.tensor(broken, device=device)
            valid[places] = read.valid.to(device)
            fields[places] = torch.cat([read.history, read.future], 1).to(device)
        return self.spec.receive(Wire(fields, upload(windows.utc(hours), device), valid), raw=False)

    def _gather(self, index: Tensor) -> Tensor:
        """(n,) → (n, C, H, W)。"""
        if self.fields.device.type != "cpu":
            return self.fields.index_select(0, index)
        out = empty_fields((len(index), *self.fields.shape[1:]), self.fields.dtype)
        return torch.index_select(self.fields, 0, index, out=out)


def keep_on_device(
    reader: FieldReader, hours: np.ndarray, device: torch.device, once: OncePerMachine = alone
) -> Resident:
    """把 hours（各划分的抽样时刻）的全部通道搬上设备；设备就是处理器时，同机的进程共用一份（once）。

    Raises:
        ValueError: 放不下；说出要多少、有多少。
    """
    hours, spec, dtype = np.unique(hours), reader.spec, reader.wire().dtype
    shape = (hours.size, spec.num_channels, spec.height, spec.width)
    if device.type != "cpu":
        fields = torch.empty(shape, dtype=dtype, device=check_fits(shape, dtype, device))
        return Resident(spec, hours, fill(fields, reader, hours), fields)

    opened: list[int] = []  # 只在填的那个进程里有

    def fill_shared() -> tuple[str, np.ndarray]:
        check_fits(shape, dtype, device)
        opened.append(os.memfd_create("ar_pred"))  # 没有名字，谁都不用它了就没有了
        path = f"/proc/{os.getpid()}/fd/{opened[0]}"
        return path, fill(map_shared(path, shape, dtype), reader, hours)

    path, whole = once(fill_shared)
    fields = map_shared(path, shape, dtype)
    once(lambda: None)  # 都接上了，才可以关
    for descriptor in opened:
        os.close(descriptor)
    return Resident(spec, hours, whole, fields)


def map_shared(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """path 的字节，谁写了大家都看得见。"""
    return torch.from_file(path, shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def check_fits(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.device:
    """放得下的 device。

    Raises:
        ValueError: 放不下；说出要多少、有多少。
    """
    needed, free = math.prod(shape) * dtype.itemsize, free_memory(device)
    if needed > SHARE * free:
        raise ValueError(
            f"data.residency = device needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on {device}, "
            f"the data may take {SHARE:.0%} of that; use memory or disk, fewer channels or years, or a store packed "
            "with --dtype float16"
        )
    log.info("residency: device %s, %.2f GB of %.2f GB free", device, needed / 1e9, free / 1e9)
    return device


def fill(fields: Tensor, reader: FieldReader, hours: np.ndarray) -> np.ndarray:
    """把 hours 读进 fields (N, C, H, W)；返回 Resident.whole。"""
    wire, frame = reader.wire(), fields[0].nbytes
    whole = np.ones(hours.size, dtype=bool)
    step = max(1, BLOCK_BYTES // frame)
    buffer = wire.empty(min(step, hours.size))
    with tqdm(total=fields.nbytes, desc=f"onto {fields.device}", unit="B", unit_scale=True, leave=False) as bar:
        for first in range(0, hours.size, step):
            part = hours[first : first + step]
            block = buffer[: part.size]
            for i, _ in wire.load(part.tolist(), as_array(block)):
                whole[first + i] = False
            place = fields[first : first + part.size]
            place.copy_(block)
            if wire.raw:
                reader.spec.standardize_(place)  # 现在就做，免得每一批再做
            bar.update(part.size * frame)
    return whole


def upload(values: Tensor, device: torch.device) -> Tensor:
    """小张量送上设备；锁页的才能异步，不锁页主机就要等设备做完手里的。"""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def free_memory(device: torch.device) -> int:
    """字节。"""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def keep_in_memory(store: Store, hours: np.ndarray) -> None:
    """hours: 要留住的小时；只读所选的通道。

    Raises:
        ValueError: 放不下；说出要多少、有多少。
    """
    plan, rows = store.plan, np.unique(np.searchsorted(store.hours, hours))
    field = plan.shape[2] * plan.shape[3] * FILE_TYPES[plan.dtype].itemsize
    needed, available = rows.size * len(store.picks) * field, available_memory()
    if needed > available:
        raise ValueError(
            f"data.residency = memory needs {needed / 1e9:.2f} GB, {available / 1e9:.2f} GB of memory are available "
            "here; use disk, fewer channels or years, or a store packed with --dtype float16"
        )
    log.info("residency: memory, %.2f GB of %.2f GB available", needed / 1e9, available / 1e9)
    with tqdm(total=needed, desc="into memory", unit="B", unit_scale=True, leave=False) as bar:
        for number in np.unique(rows // plan.chunk_rows).tolist():
            places = rows[rows // plan.chunk_rows == number] % plan.chunk_rows
            with (store.path / "fields" / chunk_name(number, 4)).open("rb") as file:
                for place in places.tolist():
                    for _, picks in store.runs:
                        size = (picks.stop - picks.start) * field
                        bar.update(len(os.pread(file.fileno(), size, (place * plan.shape[1] + picks.start) * field)))


def available_memory() -> int:
    """字节；页缓存里可以让出的也算，容器（cgroup 第 2 版、第 1 版）给的限额也算。"""
    lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    for folder, (limit, used, cached) in LIMITS.items():
        text = (CGROUP / folder / limit).read_text().strip() if (CGROUP / folder / limit).is_file() else "max"
        if text != "max":
            statistics = dict(line.split() for line in (CGROUP / folder / "memory.stat").read_text().splitlines())
            used_now = int((CGROUP / folder / used).read_text())
            available = min(available, int(text) - used_now + int(statistics[cached]))
    return available
