"""dataset.py sample：写一棵样例目录树。参数写错也是一行，没有 usage。"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from util.cli import Parser
from util.sample.tree import MARKER, Settings, already_there, channels_of, create
from util.sample.weather import PRESSURES
from util.strict import nearest

INTERVALS = (1, 2, 3, 4, 6, 8, 12, 24)  # 整除 24 的
SHOWN = 20  # 损坏的文件逐行列出的上限，全部名单在标记里


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dataset.py sample",
        description="Write a sample tree of .npy fields from a small simulation of atmospheric turbulence.",
    )  # fmt: skip
    parser.error = _refuse
    add = parser.add_argument
    add("--root", required=True, help="folder to write, e.g. data/sample")
    add("--grid", default="32x64", metavar="HxW", help="rows x columns of the global grid (default: 32x64)")
    add("--years", default="1979-1982", help="first and last year (default: 1979-1982)")
    add("--train-years", help="years of the statistics (default: all but the last two)")
    add("--interval", type=int, choices=INTERVALS, default=6, help="hours between files (default: 6)")
    add(
        "--first-hour", type=int, default=0, metavar="HOUR", help="first hour of the day, below --interval (default: 0)"
    )
    add("--levels", default="level_00", help="all, or names such as level_00,level_07 (default: level_00)")
    add("--seed", type=int, default=42, help="seed of planet and weather (default: 42)")
    add("--standardize", action="store_true", help="write standardised files (default: physical units)")
    add("--drop", type=float, default=0.0, metavar="SHARE", help="delete this share of the files")
    add("--corrupt", type=float, default=0.0, metavar="SHARE", help="corrupt this share of the files")
    add("--overwrite", action="store_true", help="replace another sample in --root")
    return parser


def read_arguments(argv: Sequence[str]) -> tuple[Path, Settings, bool]:
    """命令行 → (root, 参数, 是否覆盖)。

    Raises:
        ValueError: 写法不对；给出正确的写法。
    """
    args = make_parser().parse_args(argv)
    grid = _pair("--grid", args.grid, r"(\d{1,4})x(\d{1,4})", "32x64")
    years = _years("--years", args.years)
    train = _years("--train-years", args.train_years) if args.train_years else (years[0], max(years[0], years[1] - 2))
    if min(grid) < 8:
        raise ValueError(f"--grid {args.grid}: at least 8x8")
    if not years[0] <= train[0] <= train[1] <= years[1]:
        raise ValueError(f"--train-years {train[0]}-{train[1]}: must lie within --years {years[0]}-{years[1]}")
    if not (min(args.drop, args.corrupt) >= 0 and args.drop + args.corrupt <= 1):
        raise ValueError(f"--drop {args.drop} --corrupt {args.corrupt}: shares of at least 0, together at most 1")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: must not be negative")
    if not 0 <= args.first_hour < args.interval:
        raise ValueError(f"--first-hour {args.first_hour}: 0 to {args.interval - 1}, below --interval {args.interval}")
    settings = Settings(
        grid, years, train, args.interval, _levels(args.levels), args.seed, args.standardize, args.drop, args.corrupt,
        args.first_hour,
    )  # fmt: skip
    return Path(args.root).resolve(), settings, args.overwrite


def main(argv: Sequence[str]) -> int:
    root, settings, overwrite = read_arguments(argv)
    start = time.monotonic()
    marker = None if already_there(root, settings, overwrite) else create(root, settings, overwrite)
    if marker is None:
        print(f"sample: already there, {root}")
        return 0
    listed = [f"dropped {path}" for path in marker["dropped"]]
    listed += [f"corrupted ({kind}) {path}" for path, kind in marker["corrupted"].items()]
    print(*listed[:SHOWN], sep="\n", end="\n" if listed else "")
    if len(listed) > SHOWN:
        print(f"... and {len(listed) - SHOWN} more, all in {root / MARKER}")
    span, train = ("-".join(map(str, years)) for years in (settings.years, settings.train_years))
    unit = "standardised" if settings.standardize else "physical units"
    height, width = settings.grid
    print(
        f"sample: {marker['files']} files, {len(channels_of(settings))} channels of {height} x {width} every "
        f"{settings.interval} h, {span}, {unit}, statistics of {train}, in {root} ({time.monotonic() - start:.0f} s)"
    )
    return 0


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _pair(option: str, text: str, pattern: str, example: str) -> tuple[int, int]:
    match = re.fullmatch(pattern, text)
    if not match:
        raise ValueError(f"{option} {text}: write it like {example}")
    return int(match[1]), int(match[2])


def _years(option: str, text: str) -> tuple[int, int]:
    first, last = _pair(option, text if "-" in text else f"{text}-{text}", r"(\d{4})-(\d{4})", "1979-1982")
    if not 1 <= first <= last < 9999:
        raise ValueError(f"{option} {text}: the first year must not be after the last")
    return first, last


def _levels(text: str) -> tuple[str, ...]:
    names = [f"level_{i:02d}" for i in range(len(PRESSURES))]
    chosen = names if text == "all" else text.split(",")
    for name in chosen:
        if name not in names:
            raise ValueError(f"--levels {text}: no level {name!r}; {nearest(name, names)} (or all)")
    return tuple(name for name in names if name in chosen)
