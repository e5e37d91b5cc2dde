"""一批批问与一次全问相同；不计的场不在和里；区域网格没有球谐谱。"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.verification.climate import Climate
from engine.verification.settings import Events
from engine.verification.verifier import SUMS, Verifier, make_verifier
from util.batch import DataSpec
from util.grid import latitude_weights
from util.scores.regional import make_cells

SHAPE = (5, 2, 8, 16)  # B、C、H、W
HOURS = np.arange(5) * 6  # 五个窗口，四个钟点
MASKS = torch.zeros(2, 8, 16, dtype=torch.bool)
MASKS[0, :4], MASKS[1, :, 8:] = True, True
CELLS = make_cells(MASKS, latitude_weights([90 - 22.5 * (i + 0.5) for i in range(8)]))


def verifier(step: float = 22.5, neighbourhoods: tuple[int, ...] = (3, 5)) -> Verifier:
    latitudes = tuple((90 - 22.5 * (np.arange(8) + 0.5)).tolist())
    longitudes = tuple((np.arange(16) * step).tolist())
    spec = DataSpec(
        ("t2m", "tp"), ("K", "m"), (None, None), latitudes, longitudes, 3, 1, 6, (280, 1e-3), (9, 1e-3), False
    )
    generator = torch.Generator().manual_seed(1)
    quantiles = torch.rand(2, 2, 8, 16, generator=generator) - torch.tensor([1.0, 0.0])[:, None, None, None]
    climate = Climate(quantiles, torch.full((1, 8, 16), 0.4), torch.full((1, 8, 16), 0.5), 99)
    thresholds = torch.tensor([[0.3], [float("nan")]])
    events = Events(quantiles=[0.05, 0.95], neighbourhoods=[*neighbourhoods])
    given, regions = {"t2m": (282.7,)}, ("north", "west")
    return make_verifier(events, spec, climate, thresholds, given, torch.device("cpu"), regions, ("hour",), HOURS)


def cases() -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth, normal = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    forecasts = {"model": torch.randn(5, 3, 2, 8, 16, generator=generator), "persistence": truth[:, None] * 0.5}
    return forecasts, truth, normal


def test_window_by_window_is_all_at_once():
    asked, (forecasts, truth, normal) = verifier(), cases()
    keep = torch.ones(5, 2, dtype=torch.bool)
    keep[2, 1] = False
    whole = asked.lead(forecasts, truth, normal, keep, HOURS, CELLS)
    parts = [
        asked.lead(
            {k: v[i : i + 1] for k, v in forecasts.items()},
            truth[i : i + 1],
            normal[i : i + 1],
            keep[i : i + 1],
            HOURS[i : i + 1],
            CELLS,
        )
        for i in range(5)
    ]
    assert {kind for kind, _ in whole} == {*SUMS, "model", "persistence"}
    for key, values in whole.items():
        rows = [part[key] for part in parts]
        expected = torch.stack(rows).sum(0) if key[0] in SUMS else torch.cat(rows)
        loose = 1e-5 if key[0] == "sphere" else 1e-12  # 单精度的矩阵乘法，次序随批变
        torch.testing.assert_close(values, expected, rtol=loose, atol=1e-14, equal_nan=True)
    assert whole["table", "model"].shape == (2, 3, 4, 2)  # 两个分位数与一个阈值；三个成员
    assert float(whole["table", "model"][1, 0].sum()) == pytest.approx(4)  # 五个窗口里计四个
    places, times = whole["table_by_region", "model"], whole["table_by_period", "model"]
    assert places.shape == (2, 3, 4, 2, 2) and times.shape == (2, 3, 4, 2, 4)
    torch.testing.assert_close(times.sum(-1), whole["table", "model"])
    assert times[1, 0].sum((0, 1)).tolist() == pytest.approx([2, 1, 0, 1])  # 00 UTC 的有两个，12 UTC 的那一个不计
    assert whole["model", "seeps"][:, 0].isnan().all() and whole["model", "seeps"][:, 1].isfinite().all()


def test_a_broken_forecast_is_not_in_the_sums():
    asked, (forecasts, truth, normal) = verifier(), cases()
    keep = torch.tensor([True, True, False, True, True])[:, None].expand(5, 2)
    before = asked.lead(forecasts, truth, normal, keep, HOURS, CELLS)
    forecasts["model"][2] = float("nan")
    after = asked.lead(forecasts, truth, normal, keep, HOURS, CELLS)
    for key in (key for key in before if key[0] in SUMS):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0)


def test_a_region_has_no_spherical_spectrum_and_small_grids_no_wide_neighbourhoods():
    asked, (forecasts, truth, normal) = verifier(5.0, (3, 9)), cases()
    found = asked.lead(forecasts, truth, normal, torch.ones(5, 2, dtype=torch.bool), HOURS)
    assert not asked.sphere and ("sphere", "model") not in found
    assert asked.sizes == [3] and found["fractions", "model"].shape == (2, 3, 1, 2)
