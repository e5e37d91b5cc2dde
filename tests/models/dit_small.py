"""DiT 的测试共用：小的选项、由同一个种子造的模型、打乱的权重。"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models import build_model
from util.batch import DataSpec

SMALL = {"name": "dit", "dim": 16, "depth": 2, "heads": 2, "patch": 4, "sampling_steps": 3}
SMALL_DH = {**SMALL, "variant": "dit_dh", "wide_dim": 24, "wide_depth": 1, "wide_heads": 3}


def small(spec: DataSpec, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_model({**SMALL, **options}, spec).eval()


def randomize(module: nn.Module) -> None:
    """近零的、为一的初值，抄漏了看不出来。"""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
