"""打包：排出各块，多进程地做，末了写完成的标志。"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from util.batch import DataSpec
from util.calendar import year_start
from util.config import DataConfig
from util.data.dataset import open_data
from util.data.index import sampled_hours, split_years
from util.data.joined_origin import Joined
from util.data.reader import FieldReader
from util.data.tree_files import StaticField, Tendency, read_extremes, read_static, read_tendency, static_names
from util.files.store_files import MARK, MAY_GROW, StorePlan, read_mark, read_plan, write_plan
from util.files.zarr_metadata import FILE_TYPES
from util.packing.chunks import PackJob, make_job, pack_chunk, read_chunk_record
from util.packing.claim import check_space, claimed, refuse_other
from util.packing.finish_store import finish_store
from util.workers import Runner, distribute

CHUNK_BYTES = 32 * 2**20  # 一块约这么大：大到读得连续，小到一块的内存不算什么
MOST_BYTES = 256 * 2**20  # 打包的每个进程要拿住一块
log = logging.getLogger("ar_pred")


def pack(config: DataConfig, store: Path, dtype: str, workers: int, command: str, scheduler: str | None = None) -> None:
    """打包、接着打包，或追加；没有事可做时只说一声。scheduler 见 workers.distribute。

    Raises:
        ValueError: 数据或划分不对；STORE 里是别的东西；盘上放不下；另一个打包正在进行；工人都死了。
    """
    refuse_other(store)
    lenient = {"source": "tree", "residency": "disk", "max_missing": 1.0}  # 容许缺多少，由读存档的那一份配置管
    data = open_data(anywhere(config).model_copy(update=lenient))
    origin = data.windows.reader.origin
    homes = origin.homes if isinstance(origin, Joined) else [config.root] * len(origin.channels)
    extremes = [read_extremes(home, channel) for home, channel in zip(homes, origin.channels, strict=True)]
    tendencies = [read_tendency(home, channel) for home, channel in zip(homes, origin.channels, strict=True)]
    plan = make_plan(config, data.spec, extremes, tendencies, dtype, command)
    with claimed(store):
        pack_from(data.windows.reader, plan, store, partial(distribute, workers, scheduler), find_static(config))


def anywhere(config: DataConfig) -> DataConfig:
    """目录树写成绝对路径：别处的工人不在这个文件夹里。"""
    parts = {
        name: part.model_copy(update={"root": str(Path(part.root).absolute())}) for name, part in config.parts.items()
    }
    return config.model_copy(update={"parts": parts} if parts else {"root": str(Path(config.root).absolute())})


def find_static(config: DataConfig) -> dict[str, StaticField]:
    """各目录树里不随时间变的场；几棵树都有的须相同。"""
    found: dict[str, StaticField] = {}
    for root in config.roots:
        for name in static_names(root):
            field = read_static(root, name, config.latitude, config.longitude)
            if name in found and not np.array_equal(field.values, found[name].values):
                raise ValueError(f"{root}/static/{name}.npy differs from that of another data set; remove one of them")
            found.setdefault(name, field)
    return found


def pack_from(
    reader: FieldReader,
    plan: StorePlan,
    store: Path,
    spread: Callable[[PackJob, Sequence[Path]], AbstractContextManager[Runner]],
    static: Mapping[str, StaticField],
    freed: int = 0,
) -> None:
    """reader 读得到的，照 plan 打包，store 已经占下（claimed）。

    Args:
        spread: 各块怎样分给谁做，见 workers.distribute；paths 是工人要看得见的。
        static: 不随时间变的场。
        freed: 打时让出来的字节。
    """
    plan = replace(plan, static={name: described(field) for name, field in static.items()})
    old = read_plan(store)
    plan = merge(store, old, plan) if old else plan
    hours = packed_hours(reader, plan)
    job = make_job(store, plan, hours, reader)
    todo = [number for number in range(job.chunks) if read_chunk_record(job, number) is None]
    if not todo and old and replace(old, commands=plan.commands, root=plan.root) == plan and is_whole(store):
        log.info("store %s: %s, complete already, nothing to do", store, plan.years_text)
        return
    check_space(store, len(todo) * plan.chunk_bytes - freed)
    paths = (job.store, *map(Path, reader.config.roots))
    with spread(job, paths) as run:  # 先连上调度器，连不上的什么也不动
        (store / MARK).unlink(missing_ok=True)
        write_plan(store, plan)
        run_chunks(job, todo, run)
    finish_store(job, static)
    log.info("store %s: %s, %d times in %d chunks, %s", store, plan.years_text, hours.size, job.chunks, plan.dtype)


def described(static: StaticField) -> dict[str, Any]:
    """plan 里记的一个不随时间变的场；值换了，校验和就不同。"""
    digest = hashlib.blake2b(static.values.tobytes(), digest_size=16).hexdigest()
    return {**static.about(), "digest": digest}


def is_whole(store: Path) -> bool:
    """有完成的标志，列在里面的文件都在。"""
    return (store / MARK).is_file() and all((store / name).is_file() for name in read_mark(store)["files"])


def make_plan(
    config: DataConfig,
    spec: DataSpec,
    extremes: Sequence[tuple[float, float] | None],
    tendencies: Sequence[Tendency | None],
    dtype: str,
    command: str,
) -> StorePlan:
    """这份配置要的存档；extremes: 各通道的最小、最大，tendencies: 变化的标准差，不知道的是 None。

    一块的行数往后追加时不变。
    """
    row_bytes = spec.num_channels * spec.height * spec.width * FILE_TYPES[dtype].itemsize
    return StorePlan(
        channels=list(spec.channels),
        units=list(spec.units),
        pressures=list(spec.pressures),
        latitudes=list(spec.latitudes),
        longitudes=list(spec.longitudes),
        mean=list(spec.mean),
        std=list(spec.std),
        standardized=spec.standardized,
        standardize=config.standardize,
        utc_offset_hours=config.utc_offset_hours,
        interval_hours=spec.every_hours,
        max_gap_hours=config.max_gap_hours,
        dtype=dtype,
        chunk_rows=chunk_rows(row_bytes, spec),
        years=split_years(config),
        root=config.root,
        commands=[command],
        extremes=[pair and list(pair) for pair in extremes],
        first_hour=config.first_hour,
        tendencies=[pair and list(pair) for pair in tendencies] if any(tendencies) else [],
    )


def chunk_rows(row_bytes: int, spec: DataSpec) -> int:
    """一块几行：约 CHUNK_BYTES，至少一个窗口（它至多跨两块；一块不大过 MOST_BYTES），至多一年。"""
    ahead = spec.interval_hours // spec.every_hours  # 相邻两帧隔几行
    window = min((spec.window - 1) * ahead + 1, MOST_BYTES // row_bytes)
    return max(1, min(max(round(CHUNK_BYTES / row_bytes), window), 366 * 24 // spec.every_hours))


def merge(store: Path, old: StorePlan, new: StorePlan) -> StorePlan:
    """在已有的存档上接着做：只有年份可以往后加。

    Raises:
        ValueError: 别的什么不同，或年份不是往后加的。
    """
    for name, held in asdict(old).items():
        asked = getattr(new, name)
        if name not in (*MAY_GROW, "chunk_rows") and held != asked:
            if isinstance(held, list) and len(held) == len(asked):  # 几十个通道的表，只说第一处不同
                i = next(i for i, pair in enumerate(zip(held, asked, strict=True)) if pair[0] != pair[1])
                name, held, asked = f"{name}[{i}]", held[i], asked[i]
            raise ValueError(f"{store} was packed with {name} = {held}, this asks for {asked}; give another --out")
    if new.years[: len(old.years)] != old.years:
        raise ValueError(
            f"{store} holds {old.years_text}, data.splits need {new.years_text}: only later years can be appended "
            "(chunks are numbered from the first time), and the splits must still span the years packed before"
        )
    commands = old.commands if new.commands[0] in old.commands else old.commands + new.commands
    return replace(new, commands=commands, chunk_rows=old.chunk_rows)


def packed_hours(reader: FieldReader, plan: StorePlan) -> np.ndarray:
    """(N,) 各行的小时：抽样时刻里，max_gap_hours 以内至少有一个通道有文件的；再远的哪种配置也用不到。"""
    years = [range(year_start(year), year_start(year + 1)) for year in plan.years]
    hours = np.concatenate([sampled_hours(year, plan.interval_hours, plan.first_hour) for year in years])
    there = np.concatenate([[0], np.cumsum(reader.present.numpy().any(axis=0))])
    low = np.clip(hours - plan.max_gap_hours - reader.start, 0, there.size - 1)
    high = np.clip(hours + plan.max_gap_hours + 1 - reader.start, 0, there.size - 1)
    return hours[there[high] > there[low]]


def run_chunks(job: PackJob, todo: Sequence[int], run: Runner) -> None:
    """做 todo 各块；进度条给出 GB/s 与还要多久。"""
    size = job.plan.chunk_bytes
    done = job.chunks - len(todo)
    if done:
        log.info("%d of %d chunks are done already", done, job.chunks)
    with tqdm(total=job.chunks * size, initial=done * size, desc="pack", unit="B", unit_scale=True) as bar:
        for count in run(pack_chunk, todo):
            bar.update(count)
