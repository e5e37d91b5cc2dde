"""训练走久了，主进程的内存长不长：`python -m tests.slope --minutes 25`。

真的起一个训练（示例大小，每轮验证、每轮存），每几秒看一次它自己的内存（RssAnon：不算映射着的文件），
去掉开头的一成，直线拟合，MB 每分钟；久测里的是 test_slope.py。
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import yaml

from util.cli import run_command

ROOT = Path(__file__).resolve().parents[1]
WARM = 0.1  # 开头的份额：头几轮还在建缓存
GRID, YEARS = "16x32", "1979-1981"
CHANGES = ("train.epochs=1000000", "train.batch_size=4", "run.device=cpu", "log.every_steps=1", "run.name=slope")
CHANGES += (
    "model.dim=32",
    "model.depth=1",
    "model.decoder_depth=1",
    "model.decoder_width=32",
    "model.token_size=[4, 4]",
)
CHANGES += ("train.validate_every_epochs=1", "checkpoint.every_minutes=0.2", "train.preflight=false", "data.workers=1")


class Slope(NamedTuple):
    """MB 每分钟；拟合的标准误差；头尾的 MB；走了几步；分钟。"""

    slope: float
    error: float
    first: float
    last: float
    steps: int
    minutes: float

    def __str__(self) -> str:
        change = f"{self.slope:+.4f} +- {self.error:.4f} MB a minute"
        return f"{change}, {self.first:.1f} to {self.last:.1f} MB in {self.minutes:.1f} minutes, {self.steps} steps"


def anonymous(process: int) -> float:
    """MB。"""
    text = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return int(re.findall(r"RssAnon:\s+(\d+) kB", text)[0]) / 1e3


def fit(minutes: np.ndarray, memory: np.ndarray) -> tuple[float, float]:
    """直线的斜率与它的标准误差；相邻的点不独立，所以先平均成二十段。"""
    pieces = [(m.mean(), v.mean()) for m, v in zip(*(np.array_split(a, 20) for a in (minutes, memory)), strict=True)]
    x, y = np.array(pieces).T
    slope, level = np.polyfit(x, y, 1)
    rest = y - (slope * x + level)
    return float(slope), float(np.sqrt((rest**2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum()))


def watch(folder: Path, minutes: float, *changes: str) -> Slope:
    """在 folder 里训练这么久。"""
    sample = [
        sys.executable,
        "dataset.py",
        "sample",
        "--root",
        str(folder / "sample"),
        "--grid",
        GRID,
        "--years",
        YEARS,
    ]
    subprocess.run(sample, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    values = yaml.safe_load((ROOT / "config/quickstart.yaml").read_text(encoding="utf-8"))
    data = yaml.safe_load((ROOT / "config/data/sample.yaml").read_text(encoding="utf-8"))
    height, width = map(int, GRID.split("x"))
    data |= {
        "root": str(folder / "sample"),
        "latitude": {"first": 90 - 90 / height, "step": -180 / height, "count": height},
        "longitude": {"first": 0.0, "step": 360 / width, "count": width},
        "splits": {"train": [1979, 1979], "val": [1980, 1980], "test": [1981, 1981]},
    }
    values["data"] = {**data, **{k: v for k, v in values["data"].items() if k != "set"}, "cache_dir": str(folder)}
    values |= {"checkpoint": {"dir": str(folder / "checkpoints")}}
    values |= {"log": {"dir": str(folder / "log"), "wandb": {"mode": "disabled"}}}
    (folder / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    command = [sys.executable, "train.py", "--config", str(folder / "run.yaml"), *CHANGES, *changes]
    found, metrics = [], folder / "log/slope/metrics.csv"
    with (folder / "output").open("wb") as output:
        training = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            while not metrics.exists() or metrics.stat().st_size < 1000:
                assert training.poll() is None, (folder / "output").read_text(encoding="utf-8")
                time.sleep(1)
            began = time.monotonic()
            while (now := (time.monotonic() - began) / 60) < minutes:
                assert training.poll() is None, (folder / "output").read_text(encoding="utf-8")
                found.append((now, anonymous(training.pid)))
                time.sleep(2)
        finally:
            training.send_signal(signal.SIGKILL)
            training.wait()
    at, memory = np.array(found[int(WARM * len(found)) :]).T
    steps = int(metrics.read_text(encoding="utf-8").splitlines()[-2].split(",")[0])
    np.savetxt(ROOT / "tmp/slope.csv", found, "%.3f", ",", header="minute,MB")
    return Slope(*fit(at, memory), float(memory[:20].mean()), float(memory[-20:].mean()), steps, minutes)


def main() -> int:
    parser = argparse.ArgumentParser(description="The memory of a training over time.")
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        print(watch(Path(folder), args.minutes, *args.overrides))
    return 0


if __name__ == "__main__":
    run_command(main)
