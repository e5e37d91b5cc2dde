"""VAR 的键值缓存省下多少：`python -m benchmarks.var [--rounds 3] [--device cpu]`，随机的权重，不需要数据。

没有缓存时，每个尺度都把前面的 token 重算一遍；数一数 token，就知道缓存至多快几倍。两种采样轮流做，
秒数各取中位数，快几倍取各轮之比的中位数；时间是整个采样：网络、抽编号、累加 f̂，不含阶段一的解码。
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.imagined import imagined_spec
from models import build_model
from models.layers.members import sample_generators
from models.layers.multiscale import MultiScaleQuantizer, Scales
from models.layers.var_blocks import ScaleTransformer, initialise
from models.layers.var_condition import LabelCondition
from models.layers.var_sampling import Sampling, sample
from util.cli import run_command
from util.config import load_config

SQUARES: Scales = tuple((n, n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
LABELS, VOCABULARY, LATENT = 1000, 4096, 32  # 原版
CONFIG = Path(__file__).parent.parent / "config"


class Case(NamedTuple):
    """采样要的几样；given 一个样本一行，cfg 大于 0 时还有无条件的一支，算的是两倍。"""

    name: str
    quantizer: MultiScaleQuantizer
    net: ScaleTransformer
    condition: nn.Module
    given: Tensor
    cfg: float

    @property
    def samples(self) -> int:
        return len(self.given)


def published(samples: int, depth: int = 8) -> Case:
    """原版的结构，类别条件，深度 8。"""
    quantizer, width = MultiScaleQuantizer(VOCABULARY, LATENT, SQUARES), 64 * depth
    net = ScaleTransformer(quantizer.lengths, LATENT, VOCABULARY, width, depth, depth)
    label = LabelCondition(LABELS, width)
    initialise([net, label], net, 1e-3)
    name = f"VAR d{depth}, 10 square scales, label, guided"
    return Case(name, quantizer, net, label, torch.arange(samples) % LABELS, 1.5)


def forecast(samples: int, label: str, *overrides: str) -> Case:
    """config/var.yaml 的模型（overrides 改过的）与它的阶段一。"""
    stage = load_config(CONFIG / "vqvae_tendency.yaml").model
    run = load_config(CONFIG / "var.yaml", overrides)
    spec = imagined_spec(run.data)
    model: Any = build_model({**run.model, "first_stage": stage}, spec)
    history = torch.randn(samples, model.frames, spec.num_channels, spec.height, spec.width)
    given = model._given(model._kept(history))
    return Case(label, model.first_stage.quantizer, model.net, model.condition, given, 0.0)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.var", description="Sampling with and without the cache."
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds, the median counts (%(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    args = parser.parse_args()
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: must be at least 1")
    device = torch.device(args.device)
    torch.manual_seed(0)
    wide = ("model.width=512", "model.depth=8", "model.heads=8")
    cases = [
        published(2),
        forecast(8, "config/var.yaml"),
        forecast(8, "config/var.yaml, context", "model.history.context=true"),
        forecast(4, "config/var.yaml, width 512, depth 8", *wide),
    ]
    print("| | samples | tokens, cached / not | allowed by tokens | cached, s | not, s | speed-up | share of allowed |")
    print("|---|---|---|---|---|---|---|---|")
    for case in cases:
        kept, redone = tokens(case)
        seconds = times(case, args.rounds, device)
        fast, slow = (statistics.median(column) for column in zip(*seconds, strict=True))
        allowed, found = redone / kept, statistics.median(without / cached for cached, without in seconds)
        measured = f"{fast:.3f} | {slow:.3f} | {found:.2f} | {found / allowed:.2f}"
        print(f"| {case.name} | {case.samples} | {kept} / {redone} | {allowed:.2f} | {measured} |", flush=True)
    return 0


def tokens(case: Case) -> tuple[int, int]:
    """采一个样本，网络走过的 token 数：有缓存，没有缓存。"""
    first = case.condition(case.given[:1], torch.ones(1, dtype=torch.bool)).context
    context, lengths = 0 if first is None else first.shape[1], case.quantizer.lengths
    return context + sum(lengths), sum(context + seen for seen in accumulate(lengths))


def times(case: Case, rounds: int, device: torch.device) -> Sequence[tuple[float, float]]:
    """采 case.samples 个样本的秒数，各轮的：有缓存，没有缓存。"""
    for part in (case.quantizer, case.net, case.condition):
        part.to(device).eval()
    given, options = case.given.to(device), Sampling(cfg=case.cfg, top_k=None, top_p=1)
    found: dict[bool, list[float]] = {True: [], False: []}
    with torch.inference_mode():
        for turn in range(rounds + 1):  # 头一轮热身
            for cached, seconds in found.items():
                begin = time.perf_counter()
                generators = sample_generators(case.samples, None)
                sample(case.net, case.quantizer, case.condition, given, options, generators, cached)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn:
                    seconds.append(time.perf_counter() - begin)
    return list(zip(found[True], found[False], strict=True))


if __name__ == "__main__":
    run_command(main)
