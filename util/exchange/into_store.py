"""直接导入成存档，中间不写目录树：先过一遍全部场（统计量、哪些场含缺测），再把留下的块（kept）打包。

一个进程做：NetCDF、GRIB 的解压不宜跨进程。
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from util.cli import loading
from util.data.tree_files import StaticField
from util.exchange.kept import kept_blocks, measure_kept, remove_others
from util.exchange.plan import ImportPlan
from util.exchange.survey import Survey, survey
from util.files.moments import check_moments
from util.packing.claim import check_space, claimed, refuse_other


def import_to_store(
    plan: ImportPlan, store: Path, dtype: str, command: str, static: Mapping[str, StaticField]
) -> Survey:
    """按 plan 写成存档，或接着写，连同不随时间变的场；返回过一遍所得。

    Raises:
        ValueError: 见 packing/pack.pack_from；读不出；盘上放不下；某通道在训练日期内没有场，或全是同一个数。
    """
    refuse_other(store)
    kept = kept_blocks(plan, store)
    with claimed(store):
        remove_others(store, kept)
        check_space(store, sum(k.size for k in kept if not k.record.is_file()))  # 打包时它们逐块让位给存档
        found = survey(plan, measure_kept(plan, kept))
        for name, moments in found.moments.items():
            check_moments(name, moments, " to ".join(plan.config.splits.train))
        with loading():  # 引入 torch；在别的线程里早些引入，两边抢解释器的锁，不更快
            from util.exchange.kept_fields import pack_kept
        pack_kept(plan, kept, found, store, dtype, command, static)
    return found
