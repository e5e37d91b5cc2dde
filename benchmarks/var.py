"""VAR 的键值缓存省下多少：`python -m benchmarks.var [--rounds 3] [--device cpu]`，随机的权重，不需要数据。

没有缓存时，每个尺度都把前面的 token 重算一遍；数一数 token，就知道缓存至多快几倍。两种采样轮流做，
秒数各取中位数，快几倍取各轮之比的中位数；时间是整个采样：网络、抽编号、累加 f̂，不含阶段一的解码。
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.layers.members import sample_generators
from models.layers.multiscale import MultiScaleQuantizer, Scales, rectangular_scales
from models.layers.var_blocks import ScaleTransformer, initialise
from models.layers.var_condition import HistoryCondition, LabelCondition
from models.layers.var_sampling import Sampling, sample
from util.cli import run_command

SQUARES: Scales = tuple((n, n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
LABELS, FRAMES = 1000, 2


class Case(NamedTuple):
    """一种大小；context 为真时历史的潜变量作 token，在最前面。"""

    name: str
    scales: Scales
    vocabulary: int
    latent: int
    width: int
    depth: int
    heads: int
    context: bool
    samples: int  # 一次采几个
    cfg: float  # 大于 0 时还有无条件的一支，算的是两倍


CASES = [
    Case("VAR d8, 10 square scales, label, guided", SQUARES, 4096, 32, 512, 8, 8, False, 2, 1.5),
    Case(
        "config/var.yaml, 6 scales of 8 x 16, history", rectangular_scales(8, 16, 6), 512, 16, 128, 4, 4, True, 8, 0.0
    ),
    Case("width 512, 6 scales of 8 x 16, history", rectangular_scales(8, 16, 6), 512, 16, 512, 8, 8, True, 8, 0.0),
]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.var", description="Sampling with and without the cache."
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds, the median counts (%(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    args = parser.parse_args()
    device = torch.device(args.device)
    print("| | samples | tokens, cached / not | allowed by tokens | cached, s | not, s | speed-up | share of allowed |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        kept, redone = tokens(case)
        seconds = times(case, args.rounds, device)
        fast, slow = (statistics.median(column) for column in zip(*seconds, strict=True))
        allowed, found = redone / kept, statistics.median(without / cached for cached, without in seconds)
        measured = f"{fast:.3f} | {slow:.3f} | {found:.2f} | {found / allowed:.2f}"
        print(f"| {case.name} | {case.samples} | {kept} / {redone} | {allowed:.2f} | {measured} |", flush=True)
    return 0


def tokens(case: Case) -> tuple[int, int]:
    """采一个样本，网络走过的 token 数：有缓存，没有缓存。"""
    lengths = [h * w for h, w in case.scales]
    context = lengths[-1] if case.context else 0
    return context + sum(lengths), sum(context + seen for seen in accumulate(lengths))


def times(case: Case, rounds: int, device: torch.device) -> list[tuple[float, float]]:
    """采 case.samples 个样本的秒数，各轮的：有缓存，没有缓存。"""
    torch.manual_seed(0)
    count = case.samples
    quantizer = MultiScaleQuantizer(case.vocabulary, case.latent, case.scales).to(device).eval()
    net = ScaleTransformer(quantizer.lengths, case.latent, case.vocabulary, case.width, case.depth, case.heads)
    height, width = case.scales[-1]
    if case.context:
        frame, ways = (case.latent, height, width), [True] * 4
        condition: nn.Module = HistoryCondition(FRAMES, frame, case.scales, case.width, *ways)
        given: Tensor = torch.randn(count, FRAMES, case.latent, height, width)
    else:
        condition, given = LabelCondition(LABELS, case.width), torch.arange(count) % LABELS
    initialise([net, condition], net, 1e-3)
    net, condition, given = net.to(device).eval(), condition.to(device).eval(), given.to(device)
    options = Sampling(cfg=case.cfg, top_k=None, top_p=1)
    found: dict[bool, list[float]] = {True: [], False: []}
    with torch.inference_mode():
        for turn in range(rounds + 1):  # 头一轮热身
            for cached, seconds in found.items():
                begin = time.perf_counter()
                sample(net, quantizer, condition, given, options, sample_generators(count, None), cached)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn:
                    seconds.append(time.perf_counter() - begin)
    return list(zip(found[True], found[False], strict=True))


if __name__ == "__main__":
    run_command(main)
