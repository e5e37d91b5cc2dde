"""存档的查验：逐个文件核对校验和。"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from util.calendar import time_text
from util.files.store_files import TIMES, StorePlan, find_damage, read_hours, read_mark


def verify(store: Path, workers: int) -> list[str]:
    """逐个文件核对校验和；返回每个坏文件一行，块还说出它的时刻。

    Raises:
        ValueError: 不是存档、没有打包完，或 store.json 自己坏了。
    """
    content = read_mark(store)
    plan, files = StorePlan(**content["plan"]), content["files"]
    hours = read_hours(store, plan) if find_damage(store / TIMES, files[TIMES]) is None else np.zeros(0, dtype=np.int64)
    lines = []
    total = sum(path.stat().st_size for name in files if (path := store / name).is_file())
    bar = tqdm(total=total, desc="verify", unit="B", unit_scale=True)
    with bar, ThreadPoolExecutor(workers) as pool:  # 读盘与校验和都不占解释器的锁
        for name, fault in zip(files, pool.map(lambda n: find_damage(store / n, files[n]), files), strict=True):
            if fault:
                lines.append(f"{store / name}: {fault}{_times(plan, hours, name)}")
            bar.update((store / name).stat().st_size if fault != "missing" else 0)
    return lines


def _times(plan: StorePlan, hours: np.ndarray, name: str) -> str:
    """这个文件管着哪些时刻：块与它的邻居；别的文件、时刻自己坏了（hours 是空的），是空文本。"""
    match = re.fullmatch(r"fields/(\d+)[.0]*|pack/(\d+)\.raw", name)
    first = int(match[1] or match[2]) * plan.chunk_rows if match else hours.size
    held = hours[first : first + plan.chunk_rows]
    return f" (times {time_text(held[0])} to {time_text(held[-1])})" if held.size else ""
