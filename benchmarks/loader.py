"""读取的速度：`python -m benchmarks.loader --config config/X.yaml data.store=STORE [--batch 8] [--rounds 5] [--cold]`。

同一批随机的训练窗口，一个进程，一次一批，几种读法轮流做几遍，各取中位数：

    plain    每个文件 np.load 一次，叠成 (t, H, W, C)：最直接的写法
    tree     data.source = tree 的 WindowDataset.wire：显卡上训练时读取进程做的，存着的样子，标准化在设备上
    scaled   同上，读取进程里标准化：处理器上训练时的
    store    data.source = store 的 WindowDataset.wire
    new      内存里同样多的字节抄进新要来的内存：凡是每一批给出自己的内存的，都不会更快
    memcpy   抄进同一块缓冲区：上限
    device   data.residency = device：从设备上的一份取（没有显卡时就是内存里的一份）
    disk     --cold 时：从盘上顺序读同样多的字节，冷的缓存的上限

--steps N 接着训练 N 步，量等数据的份额（benchmarks/step/sources.py）。

先各读一遍不计，所以量的是热的页缓存；--cold 每一遍之前让系统丢掉这些文件的缓存（posix_fadvise，不需要特权）。
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.step.sources import compare_steps
from benchmarks.step.sources import show as show_steps
from util.batch import Batch
from util.cli import run_command
from util.config import DataConfig, load_config
from util.data.batches import all_starts, split_batches
from util.data.dataset import WeatherData, open_data
from util.data.store_origin import Store
from util.data.tree_files import field_path

Read = Callable[[list[int]], object]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="run YAML with data.root and data.store of the same fields")
    parser.add_argument("--windows", type=int, default=200, help="windows read by each way in each round (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="windows read at once (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, the median counts (%(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="also train this many steps, real against synthetic data")
    parser.add_argument("--step-rounds", type=int, default=3, help="rounds of --steps (%(default)s)")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before every reading")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the config")
    args = parser.parse_intermixed_args()
    if min(args.windows, args.batch, args.rounds, args.step_rounds) < 1:
        raise ValueError("--windows, --batch and the rounds must be at least 1")
    torch.set_num_threads(1)
    run = load_config(args.config, args.overrides)
    config = run.data
    if config.store is None:
        raise ValueError("data.store is needed, a packed copy of data.root: python dataset.py pack --help")
    data = {source: open_data(DataConfig(**{**config.model_dump(), "source": source})) for source in ("tree", "store")}
    tree = data["tree"]
    every = np.array([s for s in all_starts(tree.segments["train"], tree.spec.window) if complete(tree, s)])
    if not every.size:
        raise ValueError("no training window without a gap: plain np.load needs every file")
    starts = np.random.default_rng(0).choice(every, min(args.windows, every.size), replace=False)
    batches = split_batches(starts, args.batch)
    size = tree.spec.window * tree.spec.num_channels * tree.spec.height * tree.spec.width * 4
    ways: dict[str, Read] = {
        "plain": lambda batch: np.stack([plain(tree, start) for start in batch]),
        "tree": tree.windows.wire,
        "scaled": tree.windows.__getitems__,
        "store": data["store"].windows.wire,
        "new": memcpy(size, len(starts), None),
        "memcpy": memcpy(size, len(starts), np.zeros((args.batch, size), dtype=np.uint8)),
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resident = open_data(config.model_copy(update={"source": "store", "residency": "device"}), device=device).resident
    assert resident is not None
    windows = data["store"].windows
    ways["device"] = lambda batch: wait(resident.batch(windows, batch))
    files = sorted({path for start in starts.tolist() for path in window_files(tree, start)})
    stored = sorted(Path(str(config.store)).glob("fields/[0-9]*"))
    files += stored
    if args.cold:
        ways["disk"] = sequential(stored, size)
    drop = (lambda: drop_cache(data["store"], files)) if args.cold else (lambda: None)
    show(measure(ways, batches, args.rounds, drop), len(starts), size)
    if args.steps:
        show_steps(compare_steps(run, args.steps, args.step_rounds), args.steps, run)
    return 0


def complete(data: WeatherData, start: int) -> bool:
    """各文件按名字都在。"""
    reader, spec = data.windows.reader, data.spec
    return all(reader.available(start + i * spec.interval_hours) for i in range(spec.window))


def plain(data: WeatherData, start: int) -> np.ndarray:
    """(t, H, W, C)：不查、不补、不标准化。"""
    paths = np.reshape(np.array(window_files(data, start), dtype=object), (data.spec.window, -1))  # (t, C)
    return np.stack([np.stack([np.load(path) for path in row], axis=-1) for row in paths])


def window_files(data: WeatherData, start: int) -> list[Path]:
    hours = start + data.spec.interval_hours * np.arange(data.spec.window)
    return [field_path(data.config.root, channel, hour) for hour in hours.tolist() for channel in data.spec.channels]


def memcpy(size: int, windows: int, target: np.ndarray | None) -> Read:
    """源至多 1 GB，轮着用，不会留在处理器的缓存里；target 为 None 时每次要一块新的。"""
    source = np.ones((min(windows, max(2, 10**9 // size)), size), dtype=np.uint8)
    places = itertools.cycle(range(len(source)))

    def read(batch: list[int]) -> None:
        out = np.empty((len(batch), size), dtype=np.uint8) if target is None else target
        for row in range(len(batch)):
            out[row] = source[next(places)]

    return read


def wait(batch: Batch) -> Batch:
    """显卡上的要等它做完。"""
    if batch.history.is_cuda:
        torch.cuda.synchronize(batch.history.device)
    return batch


def sequential(files: list[Path], size: int) -> Read:
    """一个接一个地读文件，一个窗口读 size 字节；每个文件打开时丢掉它的页缓存，绕回来时又是冷的。"""

    def blocks() -> Iterator[int]:
        buffer = bytearray(8 * 2**20)
        for path in itertools.cycle(files):
            with path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while count := file.readinto(buffer):
                    yield count

    stream, ahead = blocks(), 0

    def read(batch: list[int]) -> None:
        nonlocal ahead  # 上一次多读的
        while ahead < len(batch) * size:
            ahead += next(stream)
        ahead -= len(batch) * size

    return read


def drop_cache(data: WeatherData, files: Iterable[Path]) -> None:
    """让系统丢掉这些文件的页；还映射着的丢不掉，所以先放开。"""
    origin = data.windows.reader.origin
    assert isinstance(origin, Store)
    origin.maps.clear()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    ways: dict[str, Read], batches: list[list[int]], rounds: int, before: Callable[[], None]
) -> dict[str, list[float]]:
    """各种读法轮流做，免得机器忙闲偏向其中一种；第一遍不计。返回每一遍的秒数。"""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, read in ways.items():
            before()
            begin = time.perf_counter()
            for batch in batches:
                read(batch)
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def show(seconds: dict[str, list[float]], windows: int, size: int) -> None:
    rates = {name: windows / statistics.median(times) for name, times in seconds.items()}
    print(f"{windows} windows of {size / 1e6:.1f} MB (float32); medians of {len(seconds['plain'])} rounds, one process")
    print(f"{'':>8} {'windows/s':>10} {'GB/s':>7} {'/ plain':>8} {'/ memcpy':>9}   slowest to fastest round")
    for name, rate in rates.items():
        spread = f"{windows / max(seconds[name]):.0f} to {windows / min(seconds[name]):.0f}"
        ratios = f"{rate / rates['plain']:>8.2f} {rate / rates['memcpy']:>9.2f}"
        print(f"{name:>8} {rate:>10.1f} {rate * size / 1e9:>7.2f} {ratios}   {spread}")


if __name__ == "__main__":
    run_command(main)
