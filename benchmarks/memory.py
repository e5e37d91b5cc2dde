"""估计的内存与量到的：`python -m benchmarks.memory [--device cpu]`，随机的数据与权重。

每一种在自己的进程里量：模型造好之前的驻留内存记下，走几步真的训练，看峰值高出多少；估计里因此也减去起初就占着的。
显卡上量的是分配过的最多显存，估计里只算张量。AR_pred 是原来的大小（7,310 万个参数），VAR 的阶段一是随机的权重。
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from lightning_fabric import Fabric

from engine.device import check_device, device_name, kept_memory, memory_size, peak_memory, reset_peak_memory
from engine.imagined import imagined_spec, random_batch
from engine.memory.estimate import Estimate, Machine, changed, estimate, this_machine
from engine.training.state import build_state, train_step
from util.cli import run_command
from util.config import RunConfig, load_config

CONFIG = Path(__file__).parent.parent / "config"
CASES = [
    ("ar_pred_video_vanilla", 1), ("ar_pred_video_vanilla", 2), ("pixel_unet", 8), ("pixel_unet", 16), ("var", 8),
    ("var", 16),
]  # fmt: skip
STEPS = 3  # 第二步起优化器有了状态


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description="Memory of a step: estimated, measured."
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the steps run (%(default)s)")
    parser.add_argument("--case", nargs=2, metavar=("NAME", "BATCH"), help="measure one in this process; prints bytes")
    args = parser.parse_args()
    check_device(args.device, "--device")
    device = Fabric(accelerator=args.device, devices=1).device
    if args.case:
        print(measured(case(args.case[0], int(args.case[1])), device))
        return 0
    print(f"{device_name(device)}; MB")
    print("| config | batch | estimated | measured | estimated / measured |\n|---|---|---|---|---|")
    for name, size in CASES:
        command = [sys.executable, "-m", "benchmarks.memory", "--device", args.device, "--case", name, str(size)]
        found = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        machine = this_machine(device)
        expected = comparable(estimate(case(name, size), machine), machine)
        print(f"| {name} | {size} | {expected / 1e6:,.0f} | {found / 1e6:,.0f} | {expected / found:.2f} |", flush=True)
    return 0


def case(name: str, size: int) -> RunConfig:
    """config/NAME.yaml，一批 size 个窗口；没有读取进程，没有预检。"""
    config = load_config(CONFIG / f"{name}.yaml", ["data.workers=0", "train.preflight=false"])
    if "first_stage" in config.model:
        stage = load_config(CONFIG / "vqvae_tendency.yaml").model
        config = config.model_copy(update={"model": {**config.model, "first_stage": stage}})
    return changed(config, batch_size=size)


def comparable(found: Estimate, machine: Machine) -> int:
    """估计里与量到的可比的：CPU 上减去起初的驻留内存，显卡上只是张量。"""
    if machine.device.type == "cpu":
        return found.total - machine.held
    return found.total - found.parts["framework"] - found.parts["fragmentation"]


def measured(config: RunConfig, device: torch.device) -> int:
    """走 STEPS 步，峰值比起初高出的字节。"""
    fabric = Fabric(accelerator=device.type, devices=1, precision=config.train.precision)
    spec = imagined_spec(config.data)
    before = memory_size(device)[1] if device.type == "cpu" else 0
    reset_peak_memory(device)
    state = build_state(fabric, config, spec, total_steps=1_000_000)
    state.progress.step = state.total_steps - STEPS  # 由粗到细的模型到这时是全部的尺度
    batch = fabric.to_device(random_batch(spec, config.train.windows))
    with kept_memory():  # 与训练相同
        for _ in range(STEPS):
            train_step(fabric, state, config, [batch]).terms()
        return peak_memory(device) - before


if __name__ == "__main__":
    run_command(main)
