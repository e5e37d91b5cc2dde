"""一批批窗口里收下个例要的：框里的成绩的统计量、羽状图的数、要画的场；别的不留。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.cases.plan import Plan
from util.scores.metrics import area_mean, pair_statistics

TRUTH = "truth"


class Shot(NamedTuple):
    """一个（起报时间，时效）的场，物理单位，(C, h, w)；members 是 (m, C, h, w)；插值得来的真值为 NaN。"""

    truth: np.ndarray
    forecast: np.ndarray
    normal: np.ndarray
    members: np.ndarray


class CaseFound(NamedTuple):
    """一个个例的 n 对（起报时间，时效）。

    keep: (n, C)，真值有效、各模型都还有限的；values: 真值与各模型 → (n, M, C) 羽状图的数，物理单位；
    statistics: 模型 → 统计量 → (n, C)，标准化单位，框里的；shots: （窗口，时效）→ 场。
    """

    rows: np.ndarray
    leads: np.ndarray
    keep: np.ndarray
    values: dict[str, np.ndarray]
    statistics: dict[str, dict[str, np.ndarray]]
    shots: dict[tuple[int, int], Shot]


class Piece(NamedTuple):
    """一批里一个时效上的；各栏同 CaseFound，还在设备上。"""

    rows: list[int]
    lead: int
    keep: Tensor
    values: dict[str, Tensor]
    statistics: dict[str, dict[str, Tensor]]
    shots: dict[tuple[int, int], tuple[Tensor, ...]]


class Collector:
    """一批窗口；留在设备上，一批走完才取到主机。"""

    def __init__(self, plans: Sequence[Plan], judged: str, rows: range) -> None:
        self.plans, self.judged, self.rows = plans, judged, rows
        self.pieces: list[list[Piece]] = [[] for _ in plans]

    def take(
        self,
        lead: int,
        forecasts: Mapping[str, Tensor],
        truth: Tensor,
        valid: Tensor,
        alive: Mapping[str, Tensor],
        normal: Tensor,
    ) -> None:
        """一个时效。forecasts: 各 (B, M, C, H, W)；truth、normal（气候态）: (B, C, H, W)；

        valid: (B, C) bool，真值有效的；alive: 模型 → (B,) bool，到这里为止还有限的。
        """
        for plan, pieces in zip(self.plans, self.pieces, strict=True):
            some = [i for i, row in enumerate(self.rows) if plan.inside[row, lead]]
            if some:
                keep = valid & torch.stack([*alive.values()]).all(0)[:, None]
                boxed = {name: crop(plan, one[some]) for name, one in {TRUTH: truth[:, None], **forecasts}.items()}
                good = (one[some][:, plan.channels] for one in (valid, keep))
                rows = [self.rows[i] for i in some]
                pieces.append(self._look(plan, lead, rows, boxed, crop(plan, normal[some]), *good))

    def _look(
        self,
        plan: Plan,
        lead: int,
        rows: list[int],
        boxed: dict[str, Tensor],
        usual: Tensor,
        valid: Tensor,
        keep: Tensor,
    ) -> Piece:
        """boxed: 真值与各模型，(n, M, c, h, w)；usual: (n, c, h, w)；valid、keep: (n, c)。"""
        device, spec = usual.device, plan.spec
        weights = torch.from_numpy(plan.weights).to(device)
        real, models = boxed[TRUTH][:, 0], {name: fields for name, fields in boxed.items() if name != TRUTH}
        none = torch.empty(spec.num_channels, 0, device=device)
        statistics = pair_statistics(models, real, usual, weights, none)
        mean, std = (torch.tensor(v, dtype=torch.float64, device=device) for v in (spec.mean, spec.std))
        values = {name: at_place(plan, fields, weights) * std + mean for name, fields in boxed.items()}
        values[TRUTH] = values[TRUTH].masked_fill(~valid[:, None], torch.nan)
        shown = real.masked_fill(~valid[..., None, None], torch.nan)
        judged = models[self.judged]
        shots = {}
        for i, row in enumerate(rows):
            if (row, lead) in plan.wanted:
                fields = (shown[i], judged[i].mean(0), usual[i], judged[i, : plan.members])
                shots[row, lead] = tuple(map(spec.to_physical, fields))
        return Piece(rows, lead, keep, values, statistics, shots)

    def found(self) -> tuple[CaseFound | None, ...]:
        """各个例的；一对也没有的是 None。"""
        return tuple(gathered(pieces) if pieces else None for pieces in self.pieces)


def crop(plan: Plan, fields: Tensor) -> Tensor:
    """(..., C, H, W) → (..., c, h, w)：框里的格点，由西向东。"""
    device = fields.device
    channels, rows, columns = (torch.tensor(v, device=device) for v in (plan.channels, plan.rows, plan.columns))
    return fields[..., channels[:, None, None], rows[:, None], columns]


def at_place(plan: Plan, fields: Tensor, weights: Tensor) -> Tensor:
    """(n, M, c, h, w) → (n, M, c) float64：框的面积平均，或那一点。"""
    if plan.point is None:
        return area_mean(fields, weights)
    row, column = plan.point
    return fields[..., row, column].double()


def gathered(pieces: list[Piece]) -> CaseFound:
    """取到主机。"""

    def joined(parts: list[Tensor]) -> np.ndarray:
        return torch.cat(parts).cpu().numpy()

    first = pieces[0]
    return CaseFound(
        rows=np.concatenate([piece.rows for piece in pieces]),
        leads=np.concatenate([[piece.lead] * len(piece.rows) for piece in pieces]),
        keep=joined([piece.keep for piece in pieces]),
        values={name: joined([piece.values[name] for piece in pieces]) for name in first.values},
        statistics={
            name: {key: joined([piece.statistics[name][key] for piece in pieces]) for key in one}
            for name, one in first.statistics.items()
        },
        shots={
            pair: Shot(*(fields.float().cpu().numpy() for fields in shot))
            for piece in pieces
            for pair, shot in piece.shots.items()
        },
    )


def join(parts: Sequence[CaseFound]) -> CaseFound:
    """各批的接起来，先排起报时间、再排时效。"""

    def joined(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(arrays)[order]

    rows, leads = np.concatenate([part.rows for part in parts]), np.concatenate([part.leads for part in parts])
    order = np.lexsort((leads, rows))
    first = parts[0]
    return CaseFound(
        rows=rows[order],
        leads=leads[order],
        keep=joined([part.keep for part in parts]),
        values={name: joined([part.values[name] for part in parts]) for name in first.values},
        statistics={
            name: {key: joined([part.statistics[name][key] for part in parts]) for key in one}
            for name, one in first.statistics.items()
        },
        shots={pair: shot for part in parts for pair, shot in part.shots.items()},
    )
