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
from util.data.index import Index, neighbours
from util.data.tree import FieldError, field_path, read_field

LINES_SHOWN = 20
MISSING = "missing"
log = logging.getLogger("ar_pred")


class Frame(NamedTuple):
    """一个时刻。sources：插值用到的 (通道序号, 小时)；这些场若在同一窗口里作目标，就等于泄露。"""

    fields: np.ndarray  # (C, H, W) float32，已标准化
    valid: np.ndarray  # (C,) bool
    sources: list[tuple[int, int]]


class DataError(ValueError):
    """读取途中发现的坏数据。DataLoader 转述读取进程的异常时会裹上整段 traceback，这里只留原来那一句。"""

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition("DataError: ")[2].strip())


class FieldReader:
    """按小时读帧。present 与已记录行数放在共享内存：一个进程发现的坏文件，别的进程不再重复报告。"""

    def __init__(
        self,
        config: DataConfig,
        spec: DataSpec,
        index: Index,
        used_hours: np.ndarray,
        report: Path | None,
        announce: bool = True,
    ) -> None:
        """used_hours: 各段的全部抽样小时（max_missing 的分母）；report: missing.csv 的路径；announce 见 open_data。"""
        self.config, self.spec, self.start, self.report = config, spec, index.start, report
        self.present = torch.from_numpy(index.present.copy()).share_memory_()  # (C, hours)
        self.used = torch.from_numpy(used_hours - index.start)
        self.lines = torch.zeros(2, dtype=torch.int64).share_memory_()
        self.mean = np.asarray(spec.mean, dtype=np.float32)[:, None, None]
        self.std = np.asarray(spec.std, dtype=np.float32)[:, None, None]
        for c, _ in enumerate(spec.channels):
            missing = self.used[~self.present[c, self.used]] + self.start
            if announce and missing.numel():
                self._note(c, missing.tolist(), MISSING)
            self._check_share(c)

    def frame(self, hour: int, until: int | None = None) -> Frame:
        """读 hour（文件名的历法）那一刻的全部通道。

        Args:
            until: 预报的初始时刻；插值的后一个邻居若在它之后就不用，沿用前一个：历史里不能有未来。

        Raises:
            DataError: 坏文件超过 max_missing，或坏文件连成的空缺超过 max_gap_hours。
        """
        assert 0 <= hour - self.start < self.present.shape[1], f"{time_text(hour)} lies outside the index"
        fields = np.empty((self.spec.num_channels, self.spec.height, self.spec.width), dtype=np.float32)
        valid = np.ones(self.spec.num_channels, dtype=bool)
        sources: list[tuple[int, int]] = []
        for c in range(self.spec.num_channels):
            field = self._try_read(c, hour)
            if field is None:
                valid[c] = False
                field, hours = self._interpolate(c, hour, until)
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
        except FieldError as error:
            self.present[c, hour - self.start] = False
            self._note(c, [hour], error.detail)
            self._check_share(c)
            return None

    def _interpolate(self, c: int, hour: int, until: int | None) -> tuple[np.ndarray, list[int]]:
        """两侧最近的可读文件，按距离加权；序列两端只有一侧时沿用那一侧。"""
        position = hour - self.start
        while True:  # 选中的邻居若也坏了，读它时已记下，再选一次
            near = neighbours(self.present[c].numpy(), position)
            width = near[-1] - near[0] if len(near) == 2 else abs(near[0] - position) if near else None
            if width is None or width > self.config.max_gap_hours:
                raise DataError(
                    f"{self.spec.channels[c]} at {time_text(hour)}: unreadable files leave a gap of more than "
                    f"data.max_gap_hours = {self.config.max_gap_hours}; delete them, then the gap ends a segment "
                    "(python -m util.data.check lists them)"
                )
            hours = [p + self.start for p in near]
            fields = [field for h in hours if (field := self._try_read(c, h)) is not None]
            if len(fields) == len(hours):
                break
        if len(hours) == 1 or (until is not None and hours[1] > until):
            return fields[0], hours[:1]
        weight = np.float32((hour - hours[0]) / (hours[1] - hours[0]))
        return (1 - weight) * fields[0] + weight * fields[1], hours

    def _note(self, c: int, hours: list[int], reason: str) -> None:
        """每个文件日志一行；缺失与读坏各显示 LINES_SHOWN 行，其余只进 missing.csv。"""
        channel, kind = self.spec.channels[c], int(reason != MISSING)
        paths = [field_path(self.config.root, channel, hour) for hour in hours]
        for hour, path in zip(hours, paths, strict=True):
            self.lines[kind] += 1
            count = int(self.lines[kind])
            if count <= LINES_SHOWN:
                log.warning("%s at %s: %s, interpolated where needed (%s)", channel, time_text(hour), reason, path)
            if count == LINES_SHOWN + 1:
                word = "unreadable" if kind else "missing"
                log.warning("more than %d fields %s; the full list is in %s", LINES_SHOWN, word, self.report)
        if self.report is not None:
            text = io.StringIO()
            writer = csv.writer(text)
            writer.writerows([channel, time_text(h), p, reason] for h, p in zip(hours, paths, strict=True))
            with self.report.open("a", encoding="utf-8") as file:  # 一次写完，多个进程不会交错
                file.write(text.getvalue())

    def _check_share(self, c: int) -> None:
        gone = ~self.present[c, self.used]
        count, total = int(gone.sum()), max(1, self.used.numel())
        if count > self.config.max_missing * total:
            channel = self.spec.channels[c]
            hours = [int(p) + self.start for p in self.used[gone][:5]]
            listed = ", ".join(field_path(self.config.root, channel, h).name for h in hours)
            more = f" and {count - 5} more" if count > 5 else ""
            raise DataError(
                f"{channel}: {count} of {total} files are missing or unreadable ({100 * count / total:.1f} %), above "
                f"data.max_missing = {self.config.max_missing:g} ({listed}{more}"
                + (f"; full list: {self.report})" if self.report else ")")
                + (f"; is data.interval_hours = {self.config.interval_hours} right?" if 2 * count > total else "")
            )
