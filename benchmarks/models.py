"""各模型的大小：`python -m benchmarks.models [CONFIG ...]`，默认 config/ 下的全部，各在自己的形状上，不需要数据。

参数个数与预报一个窗口的浮点运算次数（乘加算两次；只数矩阵乘、卷积、注意力），印成 Markdown 的表。
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.evaluation.cost import flops_per_sample, parameter_count
from engine.imagined import imagined_spec
from models import build_model
from models.interface import can_forecast
from util.cli import run_command
from util.config import load_config

CONFIGS = Path("config")


def main() -> int:
    parser = argparse.ArgumentParser(description="Parameters and FLOPs of the models, as a Markdown table.")
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="run YAMLs (default: all in config/)")
    paths = parser.parse_args().configs or sorted(map(str, CONFIGS.glob("*.yaml")))
    print("| YAML | frames | channels | grid | parameters | GFLOP / forecast |")
    print("|---|---|---|---|---|---|")
    for path in paths:
        config = load_config(path)
        spec = imagined_spec(config.data)
        try:
            model = build_model(config.model, spec)
        except ValueError as error:  # 要预训练的权重，或阶段一的检查点
            print(f"{path} left out: {error}", file=sys.stderr)
            continue
        flops = f"{flops_per_sample(model, spec) / 1e9:.3f}" if can_forecast(model) else "none"
        print(
            f"| `{Path(path).stem}` | {spec.frames_in} → {spec.frames_out} | {spec.num_channels} "
            f"| {spec.height} × {spec.width} | {parameter_count(model):,} | {flops} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    run_command(main)
