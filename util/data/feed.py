"""送批到设备：读取进程 → 锁页内存 → 另一条流上的异步搬运与标准化，比用的早一批；数据留在设备上时当场取。"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from util.batch import Batch, DataSpec, Wire
from util.data.dataset import WeatherData
from util.data.windows import WireDataset, make_loader


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
