"""评测时要留下的：序列、地图、要存盘的场；各取一批里的哪些，由 glimpse 与选项定。"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from engine.evaluation.task import Task
from util.batch import Batch


class Kept:
    """一批里要画、要存的场。"""

    def __init__(self, task: Task, row: int, count: int) -> None:
        self.task = task
        self.rows = range(row, row + count)
        self.lines: dict[str, list[np.ndarray]] = {"forecast": [], "truth": []}
        self.pictures: dict[int, dict[str, np.ndarray]] = {}
        self.saved: dict[str, list[np.ndarray]] = {"forecast": [], "truth": []}

    def take(self, lead: int, forecast: Tensor, truth: Tensor) -> None:
        """被评模型的一个时效：forecast (B, M, C, H, W)，truth (B, C, H, W)，插值得来的为 NaN。"""
        view, spec = self.task.view, self.task.spec
        both = {"forecast": forecast.mean(1), "truth": truth}
        if lead in view.leads:
            for name, fields in both.items():
                self.lines[name].append(view.series(fields))
                for i, row in enumerate(self.rows):
                    if row in view.map_rows:
                        frames = self.pictures.setdefault(row, {})
                        new = view.picture(fields[i])[None]
                        frames[name] = np.concatenate([frames[name], new]) if name in frames else new
        if self.task.options.save:
            self.saved["forecast"].append(spec.to_physical(forecast).float().cpu().numpy())
            self.saved["truth"].append(spec.to_physical(truth).float().cpu().numpy())

    def series(self) -> dict[str, np.ndarray]:
        return {name: np.stack(leads, 1) for name, leads in self.lines.items()}

    def fields(self, batch: Batch) -> dict[str, np.ndarray]:
        """forecast (B, M, L, C, H, W)，truth (B, L, C, H, W)，valid (B, L, C)，要存 npy 时 history。"""
        if not self.task.options.save:
            return {}
        spec = self.task.spec
        fields = {
            "forecast": np.stack(self.saved["forecast"], 2),
            "truth": np.stack(self.saved["truth"], 1),
            "valid": batch.valid[:, spec.frames_in :].cpu().numpy(),
        }
        if "npy" in self.task.options.save:
            fields["history"] = spec.to_physical(batch.history).float().cpu().numpy()
        return fields
