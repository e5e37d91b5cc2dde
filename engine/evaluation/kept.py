"""评测时要留下的：序列、地图、要存盘的场；各取一批里的哪些，由 glimpse 与选项定。"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.evaluation.task import Fields, Pair, Task
from util.batch import Batch

Both = tuple[Tensor, Tensor]  # 真值与预报


class Kept:
    """一批里要画、要存的场；留在设备上，一批走完才取到主机。"""

    def __init__(self, task: Task, row: int, count: int, weights: Tensor) -> None:
        """weights: (H,)，各纬度的。"""
        self.task, self.weights = task, weights
        self.rows = range(row, row + count)
        self.lines: list[Both] = []  # 各时效的 (B, C', P)
        self.maps: dict[tuple[str, int], list[Both]] = {}  # 哪一组、起报时间的序号 → 各时效的 (C', h, w)
        self.saved: list[Both] = []  # 各时效的真值 (B, C, H, W)，预报 (B, M, C, H, W)

    def take(self, lead: int, forecast: Tensor, truth: Tensor) -> None:
        """被评模型的一个时效：forecast (B, M, C, H, W)，truth (B, C, H, W)，插值得来的为 NaN。"""
        glimpse, mean = self.task.glimpse, forecast.mean(1)
        if lead in glimpse.leads:
            self.lines.append((glimpse.series(truth, self.weights), glimpse.series(mean, self.weights)))
        for name, reel in glimpse.reels.items():
            for i, row in enumerate(self.rows):
                if lead in reel.leads and row in reel.rows:
                    both = glimpse.picture(truth[i], reel), glimpse.picture(mean[i], reel)
                    self.maps.setdefault((name, row), []).append(both)
        if self.task.options.save:
            self.saved.append((truth, forecast))

    def series(self) -> Pair:
        """(B, L', C', P)。"""
        return Pair(*(torch.stack(leads, 1).cpu().numpy() for leads in zip(*self.lines, strict=True)))

    def pictures(self) -> dict[tuple[str, int], Pair]:
        """哪一组、起报时间的序号 → (L', C', h, w)。"""
        return {
            place: Pair(*(torch.stack(fields).cpu().numpy() for fields in zip(*leads, strict=True)))
            for place, leads in self.maps.items()
        }

    def fields(self, batch: Batch) -> Fields | None:
        """要存的场；什么也不存时没有。"""
        save, spec = self.task.options.save, self.task.spec
        if not save:
            return None
        truth, forecast = zip(*self.saved, strict=True)
        return Fields(
            forecast=self._physical(torch.stack(forecast, 2)),
            truth=self._physical(torch.stack(truth, 1)),
            valid=batch.valid[:, spec.frames_in :].cpu().numpy(),
            history=self._physical(batch.history) if "npy" in save else None,
        )

    def _physical(self, fields: Tensor) -> np.ndarray:
        return self.task.spec.to_physical(fields).float().cpu().numpy()
