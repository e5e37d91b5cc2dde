"""编码与解码的峰值内存：`python -m benchmarks.codec --config X.yaml [key=value ...] [--frames 8 16] [--sizes 1 4 16]`。

随机数的帧，不求导；每一种帧数与 vae_batch_size 各用一个新的进程编码、解码一遍，印出比开始时（已经走过一帧）多用的内存：
CPU 上是常驻内存的峰值，显卡上是分配过的显存。
"""

from __future__ import annotations

import argparse
import time
from multiprocessing import get_context
from typing import Any

import torch

from engine.device import device_name, peak_memory, reset_peak_memory
from engine.imagined import imagined_spec
from models import build_model
from models.interface import is_codec
from util.batch import DataSpec
from util.cli import run_command
from util.config import load_config


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codec", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="run YAML of an autoencoder; no data needed")
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16], help="frames at once (%(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16], help="model.vae_batch_size (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the config")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    spec = imagined_spec(config.data)
    if not is_codec(build_model(config.model, spec)):
        raise ValueError(f"{args.config}: model.name = {config.model['name']}: not an autoencoder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{spec.num_channels} channel(s), grid {spec.height} x {spec.width}, {device_name(device)}")
    print("| frames | vae_batch_size | encode [MiB] | decode [MiB] | seconds |")
    print("|---|---|---|---|---|")
    for frames in args.frames:
        for size in args.sizes:
            with get_context("spawn").Pool(1) as pool:
                options = {**config.model, "vae_batch_size": size}
                encode, decode, seconds = pool.apply(measure, (options, spec, frames, device))
            print(f"| {frames} | {size} | {encode:.0f} | {decode:.0f} | {seconds:.1f} |", flush=True)
    return 0


@torch.inference_mode()
def measure(options: dict[str, Any], spec: DataSpec, frames: int, device: torch.device) -> tuple[float, float, float]:
    """编码、解码各自的峰值减去开始时的 [MiB]；两步合计的秒数。"""
    model = build_model(options, spec).to(device).eval()
    assert is_codec(model)
    fields = torch.randn(frames, spec.num_channels, spec.height, spec.width, device=device)
    model.decode(model.encode(fields[:1]))  # 第一次要的工作区不算
    reset_peak_memory(device)
    before, begin = peak_memory(device), time.perf_counter()
    latents = model.encode(fields)
    encode = peak_memory(device)
    reset_peak_memory(device)
    model.decode(latents)
    return (encode - before) / 2**20, (peak_memory(device) - before) / 2**20, time.perf_counter() - begin


if __name__ == "__main__":
    run_command(main)
