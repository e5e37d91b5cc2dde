"""一批窗口怎样从帧拼成 Batch：批内重复的时刻只读一次，历史里没有未来，插值得来的场不作目标。"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from util.batch import Batch, Wire, as_array
from util.data.reader import FieldReader, Frame


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
