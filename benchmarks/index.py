"""索引的速度：`python -m benchmarks.index [--channels 9] [--years 6] [--folder DIR]`。

在 DIR（默认是系统的临时文件夹）里造一棵逐小时的树，文件都是空的，索引只看名字；量第一次扫描与从缓存起步，末了删掉。
树刚写完，文件夹的内容还在内存里：不含从盘上读它们的时间。
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

from util.calendar import hours_in_year, year_start
from util.cli import run_command
from util.config import Axis, DataConfig, Splits
from util.data.index import scan
from util.data.tree_files import field_path

FIRST_YEAR = 1979


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--channels", type=int, default=9, help="channels of the tree (%(default)s)")
    parser.add_argument("--years", type=int, default=6, help="years of hourly files of each channel (%(default)s)")
    parser.add_argument("--folder", help="where the tree is made and removed again (the system's temporary folder)")
    args = parser.parse_args()
    channels = [f"z_level_{level:02d}" for level in range(args.channels)]
    years = list(range(FIRST_YEAR, FIRST_YEAR + args.years))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        files = sum(touch_year(folder, channel, year) for channel in channels for year in years)
        point, dates = Axis(first=0.0, step=1.0, count=1), [str(FIRST_YEAR)] * 2  # 必填的；索引不看网格与划分
        config = DataConfig(
            root=folder,
            cache_dir=f"{folder}/cache",
            variables={"z": "all"},
            latitude=point,
            longitude=point,
            splits=Splits(train=dates, val=dates, test=dates),
            frames_in=1,
        )
        print(f"{files} files in {len(channels) * len(years)} folders")
        for name in ("scan", "cache"):
            begin = time.perf_counter()
            index = scan(config, channels, years)
            seconds = time.perf_counter() - begin
            assert int(index.present.sum()) == files
            print(f"{name:>6} {seconds:9.4f} s {files / seconds:14,.0f} files/s")
    return 0


def touch_year(root: str, channel: str, year: int) -> int:
    """一个通道一年的空文件；返回个数。"""
    first = field_path(root, channel, year_start(year))
    first.parent.mkdir(parents=True)
    folder = os.open(first.parent, os.O_RDONLY)
    for number in range(hours_in_year(year)):
        os.close(os.open(f"{year}-{number:04d}.npy", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    os.close(folder)
    return hours_in_year(year)


if __name__ == "__main__":
    run_command(main)
