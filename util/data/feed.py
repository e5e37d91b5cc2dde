"""送批到设备：读取进程 → 锁页内存 → 另一条流上的异步搬运与标准化，比用的早一批；数据留在设备上时当场取。"""

from __future__ import annotations

import multiprocessing
import multiprocessing.queues
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from util.batch import Batch, DataSpec, Wire
from util.data.dataset import WeatherData
from util.data.origin import DataError
from util.data.reader import SHARED, into_shared_memory, remedy
from util.data.windows import WindowDataset

GRACE = 30  # 秒
AHEAD = 2  # 每个读取进程备着几批，DataLoader 的缺省


def feed(
    data: WeatherData, batches: Sequence[Sequence[int]], device: torch.device, frames_out: int | None = None
) -> Iterator[Batch]:
    """按批次表给出已在设备上的 Batch；次序与数都与 WindowDataset 的逐位相同。

    Args:
        batches: 每批的起点。
        frames_out: 目标帧数，默认与 spec 相同；滚动评测时更长。

    Raises:
        ValueError: 放不进共享内存，见 check_shared_memory。
        DataError: 读到的坏文件太多，见 FieldReader.frame；读取进程死了，见 make_loader。
    """
    windows = data.windows if frames_out is None else data.windows.with_future(frames_out)
    if data.resident is not None and data.resident.holds(windows, batches, device):
        return (data.resident.batch(windows, starts) for starts in batches)
    if batches:
        largest = batch_bytes(windows, max(map(len, batches)), device)
        check_shared_memory(largest, data.config.workers, len(batches))
    if device.type != "cuda":  # 设备就是处理器：让读取进程标准化，不占训练的时间
        return make_loader(windows, batches, data.config.workers, pin=False)
    loader = make_loader(WireDataset(windows), batches, data.config.workers, data.config.pin_memory)
    return send_ahead(loader, data.spec, windows.reader.wire().raw, device)


class Sent(NamedTuple):
    """已经发出的一批；done 之后才能用。"""

    batch: Batch
    done: torch.Event | torch.cuda.Event


def send_ahead(loader: Iterator[Wire], spec: DataSpec, raw: bool, device: torch.device) -> Iterator[Batch]:
    """下一批的搬运与标准化排在另一条流上，与这一批的计算同时进行。"""
    stream = torch.cuda.Stream(device)
    ahead: Sent | None = None
    for wire in loader:
        with torch.cuda.stream(stream):
            sent = Sent(
                spec.receive(Wire(*(part.to(device, non_blocking=True) for part in wire)), raw), stream.record_event()
            )
        if ahead is not None:
            yield _take(ahead, device)
        ahead = sent
    if ahead is not None:
        yield _take(ahead, device)


def _take(sent: Sent, device: torch.device) -> Batch:
    sent.done.synchronize()  # 在主机上等：没有送到就是在等数据，要算进 data_wait_share；早送到的不花时间
    current = torch.cuda.current_stream(device)
    for part in sent.batch.tensors:
        part.record_stream(current)  # 这块显存是另一条流要来的：用完之前不能还
    return sent.batch


class WireDataset(Dataset[Wire]):
    """读取进程只管搬字节，标准化与精度留给设备。"""

    def __init__(self, windows: WindowDataset) -> None:
        self.windows = windows

    def __getitems__(self, starts: Sequence[int]) -> Wire:
        return self.windows.wire(starts)


def batch_bytes(windows: WindowDataset, size: int, device: torch.device) -> int:
    """一批的场占多少字节：到显卡去的是存着的精度（Wire），处理器上的是 float32。"""
    reader = windows.reader.wire() if device.type == "cuda" else windows.reader
    spec, kind = windows.spec, reader.dtype if device.type == "cuda" else torch.float32
    return size * windows.window * spec.num_channels * spec.height * spec.width * kind.itemsize


def check_shared_memory(batch: int, workers: int, batches: int | None = None, processes: int = 1) -> None:
    """读取进程备着的批都在共享内存里：放不下的不开始。

    Args:
        batch: 一批的字节。
        batches: 一共几批，None 是许多。
        processes: 这台机器上一起训练的进程数，各有各的读取进程。

    Raises:
        ValueError: 要多少、有多少、怎样改。
    """
    if not workers or not SHARED.is_dir():
        return
    held = workers * AHEAD + 1  # 用着的还有一批
    needed = batch * processes * (held if batches is None else min(held, batches))
    free = shutil.disk_usage(SHARED).free
    if needed > free:
        raise ValueError(
            f"data.workers = {workers} keeps {needed / 1e6:.1f} MB of batches in shared memory ({batch / 1e6:.1f} MB a "
            f"batch), {free / 1e6:.1f} MB are free in {SHARED}; {remedy(needed)}"
        )


def make_loader(dataset: Dataset[Any], batches: Sequence[Sequence[int]], workers: int, pin: bool) -> Iterator[Any]:
    """按给定的批次表读取；批次表就是全部次序，读取进程数不影响结果。

    Args:
        dataset: WindowDataset 或 WireDataset；一批就是它的 __getitems__ 给出的。

    Raises:
        DataError: 读到的坏文件太多，见 FieldReader.frame；读取进程起不来、死了、放不进共享内存。
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  列表就是合法的 Sampler
        collate_fn=into_shared_memory,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        pin_memory=pin,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(0),  # 不动全局随机数：续训要逐位相同
    )
    readers: list[BaseProcess] = []
    try:
        yield from _start(loader, readers)
    except Exception as error:
        # 读取进程的异常由 DataLoader 转述，与它的 traceback 互相引用，要等垃圾回收才收场；清掉那几帧的变量，当场就收
        traceback.clear_frames(error.__traceback__)
        if not isinstance(error, OSError | EOFError | RuntimeError):
            raise
        ended = wait([reader.sentinel for reader in readers], timeout=1)  # 它死在交一批的半途，先看见的是断了的连接
        for reader in readers:
            if reader.sentinel in ended:
                reader.join(1)  # 先关文件，后才有退出的状态：等到有
        dead = [reader for reader in readers if reader.exitcode]
        if not dead:
            raise
        raise DataError(_obituary(dead[0])) from None


def _start(loader: DataLoader[Any], readers: list[BaseProcess]) -> Iterable[Any]:
    """起读取进程，记下它们。

    有一个死了，torch 在收到 SIGCHLD 时就抛错，或许正在更新权重的半途；换回原来的处理，要下一批时它也查，五秒之内。
    """
    handler, before = signal.getsignal(signal.SIGCHLD), multiprocessing.active_children()
    try:
        iterator = iter(loader)
    except OSError as error:
        raise DataError(f"cannot start {loader.num_workers} reading processes: {error}; lower data.workers") from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    readers += [process for process in multiprocessing.active_children() if process not in before]
    return iterator


def _obituary(dead: BaseProcess) -> str:
    """一个读取进程怎样死的，该怎么办。"""
    status = dead.exitcode or 0
    how = f"ended with status {status}, what it said is above"
    if status < 0:
        number = signal.Signals(-status)
        hint = {signal.SIGKILL: ", out of memory?", signal.SIGBUS: f", {SHARED} is full, or the disk failed?"}.get(
            number, ""
        )
        how = f"was killed by {number.name}{hint}"
    return (
        f"reading process {dead.pid} {how}; lower data.workers or train.batch_size (data.workers=0 reads in the main "
        "process), or give the job more memory"
    )


# ---- 在读取进程里


def _start_worker(_: int) -> None:
    """信号会发给整个进程组；读取进程若先死，主进程就来不及存检查点。SIGTERM 之后留 GRACE 秒，不会永远不退。"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_cannot_send)  # type: ignore[attr-defined]


def _cannot_send(error: Exception, _: object) -> None:
    """队列的线程送不出去（文件描述符用完了之类）：缺省是印一段 traceback 了事，主进程一直等；退出，它才知道。"""
    print(f"a reading process cannot send a batch: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(1)
