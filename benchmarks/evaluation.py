"""评测的内存与速度：`python -m benchmarks.evaluation [--windows 1000 4000] [--members 1] [key=value ...]`。

在示例数据上造一个没有训练过的 quickstart 模型，评测不同个数的窗口。

* 内存：每次一个子进程，量它的峰值匿名内存（RssAnon）；读取在主进程里（workers = 0），所以量到的就是全部。
* 时间：同一个进程里轮流评测最少的那些窗口，不存场、存 NetCDF、存 Zarr、不存而问 --events；取中位数。与预报用去的相比：
  计分的循环是它的几倍，存场又多出几倍，--events 又多出几成。--members 的成员是初值扰动的。
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from lightning_fabric import Fabric

from engine.evaluation.evaluate import Trained, make_evaluation_fabric, make_task, provenance_of
from engine.evaluation.results import write_statistics
from engine.evaluation.saved_fields import open_zarr
from engine.evaluation.scoring import score
from engine.evaluation.task import Options, Task
from engine.loading import checkpoint_config, load_forecaster
from engine.progress import Progress
from models.interface import can_forecast
from util.calendar import parse_time, time_text
from util.checkpoint import load_checkpoint
from util.cli import aligned, run_command
from util.config import load_config
from util.data.dataset import open_data

CONFIG = "config/quickstart.yaml"
FIRST_DAY = "1979-01-01"
SAMPLE_SECONDS = 0.02
SAVES = ((), ("netcdf",), ("zarr",))
EVENTS = ("events",)  # 不存场，问 --events
PERTURB = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", nargs="+", type=int, default=[1000, 4000], help="windows to evaluate")
    parser.add_argument("--rounds", type=int, default=3, help="take turns this often")
    parser.add_argument("--members", type=int, default=1, help="members of the evaluated model, perturbed")
    parser.add_argument("--events", action="store_true", help="memory with --events")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"overrides of {CONFIG}")
    args = parser.parse_intermixed_args()
    more = [*("--members", str(args.members), "--perturb", str(PERTURB))] if args.members > 1 else []
    more += ["--events"] if args.events else []
    print(f"{'windows':>8} {'RssAnon MiB':>12} {'seconds':>8} {'windows/s':>10}")
    peaks = []
    for windows in args.windows:
        with tempfile.TemporaryDirectory() as folder:
            peak, seconds = evaluate(train(windows, args.overrides, Path(folder)), Path(folder), more)
        peaks.append(peak)
        print(f"{windows:>8} {peak / 1024:>12.1f} {seconds:>8.1f} {windows / seconds:>10.1f}", flush=True)
    print(f"largest / smallest RssAnon: {max(peaks) / min(peaks):.3f}")
    with tempfile.TemporaryDirectory() as folder:
        print(
            "\n".join(
                aligned(shares(train(min(args.windows), args.overrides, Path(folder)), args.rounds, args.members))
            )
        )
    return 0


def train(windows: int, overrides: list[str], folder: Path) -> Path:
    """没有训练过的模型，测试有 windows 个窗口；返回检查点。"""
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
    command = [sys.executable, "train.py", "--config", CONFIG, *changes, *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"training failed: {done.stderr.strip().splitlines()[-1]}")
    return folder / "bench/best.ckpt"


def evaluate(checkpoint: Path, folder: Path, more: list[str]) -> tuple[int, float]:
    """整个 evaluate.py；返回峰值 RssAnon（KiB）与用时（秒）。"""
    log = folder / "output.txt"
    with log.open("w") as file:
        begin = time.perf_counter()
        command = [sys.executable, "evaluate.py", "--checkpoint", str(checkpoint), "--out", str(folder / "out"), *more]
        process = subprocess.Popen(command, stdout=file, stderr=file)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise ValueError(f"evaluation failed: {log.read_text().strip().splitlines()[-1]}")
    return peak, time.perf_counter() - begin


def shares(checkpoint: Path, rounds: int, members: int) -> list[list[str]]:
    """表：一个进程里，各种存法的窗口/秒，与预报自己相比。"""
    content = load_checkpoint(checkpoint)
    config = checkpoint_config(content, str(checkpoint))
    fabric = make_evaluation_fabric(config)
    model, _ = load_forecaster(content, fabric.device)
    assert can_forecast(model)
    options = Options(members=members, perturb=PERTURB if members > 1 else 0.0, events="")
    task = make_task(model, open_data(config.data), config, options, fabric)
    trained = Trained("bench", str(checkpoint), 0, Progress(**content["progress"]))
    loop(task, (), trained, fabric)  # 预热
    kinds = (*SAVES, EVENTS)
    turns = [{kind: loop(task, kind, trained, fabric) for kind in kinds} for _ in range(rounds)]
    alone = statistics.median(forecasts for turn in turns for _, forecasts, _ in turn.values())
    head = ["", "windows/s", "of the forecasts' time", "CPU, of nothing saved"]
    rows = [head, ["forecasts alone", f"{len(task.starts) / alone:.1f}", "1", ""]]
    for save in kinds:
        total = statistics.median(turn[save][0] for turn in turns)
        ratio = statistics.median(turn[save][0] / turn[save][1] for turn in turns)
        what = "events, nothing" if save == EVENTS else " ".join(save) or "nothing"
        cpu = statistics.median(turn[save][2] / turn[()][2] for turn in turns)
        rows.append([f"scored, {what} saved", f"{len(task.starts) / total:.1f}", f"{ratio:.2f}", f"{cpu:.2f}"])
    return rows


def loop(task: Task, save: tuple[str, ...], trained: Trained, fabric: Fabric) -> tuple[float, float, float]:
    """走一遍：(全部的秒数, 其中各模型的预报, 处理器的秒数：机器忙时只有它作数)。"""
    asked = save == EVENTS
    options = replace(task.options, save=() if asked else save)
    task = replace(task, options=options, verifier=task.verifier if asked else None)
    origin = provenance_of(task, trained)
    with tempfile.TemporaryDirectory() as folder:
        begin, busy = time.perf_counter(), time.process_time()
        with ExitStack() as stack:
            keep = open_zarr(stack, task, Path(folder), origin, fabric) if "zarr" in save else None
            _, seen = write_statistics(task, score(task, fabric, keep=keep), Path(folder), origin)
        total, busy = time.perf_counter() - begin, time.process_time() - busy
    return total, sum(len(task.starts) / rate for rate in seen.rates().values() if rate), busy


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
