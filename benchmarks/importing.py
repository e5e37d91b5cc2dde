"""导入的速度：`python -m benchmarks.importing --out FOLDER [--days 180] [--rounds 3]`。

造同样的场（5 个变量，128 × 256，6 小时一个；NetCDF 里是 zlib 压缩的 int16，Zarr 里一个时刻一块）；几种写法各在自己的
进程里轮流做几遍，取中位数；峰值内存是那个进程的：

    plain    xarray 逐时刻、逐变量取一个场，np.save 一个文件：最直接的写法
    tree     dataset.py import --root
    store    dataset.py import --store：换算好的块先留在盘上，求得统计量再打包
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from util.cli import run_command

HEIGHT, WIDTH = 128, 256
NAMES = ("t2m", "u10", "v10", "sp", "tp")
STEP = 1 / 1024
FIRST = "2019-01-01"
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.importing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="folder for the sources and what is made from them")
    parser.add_argument("--days", type=int, default=180, help="days of 6-hourly fields, at least 10 (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, the median counts (%(default)s)")
    parser.add_argument("--plain", nargs=2, type=Path, metavar=("SOURCE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        return write_plainly(*args.plain)
    if args.days < 10 or args.rounds < 1:
        raise ValueError("--days must be at least 10, --rounds at least 1")
    dates = pd.date_range(FIRST, periods=4 * args.days, freq="6h")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # 子进程的峰值内存从父进程的算起，这里要小
        sources = pool.submit(write_sources, args.out, dates).result()
    for kind, source in sources.items():
        ways = commands(args.out, kind, source, dates)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, (command, made) in ways.items():
                shutil.rmtree(made, ignore_errors=True)
                found[name].append(timed(command))
        plain = statistics.median(seconds for seconds, _ in found["plain"])
        for name, results in found.items():
            seconds, peaks = zip(*results, strict=True)
            median = statistics.median(seconds)
            fields = len(dates) * len(NAMES) / median
            print(f"{kind:7} {name:6} {median:7.2f} s {fields:7.0f} fields/s {plain / median:5.2f} x plain"
                  f" {max(peaks):6.0f} MiB")  # fmt: skip
    return 0


def write_sources(out: Path, dates: pd.DatetimeIndex) -> dict[str, Path]:
    """同样的场写成两种格式；已经在的重写。"""
    rng = np.random.default_rng(0)
    smooth = np.cos(np.linspace(0, 6, HEIGHT))[:, None] * np.cos(np.linspace(0, 12, WIDTH))
    fields = {
        name: (
            ("time", "latitude", "longitude"),
            (280 + 20 * smooth + rng.standard_normal((len(dates), HEIGHT, WIDTH))).astype(np.float32),
            {"units": "1"},
        )
        for name in NAMES
    }
    latitude = 89.296875 - 1.40625 * np.arange(HEIGHT)
    longitude = 1.40625 * np.arange(WIDTH)
    dataset = xr.Dataset(fields, {"time": dates, "latitude": latitude, "longitude": longitude})
    out.mkdir(parents=True, exist_ok=True)
    netcdf, zarr = out / "source.nc", out / "source.zarr"
    packed = {"dtype": "int16", "scale_factor": STEP, "add_offset": 280.0, "_FillValue": -32767}
    squeezed = {"zlib": True, "complevel": 1, "chunksizes": (1, HEIGHT, WIDTH)}
    dataset.to_netcdf(netcdf, encoding=dict.fromkeys(NAMES, packed | squeezed))
    shutil.rmtree(zarr, ignore_errors=True)
    dataset.chunk(time=1).to_zarr(zarr, zarr_format=2, consolidated=True)
    return {"NetCDF": netcdf, "Zarr": zarr}


def commands(out: Path, kind: str, source: Path, dates: pd.DatetimeIndex) -> dict[str, tuple[list[str], Path]]:
    """各种写法的命令，与它写出来的文件夹。"""
    days = dates.normalize().unique().strftime("%Y-%m-%d")
    train, val, test = (days[0], days[-7]), (days[-6], days[-4]), (days[-3], days[-1])
    words = [word for name in NAMES for word in ("--variable", f"{name}={name}")]
    words += ["--train", *train, "--val", *val, "--test", *test]
    made = {name: out / f"{kind.lower()}-{name}" for name in ("plain", "tree", "store")}
    importing = [sys.executable, "dataset.py", "import", "--source", str(source), *words]
    itself = [sys.executable, "-m", "benchmarks.importing", "--out", str(out)]
    return {
        "plain": ([*itself, "--plain", str(source), str(made["plain"])], made["plain"]),
        "tree": ([*importing, "--root", str(made["tree"])], made["tree"]),
        "store": ([*importing, "--store", str(made["store"])], made["store"]),
    }


def timed(command: list[str]) -> tuple[float, float]:
    """(秒, 峰值内存 MiB)；命令出错就停。前一个命令还没有落盘的先落盘，免得算在这一个头上。"""
    os.sync()
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"{' '.join(command)} ended with {process.returncode}")
    return seconds, usage.ru_maxrss * 1024 / MIB


def write_plainly(source: Path, folder: Path) -> int:
    """一个场一个 .npy。"""
    folder.mkdir(parents=True)
    dataset = xr.open_zarr(source) if source.is_dir() else xr.open_dataset(source)
    with dataset:
        for i in range(dataset.sizes["time"]):
            for name in NAMES:
                np.save(folder / f"{name}-{i:05d}.npy", dataset[name].isel(time=i).values.astype(np.float32))
    return 0


if __name__ == "__main__":
    run_command(main)
