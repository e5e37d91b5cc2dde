"""dataset.py pack：把目录树打成存档。

打的是三个划分所涉及的整年、所选通道、每 interval_hours 小时。中断后原样再跑一次就接着做，做完的块不重做；
划分往后放宽再跑一次就是追加。布局见 util/data/store_origin.py。
`--scheduler [ADDRESS]`：由 dask 分给许多机器，写出的字节相同。
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from util.cli import Parser
from util.config import load_config
from util.files.zarr_metadata import FILE_TYPES
from util.workers import add_worker_options, check_worker_options, recorded_command


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dataset.py pack", description="Pack a tree of .npy fields into one Zarr folder for data.source=store."
    )
    parser.add_argument("--config", required=True, help="run YAML; its channels, years and interval are packed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key, e.g. data.root=data/sample")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="STORE", help="the folder to write, go on with or grow"
    )
    parser.add_argument("--dtype", choices=FILE_TYPES, default="float32", help="how values are stored (%(default)s)")
    add_worker_options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """
    Raises:
        ValueError: 配置、参数、数据或存档不对。
    """
    arguments = make_parser().parse_args(argv)
    check_worker_options(arguments.workers, arguments.scheduler)
    from util.logger import setup_logging
    from util.packing.pack import pack  # torch：--help 用不着等它

    setup_logging(None)
    config = load_config(arguments.config, arguments.overrides).data
    command = recorded_command("pack", argv)
    pack(config, arguments.out, arguments.dtype, arguments.workers, command, arguments.scheduler)
    return 0
