"""算术的上限：一个窗口训练一次要多少浮点运算（只看形状），这个设备做矩阵乘每秒能做多少（当场量）。"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step.reference import AR_PRED
from engine.imagined import random_batch
from engine.objective import Objective, objective_loss
from models import build_model
from models.interface import Scheduled
from util.batch import DataSpec, Seeds

WINDOWS = 2  # BatchNorm 至少要两个
LONG = 1_000_000  # 步；由粗到细的模型走到末了，尺度全了
SIDE = {"cpu": 1024, "cuda": 8192}  # 方阵的边长：够大，量到的是算术，不是搬运
REPEATS = {"cpu": 4, "cuda": 20}


class MadeUp(TorchDispatchMode):
    """只有形状的张量没有值：要值的地方给一个，循环就此结束。"""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            kind = args[0].dtype
            return False if kind == torch.bool else 0.5 if kind.is_floating_point else 1
        return func(*args, **(kwargs or {}))


def training_flops(options: Mapping[str, Any], spec: DataSpec) -> float:
    """一个窗口前向加反向的浮点运算次数，乘加算两次；只数矩阵乘、卷积和注意力。

    用只有形状的张量在处理器上数，不占内存；注意力（FlexAttention 也是）展开成矩阵乘，被遮住的块照算，所以跳过它们的
    写法利用率显得高些，与参照却是同一把尺子。丢弃激活的模型重算的部分不算。
    """
    chosen = {**options, "attention": "sdpa"} if options["name"] == AR_PRED else options
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True), MadeUp(), without_mkldnn():
        model = build_model(chosen, spec).train()
        if isinstance(model, Scheduled):
            model.at_step(LONG - 1, LONG)
        seeds = Seeds(tuple(range(WINDOWS)), tuple(i / WINDOWS for i in range(WINDOWS)), 0)
        with sdpa_kernel(SDPBackend.MATH), counter:
            batch = random_batch(spec, WINDOWS)._replace(seeds=seeds)
            objective_loss(model, batch, Objective())["loss"].backward()
    return counter.get_total_flops() / WINDOWS


@contextmanager
def without_mkldnn() -> Iterator[None]:
    """它的循环网络是一个核，计数器不认得；关上就是矩阵乘。"""
    was, *_ = torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=was)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """方阵相乘每秒的浮点运算次数，取最快的一次；torch 的矩阵乘精度（TF32）照现在的设置。"""
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = float("inf")
    for turn in range(REPEATS[device.type] + 1):
        wait_for(device)
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        wait_for(device)
        if turn:  # 头一次热身
            best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best


def wait_for(device: torch.device) -> None:
    """等显卡做完手里的。"""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
