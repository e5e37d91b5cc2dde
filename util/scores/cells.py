"""在哪里、什么时候：同一份 statistics.nc 按区域、按季、月、钟点分开平均，各格自己的自助法。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from util.scores.bootstrap import Blocks, Part, block_ids, part_sums
from util.scores.common import Array, Common, Contender, common_pairs
from util.scores.table import WHOLE, Cell
from util.scores.tabulate import finish

BATCH = 2  # 一批里的块至多是全部时间的几倍
SEASONS = ("DJF", "MAM", "JJA", "SON")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def tabulate_cells(
    contenders: Sequence[Contender], baselines: Sequence[str], references: Sequence[str] = (), by: Sequence[str] = ()
) -> list[Cell]:
    """各区域 × 各段时间的成绩，整个网格的全部时间除外（那是 tabulate 的）；参数同 tabulate，by: season、month、hour。

    各份文件里同名、同样的格点的区域才在其中。
    """
    common = common_pairs(contenders)
    found = periods(common, by)
    regions = [None, *common_regions(contenders)]
    cells = []
    for region in regions if found or len(regions) > 1 else []:
        whole = {WHOLE: np.ones(common.keep.shape[:2], dtype=bool)} if region else {}
        for parts in batches(common, whole | found):
            sums = {c.label: _sums(c, common, list(parts.values()), region) for c in contenders}
            for i, (period, part) in enumerate(parts.items()):
                blocks = {label: several[i] for label, several in sums.items()}
                counts = np.stack([common.keep[rows, lead].sum(0) for lead, rows in enumerate(part.chosen.T)])  # (L, C)
                cell = Cell(
                    region=region or WHOLE,
                    period=period,
                    bootstrap_blocks=len(part.weeks),
                    pairs={c: counts[:, k].tolist() for k, c in enumerate(common.channels)},
                    **finish(contenders, common, blocks, baselines, references),
                )
                cells.append(cell)
    return cells


def _sums(contender: Contender, common: Common, parts: Sequence[Part], region: str | None) -> list[Blocks]:
    names = contender.file.regional_names if region else contender.file.names
    return part_sums(contender, common, parts, names, region)


def batches(common: Common, chosen: Mapping[str, Array]) -> list[dict[str, Part]]:
    """几段时间一批，一批读一遍文件：合起来的块不过全部时间的 BATCH 倍，--by 再细，内存也有界。

    只留有场的块：一季之外的各周不该抽到。
    """
    ids, valid = block_ids(common), common.keep.any(2)
    room, result = 0, []
    for name, some in chosen.items():
        part = Part(some, np.unique(ids[(some & valid).any(1)]))
        if len(part.weeks) > room:
            result.append({})
            room = BATCH * len(np.unique(ids))
        result[-1][name] = part
        room -= len(part.weeks)
    return result


def periods(common: Common, by: Sequence[str]) -> dict[str, Array]:
    """名字 → 哪些起报时间与时效 (T, L)，按有效时间分；没有场的不在其中。"""
    there = common.keep.any(2)
    found = periods_of(common.hours[:, None] + np.array(common.leads), by)
    return {name: some for name, some in found.items() if (some & there).any()}


def periods_of(valid_hours: Array, by: Sequence[str]) -> dict[str, Array]:
    """名字 → 哪些有效时间（起报 + 时效，UTC 小时）在里面，同样的形状；空的也在其中。"""
    valid = valid_hours.astype("datetime64[h]")
    month = valid.astype("datetime64[M]").astype(int) % 12
    hour = valid.astype(int) % 24
    groups = {
        "season": {name: (month + 1) % 12 // 3 == i for i, name in enumerate(SEASONS)},
        "month": {name: month == i for i, name in enumerate(MONTHS)},
        "hour": {f"{h:02d} UTC": hour == h for h in range(24)},
    }
    return {name: some for one in by for name, some in groups[one].items()}


def common_regions(contenders: Sequence[Contender]) -> list[str]:
    """各份文件都有、格点也相同的区域。"""
    first, *others = {id(c.file): c.file for c in contenders}.values()
    return [name for name in first.regions if all(first.same_region(other, name) for other in others)]
