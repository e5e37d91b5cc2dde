"""读一帧：从目录树或存档读各通道；缺的、坏的用同一通道最近的两个文件按时间插值，并记下来源。"""

from __future__ import annotations

import copy
import csv
import io
import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from util.batch import DataSpec, as_array, as_tensor, empty_fields
from util.calendar import time_text
from util.data.index import Index, neighbours, too_many_missing
from util.data.origin import DataError, Origin
from util.data.tree_files import FieldError

LINES_SHOWN = 20
FIRST_WAIT = 0.1  # 秒；以后每次加倍
GIVEN_UP, DOUBTED = 1, 2  # FieldReader.lost
MISSING = "missing"
REPORT_HEADER = "channel,time,path,reason\n"  # missing.csv
SHARED = Path("/dev/shm")  # noqa: S108  容器里常只有 64 MB
REMEDY = (
    "lower data.workers or train.batch_size (data.workers=0 needs none), "
    "or make it larger, e.g. docker run --shm-size={size}m"
)
log = logging.getLogger("ar_pred")


class Frame(NamedTuple):
    """一个时刻。sources：插值用到的 (通道序号, 小时)；这些场若在同一窗口里作目标，就等于泄露。"""

    fields: np.ndarray  # (C, H, W) float32，已标准化；wire() 的读取器给出的是存着的样子
    valid: np.ndarray  # (C,) bool
    sources: list[tuple[int, int]]


class FieldReader:
    """按小时读帧。present 与已记录行数放在共享内存：一个进程发现的坏文件，别的进程不再重复报告。"""

    def __init__(
        self,
        origin: Origin,
        spec: DataSpec,
        index: Index,
        used_hours: np.ndarray,
        report: Path | None,
        announce: bool = True,
    ) -> None:
        """used_hours: 各段的全部抽样小时（max_missing 的分母）；report: missing.csv 的路径；announce 见 open_data。"""
        self.origin, self.config, self.spec, self.start, self.report = origin, origin.config, spec, index.start, report
        self.standardizes = not (spec.standardized or origin.standardized)  # 读出来的要标准化
        self.dtype = torch.float32  # 交出去的精度
        self.faults: dict[tuple[int, int], FieldError] = {}  # 这个进程读出的坏文件：(通道, 小时)
        self.present = torch.from_numpy(index.present.copy()).share_memory_()  # (C, hours)
        self.used = torch.from_numpy(used_hours - index.start)
        self.lost = torch.zeros_like(self.present, dtype=torch.uint8).share_memory_()  # 见 try_again
        self.outage = {"since": 0.0, "last": -math.inf}  # 这个进程的：从何时起、末一次在何时读不出；wire() 的也用它
        self.lines = torch.zeros(2, dtype=torch.int64).share_memory_()
        self.mean = np.asarray(spec.mean, dtype=np.float32)
        self.std = np.asarray(spec.std, dtype=np.float32)
        for c, _ in enumerate(spec.channels):
            missing = self.used[~self.present[c, self.used]] + self.start
            if announce and missing.numel():
                self._note(c, missing.tolist(), MISSING)
            self._check_share(c)

    @property
    def raw(self) -> bool:
        """交出去的还是文件里的数，要由收的一方标准化。"""
        return not (self.standardizes or self.spec.standardized or self.origin.standardized)

    def wire(self) -> FieldReader:
        """同一份数据、同一张缺失的表，交出去的却是存着的样子：目录树的不标准化，半精度的存档不换成 float32。"""
        reader = copy.copy(self)
        reader.standardizes, reader.dtype = False, self.origin.dtype
        return reader

    def empty(self, *sizes: int) -> torch.Tensor:
        """放得下 sizes 个帧的空缓冲区 (*sizes, C, H, W)；在读取进程里是共享内存。"""
        make = empty_fields if get_worker_info() is None else shared_fields
        return make((*sizes, self.spec.num_channels, self.spec.height, self.spec.width), self.dtype)

    def frame(self, hour: int, until: int | None = None, out: np.ndarray | None = None) -> Frame:
        """读 hour（文件名的历法）那一刻的全部通道；其余见 frames。"""
        if out is None:
            out = as_array(self.empty())
        return self.frames([hour], out[None], until)[0]

    def frames(self, hours: Sequence[int], out: np.ndarray, until: int | None = None) -> list[Frame]:
        """读几个小时的全部通道；几个一起读，存档里连着的就是一次复制。

        Args:
            hours: n 个小时，文件名的历法。
            out: (n, C, H, W)，精度是 self.dtype（bfloat16 是 uint16 的位模式），一批的缓冲区里的一段；
                各帧的 fields 就是它的各行。
            until: 预报的初始时刻；插值的后一个邻居若在它之后就不用，沿用前一个：历史里不能有未来。

        Raises:
            DataError: 坏文件超过 max_missing，或坏文件连成的空缺超过 max_gap_hours。
        """
        valid = np.ones(out.shape[:2], dtype=bool)
        sources: list[list[tuple[int, int]]] = [[] for _ in hours]
        for i, c in self.load(hours, out):
            valid[i, c] = False
            sources[i] += [(c, h) for h in self.interpolate(c, hours[i], until, out[i, c])]
        return [Frame(*parts) for parts in zip(out, valid, sources, strict=True)]

    def read_whole(self, windows: np.ndarray, out: np.ndarray) -> bool:
        """存档的几个窗口 (B, t)，全部有文件时直接抄进 out (B, t, C, H, W)，一个窗口一次；为假时 out 的内容不定。

        逐帧登记、去重的账比抄一遍还贵。要标准化的（目录树）不走这里：重复的时刻不必读两遍文件。
        """
        if self.standardizes or not self.origin.standardized:
            return False
        if not self.present.numpy()[:, windows.ravel() - self.start].all():
            return False
        here = np.ones(out.shape[1:3], dtype=bool)
        return not any(self.origin.load(row, here, place) for row, place in zip(windows.tolist(), out, strict=True))

    def load(self, hours: Sequence[int], out: np.ndarray) -> list[tuple[int, int]]:
        """有文件、读得出的场读进 out (n, C, H, W)，已标准化；返回其余的 (第几个小时, 通道)，那里的内容不定。"""
        positions = np.asarray(hours) - self.start
        assert positions.min() >= 0 and positions.max() < self.present.shape[1], f"{hours} lie outside the index"
        here = self.present.numpy()[:, positions].T  # (n, C) 取了副本：别的进程也会改 present
        step = 1 if self.standardizes else len(hours)  # 刚读进来的还在处理器的缓存里，就标准化
        for first in range(0, len(hours), step):
            part = slice(first, first + step)
            for i, c, error in self.origin.load(hours[part], here[part], out[part]):
                field = self._persist(c, hours[first + i], error)
                if field is None:
                    here[first + i, c] = False
                else:
                    out[first + i, c] = field
            if self.standardizes:
                for c in np.flatnonzero(here[first]).tolist():
                    self._standardize(c, out[first, c])
        return [] if here.all() else [(i, c) for i, c in np.argwhere(~here).tolist()]

    def interpolate(self, c: int, hour: int, until: int | None, out: np.ndarray) -> list[int]:
        """通道 c 的空缺补进 out (H, W)，已标准化；返回所用的小时。until 与 Raises 见 frame。"""
        field, hours = self._between(c, hour, until)
        if not (self.raw or self.spec.standardized):
            field = field.copy()
            self._standardize(c, field)
        stored = torch.from_numpy(field).to(self.origin.dtype)  # 与存档里的一样舍入
        as_tensor(out).copy_(stored)
        return hours

    def near(self, c: int, hour: int, limit: int) -> dict[int, np.ndarray]:
        """两侧最近的、相距不超过 limit 小时的可读文件：小时 → 文件里的数 (H, W)。"""
        while True:  # 选中的邻居若也坏了，读它时已记下，再选一次
            found = neighbours(self.present[c].numpy(), hour - self.start)
            hours = [h for p in found if abs((h := p + self.start) - hour) <= limit]
            fields = {h: field for h in hours if (field := self._try_raw(c, h)) is not None}
            if len(fields) == len(hours):
                return fields

    def files_of(self, hours: np.ndarray) -> np.ndarray:
        """(C, 索引的全部小时) bool：读这些时刻用得到的文件，即它们自己和空缺两侧的邻居。"""
        found = np.zeros(self.present.shape, dtype=bool)
        at, count = hours - self.start, found.shape[1]
        for needed, row in zip(found, self.present.numpy(), strict=True):
            places = np.arange(count)
            before = np.maximum.accumulate(np.where(row, places, 0))[at]  # 有文件的，两侧都是它自己
            after = np.minimum.accumulate(np.where(row, places, count - 1)[::-1])[::-1][at]
            needed[at] = needed[before] = needed[after] = True
        return found

    def available(self, hour: int) -> bool:
        """这一刻每个通道按名字都有文件。"""
        position = hour - self.start
        return 0 <= position < self.present.shape[1] and bool(self.present[:, position].all())

    def _standardize(self, c: int, field: np.ndarray) -> None:
        field -= self.mean[c]
        field /= self.std[c]

    def _try_raw(self, c: int, hour: int) -> np.ndarray | None:
        try:
            return self.origin.raw(c, hour)
        except FieldError as error:
            return self._persist(c, hour, error)

    def try_again(self) -> int:
        """盘一时读不出而放过的，以后再读（只读一次，不再等）；返回这是几个。一轮之末调用。"""
        places = self.lost == GIVEN_UP
        self.present[places] = True
        self.lost[places] = DOUBTED
        return int(places.sum())

    def _persist(self, c: int, hour: int, error: FieldError) -> np.ndarray | None:
        """没有读出的场：盘一时读不出的，隔得越来越久地再读，一次断线合起来至多 data.retry_seconds 秒；还不行就记下。"""
        place, patience, wait = hour - self.start, self.config.retry_seconds, 0.0
        now = time.monotonic()
        if now - self.outage["last"] > patience:
            self.outage["since"] = now
        until = now if self.lost[c, place] == DOUBTED else self.outage["since"] + patience
        while error.passing and now < until:
            if wait == FIRST_WAIT:
                log.warning("%s; reading it again for up to %.3g s", error, until - now)
            time.sleep(min(wait, until - now))  # 头一次不等：别的文件也许刚等过
            wait, now = 2 * wait or FIRST_WAIT, time.monotonic()
            self.outage["last"] = now
            try:
                field = self.origin.raw(c, hour)
            except FieldError as again:
                error = again
            else:
                if wait > FIRST_WAIT:
                    log.warning("%s: read now, after %.1f s", self.origin.file(c, hour), now - self.outage["since"])
                self.outage["last"] = -math.inf
                return field
        self._mark(c, hour, error)
        return None

    def _mark(self, c: int, hour: int, error: FieldError) -> None:
        """记下一个坏文件：以后与按名字缺失的相同。"""
        self.present[c, hour - self.start] = False
        if error.passing:
            self.lost[c, hour - self.start] = GIVEN_UP
        self.faults[c, hour] = error
        self._note(c, [hour], error.detail)
        self._check_share(c)

    def _between(self, c: int, hour: int, until: int | None) -> tuple[np.ndarray, list[int]]:
        """两侧最近的可读文件，按距离加权；序列两端只有一侧时沿用那一侧。"""
        position = hour - self.start
        while True:  # 选中的邻居若也坏了，读它时已记下，再选一次
            near = neighbours(self.present[c].numpy(), position)
            width = near[-1] - near[0] if len(near) == 2 else abs(near[0] - position) if near else None
            if width is None or width > self.config.max_gap_hours:
                raise DataError(
                    f"{self.spec.channels[c]} at {time_text(hour)}: unreadable files leave a gap of more than "
                    f"data.max_gap_hours = {self.config.max_gap_hours}; delete them, then the gap ends a segment "
                    "(python dataset.py check lists them)"
                )
            hours = [p + self.start for p in near]
            fields = [field for h in hours if (field := self._try_raw(c, h)) is not None]
            if len(fields) == len(hours):
                break
        if len(hours) == 1 or (until is not None and hours[1] > until):
            return fields[0], hours[:1]
        weight = np.float32((hour - hours[0]) / (hours[1] - hours[0]))
        return (1 - weight) * fields[0] + weight * fields[1], hours

    def _note(self, c: int, hours: list[int], reason: str) -> None:
        """每个文件日志一行；缺失与读坏各显示 LINES_SHOWN 行，其余只进 missing.csv。"""
        channel, kind = self.spec.channels[c], int(reason != MISSING)
        paths = [self.origin.file(c, hour) for hour in hours]
        for hour, path in zip(hours, paths, strict=True):
            self.lines[kind] += 1
            count = int(self.lines[kind])
            if count <= LINES_SHOWN:
                log.warning("%s at %s: %s, interpolated where needed (%s)", channel, time_text(hour), reason, path)
            if count == LINES_SHOWN + 1:
                word = "unreadable" if kind else "missing"
                log.warning("more than %d fields %s; the full list is in %s", LINES_SHOWN, word, self.report)
        if self.report is not None:
            self.report.parent.mkdir(parents=True, exist_ok=True)  # 训练当中也许被删去了
            text = io.StringIO("" if self.report.exists() else REPORT_HEADER)
            text.seek(0, io.SEEK_END)
            writer = csv.writer(text)
            writer.writerows([channel, time_text(h), p, reason] for h, p in zip(hours, paths, strict=True))
            with self.report.open("a", encoding="utf-8") as file:  # 一次写完，多个进程不会交错
                file.write(text.getvalue())

    def _check_share(self, c: int) -> None:
        gone = ~self.present[c, self.used]
        count, total = int(gone.sum()), self.used.numel()
        if too_many := too_many_missing(self.config, count, total):
            channel = self.spec.channels[c]
            hours = [int(p) + self.start for p in self.used[gone][:5]]
            listed = ", ".join(self.origin.file(c, h).name for h in hours)
            more = f" and {count - 5} more" if count > 5 else ""
            raise DataError(
                f"{channel}: {too_many} ({listed}{more}"
                + (f"; full list: {self.report})" if self.report else ")")
                + (f"; is data.interval_hours = {self.config.interval_hours} right?" if 2 * count > total else "")
            )


# ---- 读取进程里的批写在共享内存里，主进程拿到的就是它；放不下怎样说


def remedy(needed: int) -> str:
    """共享内存不够时怎么办。"""
    return REMEDY.format(size=math.ceil(needed / 2**20) + 1)


def shared_fields(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """共享内存里的一块：直接读进来，交出去时不必再抄一遍。

    Raises:
        DataError: 放不下。
    """
    size = math.prod(shape) * dtype.itemsize
    with _fits(size):
        return torch.empty(0, dtype=dtype).set_(torch.UntypedStorage._new_shared(size)).view(shape)


def into_shared_memory(batch: Any) -> Any:
    """不在那里的当场放进去：放不下是这里的异常，主进程收得到；留给队列的线程放，它只印一段 traceback，主进程一直等。"""
    if get_worker_info() is not None:
        tensors = [part for part in batch if isinstance(part, torch.Tensor)]  # 种子是引擎后来给的，这里没有
        with _fits(sum(part.nbytes for part in tensors)):
            for part in tensors:
                part.share_memory_()
    return batch


@contextmanager
def _fits(size: int) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"a batch of {size / 1e6:.1f} MB does not fit into shared memory ({reason}); "
            f"{shutil.disk_usage(SHARED).free / 1e6:.1f} MB are free in {SHARED}; {remedy(size)}"
        ) from None
