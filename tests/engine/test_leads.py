"""几种时效一个网络：训练各窗口抽到的是它的那一帧，网络看得见走几小时，预报每个时效走调用最少的路。"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from engine.forecasting.rollout import last_jumps, roll
from engine.imagined import random_batch
from engine.objective import make_objective, objective_loss, rolled
from engine.one_pass import fit_one_pass
from engine.seeds import training_seeds
from models import build_model
from tests.models.small import changed, make_model, small_spec
from tests.trees import DAYS, config_of
from util.batch import Batch, DataSpec
from util.data.dataset import open_data
from util.training_config import ObjectiveConfig

LEADS = (6, 12, 24)
CPU = torch.device("cpu")
UNET = {"name": "pixel_unet", "base_channels": 8, "depth": 1, "predict": "tendency", "scaling": "zscore"}
DIFFUSION = {
    "name": "latent_diffusion", "base_channels": 8, "multipliers": [1, 2], "depth": 1, "heads": 2,
    "predict": "tendency", "prediction": "v", "sampling_steps": 2,
}  # fmt: skip
MODELS = pytest.mark.parametrize(
    "options", [UNET, UNET | {"noise": {"size": 4}}, DIFFUSION], ids=["unet", "noise", "diffusion"]
)


def spec_of(frames_in: int = 2, **more: Any) -> DataSpec:
    return replace(small_spec(1, frames_in=frames_in), lead_hours=LEADS, **more)


# ---- 走哪几跳


def test_the_way_to_every_lead_is_written_out():
    jumps = last_jumps(9, [1, 2, 4])
    assert jumps == [1, 2, 1, 4, 1, 2, 1, 4, 1]  # +30 = 24 + 6，+42 = 24 + 12 + 6，+54 = 24 + 24 + 6


@pytest.mark.parametrize("leads", [(1, 2, 4), (1, 3, 4), (1, 4, 6), (1,)], ids=str)
def test_no_way_has_fewer_calls(leads: tuple[int, ...]):
    """每个时效的几跳加起来是它；再少一跳，哪样凑都凑不出。"""
    last = last_jumps(13, leads)
    for target in range(1, 14):
        way, at = [], target
        while at:
            way.append(last[at - 1])
            at -= way[-1]
        assert sum(way) == target and sorted(way) == way
        sums = {sum(each) for each in itertools.combinations_with_replacement(leads, len(way) - 1)}
        assert target not in sums


# ---- 预报


class Recorder(nn.Module):
    """预报是末一帧加上走的小时数，再加上自己发生器的一个数；记下每次调用从哪里到哪里、看见什么。"""

    probabilistic = True
    can_forecast = True
    takes_leads = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forecast(self, history: Tensor, time: Tensor, num_members: int = 1, generator: Any = None) -> Tensor:
        self.calls.append((history, time))
        noise = (
            torch.zeros(len(history))
            if generator is None
            else torch.stack([torch.randn((), generator=g) for g in generator])
        )
        ahead = (time[:, -1] - time[:, -2]) + noise
        return (history[:, -1:] + ahead[:, None, None, None, None])[:, None]


def recorder() -> Any:
    return Recorder()


def test_every_lead_is_delivered_with_one_call_from_the_frame_before():
    spec, model = spec_of(), recorder()
    history = torch.tensor([-6.0, 0.0]).view(1, 2, 1, 1, 1).expand(1, 2, 1, 8, 16)  # 场就是离起报的小时数
    frames = [*roll(model, history, torch.tensor([[594, 600]]), 7, spec)]
    assert [float(frame.mean()) for frame in frames] == [6, 12, 18, 24, 30, 36, 42]
    starts = [0, 0, 12, 0, 24, 24, 36]
    for (seen, time), start, end in zip(model.calls, starts, range(6, 48, 6), strict=True):
        assert (time - 600).tolist() == [[start - 6, start, end]]
        assert seen[0, :, 0, 0, 0].tolist() == [start - 6, start]


def members(spec: DataSpec, limit: int | None = None, count: int = 3) -> Tensor:
    """(7, B, M)：各时效减去它的小时数，即路上的噪声之和。"""
    generators = [Generator().manual_seed(10 * b + m) for b in range(2) for m in range(count)]
    history, time = torch.zeros(2, 2, 1, 8, 16), torch.tensor([[594, 600], [1194, 1200]])
    made = [frame.mean((2, 3, 4)) for frame in roll(recorder(), history, time, 7, spec, generators, limit)]
    return torch.stack(made) - torch.arange(6, 48, 6)[:, None, None]


def test_leads_of_a_member_from_one_frame_share_its_noise():
    """+6、+12、+24 同从起报时刻起，一个成员里是同一份噪声；+30、+36 同从 +24 起；与怎样分批、几个成员无关。"""
    six, twelve, eighteen, day, thirty, later, _ = members(spec_of())
    torch.testing.assert_close(six, twelve)
    torch.testing.assert_close(six, day)
    torch.testing.assert_close(thirty, later)
    steps = [six, eighteen - twelve, thirty - day]  # 三份互不相同，各成员各窗口也不同
    assert len({round(float(value), 4) for step in steps for value in step.flatten()}) == 18
    torch.testing.assert_close(members(spec_of(), limit=2), members(spec_of()))
    torch.testing.assert_close(members(spec_of(), count=2), members(spec_of())[:, :, :2])


@MODELS
def test_the_models_deliver_every_lead(options: dict[str, Any]):
    spec = spec_of(forcings=("solar",)) if options["name"] == "pixel_unet" else spec_of()
    model = make_model(options, spec).eval()
    batch = random_batch(spec, 2)
    generators = [Generator().manual_seed(i) for i in range(2)] if model.probabilistic else None
    frames = [*roll(model, batch.history, batch.time[:, :2], 5, spec, generators)]
    assert len(frames) == 5 and all(frame.shape == (2, 1, 1, 8, 16) for frame in frames)
    with pytest.raises(ValueError, match="data.lead_hours needs the time of the forecast"):
        next(roll(model, batch.history, None, 5, spec, generators))


# ---- 训练


def drawn(batch: Batch, spec: DataSpec) -> Batch:
    return rolled(batch, 1, make_objective(ObjectiveConfig(), spec, None, CPU))


def seeded(batch: Batch, epoch: int = 0) -> Batch:
    starts = list(range(len(batch.history)))
    return batch._replace(seeds=training_seeds(42, epoch, 0, starts, starts))


def test_a_window_keeps_the_frame_it_drew():
    spec = spec_of()
    batch = seeded(random_batch(spec, 12, spec.ahead(1)))
    batch.valid[:, 2:] = torch.rand(12, 4, 1) < 0.5
    found = drawn(batch, spec)
    jumps = ((found.time[:, 2] - found.time[:, 1]) // 6).tolist()
    assert {*jumps} == {1, 2, 4}
    for i, jump in enumerate(jumps):
        assert torch.equal(found.future[i, 0], batch.future[i, jump - 1])
        assert torch.equal(found.time[i], batch.time[i, [0, 1, 1 + jump]])
        assert torch.equal(found.valid[i], batch.valid[i, [0, 1, 1 + jump]])
    other = drawn(seeded(batch, epoch=1), spec)
    assert not torch.equal(other.time, found.time)  # 下一轮重新抽
    seeds = training_seeds(42, 0, 0, list(range(12)), [4, 5, 6, 7])  # 怎样切成小批都一样
    part = drawn(changed(batch, lambda tensor: tensor[4:8])._replace(seeds=seeds), spec)
    assert torch.equal(part.time, found.time[4:8])


def test_the_network_learns_how_far_it_goes():
    """目标只由时效定，历史处处相同：看不见时效的至多猜平均。"""
    spec = replace(small_spec(1, (4, 8), frames_in=1), lead_hours=LEADS)
    torch.manual_seed(0)
    model = make_model(UNET, spec)
    batch, far = random_batch(spec, 6, 4), torch.tensor([0.5, 1.0, 9.0, 2.0]).view(1, 4, 1, 1, 1)
    batch = batch._replace(history=0 * batch.history, future=far.expand_as(batch.future))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    wanted = make_objective(ObjectiveConfig(), spec, None, CPU)
    for step in range(25):
        loss = objective_loss(model, rolled(seeded(batch, step), 1, wanted), wanted)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    time = torch.tensor([[600, 600 + lead] for lead in LEADS])
    made = model.eval().forecast(torch.zeros(3, 1, 1, 4, 8), time).detach()
    torch.testing.assert_close(made.mean((1, 2, 3, 4, 5)), torch.tensor([0.5, 1.0, 2.0]), atol=0.25, rtol=0)


def test_the_code_reaches_the_denoiser():
    """梯度只落在抽到的时效的那一列；同样的噪声，走得不同就预报得不同。"""
    spec = spec_of(frames_in=1)
    torch.manual_seed(0)
    model = make_model(DIFFUSION, spec)
    batch = random_batch(spec, 2)._replace(time=torch.tensor([[600, 612], [600, 612]]))
    objective_loss(model, batch, make_objective(ObjectiveConfig(), spec, None, CPU))["loss"].backward()
    assert model.net.lead.weight.grad.any(0).tolist() == [False, True, False]
    noise = [Generator().manual_seed(1) for _ in LEADS]
    far = torch.tensor([[600, 600 + lead] for lead in LEADS])
    one, two, three = model.eval().forecast(batch.history[:1].expand(3, -1, -1, -1, -1), far, 1, noise)
    assert not any(torch.equal(*pair) for pair in ((one, two), (two, three), (three, one)))


def test_changes_have_their_own_scale_at_every_lead(make_tree, tmp_path: Path):
    """差的均值与标准差各时效一份，与逐时刻算的相同；损失与采样用的是抽到的那一份。"""
    tree = make_tree(tmp_path / "tree", ("t2m",), **DAYS)
    data = open_data(config_of(tree, frames_in=1, lead_hours=[*LEADS]))
    model = make_model(DIFFUSION, data.spec)
    fit_one_pass(model, data, batch_size=5)
    values = (tree.fields[:24, 0].astype("float64") - data.spec.mean[0]) / data.spec.std[0]
    for i, jump in enumerate((1, 2, 4)):
        changes = values[jump : jump + 20] - values[:20]  # 最远的 24 小时也在训练段里的 20 个起点
        torch.testing.assert_close(model.targets.mean[i].item(), changes.mean(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(model.targets.std[i].item(), changes.std(), rtol=1e-4, atol=1e-6)
    mean, std = model._statistics(model.leads(torch.tensor([[0, 24], [0, 6]])))
    assert torch.equal(std.flatten(), model.targets.std.flatten()[[2, 0]])
    assert torch.equal(mean.flatten(), model.targets.mean.flatten()[[2, 0]])


def test_forcings_are_those_of_the_target():
    """外强迫里末一份是目标时刻的，不是下一帧的。"""
    spec = spec_of(forcings=("hour_of_day",))
    model, plain = make_model(UNET, spec), make_model(UNET, replace(spec, lead_hours=None))
    far, fields = torch.tensor([[0, 6, 30]]), torch.zeros(1, 2, 1, 8, 16)
    made = model.inputs(fields, far)
    assert torch.equal(made[:, :1], plain.inputs(fields, far)[:, :1])
    assert torch.equal(made[:, 1, 3:], plain.inputs(fields[:, :1], torch.tensor([[30]]))[:, 0, 1:3])
    near = torch.tensor([[0, 6, 12]])
    assert torch.equal(model.inputs(fields, near), plain.inputs(fields, near))


def test_without_leads_there_is_not_one_parameter_more():
    spec = small_spec(1)
    for options in (UNET, DIFFUSION):
        torch.manual_seed(0)
        names = make_model(options, spec).state_dict().keys()
        assert not [name for name in names if "lead" in name or "modulate" in name]


# ---- 说不通的


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"lead_hours": [12, 24]},
            r"lead_hours = \[12, 24\]: write multiples of interval_hours, in order, 6 first",
        ),
        ({"lead_hours": [6, 24, 12]}, "in order"),
        ({"lead_hours": [6, 15]}, "write multiples of interval_hours"),
        ({"lead_hours": [6, 12], "frames_out": 2}, "frames_out = 2: with lead_hours a forecast is one frame; write 1"),
    ],
)
def test_leads_that_make_no_sense(make_tree, tmp_path: Path, changes: dict[str, Any], said: str):
    tree = make_tree(tmp_path / "tree", ("t2m",), (4, 8), "2000-01-01", "2000-01-02")
    with pytest.raises(ValueError, match=said):
        config_of(tree, **changes)


def test_refused():
    with pytest.raises(
        ValueError, match="data.lead_hours = 6, 12, 24: cnn cannot take them; models that can: latent_d"
    ):
        build_model({"name": "cnn"}, spec_of())
    rolling = ObjectiveConfig.model_validate({"rollout": {"steps": 2}})
    with pytest.raises(ValueError, match="train.objective.rollout: data.lead_hours draws how far each window goes"):
        make_objective(rolling, spec_of(), None, CPU)
