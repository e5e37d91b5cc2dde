"""训练的一步：`python -m benchmarks.train --config config/X.yaml [--against reference] [--imagined] [key=value ...]`。

引擎自己的循环走几轮，量每秒几个窗口，一步花在哪里，用了矩阵乘的速度（当场量）的几成，内存的峰值；印成表，写成 JSON。
时间是各轮的中位数：

    data       主机等下一批
    forward、backward、optimizer   前向，反向，梯度范数、裁剪、更新、EMA、学习率；显卡上另有设备自己的时间
    device     主机等设备把上一步的数算出来（处理器上没有）
    loop       其余：模型与数据之外的循环；另有它用去的处理器时间，机器忙时只有这个作数

--imagined 不读数据，用随机的场，留在设备上。--against reference 与注意力写开的 AR_pred（benchmarks/step/reference.py）
比，一轮对一轮地轮流走。--profile DIR 末了另走几步，写 torch.profiler 的记录。--sources 只比各种数据来源，见
benchmarks/step/sources.py。
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.step.arithmetic import matmul_rate, training_flops, wait_for
from benchmarks.step.imagined import imagined_data
from benchmarks.step.reference import as_written, reference_config
from benchmarks.step.sources import compare_steps, show
from benchmarks.step.training import Round, open_training, walk
from engine.device import device_name
from engine.training.loop import train_epoch
from engine.training.run import Run, make_fabric
from engine.versions import versions
from util.cli import run_command
from util.config import RunConfig, load_config
from util.data.dataset import open_data

SKIP = 2  # 每一轮头几步不计
DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}
OURS, REFERENCE = "ours", "reference"
MANNER = {OURS: nullcontext, REFERENCE: as_written}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description="Where a training step goes.")
    parser.add_argument("--config", required=True, help="run YAML")
    parser.add_argument("--against", choices=[REFERENCE], help="also the written-out attention of AR_pred, in turns")
    parser.add_argument("--imagined", action="store_true", help="random fields kept on the device, not the data")
    parser.add_argument("--steps", type=int, default=10, help="steps counted in each round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, the median counts (%(default)s)")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write a torch.profiler trace of one more round")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON (default: tmp/train-CONFIG.json)")
    parser.add_argument("--sources", action="store_true", help="compare the sources of the data instead")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the config")
    args = parser.parse_intermixed_args()
    if min(args.steps, args.rounds) < 1:
        raise ValueError("--steps and --rounds must be at least 1")
    logging.getLogger("ar_pred").setLevel(logging.WARNING)
    config = load_config(args.config, args.overrides)
    if args.sources:
        show(compare_steps(config, args.steps, args.rounds), args.steps, config)
        return 0
    found = measure(config, args.against is not None, args.imagined, args.steps, args.rounds, args.profile)
    print(f"{found['model']}, {found['device']}, {found['precision']}, batch {found['batch_size']}; ", end="")
    print(f"{args.steps} steps in each of {args.rounds} rounds, medians\n")
    print("\n".join(table(found["sides"])))
    path = args.out or Path("tmp") / f"train-{Path(args.config).stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"\n{path}")
    return 0


def measure(
    config: RunConfig, against: bool, imagined: bool, steps: int, rounds: int, profile_to: Path | None = None
) -> dict[str, Any]:
    """各轮轮流走，返回要写成 JSON 的；sides 是「谁 → 量到的」，见 summary。

    Raises:
        ValueError: 配置、数据不对；没有参照；没有梯度步。
    """
    configs = {OURS: config} | ({REFERENCE: reference_config(config)} if against else {})
    with ExitStack() as stack:
        data_config = stack.enter_context(imagined_data(config.data)) if imagined else config.data
        folder = Path(stack.enter_context(TemporaryDirectory()))
        fabric = make_fabric(config)
        data = open_data(data_config, device=fabric.device)
        runs: dict[str, Run] = {}
        for name, mine in configs.items():
            with MANNER[name]():
                runs[name] = stack.enter_context(open_training(mine, fabric, data, SKIP + steps, folder / name))
        device, found = fabric.device, {name: list[Round]() for name in runs}
        ceilings = []
        for name, run in runs.items():
            with MANNER[name]():
                walk(run, SKIP)  # 编译、自动选核、优化器的状态
        for _ in range(rounds):
            ceilings.append(matmul_rate(device, DTYPES[config.train.precision]))
            for name, run in runs.items():
                with MANNER[name]():
                    found[name].append(walk(run, SKIP))
        if profile_to is not None:
            write_profile(runs[OURS], profile_to)
        flops = training_flops(config.model, data.spec)
        size = config.train.windows
        return {
            "model": config.model["name"],
            "device": device_name(device),
            "precision": config.train.precision,
            "batch_size": size,
            "versions": versions(),
            "flops_per_window": flops,
            "rounds": {name: [asdict(one) for one in several] for name, several in found.items()},
            "matmul_flops_per_second": ceilings,
            "sides": {name: summary(several, size, flops, ceilings) for name, several in found.items()},
        }


def summary(rounds: Sequence[Round], size: int, flops: float, ceilings: Sequence[float]) -> dict[str, float]:
    """各轮的中位数：毫秒、TFLOP/s、MiB；利用率是各轮自己的比值的中位数。"""

    def middle(values: Sequence[float]) -> float:
        return statistics.median(values)

    first = rounds[0]
    found = {"windows/s": middle([size / r.step for r in rounds]), "step, ms": middle([1e3 * r.step for r in rounds])}
    found |= {f"{part}, ms": middle([1e3 * r.host[part] for r in rounds]) for part in first.host}
    found["loop, processor ms"] = middle([1e3 * r.processor for r in rounds])
    if any(first.device[part] != first.host[part] for part in first.device):
        found |= {f"{part} on the device, ms": middle([1e3 * r.device[part] for r in rounds]) for part in first.device}
    rates = [flops * size / r.step for r in rounds]
    found["TFLOP/s"] = middle(rates) / 1e12
    found["matmul here, TFLOP/s"] = middle(ceilings) / 1e12
    found["utilisation"] = middle([mine / most for mine, most in zip(rates, ceilings, strict=True)])
    found["memory, MiB"] = middle([r.memory / 2**20 for r in rounds])
    return found


def table(sides: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Markdown 的表：一行一个量，一栏一边；有参照时末一栏是我们的比参照的。"""
    names = [*sides, f"{OURS} / {REFERENCE}"] if REFERENCE in sides else list(sides)
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for quantity in sides[OURS]:
        values = [side[quantity] for side in sides.values()]
        cells = [f"{value:.4g}" for value in values]
        if REFERENCE in sides:
            cells.append(f"{values[0] / values[1]:.3f}" if values[1] else "-")
        lines.append(f"| {quantity} | {' | '.join(cells)} |")
    return lines


def write_profile(run: Run, folder: Path) -> None:
    """一轮的记录：trace.json（Perfetto 打得开）与各算子的表 operators.txt；印出一轮的时间是算子自己的几倍。"""
    folder.mkdir(parents=True, exist_ok=True)
    cuda = run.fabric.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    run.state.progress.batches = 0
    with profile(activities=activities) as recorded:
        begin = time.perf_counter()
        train_epoch(run)
        wait_for(run.fabric.device)
        elapsed = time.perf_counter() - begin
    operators = [event for event in recorded.key_averages() if event.key.startswith("aten::")]
    kernels = sum(event.self_device_time_total if cuda else event.self_cpu_time_total for event in operators) / 1e6
    print(f"profiled: {elapsed:.3f} s, {elapsed / kernels:.3f} x the operators' own {kernels:.3f} s\n")
    recorded.export_chrome_trace(str(folder / "trace.json"))
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    (folder / "operators.txt").write_text(recorded.key_averages().table(sort_by=order, row_limit=50), encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
