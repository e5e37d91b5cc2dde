"""评测时要留下的：序列、地图、要存盘的场；各取一批里的哪些，由 glimpse 与选项定。"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from engine.evaluation.task import Fields, Pair, Task
from util.batch import Batch


class Kept:
    """一批里要画、要存的场。"""

    def __init__(self, task: Task, row: int, count: int) -> None:
        self.task = task
        self.rows = range(row, row + count)
        self.lines: list[Pair] = []  # 各时效的 (B, C', P)
        self.maps: dict[int, list[Pair]] = {}  # 起报时间的序号 → 各时效的 (C', h, w)
        self.saved: list[Pair] = []  # 各时效：truth (B, C, H, W)，forecast (B, M, C, H, W)

    def take(self, lead: int, forecast: Tensor, truth: Tensor) -> None:
        """被评模型的一个时效：forecast (B, M, C, H, W)，truth (B, C, H, W)，插值得来的为 NaN。"""
        glimpse = self.task.glimpse
        both = (truth, forecast.mean(1))
        if lead in glimpse.leads:
            self.lines.append(Pair(*map(glimpse.series, both)))
            for i, row in enumerate(self.rows):
                if row in glimpse.map_rows:
                    self.maps.setdefault(row, []).append(Pair(*(glimpse.picture(fields[i]) for fields in both)))
        if self.task.options.save:
            self.saved.append(Pair(self._physical(truth), self._physical(forecast)))

    def _physical(self, fields: Tensor) -> np.ndarray:
        return self.task.spec.to_physical(fields).float().cpu().numpy()

    def series(self) -> Pair:
        """(B, L', C', P)。"""
        return Pair(*(np.stack(leads, 1) for leads in zip(*self.lines, strict=True)))

    def pictures(self) -> dict[int, Pair]:
        """起报时间的序号 → (L', C', h, w)。"""
        return {row: Pair(*map(np.stack, zip(*leads, strict=True))) for row, leads in self.maps.items()}

    def fields(self, batch: Batch) -> Fields | None:
        """要存的场；什么也不存时没有。"""
        save, spec = self.task.options.save, self.task.spec
        if not save:
            return None
        return Fields(
            forecast=np.stack([pair.forecast for pair in self.saved], 2),
            truth=np.stack([pair.truth for pair in self.saved], 1),
            valid=batch.valid[:, spec.frames_in :].cpu().numpy(),
            history=self._physical(batch.history) if "npy" in save else None,
        )
