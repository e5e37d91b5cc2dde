"""训练与验证的目标（train.objective）：怎样得到预报，用什么距离，各通道、各纬度多重。

直接给出场的模型没有自己的损失：预报与目标的距离在这里算。有自己的目标的模型（OwnObjective）与阶段一用自己的，权重交给它；
它评测时的损失若正是预报的均方误差（AR_pred），要别的距离、要滚动时也由它的 forecast 训练。
滚动（rollout）：目标比一次预报的长，自己的输出作下一步的历史，梯度穿过全部的步。
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.seeds import seed_of
from models.interface import ForecastModel, Learner, OwnObjective, TeacherForced, is_codec, is_direct
from util.batch import Batch, DataSpec, encoded_fields, next_history
from util.grid import latitude_weights
from util.scores.distances import DISTANCES, Grid, sum_of
from util.strict import nearest
from util.training_config import OF_MEMBERS, ObjectiveConfig, Rollout
from util.variables import split_channel

PLAIN = {"mse": 1.0}
EVERYWHERE, ONCE = Grid(), Rollout()
BALANCE_DECAY = 0.99  # 一步的分量：约一百步的平均


class Balance(NamedTuple):
    """各通道在训练里的距离：名字；滑动平均 (C,)，就地更新，还没有走过一步时是 0。"""

    names: tuple[str, ...]
    means: Tensor

    @property
    def weights(self) -> Tensor:
        """(C,) 平均为 1：各通道的距离乘上它都一样大。"""
        inverse = 1 / self.means
        return torch.where(self.means.all(), inverse / inverse.mean(), torch.ones_like(self.means))

    @torch.no_grad()
    def follow(self, terms: Mapping[str, Tensor], broken: Tensor) -> None:
        """一步的各项（小批、各进程的平均）→ 滑动平均走一步；坏的一步不走，头一步照抄。"""
        found = torch.stack([terms[name] for name in self.names])
        moved = torch.where(self.means == 0, found, self.means.lerp(found, 1 - BALANCE_DECAY))
        self.means.copy_(torch.where(broken, self.means, moved))


@dataclass(frozen=True)
class Objective:
    """distances: 名字 → 权重；members: 抽得出成员的模型抽几个；channels: (C,) 平均为 1，None 是处处相同。

    frames_out: 一次预报几帧，None 是目标有几帧就几帧；rollout: 目标更长时怎样滚。
    jumps: data.lead_hours 各是几帧；每个窗口的目标是抽到的那一个。
    balance 只有 channels: balanced 有：训练时各通道另乘它的权重，验证时不乘，前后才比得。
    """

    distances: Mapping[str, float] = field(default_factory=PLAIN.copy)
    members: int = 1
    grid: Grid = EVERYWHERE
    channels: Tensor | None = None
    frames_out: int | None = None
    rollout: Rollout = ONCE
    balance: Balance | None = None
    jumps: tuple[int, ...] = ()

    def steps(self, batch: Batch) -> int:
        """到目标的末一帧要滚几步。"""
        return 1 if self.frames_out is None else batch.future.shape[1] // self.frames_out

    @property
    def weights(self) -> Tensor | None:
        """(C, H)，平均为 1：交给有自己的目标的模型。"""
        if self.grid.area is None:
            return None if self.channels is None else self.channels[:, None]
        return self.grid.area[None] if self.channels is None else self.channels[:, None] * self.grid.area


def make_objective(
    config: ObjectiveConfig, spec: DataSpec, changes: Sequence[float] | None, device: torch.device
) -> Objective:
    """changes: 各通道一步的变化的标准差（标准化单位）；还没有量的（预检、估内存）按相同算。

    Raises:
        ValueError: 没有那个通道；amse 而经度不成一圈；时效是抽的而又要滚动。
    """
    if spec.jumps and config.rollout.longest > 1:
        raise ValueError(
            "train.objective.rollout: data.lead_hours draws how far each window goes; leave one of them out"
        )
    if "amse" in config.distances and not spec.closes_circle:
        raise ValueError("train.objective.distance has amse, which needs longitudes that close the circle")
    area = latitude_weights(spec.latitudes).float().to(device) if config.area else None
    weights = channel_weights(config, spec, changes)
    mean = sum(weights) / len(weights)
    channels = None if len(set(weights)) == 1 else torch.tensor([w / mean for w in weights], device=device)
    balance = None
    if config.channels == "balanced":
        balance = Balance(tuple(f"loss_{c}" for c in spec.channels), torch.zeros(spec.num_channels, device=device))
    grid = Grid(area, spec.closes_circle)
    made = spec.frames_out, config.rollout, balance, spec.jumps
    return Objective(config.distances, config.drawn, grid, channels, *made)


def channel_weights(config: ObjectiveConfig, spec: DataSpec, changes: Sequence[float] | None) -> list[float]:
    """(C,)，没有归一。"""
    weights = [1.0] * spec.num_channels
    if isinstance(config.channels, dict):
        named = {channel: split_channel(channel)[0] for channel in spec.channels}
        for name in config.channels:
            if name not in {*named, *named.values()}:
                raise ValueError(
                    f"train.objective.channels has {name!r}, which is not in the data; "
                    f"{nearest(name, [*named, *dict.fromkeys(named.values())], 'channels')}"
                )
        weights = [config.channels.get(c, config.channels.get(variable, 1.0)) for c, variable in named.items()]
    elif config.channels == "tendency" and changes is not None:
        weights = [1 / change for change in changes]
    if config.level == "pressure":
        weights = [w * level for w, level in zip(weights, level_weights(spec), strict=True)]
    return weights


def level_weights(spec: DataSpec) -> list[float]:
    """气压层：气压，各变量自己的平均是 1；单层的是 1。"""
    levels: dict[str, list[float]] = {}
    for channel, pressure in zip(spec.channels, spec.pressures, strict=True):
        if pressure is not None:
            levels.setdefault(split_channel(channel)[0], []).append(pressure)
    means = {variable: sum(found) / len(found) for variable, found in levels.items()}
    return [
        1.0 if pressure is None else pressure / means[split_channel(channel)[0]]
        for channel, pressure in zip(spec.channels, spec.pressures, strict=True)
    ]


def check_objective(config: ObjectiveConfig, model: Learner, name: str) -> None:
    """这个模型学得了这个目标吗。

    Raises:
        ValueError: 有自己的目标而要别的距离、要滚动；没有通道与纬度可加权；要成员而抽不出。
    """
    if config == ObjectiveConfig():
        return
    where, works = "train.objective", "leave it out"
    if is_codec(model):
        raise ValueError(f"{where}: {name} is an autoencoder and has an objective of its own; {works}")
    own = isinstance(model, OwnObjective)
    if config.rollout.longest > 1 and (not model.can_forecast or (own and not model.field_loss)):
        raise ValueError(f"{where}.rollout: {name} is not trained through the fields it forecasts; {works}")
    plain = config.distances == PLAIN
    if own and not plain and not model.field_loss:
        raise ValueError(f"{where}.distance = {config.distance}: {name} has an objective of its own; {works}")
    if own and plain and not model.weighs_fields:
        raise ValueError(f"{where}: the loss of {name} is not an error of fields, it takes no weights; {works}")
    if own and plain and config.channels == "balanced":
        raise ValueError(
            f"{where}.channels = balanced needs the distance of each channel, and {name} has an objective of its own; "
            "use tendency"
        )
    if OF_MEMBERS & config.distances.keys() and not model.probabilistic:
        raise ValueError(
            f"{where}.distance = {config.distance} needs members, and {name} is deterministic; "
            "give it model.noise (the models that take it: docs/models.md), or use mae"
        )


def objective_loss(model: Learner, batch: Batch, objective: Objective) -> dict[str, Tensor]:
    """键 `loss` 参与求导，其余只记录；`count` 见 OwnObjective.loss，没有就是有效的目标场数。"""
    by_forecast = objective.distances != PLAIN or objective.steps(batch) > 1
    if isinstance(model, OwnObjective):  # 先问它：问一次 Protocol 要十分之一毫秒
        if not (model.field_loss and by_forecast):
            return model.loss(batch, objective.weights)
    elif not isinstance(model, ForecastModel):  # 不问 is_codec：它看 latents_known，主机要等设备
        return model.loss(batch)
    return field_distance(forecast_fields(model, batch, objective), batch, objective, model.training)


def has_field_loss(model: Learner) -> bool:
    """验证损失是预报的场的距离：持续性预报的同一个数可以摆在旁边。"""
    return is_direct(model) or (isinstance(model, OwnObjective) and model.field_loss)


def forecast_fields(model: ForecastModel, batch: Batch, objective: Objective) -> Tensor:
    """(B, M, T, C, H, W)，T 是目标的帧数；目标更长时，各成员各走各的路，自己的输出作下一步的历史。"""
    steps = objective.steps(batch)
    if steps == 1 and not model.probabilistic and isinstance(model, TeacherForced) and model.training:
        return model.forced_forecast(batch)
    members = objective.members if model.probabilistic else 1
    ahead, history, time, made = batch.future.shape[1] // steps, batch.history, batch.time, []
    for step in range(steps):
        if step == 1:
            history, time = history.repeat_interleave(members, 0), time.repeat_interleave(members, 0)  # (B·M, …)
        if step:
            history, time = next_history(history, made[-1]), time[:, ahead:]
        seeds = member_seeds(batch, members, step) if model.probabilistic else None
        forecast = partial(one_forecast, model, 1 if step else members, seeds)
        arguments = history, time[:, : history.shape[1] + ahead]
        again = objective.rollout.checkpoint and step < steps - 1 and torch.is_grad_enabled()
        new = recomputed(model, forecast, *arguments) if again else forecast(*arguments)
        made.append(new.flatten(0, 1))  # (B·M, T_out, C, H, W)
    return torch.cat(made, 1).unflatten(0, (-1, members))


def one_forecast(
    model: ForecastModel, members: int, seeds: Sequence[int] | None, history: Tensor, time: Tensor
) -> Tensor:
    """发生器在里面造：重算的时候从头抽，还是同样的数。"""
    generators = None if seeds is None else [Generator().manual_seed(seed) for seed in seeds]
    return model.forecast(history, time, members, generators)


def member_seeds(batch: Batch, members: int, step: int) -> list[int] | None:
    """B·M 个：各成员的随机数属于（窗口，成员，滚到第几步），验证时每次相同；没有给种子的取自全局的发生器。"""
    if batch.seeds is None:
        return None
    rolled = ("step", step) if step else ()
    return [seed_of(window, "member", m, *rolled) for window in batch.seeds.windows for m in range(members)]


def recomputed(model: ForecastModel, forecast: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """forecast 的结果，里面的激活在反向时重算。

    训练的前向会改 buffer（BatchNorm 的平均、记忆库）：重算从那一步之前的样子算起，算完还原，不多走一步。
    """
    assert isinstance(model, nn.Module)
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    return checkpoint(
        forecast, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), set_back(buffers, before))
    )


@contextmanager
def set_back(buffers: Sequence[Tensor], before: Sequence[Tensor]) -> Iterator[None]:
    """里面 buffers 是 before 的样子，出来时还原；梯度不看它们。"""
    now = [buffer.clone() for buffer in buffers]
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, now, strict=True):
                buffer.copy_(value)


def rolled(batch: Batch, steps: int, objective: Objective) -> Batch:
    """目标只留滚 steps 步的，或抽到的时效的；loss_on: last 时，末一步之前的目标不算。"""
    if objective.jumps:
        return at_drawn_lead(batch, objective.jumps)
    if objective.frames_out is None:
        return batch
    frames = batch.history.shape[1] + steps * objective.frames_out
    valid = batch.valid[:, :frames]
    if objective.rollout.loss_on == "last":
        counts = torch.arange(frames, device=valid.device) >= frames - objective.frames_out
        valid = valid & counts[:, None]
    return batch._replace(
        future=batch.future[:, : steps * objective.frames_out], time=batch.time[:, :frames], valid=valid
    )


def at_drawn_lead(batch: Batch, jumps: Sequence[int]) -> Batch:
    """目标到最远的时效为止的一批 → 只留各窗口抽到的那一帧；抽的数属于窗口。"""
    assert batch.seeds is not None
    drawn = [jumps[seed_of(window, "lead") % len(jumps)] - 1 for window in batch.seeds.windows]
    frame = torch.tensor(drawn).to(batch.future.device, non_blocking=True)  # (B,) 目标里的第几个
    row, past = torch.arange(len(drawn), device=frame.device), batch.history.shape[1]
    time, valid = (
        torch.cat([every[:, :past], every[row, past + frame][:, None]], 1) for every in (batch.time, batch.valid)
    )
    return batch._replace(future=batch.future[row, frame][:, None], time=time, valid=valid)


def field_distance(made: Tensor, batch: Batch, objective: Objective, training: bool) -> dict[str, Tensor]:
    """(B, M, T_out, C, H, W) 与目标的距离，只算有效的场；没有有效的场时为 0。几样的加权和时，各样也给出。"""
    valid = batch.valid[:, batch.history.shape[1] :]  # (B, T_out, C)
    count, balance = valid.sum().clamp(min=1), objective.balance
    terms, logged = {}, {}
    for name in objective.distances:
        each = DISTANCES[name](made, batch.future, objective.grid)  # (B, T_out, C)
        terms[name] = each if objective.channels is None else each * objective.channels
    if training and balance is not None:
        total = sum_of(weight * terms[name].detach() for name, weight in objective.distances.items())
        logged = dict(zip(balance.names, ((total * valid).sum((0, 1)) / count).unbind(), strict=True))
        terms = {name: each * balance.weights for name, each in terms.items()}
    terms = {name: (each * valid).sum() / count for name, each in terms.items()}
    loss = sum_of(weight * terms[name] for name, weight in objective.distances.items())
    if len(terms) > 1:
        logged |= {name: term.detach() for name, term in terms.items()}
    return {"loss": loss, **logged}


def measure_changes(batches: Iterable[Batch], channels: Sequence[str]) -> list[float]:
    """各通道一步的变化（标准化单位）的标准差，只看有效的。

    Raises:
        ValueError: 某个通道从不变化，或没有一个有效的变化。
    """
    count, total, squares = (torch.zeros(len(channels), dtype=torch.float64) for _ in range(3))
    for batch in batches:
        fields, valid = encoded_fields(batch, "tendency")  # (N, C, H, W)、(N, C)
        count += valid.sum(0)
        total += (fields.mean((-2, -1), dtype=torch.float64) * valid).sum(0)
        squares += (fields.double().square().mean((-2, -1)) * valid).sum(0)
    mean = total / count
    spread = (squares / count - mean.square()).sqrt()
    for channel, value in zip(channels, spread.tolist(), strict=True):
        if not value > 0:
            raise ValueError(f"train.objective.channels = tendency: {channel} never changes in the training data")
    return spread.tolist()
