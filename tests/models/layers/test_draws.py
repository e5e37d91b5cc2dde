"""损失里的随机数：属于窗口的与分批无关，全局批共用的处处一样，错开的合起来均匀。"""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import kstest
from torch import Tensor

from engine.seeds import training_seeds, validation_seeds
from models.layers.draws import Draws
from tests.models.small import small_batch, small_spec
from util.batch import Batch

STARTS = list(range(0, 48 * 6, 6))


def batch_of(mine: list[int], epoch: int = 0, step: int = 0) -> Batch:
    batch = small_batch(small_spec(), count=len(mine))
    return batch._replace(seeds=training_seeds(42, epoch, step, STARTS, mine))


def everything(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draws = Draws(batch)
    noise = draws.normal_like(torch.empty(2 * len(batch.history), 3, 5))
    return noise.unflatten(0, (-1, 2)), draws.uniform(3), draws.integers(7), draws.spread()


def test_a_window_draws_the_same_however_the_batch_is_cut() -> None:
    whole = everything(batch_of(STARTS))
    for size in (1, 6, 16):
        parts = [everything(batch_of(STARTS[i : i + size])) for i in range(0, 48, size)]
        for drawn, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(torch.cat(pieces), drawn, rtol=0, atol=0)


def test_other_windows_epochs_and_steps_draw_other_numbers() -> None:
    noise = [everything(batch_of(STARTS, epoch=epoch, step=9))[0] for epoch in (0, 1)]
    assert len(torch.cat(noise).flatten(1).unique(dim=0)) == 2 * 48
    shared = [torch.rand(3, generator=Draws(batch_of(STARTS, step=step)).step) for step in (0, 1, 1)]
    assert not torch.equal(shared[0], shared[1]) and torch.equal(shared[1], shared[2])


def test_spread_numbers_are_uniform_each_and_evenly_apart_together() -> None:
    drawn = torch.stack([everything(batch_of(STARTS, step=step))[3] for step in range(500)]).double()  # (500, 48)
    gaps = drawn.sort(dim=1).values.diff(dim=1)
    np.testing.assert_allclose(gaps, 1 / 48, atol=1e-6)
    assert kstest(drawn[:, 17].numpy(), "uniform").pvalue > 0.01
    assert drawn.min() >= 0 and drawn.max() < 1


def test_validation_covers_the_levels_in_any_run_of_windows() -> None:
    """验证按时间的次序走：连着的哪 64 个窗口，错开的数都铺满 [0, 1)。"""
    starts = list(range(0, 400 * 24, 24))
    (whole,) = validation_seeds(42, starts, [starts])
    for first in range(0, 336, 40):
        assert np.diff(np.sort(whole.places[first : first + 64])).max() < 3 / 64
    second = list(validation_seeds(42, starts, [starts[1:9:2], starts[9:17:2]]))[1]  # 两个进程中的第二个
    assert (second.windows, second.places) == (whole.windows[9:17:2], whole.places[9:17:2])
    assert second.step == whole.step


def test_without_seeds_the_global_generator_decides() -> None:
    batch = small_batch(small_spec(), count=3)
    torch.manual_seed(5)
    first = everything(batch)
    assert not torch.equal(everything(batch)[0], first[0])
    torch.manual_seed(5)
    assert all(map(torch.equal, everything(batch), first))
