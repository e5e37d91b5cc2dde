"""扫描的摘要（dataset.py scan）：每个通道有多少文件、抽样时刻里缺多少，哪些空缺补不上。"""

from __future__ import annotations

import numpy as np

from util.calendar import time_text
from util.cli import aligned
from util.config import DataConfig
from util.data.index import Index, describe_gaps, find_segments, sampled_hours, split_hours


def summarize(config: DataConfig, index: Index) -> list[str]:
    """每个通道一行，每处补不上的空缺一行。"""
    hours = np.concatenate([sampled_hours(span, *config.sampling) for span in split_hours(config).values()])
    wanted = index.present[:, hours - index.start]  # (C, N)
    rows = [["channel", "files", "wanted", "missing", "first", "last"]]
    for channel, there, held in zip(index.channels, index.present, wanted, strict=True):
        places = np.flatnonzero(there)
        ends = [time_text(int(p) + index.start) for p in (places[0], places[-1])] if places.size else ["-", "-"]
        rows.append([channel, str(places.size), str(held.size), str(int((~held).sum())), *ends])
    gaps = describe_gaps(index, config, find_segments(index, config))
    count = f"{len(gaps)} gaps longer than data.max_gap_hours = {config.max_gap_hours}"
    return [*aligned(rows), count, *(f"  {gap}" for gap in gaps)]
