"""配置的 train 段：怎样训练。"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from util.strict import PositiveInt, Share, Strict, nearest


class Schedule(Strict):
    """学习率曲线；warmup_steps 对 constant 与 cosine 有意义，min_ratio 对 cosine 与 plateau，末两样只对 plateau：

    验证损失连着 patience 次没有进步（PyTorch 的默认：不到万分之一不算）之后再没有，学习率就乘 factor。
    """

    name: Literal["constant", "cosine", "onecycle", "plateau"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    min_ratio: Share = 0.0
    factor: float = Field(default=0.1, gt=0, lt=1)
    patience: int = Field(default=10, ge=0)


DISTANCES = ("mse", "mae", "huber", "gradient", "amse", "crps", "energy")  # 写法见 util/scores/distances.py
OF_MEMBERS = {"crps", "energy"}
BALANCES = ("equal", "tendency", "balanced")


def _distances(value: object) -> object:
    """一个名字，或名字 → 权重；联合类型自己的报错看不懂，在它之前说清。"""
    named = value if isinstance(value, dict) else {value: 1.0}
    for name, weight in named.items():
        if name not in DISTANCES:
            raise ValueError(f"no such distance: {name!r}; {nearest(str(name), DISTANCES, 'distances')}")
        _positive(str(name), weight)
    if not named:
        raise ValueError("name at least one distance")
    return value


def _channel_weights(value: object) -> object:
    if not isinstance(value, dict):
        if value not in BALANCES:
            raise ValueError(f"write one of {', '.join(BALANCES)}, or weights like {{t2m: 2.0}}")
        return value
    for name, weight in value.items():
        _positive(str(name), weight)
    return value


def _positive(name: str, weight: object) -> None:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
        raise ValueError(f"the weight of {name} is {weight!r}; it must be a number above 0")


class Rollout(Strict):
    """滚动训练：自己的输出作下一步的历史，滚几步，梯度就穿过几步。

    steps: 滚几步；schedule 代替它：[[第几次参数更新起（从 0 数）, 滚几步], ...]，如 [[0, 1], [2000, 2], [3000, 4]]。
    loss_on: 每一步的目标都算，还是只算末一步的。checkpoint: 各步的激活在反向时重算，不必都留着，多算一遍前向。
    """

    steps: PositiveInt = 1
    schedule: list[Annotated[list[int], Field(min_length=2, max_length=2)]] = Field(default_factory=list)
    loss_on: Literal["all", "last"] = "all"
    checkpoint: bool = True

    @model_validator(mode="after")
    def _one_says_how_long(self) -> Rollout:
        if not self.schedule:
            return self
        if self.steps != 1:
            raise ValueError(f"steps = {self.steps} and schedule = {self.schedule} both say how long; keep one")
        firsts = [first for first, _ in self.schedule]
        if firsts != sorted({0, *firsts}) or min(steps for _, steps in self.schedule) < 1:
            raise ValueError(
                f"schedule = {self.schedule}: write [[0, 1], [2000, 2], ...]: the updates from which on, in order, "
                "from 0, and how many steps, 1 or more"
            )
        return self

    def at(self, update: int) -> int:
        """第 update 次参数更新滚几步。"""
        return next((steps for first, steps in reversed(self.schedule) if first <= update), self.steps)

    def most(self, first: int, stop: int) -> int:
        """第 first 到 stop - 1 次参数更新里最多滚几步。"""
        return max(self.at(first), *(steps for start, steps in self.schedule if first < start < stop), 1)

    @property
    def longest(self) -> int:
        """最多滚几步。"""
        return max([self.steps, *(steps for _, steps in self.schedule)])


class ObjectiveConfig(Strict):
    """训练与验证的目标；缺省就是均方误差。有自己的目标的模型（扩散、编号）只收权重，见 engine/objective.py。

    distance: 预报与目标的距离，或几样的加权和；crps、energy 要 members 个成员，模型须抽得出（model.noise）。
    area: 按格点的面积加权，与成绩相同。channels: equal；tendency 除以一步的变化的标准差，由训练数据量；
    balanced 除以训练里各自的距离的滑动平均，各通道一样重（验证时同 equal）；或通道（变量）名 → 权重，没有写的是 1。
    level: pressure 时气压层按气压加权。各样相乘，全部的平均是 1。
    """

    distance: Annotated[str | dict[str, float], BeforeValidator(_distances)] = "mse"
    members: int | None = Field(default=None, ge=2)
    area: bool = False
    channels: Annotated[
        Literal["equal", "tendency", "balanced"] | dict[str, float], BeforeValidator(_channel_weights)
    ] = "equal"
    level: Literal["none", "pressure"] = "none"
    rollout: Rollout = Rollout()

    @model_validator(mode="after")
    def _members_have_a_use(self) -> ObjectiveConfig:
        if self.members is not None and not OF_MEMBERS & self.distances.keys():
            raise ValueError(f"members = {self.members} has no meaning without the distance crps or energy")
        return self

    @property
    def distances(self) -> dict[str, float]:
        """名字 → 权重。"""
        return self.distance if isinstance(self.distance, dict) else {self.distance: 1.0}

    @property
    def drawn(self) -> int:
        """一个窗口抽几个成员。"""
        return (self.members or 2) if OF_MEMBERS & self.distances.keys() else 1


def _number_or_auto(value: object) -> object:
    """联合类型自己的报错看不懂，在它之前说清。"""
    if value != "auto" and (type(value) is not int or not 1 <= value <= 1_000_000):
        raise ValueError("write an integer of 1 to 1000000, or auto: as many windows as fit into the memory")
    return value


class TrainConfig(Strict):
    """训练段；init 是新的运行从哪个检查点的权重起步（续训时不读）。

    batch_size 是全体设备上一次参数更新所用的窗口数；auto 由训练定下（engine/memory/advice.py），检查点里是定下的数。
    final_weight_decay: 权重衰减从 weight_decay 起，照余弦走到末一步的它；没有写就不变。
    """

    epochs: int = Field(ge=0)
    init: str | None = None
    batch_size: Annotated[int | Literal["auto"], BeforeValidator(_number_or_auto)]
    accumulate: PositiveInt = 1
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: float = Field(default=1e-4, gt=0)
    betas: list[float] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    weight_decay: float = Field(default=0.0, ge=0)
    final_weight_decay: float | None = Field(default=None, ge=0)
    schedule: Schedule = Schedule()
    clip_norm: float | None = Field(default=None, gt=0)
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    compile: bool = False
    activation_checkpointing: Literal["none", "blocks"] = "none"
    objective: ObjectiveConfig = ObjectiveConfig()
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    early_stop_epochs: PositiveInt | None = None
    validate_every_epochs: PositiveInt = 1
    preflight: bool = True

    @property
    def windows(self) -> int:
        """定下了的 batch_size。

        Raises:
            ValueError: 还是 auto。
        """
        if isinstance(self.batch_size, int):
            return self.batch_size
        raise ValueError("train.batch_size = auto: only a training settles it; write a number here")
