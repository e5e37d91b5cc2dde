"""直接导入成存档，中间不写目录树：先过一遍全部场（统计量、哪些场含缺测），再由源文件当场换算、打包。

源文件因此读两遍；打包就是 packing/pack.pack_from，这里只给它换一个读数的地方，所以与先导入成树、再打包的逐字节相同。
第一遍的结果记在 STORE/pack/survey.json，中断之后不重来；一个进程做：NetCDF、GRIB 的解压不宜跨进程。
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from util.calendar import hours_in_year, moment_of, year_start
from util.config import DataConfig
from util.data.dataset import make_spec
from util.data.index import Index, split_years
from util.data.reader import FieldReader
from util.data.tree_files import FieldError, StaticField, field_path
from util.exchange.plan import ImportPlan, block_parts, read_block
from util.exchange.survey import Outside, Survey, survey
from util.files.store_files import json_digest
from util.files.zarr_metadata import write_json
from util.moments import Moments, check_moments
from util.packing.pack import locked, make_plan, pack_from, refuse_other
from util.source.collection import Source, file_stamps

BLOCKS_KEPT = 2  # 每个变量留住的块：眼下的，和空缺另一侧的
log = logging.getLogger("ar_pred")


def import_to_store(
    plan: ImportPlan, store: Path, dtype: str, command: str, static: Mapping[str, StaticField]
) -> Survey:
    """按 plan 写成存档，或接着写，连同不随时间变的场；返回过一遍所得，其中 holes 在存档里同目录树里缺的文件。

    Raises:
        ValueError: 见 packing/pack.pack_from；读不出；某通道在训练日期内没有场，或全是同一个数。
    """
    refuse_other(store)
    with locked(store):
        found = _survey(plan, store)
    for name, moments in found.moments.items():
        check_moments(name, moments, " to ".join(plan.config.splits.train))
    config = plan.config.model_copy(update={"max_missing": 1.0})  # 容许缺多少，由读存档的那一份配置管
    origin = SourceFiles(plan, config, found)
    extremes = [(found.moments[name].low, found.moments[name].high) for name in origin.channels]
    mean, std = zip(*origin.mean_std(), strict=True)
    spec = make_spec(config, origin.channels, mean, std, standardized=False)
    index = origin.index(split_years(config))
    reader = FieldReader(origin, spec, index, np.zeros(0, dtype=np.int64), None, announce=False)
    pack_from(reader, make_plan(config, spec, extremes, [], dtype, command), store, static=static)
    return found


def _survey(plan: ImportPlan, store: Path) -> Survey:
    """过一遍，或读回上一次的；源文件、要的变量、网格、划分有一样不同就重来。"""
    path = store / "pack" / "survey.json"
    stamps = _stamps(plan)
    used = {name: [stamps[held.source] for held in files] for name, files in plan.files.items()}
    key = json_digest([Survey._fields, used, plan.values, plan.request.dates])
    if path.is_file():
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["key"] == key:
            log.info("statistics and missing fields are known already")
            moments = {name: Moments(*values) for name, values in held["moments"].items()}
            outside = {name: Outside(*values) for name, values in held["outside"].items()}
            return Survey(moments, [(name, hour) for name, hour in held["holes"]], outside)
    found = survey(plan, lambda _name, _hour, field: bool(np.isfinite(field).all()))
    write_json(path, {"key": key, **found._asdict()})
    return found


def _stamps(plan: ImportPlan) -> dict[Source, str]:
    """来源 → 文件换了、从中取什么与怎样换变了就不同的一个戳。"""
    grid = [plan.values[name] for name in ("latitude", "longitude", "pressure_hpa")]
    wanted = [
        plan.request.model_dump(exclude={"static", "dates", "skip_lacking"}),
        grid,
        [str(part) for part in plan.region],
    ]
    sources = {held.source for files in plan.files.values() for held in files}
    return {source: json_digest([wanted, file_stamps(source)]) for source in sources}


class SourceFiles:
    """源文件作为数据的来源（util.data.origin.Origin）；场是写进目录树的那些数。"""

    standardized = False
    dtype = torch.float32

    def __init__(self, plan: ImportPlan, config: DataConfig, found: Survey) -> None:
        self.plan, self.config, self.root, self.channels = plan, config, config.root, plan.names
        self.found = found
        names = {name: variable for variable, channels in plan.channels.items() for name in channels}
        self.places = [(names[name], plan.channels[names[name]].index(name)) for name in self.channels]  # 变量, 第几层
        self.parts = {
            v: [(held, part) for held in files for part in block_parts(held)] for v, files in plan.files.items()
        }
        self.rows = {  # 变量 → 小时 → (第几块, 块里的行)
            variable: {
                int(h): (i, row) for i, (held, part) in enumerate(parts) for row, h in enumerate(held.hours[part])
            }
            for variable, parts in self.parts.items()
        }
        stamps = _stamps(plan)
        self.stamps = {variable: [stamps[held.source] for held, _ in parts] for variable, parts in self.parts.items()}
        self.block = lru_cache(BLOCKS_KEPT * len(self.parts))(self._read)

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

    def file(self, c: int, hour: int) -> Path:
        return field_path(self.root, self.channels[c], hour)

    def raw(self, c: int, hour: int) -> np.ndarray:
        variable, level = self.places[c]
        number, row = self.rows[variable][hour]
        return self.block(variable, number)[row, level]

    def stamp(self, c: int, hour: int) -> str:
        variable, _ = self.places[c]
        number, _ = self.rows[variable][hour]
        return self.stamps[variable][number]

    def _read(self, variable: str, number: int) -> np.ndarray:
        return read_block(self.plan, variable, *self.parts[variable][number])
