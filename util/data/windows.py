"""时间窗口：取哪些起点、按什么次序；一批窗口怎样从帧拼成 Batch。窗口以起始小时为名，次序只由种子和轮次决定。"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from util.arrays import as_array
from util.batch import Batch, Wire
from util.data.reader import DataError, FieldReader, Frame

GRACE = 30  # 秒
Segments = list[np.ndarray]  # 每段是连续的抽样小时


def all_starts(segments: Segments, window: int, stride: int = 1) -> np.ndarray:
    """每个可能的起点（步长 stride），不跨段。"""
    return np.concatenate([s[: s.size - window + 1] for s in segments if s.size >= window] or [np.empty(0, np.int64)])[
        ::stride
    ]


def epoch_starts(segments: Segments, window: int, shuffle: bool, seed: int, epoch: int) -> np.ndarray:
    """一轮训练的起点。

    shuffle：从所有起点里不放回地随机取，个数与不打乱时相同（一段时即 N // t）；
    不打乱：互不重叠，段长不能整除时丢掉段首最早的几个样本。
    """
    count = sum(s.size // window for s in segments)
    if shuffle:
        return np.random.default_rng([seed, epoch]).permutation(all_starts(segments, window))[:count]
    return adjoining_starts(segments, window)


def adjoining_starts(segments: Segments, window: int, shared: int = 0) -> np.ndarray:
    """首尾相接的窗口的起点，相邻的共用 shared 帧；段长不合时丢掉段首最早的几个样本。"""
    ahead = window - shared
    return np.concatenate([s[(s.size - shared) % ahead : max(0, s.size - shared) : ahead] for s in segments])


class WindowDataset(Dataset[Batch]):
    """以起始小时列表取一批窗口；批内重复的时刻只读一次（相邻窗口共用 t-1 帧）。"""

    def __init__(self, reader: FieldReader, frames_out: int | None = None) -> None:
        """frames_out: 目标帧数，默认与 spec 相同；滚动评测时更长。"""
        self.reader, self.spec = reader, reader.spec
        self.window = self.spec.frames_in + (frames_out or self.spec.frames_out)

    def with_future(self, frames_out: int) -> WindowDataset:
        """同一份数据，目标取 frames_out 帧。"""
        return WindowDataset(self.reader, frames_out)

    def __getitem__(self, start: int) -> Batch:
        return self.__getitems__([start])

    def hours(self, starts: Sequence[int]) -> np.ndarray:
        """(B, t) 各窗口的小时，文件名的历法。"""
        return np.asarray(starts, dtype=np.int64)[:, None] + np.arange(self.window) * self.spec.interval_hours

    def utc(self, hours: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(hours - self.reader.config.utc_offset_hours)

    def __getitems__(self, starts: Sequence[int]) -> Batch:
        """长度 B 的起点 → Batch，时间换成 UTC。"""
        return self.spec.receive(self._read(starts, self.reader), raw=False)

    def wire(self, starts: Sequence[int]) -> Wire:
        """长度 B 的起点 → 存着的精度、存着的单位；spec.receive(…, reader.wire().raw) 之后与 __getitems__ 逐位相同。"""
        return self._read(starts, self.reader.wire())

    def _read(self, starts: Sequence[int], reader: FieldReader) -> Wire:
        hours = self.hours(starts)
        fields = reader.empty(*hours.shape)  # (B, t, C, H, W)
        if reader.read_whole(hours, as_array(fields)):  # 绝大多数的批
            return Wire(fields, self.utc(hours), torch.ones(fields.shape[:3], dtype=torch.bool))  # valid (B, t, C)
        windows = self._fill(hours, as_array(fields), reader)
        valid = np.stack([window_valid(r, w, self.spec.frames_in) for r, w in zip(hours, windows, strict=True)])
        return Wire(fields, self.utc(hours), torch.from_numpy(valid))

    def _fill(self, hours: np.ndarray, fields: np.ndarray, reader: FieldReader) -> list[list[Frame]]:
        """各窗口直接读进 fields (B, t, C, H, W)，同一时刻只读一次；返回 B 个长为 t 的列表。"""
        first: dict[int, Frame] = {}
        windows: list[list[Frame]] = []
        for row, places in zip(hours.tolist(), fields, strict=True):
            for hour, out in zip(row, places, strict=True):
                if hour in first:
                    out[...] = first[hour].fields
            new = [i for i, hour in enumerate(row) if hour not in first]
            if new:
                part = slice(new[0], new[-1] + 1)  # 窗口一样长：读过的只会是这一个的头或尾，没读过的连成一段
                first.update(zip(row[part], reader.frames(row[part], places[part]), strict=True))
            windows.append([first[hour] for hour in row])
        for row, places, window in zip(hours.tolist(), fields, windows, strict=True):  # 都抄完了才能改
            self._causal(row, places, window, reader)
        return windows

    def _causal(self, hours: list[int], fields: np.ndarray, window: list[Frame], reader: FieldReader) -> None:
        """历史帧的插值若用了初始时刻之后的文件，按「只看过去」重读：预报的输入里不能有未来。"""
        last = hours[self.spec.frames_in - 1]
        for i in range(self.spec.frames_in):
            if any(source > last for _, source in window[i].sources):
                window[i] = reader.frame(hours[i], until=last, out=fields[i])


def window_valid(hours: np.ndarray, frames: list[Frame], frames_in: int) -> np.ndarray:
    """(t, C) bool：插值得来的为假；插值用过的场若在本窗口里也为假，否则输入里就带着目标。

    历史只能从初始时刻之后的文件得来时（序列开头），这个通道的全部目标为假。
    """
    valid = np.stack([frame.valid for frame in frames])
    place = {int(h): i for i, h in enumerate(hours)}
    for i, frame in enumerate(frames):
        for channel, source in frame.sources:
            if source in place:
                valid[place[source], channel] = False
            if i < frames_in and source > hours[frames_in - 1]:
                valid[frames_in:, channel] = False
    return valid


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


def split_batches(starts: np.ndarray, batch_size: int) -> list[list[int]]:
    """起点依次切成批，最后一批可以小。"""
    return [starts[i : i + batch_size].tolist() for i in range(0, len(starts), batch_size)]


def share_batches(batches: list[list[int]], rank: int, world: int, parts: int = 1) -> Iterator[list[int]]:
    """每个全局批 → 本进程的 parts 个小批；不能整除的零头去掉（只可能在最后一批）。"""
    for batch in batches:
        size = len(batch) // (world * parts)
        if size:
            for part in range(parts):
                first = (part * world + rank) * size
                yield batch[first : first + size]


def _same(batch: Any) -> Any:
    return batch


def _leave_signals_to_parent(_: int) -> None:
    """信号会发给整个进程组；读取进程若先死，主进程就来不及存检查点。SIGTERM 之后留 GRACE 秒，不会永远不退。"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
