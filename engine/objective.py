"""训练与验证的目标（train.objective）：怎样得到预报，用什么距离，各通道、各纬度多重。

直接给出场的模型没有自己的损失：预报与目标的距离在这里算。有自己的目标的模型（OwnObjective）与阶段一用自己的，权重交给它；
它评测时的损失若正是预报的均方误差（AR_pred），要别的距离时也由它的 forecast 训练。
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from engine.seeds import seed_of
from models.interface import ForecastModel, Learner, OwnObjective, TeacherForced, is_codec, is_direct
from util.batch import Batch, DataSpec, encoded_fields
from util.grid import latitude_weights
from util.scores.distances import DISTANCES, Grid, sum_of
from util.strict import nearest
from util.training_config import OF_MEMBERS, ObjectiveConfig
from util.variables import split_channel

PLAIN = {"mse": 1.0}
EVERYWHERE = Grid()


@dataclass(frozen=True)
class Objective:
    """distances: 名字 → 权重；members: 抽得出成员的模型抽几个；channels: (C,) 平均为 1，None 是处处相同。"""

    distances: Mapping[str, float] = field(default_factory=PLAIN.copy)
    members: int = 1
    grid: Grid = EVERYWHERE
    channels: Tensor | None = None

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
        ValueError: 没有那个通道；amse 而经度不成一圈。
    """
    if "amse" in config.distances and not spec.closes_circle:
        raise ValueError("train.objective.distance has amse, which needs longitudes that close the circle")
    area = latitude_weights(spec.latitudes).float().to(device) if config.area else None
    weights = torch.tensor(channel_weights(config, spec, changes))
    channels = None if (weights == weights[0]).all() else (weights / weights.mean()).to(device)
    return Objective(config.distances, config.drawn, Grid(area, spec.closes_circle), channels)


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
        ValueError: 有自己的目标而要别的距离；没有通道与纬度可加权；要成员而抽不出。
    """
    if config == ObjectiveConfig():
        return
    where, works = "train.objective", "leave it out"
    if is_codec(model):
        raise ValueError(f"{where}: {name} is an autoencoder and has an objective of its own; {works}")
    own = isinstance(model, OwnObjective)
    plain = config.distances == PLAIN
    if own and not plain and not model.field_loss:
        raise ValueError(f"{where}.distance = {config.distance}: {name} has an objective of its own; {works}")
    if own and plain and not model.weighs_fields:
        raise ValueError(f"{where}: the loss of {name} is not an error of fields, it takes no weights; {works}")
    if OF_MEMBERS & config.distances.keys() and not model.probabilistic:
        raise ValueError(f"{where}.distance = {config.distance} needs members, and {name} is deterministic; use mae")


def objective_loss(model: Learner, batch: Batch, objective: Objective) -> dict[str, Tensor]:
    """键 `loss` 参与求导，其余只记录；`count` 见 OwnObjective.loss，没有就是有效的目标场数。"""
    if not isinstance(model, ForecastModel):  # 不问 is_codec：它看 latents_known，主机要等设备
        return model.loss(batch)
    if isinstance(model, OwnObjective) and not (model.field_loss and objective.distances != PLAIN):
        return model.loss(batch, objective.weights)
    return field_distance(forecast_fields(model, batch, objective.members), batch, objective)


def has_field_loss(model: Learner) -> bool:
    """验证损失是预报的场的距离：持续性预报的同一个数可以摆在旁边。"""
    return is_direct(model) or (isinstance(model, OwnObjective) and model.field_loss)


def forecast_fields(model: ForecastModel, batch: Batch, members: int) -> Tensor:
    """(B, M, T_out, C, H, W)；各成员的随机数属于（窗口，成员），验证时每次相同。"""
    if model.training and not model.probabilistic and isinstance(model, TeacherForced):
        return model.forced_forecast(batch)
    if not model.probabilistic or batch.seeds is None:
        return model.forecast(batch.history, batch.time, members if model.probabilistic else 1)
    owners = [seed_of(window, "member", m) for window in batch.seeds.windows for m in range(members)]
    return model.forecast(batch.history, batch.time, members, [Generator().manual_seed(seed) for seed in owners])


def field_distance(made: Tensor, batch: Batch, objective: Objective) -> dict[str, Tensor]:
    """(B, M, T_out, C, H, W) 与目标的距离，只算有效的场；没有有效的场时为 0。几样的加权和时，各样也给出。"""
    valid = batch.valid[:, batch.history.shape[1] :]  # (B, T_out, C)
    terms = {}
    for name in objective.distances:
        each = DISTANCES[name](made, batch.future, objective.grid)  # (B, T_out, C)
        each = each if objective.channels is None else each * objective.channels
        terms[name] = (each * valid).sum() / valid.sum().clamp(min=1)
    loss = sum_of(weight * terms[name] for name, weight in objective.distances.items())
    return {"loss": loss, **({} if len(terms) == 1 else {name: term.detach() for name, term in terms.items()})}


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
