"""全部模型并排：`python -m benchmarks.models [--steps N] [CONFIG ...] [key=value ...]`，默认 config/ 下的全部，
各在自己的形状上，不需要数据，印成 Markdown 的表。

参数个数与预报一个窗口的浮点运算次数（乘加算两次；只数矩阵乘、卷积、注意力）。--steps N 另训练 N 步，像 benchmarks.train
那样量：每秒几个窗口，前向、反向、更新的毫秒，用了矩阵乘的速度（当场量）的几成，内存的峰值。
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from benchmarks.train import OURS, measure
from engine.reference.configs import listed, size
from util.cli import run_command
from util.config import RunConfig, load_config

MEASURED = ("windows/s", "forward, ms", "backward, ms", "optimizer, ms", "utilisation", "memory, MiB")


def main() -> int:
    parser = argparse.ArgumentParser(description="Size and speed of the models, as a Markdown table.")
    parser.add_argument("--steps", type=int, default=0, help="time so many training steps, median of 3 rounds (none)")
    parser.add_argument("given", nargs="*", metavar="CONFIG, key=value", help="run YAMLs (default: all in config/)")
    args = parser.parse_intermixed_args()
    if args.steps < 0:
        raise ValueError(f"--steps {args.steps}: must be 0 or more")
    logging.getLogger("ar_pred").setLevel(logging.WARNING)
    overrides = [text for text in args.given if "=" in text]
    paths = [text for text in args.given if "=" not in text] or list(map(str, listed(".")))
    names = ["YAML", "frames", "channels", "grid", "parameters", "GFLOP / forecast"]
    names += ["batch", *MEASURED] if args.steps else []
    print(row(names), "|" + "---|" * len(names), sep="\n")
    for path in paths:
        try:
            config = load_config(path, overrides)
            cells = [f"`{Path(path).stem}`", *size(config), *(speed(config, args.steps) if args.steps else [])]
        except ValueError as error:  # 要预训练的权重，或阶段一的检查点；没有梯度步
            print(f"{path} left out: {error}", file=sys.stderr)
            continue
        print(row(cells), flush=True)
    return 0


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def speed(config: RunConfig, steps: int) -> list[str]:
    """批的大小，与 MEASURED 各项。"""
    side = measure(config, against=False, imagined=True, steps=steps, rounds=3)["sides"][OURS]
    return [str(config.train.windows), *(f"{side[name]:.3g}" for name in MEASURED)]


if __name__ == "__main__":
    run_command(main)
