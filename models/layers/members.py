"""集合的成员：每个（窗口，成员）一个发生器，成员因此与怎样分批无关。"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator

Generators = Generator | Sequence[Generator]  # 每个样本一个，或由一个取种子


def sample_generators(count: int, generator: Generators | None) -> Sequence[Generator]:
    """count 个样本各自的发生器，都在 CPU 上：换了设备也是同样的数。

    引擎给的就是 count 个，原样用；只给一个时种子依次取自它，没有给时取自全局的。
    """
    if generator is not None and not isinstance(generator, Generator):
        assert len(generator) == count, f"{len(generator)} generators for {count} samples"
        return generator
    device = None if generator is None else generator.device
    seeds = torch.randint(2**62, (count,), generator=generator, device=device).tolist()
    return [Generator().manual_seed(seed) for seed in seeds]
