"""dataset.py verify：逐个文件核对存档的校验和。退出码：0 全对，1 有坏的。"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from util.cli import Parser
from util.workers import add_workers_option, check_worker_options


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dataset.py verify", description="Compare every file of a packed store with its checksum; write nothing."
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="STORE", help="what dataset.py pack --out has written"
    )
    add_workers_option(parser, "threads")
    return parser


def main(argv: Sequence[str]) -> int:
    """
    Raises:
        ValueError: 不是存档、没有打包完，或 store.json 自己坏了。
    """
    arguments = make_parser().parse_args(argv)
    check_worker_options(arguments.workers)
    from util.packing.verify import verify  # torch：--help 用不着等它

    lines = verify(arguments.out, arguments.workers)
    repair = f"{len(lines)} files are damaged; remove them and run the packing again, it makes these anew"
    print(*lines, f"{arguments.out}: {repair if lines else 'every checksum is right'}", sep="\n")
    return 1 if lines else 0
