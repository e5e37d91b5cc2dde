"""设备：叫什么，用了多少内存、多少时间；训练与评测量的是同一个数。"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from util.data.resident import available_memory

Moment = float | torch.cuda.Event
Span = tuple[Moment, Moment]
log = logging.getLogger("ar_pred")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, NEVER = -1, -3, -1  # malloc.h；NEVER 在那里是最大的无符号数
LARGEST_HEAP_BLOCK = 32 * 2**20  # 字节；glibc 自己调也只到这里（界限的两倍以上才还）
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def check_device(wanted: str, key: str = "run.device") -> None:
    """
    Raises:
        ValueError: 要 cuda 而这里没有。
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{key} = cuda, but no CUDA device is available here; use auto or cpu")


def reset_peak_memory(device: torch.device) -> None:
    """从这里起重新量峰值内存。"""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")  # 内核只认这个数：VmHWM 回到现在的值


def peak_memory(device: torch.device) -> int:
    """字节：显卡上是分配过的最多显存；CPU 上是整个进程的最大驻留内存（没有 /proc 的系统从进程开始算起）。"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if STATUS.exists() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_size(device: torch.device) -> tuple[int, int]:
    """(一共, 已经占着) 字节。CPU 上一共是这个进程驻留的加还能要到的（容器的限额也算），占着的是前者。

    显卡上占着的是别人的与 CUDA 自己的，这个进程的张量不算。
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, total - free - torch.cuda.memory_reserved(device)
    resident = _status("VmRSS")
    return available_memory() + resident, resident


@contextmanager
def kept_memory() -> Iterator[None]:
    """里面 glibc 用过的内存留着，不还给系统：一步的激活不必每一步又要一遍页，那是一步的二十分之一。

    它平时自己调的两个界限到此为止，所以都要给；谁用环境变量 MALLOC_… 定过，照那个。
    """
    libc = ctypes.CDLL(None)
    ours = sys.platform == "linux" and hasattr(libc, "mallopt") and not any(n.startswith("MALLOC_") for n in os.environ)
    for limit, value in ((M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK), (M_TRIM_THRESHOLD, NEVER)) if ours else ():
        libc.mallopt(limit, value)
    try:
        yield
    finally:
        if ours:
            libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_HEAP_BLOCK)
            libc.malloc_trim(0)


def _status(key: str) -> int:
    """/proc/self/status 的一行，字节。"""
    line = next(row for row in STATUS.read_text().splitlines() if row.startswith(key))
    return int(line.split()[1]) * 1024


@contextmanager
def float32_matmuls(precision: str) -> Iterator[None]:
    """块里 float32 的矩阵乘用这个精度（torch.set_float32_matmul_precision），出来还原：计分总是 highest。"""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    convolutions = "TF32 on CUDA" if torch.backends.cudnn.allow_tf32 else "float32"
    log.info("float32 matrix products: precision %s; float32 convolutions: %s", precision, convolutions)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """wanted 时只用每次结果都相同的算法，慢些；没有这种算法的运算抛错。出来还原。"""
    if not wanted:
        yield
        return
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS 要它才肯，在头一次矩阵乘之前
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    log.info("deterministic algorithms only; CUBLAS_WORKSPACE_CONFIG=%s", workspace)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def to_host(values: torch.Tensor) -> Callable[[], list[float]]:
    """开始把一维的几个数搬到主机，不等；调返回的函数时才等它们，等的只是到这里为止的计算。"""
    if values.device.type != "cuda":
        return values.tolist
    moved = values.to("cpu", non_blocking=True)  # 到锁页内存里
    arrived = torch.cuda.current_stream(values.device).record_event()

    def read() -> list[float]:
        arrived.synchronize()
        return moved.tolist()

    return read


def random_now(device: torch.device) -> list[torch.Tensor]:
    """全局发生器此刻的状态：处理器的，显卡的。主机不等设备。"""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random(states: list[torch.Tensor], device: torch.device) -> None:
    """random_now 的逆。"""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def device_name(device: torch.device) -> str:
    """显卡的型号；CPU 则写用了几个线程。"""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


def now(device: torch.device) -> Moment:
    """此刻；显卡上是排在它的流里的一个记号，主机不等它走到。"""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def elapsed(begin: Moment, end: Moment) -> float:
    """秒；显卡已走过这两个记号（取过后面的结果）才能问。"""
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1000
    assert isinstance(begin, float) and isinstance(end, float)
    return end - begin
