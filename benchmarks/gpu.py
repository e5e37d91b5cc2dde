"""只有显卡才看得出的，一条命令：`python -m benchmarks.gpu --out DIR [--minutes 8]`。

各部分照值不值得排次序，各在自己的进程里（fork；这里不碰显卡）：一个坏了、停住了、弄坏了 CUDA，别的照走。每走完一个就写
DIR/gpu.json 与 DIR/gpu.md；它印的、它的 traceback 在 DIR/<部分>.log。时间不够的、缺了哪个库的都列出来。
没有显卡时（或 --small）都缩到最小，只看走得通。
要的库：torch ≥ 2.11、lightning-fabric、pydantic、numpy、einops、PyYAML、tqdm、xarray、scipy、xxhash。
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from benchmarks.step.reference import AR_PRED
from engine.device import device_name
from engine.versions import versions
from util.cli import one_line, run_command

OURS = ("benchmarks", "engine", "models", "util")
FORK = multiprocessing.get_context("fork")
GRACE = 5  # 秒；停不下来的再等这么久就杀掉


class Part(NamedTuple):
    """where: benchmarks/gpu_parts/ 里的文件与函数；seconds: 在显卡上估计要多久，余下的不够就跳过；about: 见 Scene。"""

    name: str
    where: str
    seconds: int
    about: tuple[str, ...] = ()


BF16, COMPILED = "train.precision=bf16-mixed", "train.compile=true"
STAGES = {"vqvae": "model.first_stage=config/vqvae_tendency.yaml", "vae": "model.first_stage=config/sd_vae_small.yaml"}
MAIN = [
    Part("FlexAttention equals SDPA", "attention.equal_to_sdpa", 60),
    *(
        Part(
            f"AR_pred, bf16, batch {n}, and the reference",
            "steps.against_reference",
            40,
            (AR_PRED, f"train.batch_size={n}", BF16),
        )
        for n in (32, 16)
    ),
    Part("AR_pred, bf16, compiled, batch 32", "steps.ours", 90, (AR_PRED, "train.batch_size=32", BF16, COMPILED)),
    Part("AR_pred, float32, batch 16", "steps.ours", 40, (AR_PRED, "train.batch_size=16")),
    Part("waiting for data", "feeding.residencies", 45),
    Part("transfer to the device", "feeding.transfer", 15),
    Part("resuming AR_pred", "resume.identical", 20, (AR_PRED, BF16)),
    Part("evaluation", "scoring.throughput", 20, (AR_PRED,)),
    Part("VAR with its cache", "sampling.var", 25),
    Part("flow sampling", "sampling.diffusion", 15, ("dit", "model.first_stage=null")),
    Part("diffusion sampling", "sampling.diffusion", 15, ("pixel_diffusion",)),
    *(
        Part(
            f"memory of {about[0]}, batch {n}, estimated",
            "memory.against_estimate",
            12,
            (*about, f"train.batch_size={n}"),
        )
        for about, n in [
            ((AR_PRED,), 8),
            ((AR_PRED,), 16),
            (("pixel_unet",), 8),
            (("pixel_unet",), 16),
            (("var", STAGES["vqvae"]), 8),
            (("var", STAGES["vqvae"]), 16),
        ]
    ),
]
ZOO: list[tuple[str, ...]] = [
    ("simvp",), ("cnn",), ("convlstm",), ("weather_transformer",), ("pixel_unet",), ("pixel_diffusion",), ("vqvae",),
    ("var", STAGES["vqvae"]), ("pastnet",), ("simvp_gsta",), ("lstm",), ("sequence_transformer",), ("sd_vae_small",),
    ("latent_diffusion", STAGES["vae"]), ("dit", STAGES["vae"]),
]  # fmt: skip
PARTS = [*MAIN, *(Part(f"step of {about[0]}", "steps.briefly", 10, (*about, BF16)) for about in ZOO)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="All that only a GPU can show.")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="gpu.json, gpu.md and a log of each part"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after this long (%(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU (the default without a GPU)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="the parts whose names contain one of these")
    args = parser.parse_args()
    parts = [p for p in PARTS if not args.only or any(word in p.name for word in args.only)]
    if not parts:
        raise ValueError(f"--only {' '.join(args.only)}: no such part; there are {', '.join(p.name for p in PARTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    with FORK.Pool(1) as pool:
        name = None if args.small else pool.apply(cuda_name)
    device = torch.device("cpu" if name is None else "cuda")
    for module in {part.where.partition(".")[0] for part in parts}:
        with suppress(ImportError):  # 各进程就不必再引入；缺什么由它们说
            importlib.import_module(f"benchmarks.gpu_parts.{module}")
    report = {
        "device": name or device_name(device),
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "versions": {**versions(), "cuda": torch.version.cuda},
        "parts": [],
    }
    begin = time.monotonic()
    for part in parts:
        left = 60 * args.minutes - (time.monotonic() - begin)
        found = run_part(part, device, args.out, left)
        report["parts"].append({"name": part.name, **found})
        (args.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (args.out / "gpu.md").write_text("\n".join(table(report)) + "\n", encoding="utf-8")
        print(f"{part.name}: {found['status']}, {found['seconds']:.1f} s", flush=True)
    print(f"{args.out / 'gpu.md'}")
    return int(any(part["status"].startswith("failed") for part in report["parts"]))


def cuda_name() -> str | None:
    """显卡的型号；在别的进程里问，问过的进程就不能再 fork 了。"""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def run_part(part: Part, device: torch.device, out: Path, left: float) -> dict[str, Any]:
    """status（done、failed、left out、skipped 与缘由）、seconds、found。"""
    if left < (part.seconds if device.type == "cuda" else 1):
        return {"status": f"skipped: needs about {part.seconds} s, {max(0.0, left):.0f} s are left", "seconds": 0.0}
    begin = time.monotonic()
    with TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        log = out / f"{part.name.replace(' ', '-').replace(',', '')}.log"
        process = FORK.Process(target=work, args=(part, device, Path(folder), answer, log))
        process.start()
        process.join(left)
        stopped = process.is_alive()
        if stopped:
            process.terminate()
            process.join(GRACE)
            process.kill()
            process.join()
        seconds = time.monotonic() - begin
        if answer.is_file():
            return {**json.loads(answer.read_text(encoding="utf-8")), "seconds": seconds}
        how = f"stopped after {seconds:.0f} s" if stopped else f"ended with status {process.exitcode}"
        return {"status": f"failed: {how}, see {log.name}", "seconds": seconds}


def work(part: Part, device: torch.device, folder: Path, answer: Path, log: Path) -> None:
    """在自己的进程里：走一个部分，结果写进 answer，印的都到 log。"""
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.getLogger("ar_pred").setLevel(logging.WARNING)
    module, _, function = part.where.partition(".")
    result: dict[str, Any]
    try:
        scene = importlib.import_module("benchmarks.gpu_parts.scene").Scene(
            device, device.type == "cpu", part.about, folder
        )
        found = getattr(importlib.import_module(f"benchmarks.gpu_parts.{module}"), function)(scene)
        result = {"status": "done", "found": found}
    except ImportError as error:
        traceback.print_exc()
        missing = (error.name or "").partition(".")[0]
        how = "failed" if missing in OURS else "left out"
        result = {"status": f"{how}: {one_line(error)}"}
    except Exception as error:  # noqa: BLE001  哪一种都只算这一部分的
        traceback.print_exc()
        result = {"status": f"failed: {type(error).__name__}: {one_line(error)}"}
    written = answer.with_suffix(".part")
    written.write_text(json.dumps(result), encoding="utf-8")
    written.rename(answer)


def table(report: dict[str, Any]) -> list[str]:
    """Markdown：一行一个量；没有走完的部分一行，写着缘由。"""
    named = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    lines = [f"{report['device']}; {report['date']}; {named}", "", "| | | |", "|---|---|---|"]
    for part in report["parts"]:
        rows: Sequence[tuple[str, Any]] = list(part.get("found", {}).items()) or [(part["status"], "")]
        for i, (quantity, value) in enumerate(rows):
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append(f"| {'' if i else part['name']} | {quantity.replace('|', '/')} | {text} |")
    return lines


if __name__ == "__main__":
    run_command(main)
