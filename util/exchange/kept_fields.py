"""留下的块作为数据的来源，打包成存档。

打包就是 packing/pack.pack_from，这里只给它换一个读数的地方，所以与先导入成树、再打包的逐字节相同。
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock

import numpy as np
import torch

from util.calendar import hours_in_year, moment_of, year_start
from util.config import DataConfig
from util.data.dataset import make_spec
from util.data.index import Index, split_years
from util.data.reader import FieldReader
from util.data.tree_files import FieldError, StaticField, field_path
from util.exchange.kept import Kept, open_kept
from util.exchange.plan import ImportPlan
from util.exchange.survey import Survey
from util.packing.chunks import PackJob
from util.packing.pack import make_plan, pack_from
from util.workers import Runner, Work

CHUNKS_AT_ONCE = 2  # 一块等盘、求校验和的时候，读、换算下一块
BLOCKS_KEPT = 2 * CHUNKS_AT_ONCE  # 每个变量映射着的块：各块眼下的，和空缺另一侧的


def pack_kept(
    plan: ImportPlan,
    kept: Sequence[Kept],
    found: Survey,
    store: Path,
    dtype: str,
    command: str,
    static: Mapping[str, StaticField],
) -> None:
    """kept 各块、不随时间变的场，打包；found 是过一遍所得，其中 holes 在存档里同目录树里缺的文件。

    Raises:
        ValueError: 见 packing/pack.pack_from。
    """
    config = plan.config.model_copy(update={"max_missing": 1.0})  # 容许缺多少，由读存档的那一份配置管
    moments = [found.moments[name] for name in plan.names]
    mean, std = zip(*((m.mean, m.std) for m in moments), strict=True)
    spec = make_spec(config, plan.names, mean, std, standardized=False)
    store_plan = make_plan(config, spec, [(m.low, m.high) for m in moments], [], dtype, command)
    origin = KeptFields(plan, config, found, kept)
    reader = FieldReader(origin, spec, origin.index(split_years(config)), np.zeros(0, np.int64), None, announce=False)
    freed = sum(k.size for k in kept if k.raw.is_file())
    pack_from(reader, store_plan, store, partial(in_threads, origin), static, freed)
    for k in kept:
        k.raw.unlink(missing_ok=True)


@contextmanager
def in_threads(origin: KeptFields, job: PackJob, _: Sequence[Path]) -> Iterator[Runner]:
    """几块同时做，从前往后；一块和它之前的都做完，再用不到的场就删去。"""

    def run(work: Work, numbers: Sequence[int]) -> Iterator[int]:
        for number, size in zip(numbers, pool.map(partial(work, job), numbers), strict=True):
            yield size
            origin.free(int(job.rows(number)[-1]) - job.plan.max_gap_hours)  # 往后的空缺只看到这里

    with ThreadPoolExecutor(CHUNKS_AT_ONCE) as pool:
        yield run


class KeptFields:
    """留下的块作为数据的来源（util.data.origin.Origin）。"""

    standardized = False
    dtype = torch.float32

    def __init__(self, plan: ImportPlan, config: DataConfig, found: Survey, kept: Sequence[Kept]) -> None:
        self.plan, self.config, self.root, self.channels = plan, config, config.root, plan.names
        self.found, self.kept = found, kept
        names = {name: variable for variable, channels in plan.channels.items() for name in channels}
        self.places = [(names[name], plan.channels[names[name]].index(name)) for name in self.channels]  # 变量, 第几层
        self.rows = {variable: np.empty((2, plan.hours.size), dtype=np.int64) for variable in plan.files}
        for number, k in enumerate(kept):  # 变量 → 各时刻在第几块、块里的哪一行
            at = np.searchsorted(plan.hours, k.block.hours)
            self.rows[k.block.name][:, at] = np.full(at.size, number), np.arange(at.size)
        self.block = lru_cache(BLOCKS_KEPT * len(plan.files))(self._open)
        self.opening = Lock()  # 不在的块要再读一次源文件，两块同时要也只读一次
        self.held = sorted(kept, key=lambda k: -k.block.hours.max())  # 还没有删去的，末一个最先用完

    def years(self, wanted: Sequence[int]) -> list[int]:
        return sorted(set(wanted) & {moment_of(hour).year for hour in self.plan.hours.tolist()})

    def index(self, years: list[int]) -> Index:
        """与扫描导入成的树所得的相同：含缺测的场没有文件。"""
        start = year_start(years[0])
        present = np.zeros((len(self.channels), year_start(years[-1]) + hours_in_year(years[-1]) - start), dtype=bool)
        there = self.plan.hours[(self.plan.hours >= start) & (self.plan.hours < start + present.shape[1])]
        present[:, there - start] = True
        for name, hour in self.found.holes:
            if start <= hour < start + present.shape[1]:
                present[self.channels.index(name), hour - start] = False
        return Index(tuple(self.channels), start, present)

    def mean_std(self) -> list[tuple[float, float]]:
        return [(self.found.moments[name].mean, self.found.moments[name].std) for name in self.channels]

    def decide(self, index: Index, training: np.ndarray) -> bool:
        return False

    def load(self, hours: Sequence[int], here: np.ndarray, out: np.ndarray) -> list[tuple[int, int, FieldError]]:
        """没有坏的：读不出在过一遍时就停了。"""
        for i, hour in enumerate(hours):
            for c in np.flatnonzero(here[i]).tolist():
                out[i, c] = self.raw(c, hour)
        return []

    def free(self, hour: int) -> None:
        """hour 之前的不再读了。"""
        while self.held and self.held[-1].block.hours.max() < hour:
            self.held.pop().raw.unlink(missing_ok=True)

    def file(self, c: int, hour: int) -> Path:
        return field_path(self.root, self.channels[c], hour)

    def raw(self, c: int, hour: int) -> np.ndarray:
        number, row = self._place(c, hour)
        with self.opening:
            block = self.block(number)
        return block[row, self.places[c][1]]

    def stamp(self, c: int, hour: int) -> str:
        return self.kept[self._place(c, hour)[0]].stamp

    def _place(self, c: int, hour: int) -> tuple[int, int]:
        """在第几块，块里的哪一行。"""
        number, row = self.rows[self.places[c][0]][:, np.searchsorted(self.plan.hours, hour)].tolist()
        return number, row

    def _open(self, number: int) -> np.ndarray:
        return open_kept(self.plan, self.kept[number])
