"""把目录树打成存档：`python -m util.data.pack --config config/X.yaml --out STORE [key=value ...]`。

打的是三个划分所涉及的整年、所选通道、每 interval_hours 小时。中断后原样再跑一次就接着做，做完的块不重做；
划分往后放宽再跑一次就是追加。`--verify --out STORE` 只核对校验和。布局见 util/data/store.py。
`--scheduler [ADDRESS]`：由 dask 分给许多机器，写出的字节相同。
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from util.cli import run_command
from util.config import load_config
from util.files.zarr_metadata import FILE_TYPES
from util.workers import add_worker_options, check_worker_options, recorded_command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m util.data.pack",
        description="Pack a tree of .npy fields into one Zarr folder for data.source=store.",
    )
    parser.add_argument("--config", help="run YAML; its channels, years and interval are packed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key, e.g. data.root=data/sample")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="STORE", help="the folder to write, go on with or grow"
    )
    parser.add_argument("--dtype", choices=FILE_TYPES, default="float32", help="how values are stored (%(default)s)")
    add_worker_options(parser)
    parser.add_argument("--verify", action="store_true", help="write nothing: compare every file with its checksum")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """命令行入口，返回退出码：--verify 发现坏文件时为 1。

    Raises:
        ValueError: 配置、参数、数据或存档不对。
    """
    arguments = parse_arguments(argv)
    check_worker_options(arguments.workers, arguments.scheduler)
    from util.logger import setup_logging
    from util.packing.finish_store import verify
    from util.packing.packing import pack  # torch：--help 用不着等它

    if arguments.verify:
        lines = verify(arguments.out, arguments.workers)
        repair = f"{len(lines)} files are damaged; remove them and run the packing again, it makes these anew"
        print(*lines, f"{arguments.out}: {repair if lines else 'every checksum is right'}", sep="\n")
        return 1 if lines else 0
    if arguments.config is None:
        raise ValueError("--config is needed to pack; only --verify goes without")
    setup_logging(None)
    config = load_config(arguments.config, arguments.overrides).data
    command = recorded_command("util.packing.pack", argv)
    pack(config, arguments.out, arguments.dtype, arguments.workers, command, arguments.scheduler)
    return 0


if __name__ == "__main__":
    run_command(main)
