"""集合的成员：每个样本一个种子，成员因此与怎样分批无关。"""

from __future__ import annotations

import torch
from torch import Generator


def sample_generators(count: int, generator: Generator | None) -> list[Generator]:
    """count 个样本各自的发生器，种子依次取自 generator（没有给就是全局的）。"""
    device = None if generator is None else generator.device
    seeds = torch.randint(2**62, (count,), generator=generator, device=device).tolist()
    return [Generator().manual_seed(seed) for seed in seeds]
