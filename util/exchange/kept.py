"""直接导入成存档时，换算好的块留在盘上：源文件只读一遍，中断之后再跑，读过的不再读。

STORE/pack/source/KEY.raw 是一块的场，用完就删；KEY.json 是过一遍所得，留着：往后加年份，从前的不必再读。
KEY 由源文件（换过没有）、从中取什么、怎样换、训练日期定，所以换了哪一样，都不会读到旧的。
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from util.atomic import replacing
from util.exchange.plan import Block, ImportPlan, blocks_of, read_block, read_blocks
from util.exchange.survey import Outside, Survey, measure_block
from util.files.moments import Moments
from util.files.zarr_metadata import json_digest, write_json
from util.source.collection import Source, file_stamps

log = logging.getLogger("ar_pred")


class Kept(NamedTuple):
    """一块，和它在盘上的两个文件。

    stamp: 源文件换了，或从中取什么、怎样换变了，就不同；shape: raw 里的 (n, 通道, H, W)，float32。
    """

    block: Block
    stamp: str
    shape: tuple[int, int, int, int]
    raw: Path
    record: Path

    @property
    def size(self) -> int:
        """raw 有多少字节。"""
        return 4 * math.prod(self.shape)


def kept_blocks(plan: ImportPlan, store: Path) -> list[Kept]:
    """plan 的各块。"""
    folder, stamps, kept = store / "pack" / "source", _stamps(plan), []
    grid = plan.config.latitude.count, plan.config.longitude.count
    for block in blocks_of(plan):
        stamp = stamps[block.held.source]
        key = json_digest([stamp, block.name, block.hours.tolist(), plan.config.splits.train, Survey._fields])
        shape = block.hours.size, len(plan.channels[block.name]), *grid
        kept.append(Kept(block, stamp, shape, folder / f"{key}.raw", folder / f"{key}.json"))
    return kept


def _stamps(plan: ImportPlan) -> dict[Source, str]:
    """来源 → Kept.stamp。"""
    grid = [plan.values[name] for name in ("latitude", "longitude", "pressure_hpa")]
    wanted = [
        plan.request.model_dump(exclude={"static", "dates", "skip_lacking"}),
        grid,
        plan.regrid and plan.regrid.method,
        [str(part) for part in plan.region],
    ]
    sources = {held.source for files in plan.files.values() for held in files}
    return {source: json_digest([wanted, file_stamps(source)]) for source in sources}


def measure_kept(plan: ImportPlan, kept: Sequence[Kept]) -> Iterator[tuple[Block, Survey]]:
    """各块与过一遍所得；没有记录的才读，写下。"""
    known = {k.record: found for k in kept if (found := _read_record(k.record))}
    if known:
        log.info("%d of %d blocks of the source are known already", len(known), len(kept))
    read = read_blocks(plan, [k.block for k in kept if k.record not in known])
    for k in kept:
        if k.record not in known:
            values, filled = next(read)
            known[k.record] = measure_block(plan, k.block, values, filled, _finite)
            _write(k.raw, values)
            write_json(k.record, known[k.record]._asdict())
        yield k.block, known[k.record]


def open_kept(plan: ImportPlan, kept: Kept) -> np.ndarray:
    """一块的场 (n, 通道, H, W)，映射着的；不在的（从前打好、这次有一部分要重做的）再读一次源文件。"""
    if not kept.raw.is_file() or kept.raw.stat().st_size != kept.size:  # 断电之后可能不全
        _write(kept.raw, read_block(plan, kept.block)[0])
    return np.memmap(kept.raw, np.float32, "r", shape=kept.shape)


def remove_others(store: Path, kept: Iterable[Kept]) -> None:
    """删去 kept 之外的：换过的源文件、从前的做法留下的。"""
    used = {path for k in kept for path in (k.raw, k.record)}
    for path in (store / "pack" / "source").glob("*"):
        if path not in used:
            path.unlink()


def _finite(_name: str, _hour: int, field: np.ndarray) -> bool:
    return bool(np.isfinite(field).all())


def _read_record(path: Path) -> Survey | None:
    """记录；没有，或坏了，是 None。"""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        moments = {name: Moments(*values) for name, values in held["moments"].items()}
        outside = {name: Outside(*values) for name, values in held["outside"].items()}
        return Survey(moments, outside, *([tuple(one) for one in held[key]] for key in ("holes", "filled")))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, values: np.ndarray) -> None:
    """不等落盘：长短不对的 open_kept 不认。不用 tofile：磁盘满时它的 OSError 没有错误号。"""
    with replacing(path) as temporary:
        temporary.write_bytes(values.data)
