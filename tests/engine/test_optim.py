"""学习率曲线：与写开的公式相比；预热对 constant 与 cosine 都有效，没有写时 constant 恒定。"""

from __future__ import annotations

import math

import pytest
import torch

from engine.optim import make_scheduler
from util.training_config import Schedule

LR = 0.5


def rates(total: int, **options: object) -> list[float]:
    """total 步里每一步用的学习率。"""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = make_scheduler(optimizer, Schedule.model_validate(options), LR, total)
    found = []
    for _ in range(total):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_constant_is_constant_unless_a_warmup_is_asked_for() -> None:
    assert rates(6, name="constant") == [LR] * 6
    assert rates(6, name="constant", warmup_steps=4) == pytest.approx([LR / 4, LR / 2, LR * 3 / 4, LR, LR, LR])


def test_cosine_warms_up_and_falls_to_the_floor() -> None:
    fall = [0.1 + 0.9 * (1 + math.cos(math.pi * done / 4)) / 2 for done in range(4)]
    expected = [LR / 2, LR, *(LR * share for share in fall)]
    assert rates(6, name="cosine", warmup_steps=2, min_ratio=0.1) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_a_warmup_as_long_as_the_training_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"train\.schedule\.warmup_steps = 6, but the whole training has 6 steps"):
        rates(6, name=name, warmup_steps=6)
