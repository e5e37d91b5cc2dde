"""严格的配置：一份 YAML 是一次完整的运行；不认识的键、错误的类型在读入时就停下，并给出最近的正确写法。"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from util.strict import (
    Day,
    PositiveInt,
    Share,
    Strict,
    apply_overrides,
    brief,
    nearest,
    overlaid,
    read_mapping,
    validate,
)
from util.training_config import CheckpointConfig, LogConfig, RunSection, TrainConfig
from util.variables import RANGES, Forcings, Levels, Limits, plausible_range, split_channel


def _yes_no(value: object) -> object:
    """YAML 把 yes / no 读成布尔值，这里换回用户写的词。"""
    return {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value


class Axis(Strict):
    """等距坐标轴；step 的正负就是排列方向。"""

    first: float
    """degrees, of the first row or column of a file"""
    step: float
    """degrees from one to the next; negative: north to south"""
    count: int = Field(ge=1, le=100_000)  # 400 米
    """rows or columns"""

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
    """三段日期。"""

    train: list[Day] = Field(min_length=2, max_length=2)
    """[first, last] of training, both included: a year (1979) or a day (1979-01-31)"""
    val: list[Day] = Field(min_length=2, max_length=2)
    """the same of validation"""
    test: list[Day] = Field(min_length=2, max_length=2)
    """the same of the test"""


Frames = Annotated[int, Field(ge=1, le=10_000)]  # 再长就是一张张的表、一个个的位置先把内存用尽
Source = Literal["tree", "store"]
Windows = Literal["random", "apart", "all"]


class DataPart(Strict):
    """几个数据集合成一个时，其中一个自己的：在哪里、有哪些通道；其余的键各个都相同。"""

    root: str
    """folder of its tree"""
    source: Source = "tree"
    """read the tree under root, or the store"""
    store: str | None = None
    """folder of its store"""
    variables: dict[str, Levels]
    """its variables, as in data.variables"""


class DataConfig(Strict):
    """data 段与它引用的数据集文件合并之后的样子；source 为 store 时读 dataset.py pack 写的存档，不看 root。

    读的是从 1970-01-01T00 数起（文件名的历法）第 first_hour、first_hour + interval_hours……小时的场，哪一年都接着数；
    步长整除 24 时 first_hour 就是每天的第一个钟点。
    写了 starts_every_hours 的，读的是第 first_hour 起每 starts_every_hours 小时的场，窗口里的帧仍隔 interval_hours。
    lead_hours：每个训练窗口抽一个，时效是网络的条件。
    外强迫与角色见 models/layers/forcings.py；data.set 是一列时，root 只是 parts 的名字。
    """

    root: str
    """folder of the tree: root/t2m_npy/1979/1979-0000.npy; not read with source: store"""
    source: Source = "tree"
    """tree: the files under root; store: the folder that dataset.py pack wrote"""
    store: str | None = None
    """that folder"""
    parts: dict[str, DataPart] = Field(default_factory=dict)
    """made by a list in data.set: name of a data set (its file) -> what is its own"""
    statistics: str | None = None
    """several data sets: folder of their joint statistics (dataset.py statistics --write)"""
    verify: Literal["never", "first_read", "always"] = "first_read"
    """checksums of the chunks of a store: at the first read of each, always, or never"""
    residency: Literal["disk", "memory", "device"] = "disk"
    """disk: as needed; memory: a store read ahead into the page cache; device: training and validation kept on it"""
    variables: dict[str, Levels]
    """variable -> single, all, or its levels [level_00, ...]; the channels in this order"""
    units: dict[str, str] = Field(default_factory=dict)
    """variable or channel -> its unit, where it is not the usual one"""
    valid_range: dict[str, Limits] = Field(default_factory=dict)
    """variable or channel -> [low, high] in its unit; what lies outside counts as missing"""
    pressure_hpa: list[float] = Field(default_factory=list)
    """pressures of level_00, level_01, ..."""
    latitude: Annotated[Axis, AfterValidator(_between_poles)]
    """the rows of a file"""
    longitude: Annotated[Axis, AfterValidator(_one_circle)]
    """the columns of a file"""
    utc_offset_hours: int = Field(default=0, ge=-12, le=14)
    """clock of the file numbers minus UTC"""
    interval_hours: PositiveInt = 6
    """hours from one frame to the next"""
    first_hour: int = Field(default=0, ge=0)
    """first hour read, counted from 1970-01-01T00 on: the first of a day where interval_hours divides 24"""
    starts_every_hours: PositiveInt | None = None
    """null: interval_hours; less, a divisor of it, where the data are denser: each of these hours starts a window"""
    splits: Splits
    """dates of training, validation and test"""
    frames_in: Frames
    """frames of history; t = frames_in + frames_out"""
    frames_out: Frames = 1
    """frames of one forecast"""
    lead_hours: list[PositiveInt] = Field(default_factory=list)
    """hours that one forecast may reach, interval_hours first: the network learns all of them; []: that alone"""
    forcings: Forcings = Field(default_factory=list)
    """known inputs, never forecast: solar, day_of_year, hour_of_day, latitude, longitude, static/NAME"""
    roles: dict[str, Literal["prognostic", "diagnostic"]] = Field(default_factory=dict)
    """variable or channel -> diagnostic: forecast and scored, but never an input"""
    standardize: Annotated[Literal["auto", "yes", "no"], BeforeValidator(_yes_no)] = "auto"
    """yes: the files are raw; no: they are standardised; auto: measure a sample and decide"""
    max_gap_hours: PositiveInt = 24
    """longer gaps are not interpolated, and no window crosses them"""
    max_missing: Share = 0.01
    """share of a channel's files that may be missing or unreadable"""
    retry_seconds: float = Field(default=30.0, ge=0)
    """a file the disk cannot read for a moment is tried again this long before it counts as missing, for the epoch"""
    windows: Windows = "random"
    """windows of an epoch: random draws N // t starts, apart takes them side by side, all every start

    (shuffle: true is random, shuffle: false is apart)"""
    eval_stride: PositiveInt = 1
    """validation and test take every n-th start"""
    workers: int = Field(default=2, ge=0, le=1024)
    """reading processes"""
    pin_memory: bool = True
    """page-locked memory for the copies to a GPU"""
    cache_dir: str = "tmp"
    """folder of caches; it may be deleted"""

    @model_validator(mode="before")
    @classmethod
    def _shuffle_is_windows(cls, values: Any) -> Any:
        """需求的说法：shuffle: true | false 就是 windows: random | apart。"""
        if not isinstance(values, dict) or "shuffle" not in values:
            return values
        rest = {key: value for key, value in values.items() if key != "shuffle"}
        shuffle, wanted = values["shuffle"], rest.get("windows")
        if wanted is not None:
            raise ValueError(f"windows = {wanted} and shuffle = {shuffle} say the same thing; remove shuffle")
        if not isinstance(shuffle, bool):
            raise ValueError(f"shuffle = {brief(shuffle)}: write true or false, or windows: random | apart | all")
        return rest | {"windows": "random" if shuffle else "apart"}

    @model_validator(mode="after")
    def _hours_fit(self) -> DataConfig:
        every, _ = self.sampling
        if self.interval_hours % every:
            raise ValueError(f"starts_every_hours = {every} does not divide interval_hours = {self.interval_hours}")
        if self.first_hour >= every:
            raise ValueError(
                f"first_hour = {self.first_hour} is not the first of every {every} h; write {self.first_hour % every}, "
                "or another interval_hours (starts_every_hours, where it is given)"
            )
        step, leads = self.interval_hours, self.lead_hours
        if leads and (leads != sorted({step, *leads}) or any(lead % step for lead in leads)):
            raise ValueError(f"lead_hours = {leads}: write multiples of interval_hours, in order, {step} first")
        if leads and self.frames_out != 1:
            raise ValueError(f"frames_out = {self.frames_out}: with lead_hours a forecast is one frame; write 1")
        return self

    @model_validator(mode="after")
    def _ranges_named(self) -> DataConfig:
        known = dict.fromkeys([*self.variables, *self.units, *RANGES])
        for name in self.valid_range:
            if split_channel(name)[0] not in known:
                raise ValueError(f"valid_range has {name!r}, which is no variable; {nearest(name, known, 'variables')}")
        return self

    @model_validator(mode="after")
    def _parts_named(self) -> DataConfig:
        if self.parts and self.root != " + ".join(self.parts):
            keys = ", ".join(f"data.parts.{name}.root" for name in self.parts)
            raise ValueError(f"root = {self.root!r}: there are several data sets, each with its own: {keys}")
        if self.statistics and not self.parts:
            raise ValueError("statistics is for several data sets (set is a list); one tree holds its own statistics")
        return self

    @model_validator(mode="after")
    def _store_named(self) -> DataConfig:
        if self.source == "store" and self.store is None:
            raise ValueError("source = store needs store, the folder that python dataset.py pack wrote")
        if self.residency == "memory" and self.source != "store":
            raise ValueError("residency = memory needs source = store")
        return self

    def part_configs(self) -> dict[str, DataConfig]:
        """各数据集自己的配置；只有一个、或合起来打成了一个存档（source: store）时是空的。"""
        if self.source == "store":
            return {}
        alone = {"parts": {}, "statistics": None}
        return {name: self.model_copy(update={**dict(part), **alone}) for name, part in self.parts.items()}

    @property
    def sampling(self) -> tuple[int, int]:
        """(每隔几小时, 头一个)：读哪些时刻的场。"""
        return self.starts_every_hours or self.interval_hours, self.first_hour

    @property
    def roots(self) -> list[str]:
        """各目录树。"""
        return [part.root for part in self.parts.values()] or [self.root]

    def limits(self, channel: str) -> tuple[float, float] | None:
        """通道的合理范围，物理单位；不知道是 None。"""
        return plausible_range(channel, self.units, self.valid_range)


class RunConfig(Strict):
    """一次运行的全部配置；model 段由 models.build_config 按模型自己的 Config 检查。"""

    run: RunSection = RunSection()
    """where to run, and the seed"""
    data: DataConfig
    """which fields, dates and windows"""
    model: dict[str, Any]
    """name and options of the model"""
    train: TrainConfig
    """how to train"""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """what is saved, and when"""
    log: LogConfig = LogConfig()
    """what is written beside it"""
    smoke: list[str] = Field(default_factory=list)
    """the overrides (key=value) of --smoke, which shrink the run"""


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
        paths = data["set"] if isinstance(data["set"], list) else [data["set"]]
        if not paths or not all(isinstance(name, str) for name in paths):
            raise ValueError(
                f"{path}: data.set = {brief(data['set'])}: write the path of a YAML file, or a list of them"
            )
        where += f" with {' and '.join(paths)}"
        own = {k: v for k, v in data.items() if k != "set"}
        values["data"] = overlaid(read_mapping(paths[0]) if len(paths) == 1 else _join_sets(paths, own, where), own)
    values = apply_overrides(values, [text for text, chooses in zip(changes, chooses_set, strict=True) if not chooses])
    return validate(RunConfig, values, where)


def _join_sets(paths: list[str], own: dict[str, Any], where: str) -> dict[str, Any]:
    """几个数据集文件 → 一份 data 段。DataPart 的键各归各的，其余须相同；own（运行 YAML 写了的键）除网格外不必。"""
    sets = {Path(path).stem: read_mapping(path) for path in paths}
    if len(sets) < len(paths):
        raise ValueError(f"{where}: data.set: two files of one name; the name stands for the data set, rename one")
    parts = {name: {k: v for k, v in values.items() if k in DataPart.model_fields} for name, values in sets.items()}
    joined: dict[str, Any] = {"root": " + ".join(sets), "parts": parts, "variables": {}}
    for values in sets.values():
        for variable, levels in (values.get("variables") or {}).items():
            joined["variables"][variable] = _union(joined["variables"].get(variable, levels), levels)
        joined |= {key: overlaid(joined.get(key) or {}, values.get(key) or {}) for key in ("units", "valid_range")}
    for key in dict.fromkeys(key for values in sets.values() for key in values):
        free = key in own and key not in ("latitude", "longitude")
        if free or key in DataPart.model_fields:
            continue
        held = {name: _stated(values, key) for name, values in sets.items()}
        held = {name: value for name, value in held.items() if value is not None}
        (first, wanted), *others = held.items()
        for name, value in others:
            if not _agree(key, wanted, value, where):
                raise ValueError(
                    f"{where}: data.{key} = {brief(wanted)} in {first}, {brief(value)} in {name}; data sets that are "
                    f"read as one must agree{'' if key in ('latitude', 'longitude') else ', or the run YAML decides'}"
                )
        if key not in ("units", "valid_range"):
            joined[key] = wanted
    return joined


def _stated(values: dict[str, Any], key: str) -> Any:
    """数据集写着的，没有写的是默认值；没有默认值、或空着的是 None：由别的说。"""
    field = DataConfig.model_fields.get(key)
    default = None if field is None or field.is_required() else field.get_default(call_default_factory=True)
    value = values.get(key, default)
    return None if value in ([], {}) else value


def _agree(key: str, one: Any, other: Any, where: str) -> bool:
    if key in ("latitude", "longitude"):
        return validate(Axis, one, where, f"data.{key}").same_as(validate(Axis, other, where, f"data.{key}"))
    if key in ("units", "valid_range"):
        return all(one[name] == other[name] for name in one.keys() & other.keys())
    return bool(one == other)


def _union(one: Any, other: Any) -> Any:
    """一个变量在两个数据集里的层合起来。"""
    if one == other or not (isinstance(one, list) and isinstance(other, list)):
        return one if one == other else "all"
    return list(dict.fromkeys([*one, *other]))


def least_batch(config: RunConfig) -> int:
    """train.batch_size 须是它的倍数：每个进程的每个小批一个窗口。"""
    return config.train.accumulate * config.run.devices * config.run.num_nodes


def check_batch_size(config: RunConfig) -> None:
    """全局的批要切得成一样大的小批。

    Raises:
        ValueError: 切不成。
    """
    size, parts = config.train.batch_size, least_batch(config)
    if size != "auto" and size % parts:
        raise ValueError(f"train.batch_size = {size} must be a multiple of devices x train.accumulate = {parts}")


def eval_batch_size(config: RunConfig) -> int:
    """评测时一批的窗口数：与训练的小批相同，显存已知够用；与这一次起了几个进程无关，结果才与进程数无关。"""
    return max(1, config.train.windows // least_batch(config))
