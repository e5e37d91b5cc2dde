"""配置的 run、train、checkpoint、log 段：在哪里跑，怎样训练，留下什么。"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from util.strict import Name, PositiveInt, Share, Strict, nearest


class RunSection(Strict):
    """在哪里跑、用什么种子。"""

    name: Name | None = None
    """name of the folders of this run; null: config name and time"""
    seed: int = Field(default=42, ge=0)
    """of every random draw"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one"""
    devices: int = Field(default=1, ge=1, le=1024)
    """GPUs, or processes on CPUs, of each machine"""
    num_nodes: PositiveInt = 1
    """machines"""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """several devices: ddp copies the model, fsdp shards it; auto: ddp"""


class CheckpointConfig(Strict):
    """存什么、何时存。"""

    dir: str = "checkpoints"
    """the run's folder is made in it"""
    every_epochs: PositiveInt = 10
    """epochs from one epoch-NNNN.ckpt to the next"""
    every_minutes: float = Field(default=15.0, gt=0)
    """last.ckpt is never older than this"""
    sharded: bool = False
    """each process writes its shard of last.ckpt; best and epoch-NNNN are whole files always"""


class WandbConfig(Strict):
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with an API key, else offline"""
    project: str = "ar_pred"
    """project of W&B"""
    entity: str | None = None
    """user or team of W&B; null: that of the key"""
    dir: str = "."
    """wandb/ is made in it"""


class LogConfig(Strict):
    dir: str = "log"
    """the run's folder is made in it"""
    every_steps: PositiveInt = 10
    """updates from one row of metrics.csv to the next"""
    figures: int = Field(default=2, ge=0)
    """figures of each split at the end of a training"""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases"""


class Schedule(Strict):
    """学习率曲线；plateau 的进步照 PyTorch 的默认：不到万分之一不算。"""

    name: Literal["constant", "cosine", "onecycle", "plateau"] = "constant"
    """course of the learning rate; plateau: times factor when the validation loss falls no more"""
    warmup_steps: int = Field(default=0, ge=0)
    """constant, cosine: updates of the rise to lr"""
    min_ratio: Share = 0.0
    """cosine, plateau: the lowest, over lr"""
    factor: float = Field(default=0.1, gt=0, lt=1)
    """plateau: the learning rate is multiplied by it"""
    patience: int = Field(default=10, ge=0)
    """plateau: so many validations without progress are let pass"""


Distance = Literal["mse", "mae", "huber", "gradient", "amse", "crps", "energy"]  # 写法见 util/scores/distances.py
DISTANCES: tuple[str, ...] = get_args(Distance)
OF_MEMBERS = {"crps", "energy"}
Balance = Literal["equal", "tendency", "balanced"]
BALANCES: tuple[str, ...] = get_args(Balance)


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
    """滚动训练：自己的输出作下一步的历史，滚几步，梯度就穿过几步。"""

    steps: PositiveInt = 1
    """calls of the model in a row, each fed with the forecast before; 1: its own forecasts are not fed back"""
    schedule: list[Annotated[list[int], Field(min_length=2, max_length=2)]] = Field(default_factory=list)
    """instead of steps: [[update, steps from it on], ...], from update 0"""
    loss_on: Literal["all", "last"] = "all"
    """the targets of all steps count, or those of the last"""
    checkpoint: bool = True
    """recompute each step in the backward pass: less memory, one more forward pass"""

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

    各样权重相乘，全部的平均是 1；balanced 除以训练里各自的距离的滑动平均，验证时同 equal。
    """

    distance: Annotated[Distance | dict[Distance, float], BeforeValidator(_distances)] = "mse"
    """of forecast and truth: a name, or a weighted sum {mae: 0.8, mse: 0.2}; crps, energy need a model with members"""
    members: int | None = Field(default=None, ge=2)
    """crps, energy: members drawn of each window; null: 2"""
    area: bool = False
    """weigh grid points by their area, as the scores do"""
    channels: Annotated[Balance | dict[str, float], BeforeValidator(_channel_weights)] = "equal"
    """tendency: divide by the spread of a step's change; balanced: all weigh the same; or {t2m: 2.0}, others 1"""
    level: Literal["none", "pressure"] = "none"
    """pressure: weigh pressure levels by their pressure"""
    rollout: Rollout = Rollout()
    """training on its own forecasts"""

    @model_validator(mode="after")
    def _members_have_a_use(self) -> ObjectiveConfig:
        if self.members is not None and not OF_MEMBERS & self.distances.keys():
            raise ValueError(f"members = {self.members} has no meaning without the distance crps or energy")
        return self

    @property
    def distances(self) -> dict[str, float]:
        """名字 → 权重。"""
        return {**self.distance} if isinstance(self.distance, dict) else {self.distance: 1.0}

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
    """训练段；续训时不读 init。batch_size: auto 由训练定下（engine/memory/advice.py），检查点里是定下的数。"""

    epochs: int = Field(ge=0)
    """passes over the training windows; 0: only look at the data"""
    init: str | None = None
    """checkpoint whose weights a new run starts from, where names and shapes agree"""
    batch_size: Annotated[int | Literal["auto"], BeforeValidator(_number_or_auto)]
    """windows of one update, on all devices together; auto: the most that fit into memory"""
    accumulate: PositiveInt = 1
    """micro-batches that an update is made of"""
    optimizer: Literal["adam", "adamw"] = "adam"
    """adamw: weight decay apart from the gradient"""
    lr: float = Field(default=1e-4, gt=0)
    """learning rate, the highest of the schedule"""
    betas: list[float] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """the two of Adam"""
    weight_decay: float = Field(default=0.0, ge=0)
    """of matrices; vectors and tables of codes have none"""
    final_weight_decay: float | None = Field(default=None, ge=0)
    """weight decay goes to it along a cosine; null: it stays"""
    schedule: Schedule = Schedule()
    """learning rate over the run"""
    clip_norm: float | None = Field(default=None, gt=0)
    """longest gradient; null: any"""
    skip_nonfinite: int = Field(default=0, ge=0)
    """leave out up to this many updates whose loss or gradient is not finite; one more stops"""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """bf16-mixed: compute in half precision, keep weights in float32"""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """float32 matrix products: high is TF32 on a GPU, medium less; scores always take highest"""
    compile: bool = False
    """compile block by block; needs a C++ compiler (Triton on a GPU)"""
    activation_checkpointing: Literal["none", "blocks"] = "none"
    """blocks: recompute their activations in the backward pass: less memory, one more forward pass"""
    objective: ObjectiveConfig = ObjectiveConfig()
    """what training and validation minimise"""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """running average of the weights, which validation and best.ckpt take; null: none"""
    early_stop_epochs: PositiveInt | None = None
    """stop after so many epochs without progress; null: never"""
    validate_every_epochs: PositiveInt = 1
    """epochs from one validation to the next"""
    preflight: bool = True
    """before training: one step, a save and a restore at full size"""

    @property
    def windows(self) -> int:
        """定下了的 batch_size。

        Raises:
            ValueError: 还是 auto。
        """
        if isinstance(self.batch_size, int):
            return self.batch_size
        raise ValueError("train.batch_size = auto: only a training settles it; write a number here")
