"""dataset.py statistics：训练日期内各通道的统计量；--write 写下来，已有的要 --overwrite。

--overwrite 换下的 mean_std.json 里有变化的标准差，就连它一起重算：既不丢，也不留下旧的。
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext

from util.cli import Parser
from util.config import load_config
from util.data.tree_files import holds_tendency
from util.inspection.statistics import (
    channel_statistics,
    channels_of,
    home,
    owned_home,
    refuse_written,
    table,
    write_all,
)
from util.workers import add_worker_options, check_worker_options


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dataset.py statistics",
        description="Mean, std, min and max of every channel of a tree over the training dates.",
    )
    parser.add_argument("--config", required=True, help="run YAML; its channels and training dates are measured")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key, e.g. data.root=data/sample")
    parser.add_argument("--write", action="store_true", help="write mean_std.json and min_max.json of every channel")
    parser.add_argument("--overwrite", action="store_true", help="with --write: replace those that exist")
    parser.add_argument(
        "--tendency",
        action="store_true",
        help="also the std of the change over data.interval_hours: tendency_std in mean_std.json",
    )
    add_worker_options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = make_parser().parse_args(argv)
    check_worker_options(arguments.workers, arguments.scheduler)
    if arguments.overwrite and not arguments.write:
        raise ValueError("--overwrite needs --write; without it nothing is written")
    config = load_config(arguments.config, arguments.overrides).data
    channels = channels_of(config)
    with owned_home(config, channels) if arguments.write else nullcontext():
        if arguments.write and not arguments.overwrite:
            refuse_written(config, channels)
        tendency = arguments.tendency or (arguments.overwrite and holds_tendency(home(config), channels))
        results = channel_statistics(config, arguments.workers, arguments.scheduler, tendency)
        print(table(config, results))
        if arguments.write:
            write_all(config, results, tendency)
            print(f"mean_std.json and min_max.json of {len(results)} channels written to {home(config)}")
    return 0
