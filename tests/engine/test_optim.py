"""学习率曲线：与写开的公式、手里另开的 ReduceLROnPlateau 相比；没有写预热时 constant 恒定；权重衰减。"""

from __future__ import annotations

import math

import pytest
import torch

from engine.optim import follow_step, follow_validation, make_optimizer, make_scheduler, set_weight_decay
from util.training_config import Schedule, TrainConfig

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


def test_plateau_is_torchs_driven_by_the_validation_loss() -> None:
    """参数更新不动它；验证损失走一步，与手里另开的 ReduceLROnPlateau 相同，存下读回接着走也相同。"""
    losses = [1.0, 0.9, 0.95, 0.95, 0.9, 0.91, 0.5, 0.6, 0.7, 0.6, 0.6, 0.6, 0.6]
    options = {"name": "plateau", "factor": 0.5, "patience": 1, "min_ratio": 0.2}
    mine, theirs = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR) for _ in range(2))
    scheduler = make_scheduler(mine, Schedule.model_validate(options), LR, 100)
    wanted = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, factor=0.5, patience=1, min_lr=0.2 * LR)
    seen = []
    for epoch, loss in enumerate(losses):
        for _ in range(3):
            follow_step(scheduler, scheduler.last_epoch + 1)
        follow_validation(scheduler, loss)
        wanted.step(loss)
        seen.append(mine.param_groups[0]["lr"])
        assert seen[-1] == theirs.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
        if epoch % 3 == 1:
            kept = scheduler.state_dict()
            scheduler = make_scheduler(mine, Schedule.model_validate(options), LR, 100)
            scheduler.load_state_dict(kept)
    assert seen[0] == LR and seen[-1] == 0.2 * LR and len(set(seen)) == 4


@pytest.mark.parametrize("name", ["constant", "cosine", "onecycle"])
def test_the_learning_rate_goes_back_with_the_steps(name: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = make_scheduler(optimizer, Schedule.model_validate({"name": name}), LR, 9)
    expected = rates(9, name=name)
    optimizer.step()
    for step in (1, 2, 3, 4, 2, 3):
        follow_step(scheduler, step)
        assert scheduler.get_last_lr()[0] == expected[step]


def test_weight_decay_falls_along_a_cosine_to_its_end() -> None:
    """只有作衰减的一组变；第一步是 weight_decay，末一步正好是 final_weight_decay。"""
    model = torch.nn.Linear(2, 2)
    config = TrainConfig(epochs=1, batch_size=1, optimizer="adamw", weight_decay=0.05, final_weight_decay=0.2)
    optimizer = make_optimizer(model, config)
    found = []
    for step in range(5):
        set_weight_decay(optimizer, config, step, total_steps=5)
        found.append([group["weight_decay"] for group in optimizer.param_groups])
    expected = [0.2 - 0.15 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]
    assert [decay for decay, _ in found] == pytest.approx(expected)
    assert {none for _, none in found} == {0.0}
    set_weight_decay(optimizer, config.model_copy(update={"final_weight_decay": None}), 2, total_steps=5)
    assert optimizer.param_groups[0]["weight_decay"] == found[-1][0]


@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_a_warmup_as_long_as_the_training_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"train\.schedule\.warmup_steps = 6, but the whole training has 6 steps"):
        rates(6, name=name, warmup_steps=6)
