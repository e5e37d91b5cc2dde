"""严格的配置：一份 YAML 是一次完整的运行；不认识的键、错误的类型在读入时就停下，并给出最近的正确写法。"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from util.strict import PositiveInt, Share, Strict, brief, nearest, validate
from util.variables import RANGES, plausible_range, split_channel


def _yes_no(value: object) -> object:
    """YAML 把 yes / no 读成布尔值，这里换回用户写的词。"""
    return {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value


def _day_text(value: object) -> object:
    """日期可写年份（1979）或日子（1979-01-01）；统一存成文本，检查点里才是普通值。"""
    if isinstance(value, bool) or not isinstance(value, (str, int, date)):
        return value  # 类型不对，由 pydantic 报
    text = str(value)
    if re.fullmatch(r"[1-9]\d{3}", text):
        return text
    try:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", text):  # fromisoformat 在 3.11 起还认别的写法，3.10 不认
            raise ValueError("neither YYYY nor YYYY-MM-DD")
        date.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"not a date ({error}); write a year like 1979 or a day like 1979-01-31") from None
    return text


def _levels(value: object) -> object:
    """变量的层：single、all 或层的列表；联合类型自己的报错看不懂，在它之前说清。"""
    named = isinstance(value, list) and value and all(re.fullmatch(r"level_\d+", str(v)) for v in value)
    if not named and (isinstance(value, list) or value not in ("single", "all")):
        raise ValueError("write single, all, or a list of levels like [level_00, level_01]")
    return value


Day = Annotated[str, BeforeValidator(_day_text)]
Levels = Annotated[Literal["single", "all"] | list[str], BeforeValidator(_levels)]


def _limits(value: list[float]) -> list[float]:
    if len(value) != 2 or not value[0] < value[1]:
        raise ValueError("write [low, high], low below high, in the units of the channel")
    return value


Limits = Annotated[list[float], AfterValidator(_limits)]


class Axis(Strict):
    """等距坐标轴，单位为度；step 的正负就是排列方向（纬度由北向南时为负）。"""

    first: float
    step: float
    count: PositiveInt

    @model_validator(mode="after")
    def _nonzero(self) -> Axis:
        if self.step == 0 and self.count > 1:
            raise ValueError("step must not be 0")
        return self

    def values(self) -> tuple[float, ...]:
        return tuple(self.first + self.step * i for i in range(self.count))

    def same_as(self, other: Axis) -> bool:
        """差在舍入（格距的千分之一）之内。"""
        off = max(abs(a - b) for a, b in zip(self.values(), other.values(), strict=False))
        return self.count == other.count and off <= 1e-3 * abs(self.step)

    def text(self) -> str:
        """报错用。"""
        return f"{self.count} values from {self.first:g} to {self.values()[-1]:g}"


def _between_poles(axis: Axis) -> Axis:
    first, last = axis.values()[0], axis.values()[-1]
    if max(abs(first), abs(last)) > 90 + 1e-6:
        raise ValueError(f"runs from {first:g} to {last:g}, outside -90 to 90")
    return axis


def _one_circle(axis: Axis) -> Axis:
    if abs(axis.step) * axis.count > 360 + 1e-6:
        raise ValueError(
            f"covers more than 360 degrees ({axis.count} steps of {axis.step:g} from {axis.first:g}): leave out the "
            "columns that come twice (dataset.py import --cols)"
        )
    return axis


class Splits(Strict):
    """三段日期 [起, 止]，两端都含；写年份时取整年。"""

    train: list[Day] = Field(min_length=2, max_length=2)
    val: list[Day] = Field(min_length=2, max_length=2)
    test: list[Day] = Field(min_length=2, max_length=2)


class DataConfig(Strict):
    """data 段与它引用的数据集文件合并之后的样子；source 为 store 时读 dataset.py pack 写的存档，不看 root。

    读的是从 1970-01-01T00 数起（文件名的历法）第 first_hour、first_hour + interval_hours……小时的场，哪一年都接着数；
    步长整除 24 时 first_hour 就是每天的第一个钟点。
    """

    root: str
    source: Literal["tree", "store"] = "tree"
    store: str | None = None
    residency: Literal["disk", "memory", "device"] = "disk"
    variables: dict[str, Levels]
    units: dict[str, str] = Field(default_factory=dict)
    valid_range: dict[str, Limits] = Field(default_factory=dict)
    pressure_hpa: list[float] = Field(default_factory=list)
    latitude: Annotated[Axis, AfterValidator(_between_poles)]
    longitude: Annotated[Axis, AfterValidator(_one_circle)]
    utc_offset_hours: int = Field(default=0, ge=-12, le=14)
    interval_hours: PositiveInt = 6
    first_hour: int = Field(default=0, ge=0)
    splits: Splits
    frames_in: PositiveInt
    frames_out: PositiveInt = 1
    standardize: Annotated[Literal["auto", "yes", "no"], BeforeValidator(_yes_no)] = "auto"
    max_gap_hours: PositiveInt = 24
    max_missing: Share = 0.01
    shuffle: bool = True
    eval_stride: PositiveInt = 1
    workers: int = Field(default=2, ge=0)
    pin_memory: bool = True
    cache_dir: str = "tmp"

    @model_validator(mode="after")
    def _first_of_the_day(self) -> DataConfig:
        if self.first_hour >= self.interval_hours:
            raise ValueError(
                f"first_hour = {self.first_hour} is not the first of every {self.interval_hours} h; "
                f"write {self.first_hour % self.interval_hours}, or another interval_hours"
            )
        return self

    @model_validator(mode="after")
    def _ranges_named(self) -> DataConfig:
        known = dict.fromkeys([*self.variables, *self.units, *RANGES])
        for name in self.valid_range:
            if split_channel(name)[0] not in known:
                raise ValueError(f"valid_range has {name!r}, which is no variable; {nearest(name, known, 'variables')}")
        return self

    @model_validator(mode="after")
    def _store_named(self) -> DataConfig:
        if self.source == "store" and self.store is None:
            raise ValueError("source = store needs store, the folder that python dataset.py pack wrote")
        if self.residency == "memory" and self.source != "store":
            raise ValueError("residency = memory needs source = store")
        return self

    def limits(self, channel: str) -> tuple[float, float] | None:
        """通道的合理范围，物理单位；不知道是 None。"""
        return plausible_range(channel, self.units, self.valid_range)


class RunSection(Strict):
    """在哪里跑、用什么种子。"""

    name: str | None = None
    seed: int = Field(default=42, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: PositiveInt = 1
    num_nodes: PositiveInt = 1
    strategy: Literal["auto", "ddp"] = "auto"


class Schedule(Strict):
    """学习率曲线；warmup_steps 对 constant 与 cosine 有意义，min_ratio 只对 cosine。"""

    name: Literal["constant", "cosine", "onecycle"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    min_ratio: Share = 0.0


class TrainConfig(Strict):
    """训练段；batch_size 是全体设备上一次参数更新所用的窗口数；init 是新的运行从哪个检查点的权重起步（续训时不读）。"""

    epochs: int = Field(ge=0)
    init: str | None = None
    batch_size: PositiveInt
    accumulate: PositiveInt = 1
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: float = Field(default=1e-4, gt=0)
    betas: list[float] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Schedule = Schedule()
    clip_norm: float | None = Field(default=None, gt=0)
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    early_stop_epochs: PositiveInt | None = None
    validate_every_epochs: PositiveInt = 1
    preflight: bool = True


class CheckpointConfig(Strict):
    dir: str = "checkpoints"
    every_epochs: PositiveInt = 10
    every_minutes: float = Field(default=15.0, gt=0)


class WandbConfig(Strict):
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "ar_pred"
    entity: str | None = None
    dir: str = "."  # wandb 自己在其下建 wandb/


class LogConfig(Strict):
    dir: str = "log"
    every_steps: PositiveInt = 10
    figures: int = Field(default=2, ge=0)
    wandb: WandbConfig = WandbConfig()


class RunConfig(Strict):
    """一次运行的全部配置；model 段由 models.build_config 按模型自己的 Config 检查。"""

    run: RunSection = RunSection()
    data: DataConfig
    model: dict[str, Any]
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    smoke: list[str] = Field(default_factory=list)


class _Loader(yaml.SafeLoader):
    """SafeLoader 加三条：1e-4 是浮点数（YAML 1.1 读成字符串）；日期留作文本，由 Day 检查，报得出键名；键不许写两次。"""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:timestamp"]
    for first, rules in _Loader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: str) -> Any:
    """读 YAML 文本；出错时给出文件与行列。

    Raises:
        ValueError: 不是合法的 YAML。
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  _Loader 是 SafeLoader 的子类
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{where}{place}: not valid YAML ({getattr(error, 'problem', error)})") from None


def read_mapping(path: str | Path) -> dict[str, Any]:
    """读一个顶层为映射的 YAML 文件。

    Raises:
        ValueError: 文件不在（列出旁边有什么），或顶层不是映射。
    """
    path = Path(path)
    if not path.is_file():
        found = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ValueError(f"no file {path}; {nearest(path.name, found, 'files there')}")
    values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping at the top, found {type(values).__name__}")
    return values


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """把 `a.b=值` 写进嵌套映射的副本；键是否存在由随后的严格检查决定。

    Raises:
        ValueError: 不是 key=value 的写法，或路径穿过了一个不是映射的值。
    """
    result = _copy(values)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"override {text!r} is not key=value, e.g. train.epochs=10")
        *path, last = key.strip().split(".")
        node = result
        for i, part in enumerate(path):
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"override {text!r}: {'.'.join(path[: i + 1])} has no keys below it")
        node[last] = parse_yaml(value, f"override {text!r}")
    return result


def load_config(path: str | Path, overrides: Iterable[str] = (), smoke: bool = False) -> RunConfig:
    """读一份运行 YAML：数据集文件 < 运行文件 < smoke 段 < 命令行。

    Args:
        path: config/ 下的 YAML。
        overrides: 命令行的 key=value。
        smoke: 是否用上文件里的 smoke 段（缩小到一分钟以内）。

    Raises:
        ValueError: 一行说清键、值和最近的正确写法。
    """
    values = read_mapping(path)
    smoke_list = values.get("smoke") or []
    changes = [str(item) for item in smoke_list] if smoke and isinstance(smoke_list, list) else []
    changes += overrides
    # data.set 先定，余下的改动作用在合并之后：data.variables.z=all 只改一个变量，不丢掉数据集里别的
    chooses_set = [text.partition("=")[0].strip() == "data.set" for text in changes]
    values = apply_overrides(values, [text for text, chooses in zip(changes, chooses_set, strict=True) if chooses])
    where, data = str(path), values.get("data")
    if isinstance(data, dict) and "set" in data:
        if not isinstance(data["set"], str):
            raise ValueError(f"{path}: data.set = {brief(data['set'])}: write the path of a YAML file")
        where += f" with {data['set']}"
        values["data"] = _merge(read_mapping(data["set"]), {k: v for k, v in data.items() if k != "set"})
    values = apply_overrides(values, [text for text, chooses in zip(changes, chooses_set, strict=True) if not chooses])
    return validate(RunConfig, values, where)


def _copy(values: Any) -> Any:
    return {key: _copy(v) for key, v in values.items()} if isinstance(values, dict) else values


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """top 盖过 base；映射逐键合并，只有 variables 整个替换（选了哪些变量不该与数据集的列表混在一起）。"""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "variables"
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def eval_batch_size(config: RunConfig) -> int:
    """评测时一批的窗口数：与训练的小批相同，显存已知够用；与这一次起了几个进程无关，结果才与进程数无关。"""
    return max(1, config.train.batch_size // (config.train.accumulate * config.run.devices * config.run.num_nodes))
