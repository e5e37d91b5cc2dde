"""评测的内存与速度：`python -m benchmarks.evaluation [--windows 1000 4000] [key=value ...]`。

在示例数据上造一个没有训练过的 quickstart 模型，评测不同个数的窗口；每次一个子进程，量它的峰值匿名内存（RssAnon）。
读取在主进程里（workers = 0），所以量到的就是全部。
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from util.calendar import parse_time, time_text
from util.cli import run_command
from util.config import load_config

CONFIG = "config/quickstart.yaml"
FIRST_DAY = "1979-01-01"
SAMPLE_SECONDS = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", nargs="+", type=int, default=[1000, 4000], help="windows to evaluate")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"overrides of {CONFIG}")
    args = parser.parse_intermixed_args()
    print(f"{'windows':>8} {'RssAnon MiB':>12} {'seconds':>8} {'windows/s':>10}")
    peaks = []
    for windows in args.windows:
        with tempfile.TemporaryDirectory() as folder:
            peak, seconds = evaluate(windows, args.overrides, Path(folder))
        peaks.append(peak)
        print(f"{windows:>8} {peak / 1024:>12.1f} {seconds:>8.1f} {windows / seconds:>10.1f}", flush=True)
    print(f"largest / smallest RssAnon: {max(peaks) / min(peaks):.3f}")
    return 0


def evaluate(windows: int, overrides: list[str], folder: Path) -> tuple[int, float]:
    """评测 windows 个窗口；返回峰值 RssAnon（KiB）与用时（秒）。"""
    changes = [
        *split_overrides(windows),
        f"checkpoint.dir={folder}",
        f"log.dir={folder}",
        "log.wandb.mode=disabled",
        "log.figures=0",
        "run.name=bench",
        "run.device=cpu",
        "train.epochs=0",
        "train.preflight=false",
        "data.workers=0",
        "data.eval_stride=10000",
    ]
    log = folder / "output.txt"
    with log.open("w") as file:
        command = [sys.executable, "train.py", "--config", CONFIG, *changes, *overrides]
        if subprocess.run(command, stdout=file, stderr=file).returncode:
            raise ValueError(f"training failed: {log.read_text().strip().splitlines()[-1]}")
        checkpoint = folder / "bench/best.ckpt"
        begin = time.perf_counter()
        command = [sys.executable, "evaluate.py", "--checkpoint", str(checkpoint), "--out", str(folder / "out")]
        process = subprocess.Popen(command, stdout=file, stderr=file)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(SAMPLE_SECONDS)
        if process.returncode:
            raise ValueError(f"evaluation failed: {log.read_text().strip().splitlines()[-1]}")
    return peak, time.perf_counter() - begin


def split_overrides(windows: int) -> list[str]:
    """测试从第一天起恰好 windows 个窗口（按整天取），验证与训练在它后面。"""
    config = load_config(CONFIG)
    step, frames = config.data.interval_hours, config.data.frames_in + config.data.frames_out
    days = -(-(windows + frames - 1) * step // 24)
    first = parse_time(FIRST_DAY)
    spans = {"test": (0, days - 1), "val": (days, days + 9), "train": (days + 10, days + 49)}
    return [
        f"data.splits.{name}=[{', '.join(time_text(first + 24 * day)[:10] for day in span)}]"
        for name, span in spans.items()
    ]


def anonymous_memory(pid: int) -> int:
    """一个进程的 RssAnon，KiB；已经结束的为 0。"""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")]
    return int(found[0]) if found else 0


if __name__ == "__main__":
    run_command(main)
