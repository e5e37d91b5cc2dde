"""滚动训练：梯度与手写展开的两步逐位相同；各步重算与不重算相同，BatchNorm、记忆库不多走一步；遮罩、时间、成员、拒绝。"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.imagined import random_batch
from engine.memory.step import step_peak
from engine.objective import Objective, check_objective, make_objective, objective_loss, rolled
from tests.models.dit_small import SMALL as DIT
from tests.models.small import TINY, make_model, small_spec
from util.batch import Batch, DataSpec, Seeds
from util.training_config import ObjectiveConfig, Rollout, TrainConfig

CPU = torch.device("cpu")
SMALL: dict[str, dict[str, Any]] = {
    "cnn": {"name": "cnn", "width": 4},
    "convlstm": {"name": "convlstm", "hidden": 4, "layers": 1},
    "ar_pred": {**TINY, "dropout": 0.1},
}


def objective(spec: DataSpec, **options: Any) -> Objective:
    return make_objective(ObjectiveConfig.model_validate({"rollout": options}), spec, None, CPU)


def long_batch(spec: DataSpec, steps: int, count: int = 2) -> Batch:
    torch.manual_seed(0)
    return random_batch(spec, count, steps)


def gradients(model: Any, batch: Batch, wanted: Objective) -> dict[str, Tensor]:
    """训练模式下走一次；同样的随机数。"""
    model.train()
    model.zero_grad()
    torch.manual_seed(1)
    objective_loss(model, batch, wanted)["loss"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("frames_out", [1, 2, 4], ids=["one frame", "some", "more than the history"])
def test_gradients_are_those_of_two_steps_written_out(frames_out: int, checkpoint: bool) -> None:
    spec = small_spec(frames_in=3, frames_out=frames_out)
    model = make_model({"name": "simvp", "hid_S": 8, "hid_T": 16, "N_T": 2}, spec)
    batch = long_batch(spec, 2)
    found = gradients(model, batch, objective(spec, steps=2, checkpoint=checkpoint))

    model.zero_grad()
    one = model.forecast(batch.history, batch.time[:, : spec.window])[:, 0]
    seen = torch.cat([batch.history, one], 1)[:, -3:]
    two = model.forecast(seen, batch.time[:, frames_out:])[:, 0]
    (torch.cat([one, two], 1) - batch.future).square().mean((-2, -1)).mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(found[name], p.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", [*SMALL, "memory"])
def test_recomputing_changes_nothing(name: str) -> None:
    """梯度逐位相同；BatchNorm 的平均、记忆库三步走三次，不是五次。"""
    spec = small_spec(frames_in=3)
    one = make_model(SMALL[name], spec) if name in SMALL else Remembering()
    two = copy.deepcopy(one)
    batch = long_batch(spec, 3)
    plain = gradients(one, batch, objective(spec, steps=3, checkpoint=False))
    again = gradients(two, batch, objective(spec, steps=3))
    assert plain.keys() == again.keys() and any(grad.any() for grad in plain.values())
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    for (key, mine), (_, theirs) in zip(one.named_buffers(), two.named_buffers(), strict=True):
        assert torch.equal(mine, theirs), key
        if key.endswith("num_batches_tracked"):
            assert mine == 3


class Remembering(nn.Module):
    """读着记忆库，随即改它。"""

    probabilistic = False
    can_forecast = True

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.code = nn.Buffer(torch.tensor(1.0))

    def forecast(self, history: Tensor, time: Tensor, num_members: int = 1, generator: Any = None) -> Tensor:
        made = (self.gain * history[:, -1:]).tanh() * (self.code.clone() * self.gain).exp()
        with torch.no_grad():
            self.code.copy_(self.code + made.mean())
        return made[:, None]


class Clock(nn.Module):
    """预报是 gain × 末一帧加上末一个时刻，再加上自己发生器的一个数：看得出谁收到了什么。"""

    probabilistic = True
    can_forecast = True

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.times: list[Tensor] = []

    def forecast(self, history: Tensor, time: Tensor, num_members: int = 1, generator: Any = None) -> Tensor:
        self.times.append(time)
        each = history[:, -1:].repeat_interleave(num_members, 0)
        noise = torch.stack([torch.randn((), generator=g) for g in generator])[:, None, None, None, None]
        return (self.gain * each + noise).unflatten(0, (len(history), num_members))


def test_members_go_their_own_ways_and_the_clock_goes_on() -> None:
    """3 个成员、3 步：与写开的循环相同，重算时抽的还是同样的数；第 n 步看见的时刻挪后 n 步。"""
    spec = small_spec(frames_in=2)
    batch = long_batch(spec, 3)._replace(seeds=Seeds((11, 12), (0.0, 0.5), 1))
    config = {"distance": "crps", "members": 3, "rollout": {"steps": 3}}
    model = Clock()
    grads = []
    for again in (True, False):
        config["rollout"] = {"steps": 3, "checkpoint": again}
        wanted = make_objective(ObjectiveConfig.model_validate(config), spec, None, CPU)
        model.times.clear()
        grads.append(gradients(model, batch, wanted)["gain"])
    assert torch.equal(*grads)
    for step, time in enumerate(model.times):
        rows = batch.time[:, step : step + 3].repeat_interleave(1 if step == 0 else 3, 0)
        assert torch.equal(time, rows)


def test_only_valid_targets_count_at_every_step() -> None:
    spec = small_spec(channels=2, frames_in=2)
    model = make_model({"name": "persistence"}, spec)
    batch = long_batch(spec, 3)
    valid = torch.rand(batch.valid.shape, generator=torch.Generator().manual_seed(2)) > 0.4
    batch = batch._replace(valid=valid)
    errors = (batch.future - batch.history[:, -1:]).square().mean((-2, -1))
    for loss_on, keep in (("all", valid[:, 2:]), ("last", valid[:, 2:] & torch.tensor([False, False, True])[:, None])):
        wanted = objective(spec, steps=3, loss_on=loss_on)
        cut = rolled(batch, 3, wanted)
        assert torch.equal(cut.valid[:, 2:], keep)  # 累积、多进程的权重数的也是它
        torch.testing.assert_close(objective_loss(model, cut, wanted)["loss"], errors[keep].mean())
        other = cut._replace(future=torch.where(cut.valid[:, 2:, :, None, None], cut.future, 1e6))
        assert torch.equal(objective_loss(model, other, wanted)["loss"], objective_loss(model, cut, wanted)["loss"])


def test_a_shorter_step_reads_the_head_of_the_window() -> None:
    spec = small_spec(frames_in=2, frames_out=2)
    batch = long_batch(spec, 3)
    wanted = objective(spec, steps=3)
    cut = rolled(batch, 1, wanted)
    assert torch.equal(cut.future, batch.future[:, :2]) and cut.time.shape[1] == cut.valid.shape[1] == spec.window
    whole = rolled(batch, 3, wanted)
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors, batch.tensors, strict=True))


def test_ar_pred_keeps_its_own_loss_for_one_step() -> None:
    """一步时是遮挡重建；滚动时由预报训练，拿掉的是末一帧，遮挡照 eval_mask。"""
    spec = small_spec(frames_in=3)
    model = make_model(TINY, spec)
    wanted = objective(spec, schedule=[[0, 1], [10, 2]])
    batch = long_batch(spec, 2)
    short = rolled(batch, 1, wanted)
    torch.manual_seed(1)
    own = model.loss(short)
    torch.manual_seed(1)
    assert torch.equal(objective_loss(model, short, wanted)["loss"], own["loss"])
    model.train()
    one = model.forecast(batch.history, None)[:, 0]
    two = model.forecast(torch.cat([batch.history[:, 1:], one], 1), None)[:, 0]
    by_hand = (torch.cat([one, two], 1) - batch.future).square().mean()
    torch.testing.assert_close(objective_loss(model, batch, wanted)["loss"], by_hand)


def test_models_with_an_objective_of_their_own_are_refused() -> None:
    config, spec = ObjectiveConfig.model_validate({"rollout": {"steps": 2}}), small_spec()
    whole = {"grouping": {"order": "t h w", "size": 4}}  # 区块不是一帧：只能重建
    for model in (make_model({**TINY, **whole}, spec), make_model(DIT, spec)):
        with pytest.raises(ValueError, match=r"\Atrain.objective.rollout: it is not trained through the fields"):
            check_objective(config, model, "it")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"steps": 2, "schedule": [[0, 1], [5, 2]]}, "both say how long; keep one"),
        ({"schedule": [[1, 1]]}, "in order, from 0"),
        ({"schedule": [[0, 1], [5, 2], [5, 3]]}, "in order, from 0"),
        ({"schedule": [[0, 0]]}, "1 or more"),
    ],
)
def test_schedules_that_say_nothing_clear(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Rollout.model_validate(options)


def test_the_schedule_by_hand() -> None:
    rollout = Rollout(schedule=[[0, 1], [4, 3], [6, 2]])
    steps = [1, 1, 1, 1, 3, 3, 2, 2]
    assert [rollout.at(update) for update in range(8)] == steps and rollout.longest == 3
    assert all(rollout.most(a, b) == max(steps[a:b]) for a in range(8) for b in range(a + 1, 9))
    assert Rollout.model_validate(rollout.model_dump()) == rollout
    assert Rollout(steps=4).at(9) == Rollout(steps=4).most(0, 5) == 4


def test_the_memory_of_the_longest_rollout_is_counted() -> None:
    spec = small_spec(grid=(16, 32))

    def activations(**options: Any) -> int:
        train = {"epochs": 1, "batch_size": 8, "objective": {"rollout": options}}
        return step_peak({"name": "cnn", "width": 8}, spec, TrainConfig.model_validate(train), 8).sizes["activations"]

    one, kept, again = activations(), activations(steps=4, checkpoint=False), activations(schedule=[[0, 1], [9, 4]])
    assert kept > 3 * one
    assert again < 2 * one
