"""扫描目录树的文件名，不读文件：`python -m util.data.scan --config config/X.yaml [key=value ...] [--rebuild]`。

每个通道有多少文件、抽样时刻里缺多少，哪些空缺补不上，用了多久。索引存着，训练时直接读回；
它以各年份文件夹的修改时间为键，有的网络盘不更新这个时间：--rebuild 不看存着的，重新扫描、重新存。
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np

from util.calendar import time_text, years_text
from util.cli import aligned, run_command
from util.config import DataConfig, load_config
from util.data.index import Index, describe_gaps, find_segments, sampled_hours, scan, split_hours, split_years
from util.data.tree_files import select_channels


def summarize(config: DataConfig, index: Index) -> list[str]:
    """每个通道一行，每处补不上的空缺一行。"""
    hours = np.concatenate([sampled_hours(span, config.interval_hours) for span in split_hours(config).values()])
    wanted = index.present[:, hours - index.start]  # (C, N)
    rows = [["channel", "files", "wanted", "missing", "first", "last"]]
    for channel, there, held in zip(index.channels, index.present, wanted, strict=True):
        places = np.flatnonzero(there)
        ends = [time_text(int(p) + index.start) for p in (places[0], places[-1])] if places.size else ["-", "-"]
        rows.append([channel, str(places.size), str(held.size), str(int((~held).sum())), *ends])
    gaps = describe_gaps(index, config, find_segments(index, config))
    count = f"{len(gaps)} gaps longer than data.max_gap_hours = {config.max_gap_hours}"
    return [*aligned(rows), count, *(f"  {gap}" for gap in gaps)]


def main(argv: Sequence[str] | None = None) -> int:
    """命令行入口。"""
    parser = argparse.ArgumentParser(
        prog="python -m util.data.scan", description="List which files of a tree are there, by name."
    )
    parser.add_argument("--config", required=True, help="run YAML; its channels and the years of its splits are listed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key, e.g. data.root=data/sample")
    parser.add_argument("--rebuild", action="store_true", help="list the folders anew and rewrite the cached index")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides).data
    channels, years = select_channels(config), split_years(config)
    start = time.perf_counter()
    index = scan(config, channels, years, arguments.rebuild)
    seconds = time.perf_counter() - start
    print(*summarize(config, index), sep="\n")
    print(f"{int(index.present.sum())} files of {len(channels)} channels in {years_text(years)}: {seconds:.2f} s")
    return 0


if __name__ == "__main__":
    run_command(main)
