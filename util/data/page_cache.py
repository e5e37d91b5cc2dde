"""data.residency = memory：训练开始之前把存档里要用的部分顺序读一遍，留在操作系统的页缓存里。

存档是映射着读的，页缓存里的那一份由一台机器上的全部读取进程、全部训练进程共用，不必另抄一份；第一轮就不再是随机读盘。
页没有锁住（mlock 的限额通常只有几 MB）：别的程序要内存时，系统可以丢掉一些，再用到时从盘上读，数不会错。
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from util.data.store_origin import Store
from util.files.zarr_metadata import FILE_TYPES, chunk_name

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
log = logging.getLogger("ar_pred")


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
    """字节；页缓存里可以让出的也算，容器（cgroup 第 2 版）给的限额也算。"""
    lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limit = (CGROUP / "memory.max").read_text().strip() if (CGROUP / "memory.max").is_file() else "max"
    if limit == "max":
        return available
    used = int((CGROUP / "memory.current").read_text())
    cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
    return min(available, int(limit) - used + int(cached))
