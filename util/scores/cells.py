"""在哪里、什么时候：同一份 statistics.nc 按区域、按季、月、钟点分开平均，各格自己的自助法。"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from util.scores.bootstrap import Blocks, block_ids, part_sums
from util.scores.common import Array, Common, Contender, common_pairs
from util.scores.table import WHOLE, Cell
from util.scores.tabulate import finish

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
        parts = {WHOLE: common.keep, **found} if region else found
        sums = {c.label: _sums(c, common, list(parts.values()), region) for c in contenders}
        for i, (period, keep) in enumerate(parts.items()):
            blocks = {label: several[i] for label, several in sums.items()}
            counts = keep.sum(0)  # (L, C)
            cell = Cell(
                region=region or WHOLE,
                period=period,
                bootstrap_blocks=len(next(iter(blocks.values())).counts),
                pairs={c: counts[:, k].tolist() for k, c in enumerate(common.channels)},
                **finish(contenders, common, blocks, baselines, references),
            )
            cells.append(cell)
    return cells


def _sums(contender: Contender, common: Common, parts: Sequence[Array], region: str | None) -> list[Blocks]:
    """只留有场的块：一季之外的各周不该抽到。"""
    names = contender.file.regional_names if region else contender.file.names
    weeks = block_ids(common)
    sums = part_sums(contender, common, parts, names, region)
    kept = [np.unique(weeks[part.any((1, 2))]) for part in parts]
    return [
        Blocks({name: total[rows] for name, total in one.sums.items()}, one.counts[rows], one.std)
        for one, rows in zip(sums, kept, strict=True)
    ]


def periods(common: Common, by: Sequence[str]) -> dict[str, Array]:
    """名字 → 哪些场 (T, L, C)，按有效时间（起报 + 时效，UTC）分；没有场的不在其中。"""
    valid = (common.hours[:, None] + np.array(common.leads)).astype("datetime64[h]")  # (T, L)
    month = valid.astype("datetime64[M]").astype(int) % 12
    hour = valid.astype(int) % 24
    groups = {
        "season": {name: (month + 1) % 12 // 3 == i for i, name in enumerate(SEASONS)},
        "month": {name: month == i for i, name in enumerate(MONTHS)},
        "hour": {f"{h:02d} UTC": hour == h for h in range(24)},
    }
    kept = {name: common.keep & chosen[..., None] for one in by for name, chosen in groups[one].items()}
    return {name: keep for name, keep in kept.items() if keep.any()}


def common_regions(contenders: Sequence[Contender]) -> list[str]:
    """各份文件都有、格点也相同的区域。"""
    first, *others = {id(c.file): c.file for c in contenders}.values()
    return [name for name in first.regions if all(first.same_region(other, name) for other in others)]
