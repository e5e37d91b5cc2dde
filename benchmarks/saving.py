"""NetCDF 的块与压缩怎样选：`python -m benchmarks.saving [--times 1000] [key=value ...]`。

quickstart 测试年的场，像评测那样一批 16 个时刻地写：各种块的大小、压缩，变量一直开着或每批关上一次。
各写法轮流写 --rounds 遍，取处理器时间最少的一遍（别的负载不算在内）；压成多大也是这些场的。
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from util.cli import aligned, run_command
from util.config import load_config
from util.data.dataset import open_data

CONFIG = "config/quickstart.yaml"
BATCH = 16
GZIP = {"compression": "gzip", "compression_opts": 1, "shuffle": True}


class Choice(NamedTuple):
    """rows 个时刻一块；held: 变量一直开着。"""

    name: str
    rows: int
    options: dict[str, Any]
    held: bool = True


CHOICES = [
    Choice("no compression", 64, {}),
    Choice("no compression", 1, {}),
    Choice("lzf", 64, {"compression": "lzf", "shuffle": True}),
    Choice("gzip 1", 64, GZIP),
    Choice("gzip 1", 1, GZIP),
    Choice("gzip 1, closed after every batch", 64, GZIP, held=False),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=1000, help="fields of every channel to write")
    parser.add_argument("--rounds", type=int, default=3, help="take turns this often")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"overrides of {CONFIG}")
    args = parser.parse_intermixed_args()
    data = open_data(load_config(CONFIG, args.overrides).data)
    hours = np.concatenate(data.segments["test"])[: args.times]
    standardized = data.windows.reader.empty(len(hours), 1)[:, 0]  # (N, C, H, W)
    data.windows.reader.frames(hours.tolist(), standardized.numpy())
    fields = data.spec.to_physical(standardized).numpy()
    found = [[measure(choice, fields) for choice in CHOICES] for _ in range(args.rounds)]
    rows = [["", "times a chunk", "MB/s", "size"]]
    for choice, rounds in zip(CHOICES, zip(*found, strict=True), strict=True):
        seconds, size = min(rounds)
        rows.append(
            [choice.name, str(choice.rows), f"{fields.nbytes / 1e6 / seconds:.0f}", f"{size / fields.nbytes:.2f}"]
        )
    print("\n".join(aligned(rows)))
    return 0


def measure(choice: Choice, fields: np.ndarray) -> tuple[float, int]:
    """(处理器时间, 文件的字节)；fields (N, C, H, W)，一个通道一个变量。"""
    count, channels, *grid = fields.shape
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fields.nc"
        begin = time.process_time()
        with h5py.File(path, "w") as file:
            for c in range(channels):
                shape, chunks = (count, *grid), (min(choice.rows, count), *grid)
                file.create_dataset(str(c), shape, "f4", chunks=chunks, fillvalue=np.nan, **choice.options)
            held = [file[str(c)] for c in range(channels)] if choice.held else None
            for row in range(0, count, BATCH):
                for c in range(channels):
                    variable: Any = held[c] if held else file[str(c)]
                    variable[row : row + BATCH] = fields[row : row + BATCH, c]
                    del variable
        return time.process_time() - begin, path.stat().st_size


if __name__ == "__main__":
    run_command(main)
