"""造一棵量速度用的目录树：`python -m benchmarks.random_tree --root TREE --yaml FILE.yaml`。

9 个通道、128 × 256 的标准正态数，头一年训练、末两年验证与测试；只有大小与布局像 ERA5。
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import yaml
from tqdm import tqdm

from util.calendar import year_start
from util.cli import run_command
from util.data.index import sampled_hours
from util.data.tree_files import field_path, write_field, write_mean_std

HEIGHT, WIDTH = 128, 256
VARIABLES = dict.fromkeys(("t2m", "tp", "u10", "v10"), "single") | {name: ["level_00"] for name in "rtuvz"}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.random_tree", description="Write a tree of random fields, 9 channels of 128 x 256."
    )
    parser.add_argument("--root", required=True, help="the tree to write")
    parser.add_argument("--yaml", type=Path, required=True, help="the data-set YAML to write")
    parser.add_argument("--years", default="1979-1981", help="first and last year, at least three (%(default)s)")
    parser.add_argument("--interval", type=int, default=12, help="hours between files (%(default)s)")
    args = parser.parse_args()
    first, _, last = args.years.partition("-")
    years = list(range(int(first), int(last or first) + 1))
    if len(years) < 3:
        raise ValueError(f"--years {args.years}: at least three, for training, validation and test")
    channels = [name if levels == "single" else f"{name}_{levels[0]}" for name, levels in VARIABLES.items()]
    hours = sampled_hours(range(year_start(years[0]), year_start(years[-1] + 1)), args.interval, 0)
    write_tree(args.root, channels, (HEIGHT, WIDTH), tqdm(hours.tolist()))
    values = {
        "root": args.root,
        "variables": VARIABLES,
        "units": {"r": "%"},
        "pressure_hpa": [500.0],
        "latitude": {"first": 89.296875, "step": -1.40625, "count": HEIGHT},
        "longitude": {"first": 0.0, "step": 1.40625, "count": WIDTH},
        "interval_hours": args.interval,
        "splits": {"train": [years[0], years[-3]], "val": [years[-2]] * 2, "test": [years[-1]] * 2},
        "standardize": "yes",
    }
    args.yaml.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return 0


def write_tree(root: str | Path, channels: Sequence[str], grid: tuple[int, int], hours: Iterable[int]) -> None:
    """这些钟点（1970 年以来）的随机场，均值 0.5、标准差 2；内容轮着用：量的是读写，不是随机数。"""
    pool = np.random.default_rng(0).standard_normal((16, *grid), dtype=np.float32)
    for channel in channels:
        write_mean_std(root, channel, 0.5, 2.0, -10.0, 10.0)
    for i, hour in enumerate(hours):
        for c, channel in enumerate(channels):
            write_field(field_path(root, channel, hour), 0.5 + 2 * pool[(i + 5 * c) % len(pool)])


if __name__ == "__main__":
    run_command(main)
