"""读一帧：逐通道读文件；缺的、坏的用同一通道最近的两个文件按时间插值，并记下来源。"""

from __future__ import annotations

import csv
import io
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from util.batch import DataSpec
from util.config import DataConfig
from util.data.calendar import time_text
from util.data.index import Index
from util.data.tree import field_path, read_field

LINES_SHOWN = 20
log = logging.getLogger("ar_pred")


class Frame(NamedTuple):
    """一个时刻。sources：插值用到的 (通道序号, 小时)；这些场若在同一窗口里作目标，就等于泄露。"""

    fields: np.ndarray  # (C, H, W) float32，已标准化
    valid: np.ndarray  # (C,) bool
    sources: list[tuple[int, int]]


class FieldReader:
    """按小时读帧。present 与已记录行数放在共享内存：一个进程发现的坏文件，别的进程不再重复报告。"""

    def __init__(
        self, config: DataConfig, spec: DataSpec, index: Index, used_hours: np.ndarray, report: Path | None
    ) -> None:
        """used_hours: 各段的全部抽样小时（max_missing 的分母）；report: missing.csv 的路径。"""
        self.config, self.spec, self.start, self.report = config, spec, index.start, report
        self.present = torch.from_numpy(index.present.copy()).share_memory_()  # (C, hours)
        self.used = torch.from_numpy(used_hours - index.start)
        self.lines = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.mean = np.asarray(spec.mean, dtype=np.float32)[:, None, None]
        self.std = np.asarray(spec.std, dtype=np.float32)[:, None, None]
        for c, _ in enumerate(spec.channels):
            for position in self.used[~self.present[c, self.used]].tolist():
                self._note(c, position + self.start, "missing")
            self._check_share(c)

    def frame(self, hour: int) -> Frame:
        """读 hour（文件名的历法）那一刻的全部通道。

        Raises:
            ValueError: 坏文件超过 max_missing，或坏文件连成的空缺超过 max_gap_hours。
        """
        fields = np.empty((self.spec.num_channels, self.spec.height, self.spec.width), dtype=np.float32)
        valid = np.ones(self.spec.num_channels, dtype=bool)
        sources: list[tuple[int, int]] = []
        for c in range(self.spec.num_channels):
            field = self._try_read(c, hour)
            if field is None:
                valid[c] = False
                field, hours = self._interpolate(c, hour)
                sources += [(c, h) for h in hours]
            fields[c] = field
        if not self.spec.standardized:
            fields -= self.mean
            fields /= self.std
        return Frame(fields, valid, sources)

    def available(self, hour: int) -> bool:
        """这一刻每个通道按名字都有文件。"""
        position = hour - self.start
        return 0 <= position < self.present.shape[1] and bool(self.present[:, position].all())

    def _try_read(self, c: int, hour: int) -> np.ndarray | None:
        if not self.present[c, hour - self.start]:
            return None
        path = field_path(self.config.root, self.spec.channels[c], hour)
        try:
            return read_field(path, (self.spec.height, self.spec.width))
        except ValueError as error:
            self.present[c, hour - self.start] = False
            self._note(c, hour, str(error).removeprefix(f"{path}: "))
            self._check_share(c)
            return None

    def _interpolate(self, c: int, hour: int) -> tuple[np.ndarray, list[int]]:
        """两侧最近的可读文件，按距离加权；序列两端只有一侧时沿用那一侧。"""
        before, after = self._nearest(c, hour, -1), self._nearest(c, hour, +1)
        found = [pair for pair in (before, after) if pair is not None]
        width = found[-1][0] - found[0][0] if len(found) == 2 else abs(found[0][0] - hour) if found else None
        if width is None or width > self.config.max_gap_hours:
            raise ValueError(
                f"{self.spec.channels[c]} at {time_text(hour)}: unreadable files leave a gap of more than "
                f"data.max_gap_hours = {self.config.max_gap_hours}; delete them, then the gap ends a segment "
                "(python -m util.data.check lists them)"
            )
        if len(found) == 1:
            return found[0][1], [found[0][0]]
        (h0, f0), (h1, f1) = found
        weight = np.float32((hour - h0) / (h1 - h0))
        return (1 - weight) * f0 + weight * f1, [h0, h1]

    def _nearest(self, c: int, hour: int, step: int) -> tuple[int, np.ndarray] | None:
        for distance in range(1, self.config.max_gap_hours + 1):
            other = hour + step * distance
            if not 0 <= other - self.start < self.present.shape[1]:
                return None
            field = self._try_read(c, other)
            if field is not None:
                return other, field
        return None

    def _note(self, c: int, hour: int, reason: str) -> None:
        """日志一行；超过 LINES_SHOWN 行后只进 missing.csv。"""
        channel = self.spec.channels[c]
        path = field_path(self.config.root, channel, hour)
        self.lines += 1
        count = int(self.lines)
        if count <= LINES_SHOWN:
            log.warning("%s at %s: %s, interpolated (%s)", channel, time_text(hour), reason, path)
        if count == LINES_SHOWN + 1:
            log.warning("more than %d fields missing or unreadable; the full list is in %s", LINES_SHOWN, self.report)
        if self.report is not None:
            line = io.StringIO()
            csv.writer(line).writerow([channel, time_text(hour), path, reason])
            with self.report.open("a", encoding="utf-8") as file:  # 追加的一行一次写完，多个进程不会交错
                file.write(line.getvalue())

    def _check_share(self, c: int) -> None:
        gone = ~self.present[c, self.used]
        count, total = int(gone.sum()), max(1, self.used.numel())
        if count > self.config.max_missing * total:
            channel = self.spec.channels[c]
            hours = [int(p) + self.start for p in self.used[gone][:5]]
            listed = ", ".join(field_path(self.config.root, channel, h).name for h in hours)
            more = f" and {count - 5} more" if count > 5 else ""
            raise ValueError(
                f"{channel}: {count} of {total} files are missing or unreadable ({100 * count / total:.1f} %), above "
                f"data.max_missing = {self.config.max_missing:g} ({listed}{more}; full list: {self.report or 'not kept'})"
            )
