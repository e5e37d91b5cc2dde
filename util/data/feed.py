"""送批到设备：读取进程 → 锁页内存 → 另一条流上的异步搬运与标准化，比用的早一批；数据留在设备上时当场取。"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from util.batch import Batch, DataSpec, Wire
from util.data.dataset import WeatherData
from util.data.origin import DataError
from util.data.windows import WindowDataset

GRACE = 30  # 秒


def feed(
    data: WeatherData, batches: Sequence[Sequence[int]], device: torch.device, frames_out: int | None = None
) -> Iterator[Batch]:
    """按批次表给出已在设备上的 Batch；次序与数都与 WindowDataset 的逐位相同。

    Args:
        batches: 每批的起点。
        frames_out: 目标帧数，默认与 spec 相同；滚动评测时更长。

    Raises:
        DataError: 读到的坏文件太多，见 FieldReader.frame。
    """
    windows = data.windows if frames_out is None else data.windows.with_future(frames_out)
    if data.resident is not None and data.resident.holds(windows, batches, device):
        return (data.resident.batch(windows, starts) for starts in batches)
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
    for part in sent.batch:
        part.record_stream(current)  # 这块显存是另一条流要来的：用完之前不能还
    return sent.batch


class WireDataset(Dataset[Wire]):
    """读取进程只管搬字节，标准化与精度留给设备。"""

    def __init__(self, windows: WindowDataset) -> None:
        self.windows = windows

    def __getitems__(self, starts: Sequence[int]) -> Wire:
        return self.windows.wire(starts)


def make_loader(dataset: Dataset[Any], batches: Sequence[Sequence[int]], workers: int, pin: bool) -> Iterator[Any]:
    """按给定的批次表读取；批次表就是全部次序，读取进程数不影响结果。

    Args:
        dataset: WindowDataset 或 WireDataset；一批就是它的 __getitems__ 给出的。

    Raises:
        DataError: 读到的坏文件太多，见 FieldReader.frame。
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  列表就是合法的 Sampler
        collate_fn=_same,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_parent,
        generator=torch.Generator().manual_seed(0),  # 不动全局随机数：续训要逐位相同
    )
    try:
        yield from loader
    except DataError as error:
        # 读取进程的异常由 DataLoader 转述，与它的 traceback 互相引用，读取进程要等垃圾回收才收场；断开，当场就收
        raise error.with_traceback(None) from None


def _same(batch: Any) -> Any:
    return batch


def _leave_signals_to_parent(_: int) -> None:
    """信号会发给整个进程组；读取进程若先死，主进程就来不及存检查点。SIGTERM 之后留 GRACE 秒，不会永远不退。"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
