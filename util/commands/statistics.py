"""dataset.py statistics：训练日期内各通道的统计量；--write 写下来，已有的要 --overwrite。"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from util.config import load_config
from util.inspection.statistics import channel_statistics, refuse_written, table, write_all
from util.workers import add_worker_options, check_worker_options


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dataset.py statistics",
        description="Mean, std, min and max of every channel of a tree over the training dates.",
    )
    parser.add_argument("--config", required=True, help="run YAML; its channels and training dates are measured")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key, e.g. data.root=data/sample")
    parser.add_argument("--write", action="store_true", help="write mean_std.json and min_max.json of every channel")
    parser.add_argument("--overwrite", action="store_true", help="with --write: replace those that exist")
    add_worker_options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = make_parser().parse_args(argv)
    check_worker_options(arguments.workers, arguments.scheduler)
    if arguments.overwrite and not arguments.write:
        raise ValueError("--overwrite needs --write; without it nothing is written")
    config = load_config(arguments.config, arguments.overrides).data
    if arguments.write and not arguments.overwrite:
        refuse_written(config)
    results = channel_statistics(config, arguments.workers, arguments.scheduler)
    print(table(config, results))
    if arguments.write:
        write_all(config, results)
        print(f"mean_std.json and min_max.json of {len(results)} channels written to {config.root}")
    return 0
