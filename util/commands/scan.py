"""dataset.py scan：扫描目录树的文件名，不读文件。

索引存着，训练时直接读回；它以各年份文件夹的修改时间为键，有的网络盘不更新这个时间：
--rebuild 不看存着的，重新扫描、重新存。
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from util.calendar import years_text
from util.cli import Parser
from util.config import load_config
from util.data.index import scan, split_years
from util.data.tree_files import select_channels
from util.inspection.scan import summarize


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="dataset.py scan", description="List which files of a tree are there, by name.")
    parser.add_argument("--config", required=True, help="run YAML; its channels and the years of its splits are listed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key, e.g. data.root=data/sample")
    parser.add_argument("--rebuild", action="store_true", help="list the folders anew and rewrite the cached index")
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = make_parser().parse_args(argv)
    config = load_config(arguments.config, arguments.overrides).data
    channels, years = select_channels(config), split_years(config)
    start = time.perf_counter()
    index = scan(config, channels, years, arguments.rebuild)
    seconds = time.perf_counter() - start
    print(*summarize(config, index), sep="\n")
    print(f"{int(index.present.sum())} files of {len(channels)} channels in {years_text(years)}: {seconds:.2f} s")
    return 0
