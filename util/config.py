"""严格的配置：一份 YAML 是一次完整的运行；不认识的键、错误的类型在读入时就停下，并给出最近的正确写法。"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator


class Strict(BaseModel):
    """所有配置段的基类：不许多余的键，不做类型转换，读入后不可改。"""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


def _yes_no(value: object) -> object:
    """YAML 把 yes / no 读成布尔值，这里换回用户写的词。"""
    return {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value


def _day_text(value: object) -> object:
    """日期可写年份（1979）或日子（1979-01-01）；统一存成文本，检查点里才是普通值。"""
    if isinstance(value, date) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    if isinstance(value, str) and not re.fullmatch(r"\d{4}", value):
        date.fromisoformat(value)  # 写错时的 ValueError 由 pydantic 接住，并报出键名
    return value


Day = Annotated[str, BeforeValidator(_day_text)]
PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


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


class Splits(Strict):
    """三段日期 [起, 止]，两端都含；写年份时取整年。"""

    train: list[Day] = Field(min_length=2, max_length=2)
    val: list[Day] = Field(min_length=2, max_length=2)
    test: list[Day] = Field(min_length=2, max_length=2)


class DataConfig(Strict):
    """data 段与它引用的数据集文件合并之后的样子。"""

    root: str
    variables: dict[str, Annotated[Literal["single", "all"] | list[str], Field(union_mode="left_to_right")]]
    units: dict[str, str] = {}
    pressure_hpa: list[float] = []
    latitude: Axis
    longitude: Axis
    utc_offset_hours: int = Field(0, ge=-12, le=14)
    interval_hours: Literal[1, 2, 3, 4, 6, 8, 12, 24] = 6
    splits: Splits
    frames_in: PositiveInt
    frames_out: PositiveInt = 1
    standardize: Annotated[Literal["auto", "yes", "no"], BeforeValidator(_yes_no)] = "auto"
    max_gap_hours: PositiveInt = 24
    max_missing: Share = 0.01
    shuffle: bool = True
    eval_stride: PositiveInt = 1
    workers: int = Field(2, ge=0)
    pin_memory: bool = True
    cache_dir: str = "tmp"


class RunSection(Strict):
    """在哪里跑、用什么种子。"""

    name: str | None = None
    seed: int = 42
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: PositiveInt = 1
    num_nodes: PositiveInt = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"


class Schedule(Strict):
    """学习率曲线；warmup_steps 与 min_ratio 只对 cosine 有意义。"""

    name: Literal["constant", "cosine", "onecycle"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    min_ratio: Share = 0.0


class TrainConfig(Strict):
    """训练段；batch_size 是全体设备上一次参数更新所用的窗口数。"""

    epochs: int = Field(ge=0)
    batch_size: PositiveInt
    accumulate: PositiveInt = 1
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: float = Field(1e-4, gt=0)
    betas: list[float] = Field([0.9, 0.999], min_length=2, max_length=2)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Schedule = Schedule()
    clip_norm: float | None = Field(None, gt=0)
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    ema_decay: float | None = Field(None, gt=0, lt=1)
    early_stop_epochs: PositiveInt | None = None
    validate_every_epochs: PositiveInt = 1
    preflight: bool = True


class CheckpointConfig(Strict):
    dir: str = "checkpoints"
    every_epochs: PositiveInt = 10
    every_minutes: float = Field(15.0, gt=0)


class WandbConfig(Strict):
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "ar_pred"
    entity: str | None = None
    dir: str = "."  # wandb 自己在其下建 wandb/


class LogConfig(Strict):
    dir: str = "log"
    every_steps: PositiveInt = 10
    figures: int = Field(2, ge=0)
    wandb: WandbConfig = WandbConfig()


class RunConfig(Strict):
    """一次运行的全部配置；model 段由 models.build_config 按模型自己的 Config 检查。"""

    run: RunSection = RunSection()
    data: DataConfig
    model: dict[str, Any]
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    smoke: list[str] = []


class _Loader(yaml.SafeLoader):
    """PyYAML 把 1e-4 读成字符串（YAML 1.1 的规矩）；补一条规则，读成浮点数。"""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


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


def nearest(word: str, options: Iterable[str], what: str = "valid names") -> str:
    """报错的后半句：最近的名字，没有相近的就列出全部。"""
    options = list(options)
    if not options:
        return f"{what}: none"
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f"nearest: {close[0]}" if close else f"{what}: {', '.join(options)}"


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
    if smoke and isinstance(smoke_list, list):
        values = apply_overrides(values, [str(item) for item in smoke_list])
    values = apply_overrides(values, overrides)
    data = values.get("data")
    if isinstance(data, dict) and "set" in data:
        data = dict(data)
        values["data"] = _merge(read_mapping(data.pop("set")), data)
    return validate(RunConfig, values, str(path))


def validate(schema: type[BaseModel], values: Mapping[str, Any], where: str, prefix: str = "") -> Any:
    """按 schema 检查一段配置；第一个错误变成一行 ValueError。"""
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError(f"{where}: {_explain(schema, error, prefix)}") from None


def _explain(schema: type[BaseModel], error: ValidationError, prefix: str) -> str:
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # 拼错的键常连带「缺键」，先说拼错
    path = [str(part) for part in first["loc"] if not re.match(r"^(literal|list|function)\[", str(part))]
    key = ".".join([prefix, *path] if prefix else path) or "top level"
    kind, value = first["type"], first.get("input")
    if kind == "extra_forbidden":
        fields = _fields_at(schema, path[:-1])
        hint = nearest(path[-1], fields, "valid keys")
        return f"unknown key {key} = {_short(value)}; {hint}"
    if kind == "missing":
        return f"missing key {key}"
    message = first["msg"].removeprefix("Value error, ")
    if kind == "literal_error" and isinstance(value, str):
        options = re.findall(r"'([^']+)'", message)
        message += f"; {nearest(value, options)}" if options else ""
    return f"{key} = {_short(value)}: {message[:1].lower() + message[1:]}"


def _fields_at(schema: type[BaseModel], path: list[str]) -> list[str]:
    """沿路径走到那一层，列出它的合法键。"""
    for part in path:
        field = schema.model_fields.get(part)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        schema = inner
    return list(schema.model_fields)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _copy(values: Any) -> Any:
    return {key: _copy(v) for key, v in values.items()} if isinstance(values, dict) else values


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """top 盖过 base；映射逐键合并，只有 variables 整个替换（选了哪些变量不该与数据集的列表混在一起）。"""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "variables"
        merged[key] = _merge(merged[key], value) if both else value
    return merged
