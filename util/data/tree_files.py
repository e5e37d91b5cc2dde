"""目录树的约定：`<root>/t2m_npy/1979/1979-0000.npy`、`<root>/z_npy/level_00/1979/…`，统计量 json 与年份并列；

不随时间变的场在 `<root>/static/lsm.npy`，旁边是它的 lsm.json。
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from util.atomic import remove_leftovers, replacing, reserved
from util.calendar import moment_of, year_start
from util.config import Axis, DataConfig
from util.files.bounded import open_regular, passing, read_json, read_npy_header, read_npy_values
from util.files.fills import Fills, fills_of, find_fill, standardized_too, surely_data
from util.files.moments import Moments, check_moments, measure
from util.strict import Strict, nearest, validate
from util.variables import channel_folder, channel_name, split_channel

Field = np.ndarray  # (H, W) float32
STATISTICS = ("mean_std.json", "min_max.json")  # 与年份文件夹并列
Fault = Literal["missing", "unreadable", "wrong shape", "wrong dtype", "non-finite", "fill value"]

ANY_FILL = Fills()  # 合理范围不知道时


class Tendency(NamedTuple):
    """隔 hours 小时的变化的标准差，物理单位。"""

    std: float
    hours: int


class FieldError(ValueError):
    """一个场用不了。fault: 哪一种毛病；detail: 不带路径的说明；passing: 文件也许是好的，盘一时读不出。"""

    def __init__(self, path: Path, fault: Fault, detail: str, passing: bool = False) -> None:
        super().__init__(f"{path}: {detail}")
        self.fault: Fault = fault
        self.detail = detail
        self.passing = passing


@contextmanager
def owned(root: str | Path, channels: Iterable[str], static: bool = False) -> Iterator[None]:
    """块内这棵树里这些通道的变量（要的话连同 static/）只由这个进程写；Raises 见 reserved。"""
    names = dict.fromkeys(f"{split_channel(channel)[0]}_npy" for channel in channels)
    with ExitStack() as held:
        for name in [*names, *["static"] * static]:
            held.enter_context(reserved(folder := Path(root) / name, "wait for it to end", sweep=False))
            for place in (folder, *folder.glob("level_*")):  # 统计量；一年年的文件夹里没有临时文件
                remove_leftovers(place, deep=False)
        yield


def field_path(root: str | Path, channel: str, hour: int) -> Path:
    """某通道某小时（文件名所用的历法，1970 年以来）的文件；文件号是年内小时。"""
    year = moment_of(hour).year
    return Path(root) / channel_folder(channel) / str(year) / f"{year}-{hour - year_start(year):04d}.npy"


def channel_fills(config: DataConfig, channel: str) -> Fills:
    """这个通道的文件里认作填充值的。没有、坏了的 mean_std.json 由要用它的人说。"""
    fills = fills_of(config.limits(channel))
    try:
        return fills if config.standardize == "yes" else standardized_too(fills, *read_mean_std(config.root, channel))
    except ValueError:
        return fills


def read_field(path: Path, shape: tuple[int, int], fills: Fills = ANY_FILL) -> Field:
    """读一个场并查验，返回 (H, W) float32。

    Raises:
        FieldError: 文件不在、打不开、被截断、形状或类型不对、含非有限值或填充值；一行说清是哪一种。
    """
    try:
        with open_regular(path) as file:
            header = read_npy_header(file)
            fits = header.shape == shape and header.dtype == np.float32
            field = read_npy_values(file, header) if fits else None
    except FileNotFoundError:  # 连文件夹也没有了：是盘不在，不是删了它
        raise FieldError(path, "missing", "missing", passing=not path.parent.is_dir()) from None
    except (OSError, ValueError) as error:  # 截断、不是 npy、内含 pickle、文件头坏了
        raise FieldError(path, "unreadable", f"unreadable ({error})", passing(error)) from None
    if header.shape != shape:
        raise FieldError(path, "wrong shape", f"shape {header.shape}, expected {shape}")
    if header.dtype != np.float32:
        raise FieldError(path, "wrong dtype", f"dtype {header.dtype}, expected float32")
    assert field is not None
    if not np.isfinite(field).all():
        raise FieldError(path, "non-finite", f"{int((~np.isfinite(field)).sum())} non-finite values")
    if found := find_fill(field, fills):
        fill, where = found
        raise FieldError(path, "fill value", f"{int(where.sum())} of {field.size} values are {fill:g}, a fill value")
    return field


def usual_header(shape: tuple[int, int]) -> bytes:
    """NumPy 写 (H, W) 的 <f4 场时的文件头，逐字节。"""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return header.getvalue()


def plain_header(path: Path, shape: tuple[int, int]) -> bytes | None:
    """读得出的文件的文件头，若它后面就是按行存的 (H, W) <f4（从前的 NumPy 补的空格少些）；否则、或刚被删了是 None。"""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return None
    with file:
        header = read_npy_header(file)
        file.seek(0)
        start = file.read(header.start)
    plain = header == (shape, np.dtype("<f4"), False, len(start)) and start[6:8] == b"\x01\x00"
    return start if plain else None


def read_into(path: str, header: bytes, out: np.ndarray, fills: Fills = ANY_FILL) -> bool:
    """文件里的数直接读进 out (H, W) float32，中间不抄：一次系统调用，文件头只比字节，不解析。

    只有文件头恰是 header、数据足长、surely_data 才为真，此时与 read_field 读出的逐位相同；
    为假时 out 的内容不定，是什么毛病由 read_field 说。
    """
    start = bytearray(len(header))
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # 管道不等
    except OSError:
        return False
    try:
        count = os.readv(file, (start, out.data))
    except OSError:
        return False
    finally:
        os.close(file)
    return count == len(header) + out.nbytes and start == header and surely_data(out, fills)


def write_field(path: Path, field: Field) -> None:
    """写一个场；文件夹不在就建。"""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.asarray(field, dtype=np.float32))


def read_mean_std(root: str | Path, channel: str) -> tuple[float, float]:
    """读通道的 mean_std.json（与年份文件夹并列），返回 (均值, 标准差)，物理单位。

    Raises:
        ValueError: 文件不在或格式不对；给出应有的样子。
    """
    expected = 'expected {"mean": [number], "std": [positive number]}'
    path = Path(root) / channel_folder(channel) / "mean_std.json"
    mean, std = _read_pair(path, ("mean", "std"), expected)
    if std <= 0:
        raise ValueError(f"{path}: mean {mean}, std {std}; {expected}")
    return mean, std


def read_joined_statistics(config: DataConfig, channels: Sequence[str]) -> list[tuple[float, float]]:
    """data.statistics 里各通道的均值、标准差；须是这几个数据集、这些训练日期的。

    Raises:
        ValueError: 还没有算，或是别的数据集、别的日期的。
    """
    assert config.statistics is not None
    path, way = Path(config.statistics) / "data_sets.json", "python dataset.py statistics --config CONFIG --write"
    if not path.is_file():
        raise ValueError(f"data.statistics: no {path}; {way} writes it, with mean_std.json of every channel")
    found, wanted = read_json(path), joined_about(config)
    if found != wanted:
        raise ValueError(
            f"{path}: the statistics there are of {found}, wanted are those of {wanted}; {way} --overwrite"
        )
    return [read_mean_std(config.statistics, channel) for channel in channels]


def joined_about(config: DataConfig) -> dict[str, Any]:
    """data_sets.json：合起来的统计量是哪几个数据集、哪些日期的。"""
    return {"data_sets": list(config.parts), "train": list(config.splits.train)}


def write_joined_about(config: DataConfig) -> None:
    assert config.statistics is not None
    with replacing(Path(config.statistics) / "data_sets.json") as temporary:
        temporary.write_text(json.dumps(joined_about(config), indent=4, ensure_ascii=False), encoding="utf-8")


def read_extremes(root: str | Path, channel: str) -> tuple[float, float] | None:
    """读通道的 min_max.json，返回 (最小, 最大)；训练用不到它，可以没有，没有就是 None。

    Raises:
        ValueError: 格式不对；给出应有的样子。
    """
    expected = 'expected {"min": [number], "max": [number]}, the max not below the min'
    path = Path(root) / channel_folder(channel) / "min_max.json"
    if not path.exists():
        return None
    low, high = _read_pair(path, ("min", "max"), expected)
    if low > high:
        raise ValueError(f"{path}: min {low}, max {high}; {expected}")
    return low, high


def read_tendency(root: str | Path, channel: str) -> Tendency | None:
    """mean_std.json 里变化的标准差；没有算过就是 None。

    Raises:
        ValueError: 格式不对；给出应有的样子。
    """
    expected = 'expected {"tendency_std": [positive number], "tendency_hours": [whole number]}, or neither'
    path = Path(root) / channel_folder(channel) / "mean_std.json"
    if not path.is_file() or "tendency_" not in path.read_text(encoding="utf-8", errors="replace"):
        return None
    std, hours = _read_pair(path, ("tendency_std", "tendency_hours"), expected)
    if std <= 0 or hours < 1 or hours != int(hours):
        raise ValueError(f"{path}: tendency_std {std}, tendency_hours {hours}; {expected}")
    return Tendency(std, int(hours))


def holds_tendency(root: str | Path, channels: Sequence[str]) -> bool:
    """有没有哪个通道的 mean_std.json 写着变化的标准差，坏的文件也算。"""
    paths = [Path(root) / channel_folder(channel) / "mean_std.json" for channel in channels]
    return any(p.is_file() and "tendency_std" in p.read_text(encoding="utf-8", errors="replace") for p in paths)


def _read_pair(path: Path, keys: tuple[str, str], expected: str) -> tuple[float, float]:
    """json 里两个键的有限数；用户的文件把它们放在一个元素的列表里。"""
    if not path.is_file():
        raise ValueError(f"{path}: missing; {expected}")
    try:
        values = read_json(path)
        first, second = (float(v[0] if isinstance(v, list) else v) for v in (values[key] for key in keys))
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path}: malformed ({type(error).__name__}: {error}); {expected}") from None
    if not (math.isfinite(first) and math.isfinite(second)):
        raise ValueError(f"{path}: {keys[0]} {first}, {keys[1]} {second}; {expected}")
    return first, second


def write_mean_std(
    root: str | Path,
    channel: str,
    mean: float,
    std: float,
    low: float | None = None,
    high: float | None = None,
    tendency: Tendency | None = None,
) -> None:
    """写 mean_std.json 与（知道极值时）min_max.json，格式与用户的一致（各为一个元素的列表）。"""
    folder = Path(root) / channel_folder(channel)
    contents = {"mean_std.json": {"mean": [mean], "std": [std]}}
    if tendency is not None:
        contents["mean_std.json"] |= {"tendency_std": [tendency.std], "tendency_hours": [tendency.hours]}
    if low is not None and high is not None:
        contents["min_max.json"] = {"min": [low], "max": [high]}
    for name, values in contents.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(json.dumps(values, indent=4), encoding="utf-8")


def select_channels(config: DataConfig) -> list[str]:
    """按 YAML 的 variables 展开成通道名，次序即 YAML 的次序；文件夹不在的当场报错。

    Raises:
        ValueError: 根目录、变量或层不在：说出要的是哪个、在哪里找的、那里有什么。
    """
    root = Path(config.root)
    if config.parts:
        raise ValueError(f"data.set names {len(config.parts)} data sets; this looks at one tree: give data.set=FILE")
    if not root.is_dir():
        raise ValueError(
            f"data.root {root} is not a directory; give data.root=FOLDER, the one that holds t2m_npy/ and the others "
            "(a sample: python dataset.py sample --root data/sample)"
        )
    if not config.variables:
        raise ValueError("data.variables is empty; choose at least one, e.g. {t2m: single, z: [level_00]}")
    channels: list[str] = []
    for variable, levels in config.variables.items():
        folder = root / f"{variable}_npy"
        if not folder.is_dir():
            found = sorted(p.name.removesuffix("_npy") for p in root.glob("*_npy"))
            raise ValueError(
                f"data.variables: no {variable!r} (looked for {folder}); {nearest(variable, found, 'there')}"
            )
        present = sorted(p.name for p in folder.glob("level_*") if p.is_dir())
        if levels == "single":
            if present:
                raise ValueError(f"data.variables.{variable} = single, but {folder} holds levels: {', '.join(present)}")
            channels.append(channel_name(variable, None))
            continue
        chosen = present if levels == "all" else levels
        if not chosen:
            raise ValueError(
                f"data.variables.{variable} = {levels}: no levels in {folder}; write 'single' for one level"
            )
        for level in chosen:
            if level not in present:
                raise ValueError(
                    f"data.variables.{variable}: no {level!r} in {folder}; there: {', '.join(present) or 'none'}"
                )
            channels.append(channel_name(variable, level))
    doubled = sorted({c for c in channels if channels.count(c) > 1})
    if doubled:
        raise ValueError(f"data.variables: listed twice: {', '.join(doubled)}")
    return channels


def choose_channels(config: DataConfig, there: Sequence[str], where: str) -> list[str]:
    """data.variables 展开成通道名；all 是 there 里有的各层。

    Raises:
        ValueError: there 里没有的变量或层。
    """
    channels: list[str] = []
    for variable, levels in config.variables.items():
        held = [channel for channel in there if split_channel(channel)[0] == variable]
        named = [variable] if levels == "single" else [channel_name(variable, level) for level in levels]
        wanted = [channel for channel in held if channel != variable] if levels == "all" else named
        if not wanted or not set(wanted) <= set(held):
            raise ValueError(f"data.variables.{variable} = {levels}: not in {where}; it holds {', '.join(there)}")
        channels += wanted
    if not channels or len(set(channels)) < len(channels):
        raise ValueError(f"data.variables = {config.variables}: choose at least one channel, and none twice")
    return channels


def write_moments(root: str | Path, name: str, moments: Moments, dates: str) -> None:
    """写 mean_std.json 与 min_max.json；Raises 见 check_moments。"""
    check_moments(name, moments, dates)
    write_mean_std(root, name, moments.mean, moments.std, moments.low, moments.high)


class StaticField(NamedTuple):
    """不随时间变的场：地形、海陆分布、土壤类型。values: (H, W) float32，单位是 units。"""

    values: Field
    units: str

    def about(self) -> dict[str, Any]:
        """单位与统计量；各格点一样重，同 mean_std.json。"""
        m = measure([self.values])
        return {"units": self.units, "mean": [m.mean], "std": [m.std], "min": [m.low], "max": [m.high]}


class StaticAbout(Strict):
    """`<root>/static/NAME.json`：NAME.npy 的单位、统计量，和它的网格：目录树自己不带坐标。"""

    units: str
    mean: list[float]
    std: list[float]
    min: list[float]
    max: list[float]
    latitude: Axis
    longitude: Axis


def static_names(root: str | Path) -> list[str]:
    """`<root>/static/` 里有哪些场。"""
    return sorted(path.stem for path in (Path(root) / "static").glob("*.npy"))


def write_static(root: str | Path, name: str, static: StaticField, latitude: Axis, longitude: Axis) -> None:
    """写 NAME.npy 与 NAME.json。"""
    folder = Path(root) / "static"
    write_field(folder / f"{name}.npy", static.values)
    about = StaticAbout(**static.about(), latitude=latitude, longitude=longitude)
    with replacing(folder / f"{name}.json") as temporary:
        temporary.write_text(about.model_dump_json(indent=4), encoding="utf-8")


def read_static(root: str | Path, name: str, latitude: Axis, longitude: Axis) -> StaticField:
    """读 NAME.npy；网格须是 latitude、longitude。

    Raises:
        ValueError: 两个文件有一个不在、坏了，互不相符，或是另一种网格。
    """
    path = Path(root) / "static" / f"{name}.npy"
    beside, again = path.with_suffix(".json"), "python dataset.py import --static writes both files"
    try:
        content = read_json(beside)
    except (OSError, ValueError) as error:
        raise ValueError(f"{beside}: cannot be read ({type(error).__name__}: {error}); {again}") from None
    about = validate(StaticAbout, content, str(beside))
    for key, wanted in (("latitude", latitude), ("longitude", longitude)):
        if not (axis := getattr(about, key)).same_as(wanted):
            raise ValueError(f"{path}: its {key} has {axis.text()}, data.{key} has {wanted.text()}; {again}")
    static = StaticField(read_field(path, (latitude.count, longitude.count)), about.units)
    stated, found = ([about[key][0] for key in ("mean", "std", "min", "max")] for about in (content, static.about()))
    if not np.allclose(found, stated, rtol=1e-6, atol=1e-12):
        raise ValueError(f"{beside}: mean, std, min, max are {stated}, those of the field {found}; {again}")
    return static
