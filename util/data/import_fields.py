"""把 NetCDF 或 Zarr 导入目录树：`python -m util.data.import_fields --help`。

先只读坐标，排好计划，把能查的都查完（plan_import）；再按时间分块读场、写场（write_fields），
占用的内存只与一块有关，与时间长短无关。
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from util.cli import run_command
from util.config import DataConfig, nearest, validate
from util.data.calendar import moment_of, time_text
from util.data.index import SPLITS, split_hours
from util.data.source import Dims, find_dims, has_levels, listed, open_source, read_axis, read_hours, read_pressures
from util.data.tree import field_path, write_field, write_statistics
from util.data.variables import channel_folder, channel_name, describe

if TYPE_CHECKING:
    import xarray as xr

UNIT_SPELLING = {"degK": "K", "(0 - 1)": "1"}  # 常见而不合 CF 的写法
BLOCK_BYTES = 64 * 2**20
SHOWN = 20  # 摘要里最多逐条列出几个


@dataclass(frozen=True)
class Plan:
    """一次导入要做的全部事情，排好时还没有读任何场。

    hours: (T,) int64，按源文件的次序；region: 经纬两维的裁剪；
    channels: 源变量 → [(通道名, 气压轴上的下标或 None)]；values: 将写进 YAML 的键值；config: 它们检查过的样子。
    """

    dataset: xr.Dataset
    dims: Dims
    hours: np.ndarray
    region: dict[str, slice]
    channels: dict[str, list[tuple[str, int | None]]]
    values: dict[str, Any]
    config: DataConfig

    @property
    def names(self) -> list[str]:
        return [name for layers in self.channels.values() for name, _ in layers]

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """相邻两个时刻相距大于最小步长之处：(前, 后)。"""
        hours = np.sort(self.hours)
        wide = np.flatnonzero(np.diff(hours) > self.config.interval_hours)
        return [(int(hours[i]), int(hours[i + 1])) for i in wide]


class Moments(NamedTuple):
    """逐块合并的统计量（float64）：个数、均值、离差平方和、最小、最大。"""

    total: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = np.inf
    high: float = -np.inf

    def merge(self, fields: np.ndarray) -> Moments:
        """并入任意形状的一块；先减块内均值再平方，均值远大于起伏的量（位势）也不丢精度。"""
        if not fields.size:
            return self
        block = fields.astype(np.float64)
        mean = float(block.mean())
        total, shift = self.total + block.size, mean - self.mean
        squares = self.squares + float(((block - mean) ** 2).sum()) + shift**2 * self.total * block.size / total
        low, high = min(self.low, float(block.min())), max(self.high, float(block.max()))
        return Moments(total, self.mean + shift * block.size / total, squares, low, high)


def choose_region(sizes: tuple[int, int], crop: str | None, rows: str | None, cols: str | None) -> tuple[slice, slice]:
    """命令行的裁剪 → 行、列切片；crop 取中央，rows、cols 是 Python 式的 a:b（含 a 不含 b，从 0 数）。

    Raises:
        ValueError: 写法不对、超出网格，或两种写法都给了。
    """
    if crop is None:
        return _slice(rows, sizes[0], "--rows"), _slice(cols, sizes[1], "--cols")
    if rows or cols:
        raise ValueError("--crop and --rows/--cols exclude each other; give one of them")
    match = re.fullmatch(r"(\d+)x(\d+)", crop)
    if not match:
        raise ValueError(f"--crop {crop}: write it like 24x48 (rows x columns)")
    height, width = int(match[1]), int(match[2])
    if not (1 <= height <= sizes[0] and 1 <= width <= sizes[1]):
        raise ValueError(f"--crop {crop}: does not fit into the grid {sizes[0]}x{sizes[1]} of the file")
    top, left = (sizes[0] - height) // 2, (sizes[1] - width) // 2
    return slice(top, top + height), slice(left, left + width)


def plan_import(
    dataset: xr.Dataset,
    root: str | Path,
    variables: dict[str, str],
    splits: dict[str, list[str]],
    crop: str | None = None,
    rows: str | None = None,
    cols: str | None = None,
) -> Plan:
    """查完坐标、变量、日期、裁剪，排出计划；不读场，不写文件。

    Args:
        variables: 源变量 → 目录树里的名字。
        splits: train、val、test 各为 [起, 止]，写法同 YAML。

    Raises:
        ValueError: 任何一样不对，一行说清。
    """
    dims, hours = find_dims(dataset), read_hours(dataset)
    region = choose_region((dataset.sizes[dims.latitude], dataset.sizes[dims.longitude]), crop, rows, cols)
    layered = {source: has_levels(dataset, source, dims) for source in variables}
    order, pressures = read_pressures(dataset, dims.level) if dims.level and any(layered.values()) else ([], [])
    channels: dict[str, list[tuple[str, int | None]]] = {}
    units: dict[str, str] = {}
    for source, name in variables.items():
        levels = [(channel_name(name, f"level_{i:02d}"), place) for i, place in enumerate(order)]
        channels[source] = [*levels] if layered[source] else [(name, None)]
        text = str(dataset[source].attrs.get("units", describe(name).units)).replace("**", "")
        if text:
            units[name] = UNIT_SPELLING.get(text, text)
    values = {
        "root": str(root),
        "variables": {name: "all" if layered[source] else "single" for source, name in variables.items()},
        "units": units,
        "pressure_hpa": pressures,
        "latitude": read_axis(dataset, dims.latitude, region[0]).model_dump(),
        "longitude": read_axis(dataset, dims.longitude, region[1]).model_dump(),
        "interval_hours": int(np.diff(np.sort(hours)).min()),
        "splits": splits,
        "standardize": "yes",
    }
    config = validate(DataConfig, values | {"frames_in": 1}, "import", "data")  # frames_in 属于运行 YAML，这里只为检查
    _check_hours(hours, config)
    return Plan(dataset, dims, hours, {dims.latitude: region[0], dims.longitude: region[1]}, channels, values, config)


def write_fields(plan: Plan, overwrite: bool = False) -> list[tuple[str, int]]:
    """写出全部场和统计量；返回因含非有限值而没有写的 (通道, 小时)。

    Raises:
        ValueError: 文件已在而没有 overwrite；读不出；某通道在训练日期内没有场，或全是同一个数。
    """
    from tqdm import tqdm

    if not overwrite:
        _refuse_existing(plan)
    holes: list[tuple[str, int]] = []
    train = split_hours(plan.config)["train"]
    with tqdm(total=plan.hours.size * len(plan.names), unit="field", desc="import", disable=None) as bar:
        for source, layers in plan.channels.items():
            moments = {name: Moments() for name, _ in layers}
            for hours, block in _read_blocks(plan, source):
                inside = (hours >= train.start) & (hours < train.stop)
                for name, place in layers:
                    fields = block if place is None else block[:, place]  # (n, H, W)
                    good = np.array([_write_or_remove(plan, name, h, f) for h, f in zip(hours, fields, strict=True)])
                    holes += [(name, hour) for hour in hours[~good].tolist()]
                    moments[name] = moments[name].merge(fields[good & inside])
                    bar.update(hours.size)
            for name, result in moments.items():
                _write_moments(plan, name, result)
    return holes


def data_yaml(plan: Plan, source: str) -> str:
    """数据集 YAML 的文本，每个键带一句说明。"""
    import yaml

    comments = {
        "root": "目录树所在",
        "variables": "single 单层，all 全部层",
        "units": "取自源文件",
        "pressure_hpa": "依次为 level_00、level_01……",
        "latitude": "照源文件的方向；step 为负是由北向南",
        "longitude": "单位为度",
        "interval_hours": "源文件的最小步长",
        "splits": "起止两端都含；统计量只用 train",
        "standardize": "文件为物理单位，读入时标准化",
    }
    values = {key: value for key, value in plan.values.items() if value}
    text = yaml.safe_dump(values, default_flow_style=None, sort_keys=False, width=1000, allow_unicode=True)
    rows, cols = plan.region.values()
    lines = [f"# 由 util.data.import_fields 导入：{source}，行 {rows.start}:{rows.stop}，列 {cols.start}:{cols.stop}"]
    for line in text.splitlines():
        comment = comments.get(line.partition(":")[0])
        lines.append(f"{line}  # {comment}" if comment else line)
    return "\n".join(lines) + "\n"


def summarize(plan: Plan, holes: list[tuple[str, int]]) -> list[str]:
    """导入之后给人看的几行。"""
    hours, config, step = np.sort(plan.hours), plan.config, plan.config.interval_hours
    latitude, longitude = (f"{axis.first:g} to {axis.values()[-1]:g}" for axis in (config.latitude, config.longitude))
    lines = [
        f"times     {hours.size}, {time_text(hours[0])} to {time_text(hours[-1])}, every {step} h",
        f"channels  {len(plan.names)}: {listed(plan.names)}",
        f"grid      {config.latitude.count} x {config.longitude.count}, latitude {latitude}, longitude {longitude}",
    ]
    if (np.diff(plan.hours) < 0).any():
        lines.append("order     the times in the file are not sorted; each field is in the file of its own time")
    if config.pressure_hpa:
        pairs = [f"level_{i:02d} = {pressure:g} hPa" for i, pressure in enumerate(config.pressure_hpa)]
        lines.append(f"levels    {listed(pairs)}")
    lines.append(f"gaps      {len(plan.gaps)} longer than {step} h (data.max_gap_hours says which are bridged)")
    lines += _shown([f"          {time_text(a)} to {time_text(b)}, {b - a} h" for a, b in plan.gaps])
    lines.append(f"left out  {len(holes)} fields with non-finite values")
    lines += _shown([f"          {name} {time_text(hour)}" for name, hour in holes])
    missing = [name for name in config.variables if name not in config.units]
    lines += [f"units     none for {listed(missing)} in the file; add them to units"] if missing else []
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """命令行入口。"""
    args = _parse_arguments(argv)
    if args.yaml and Path(args.yaml).exists() and not args.overwrite:
        raise ValueError(f"--yaml {args.yaml} exists; give --overwrite to replace it")
    with open_source(args.source) as dataset:
        variables = _parse_variables(args.variable, [str(name) for name in dataset.data_vars])
        splits = {name: getattr(args, name) for name in SPLITS}
        plan = plan_import(dataset, args.root, variables, splits, args.crop, args.rows, args.cols)
        holes = write_fields(plan, args.overwrite)
    text = data_yaml(plan, Path(args.source).name)
    print("\n".join(summarize(plan, holes)))
    if args.yaml:
        Path(args.yaml).parent.mkdir(parents=True, exist_ok=True)
        Path(args.yaml).write_text(text, encoding="utf-8")
        print(f"data set  written to {args.yaml}")
    else:
        print(f"data set  put this into a file such as config/data/NAME.yaml\n{text}", end="")
    return 0


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m util.data.import_fields", description="Write NetCDF or Zarr fields into a tree of .npy files."
    )
    parser.add_argument("--source", required=True, help="a NetCDF file or a Zarr folder")
    parser.add_argument("--root", required=True, help="the tree to write, e.g. data/my_set")
    several = "variable in the file and its name in the tree, all its levels; repeatable"
    parser.add_argument("--variable", action="append", default=[], metavar="SOURCE=NAME", help=several)
    for name in SPLITS:
        text = f"dates of the {name} split, both included" + ("; mean_std.json is from them" if name == "train" else "")
        parser.add_argument(f"--{name}", nargs=2, required=True, metavar=("START", "END"), help=text)
    parser.add_argument("--crop", metavar="HxW", help="keep the middle H rows and W columns")
    parser.add_argument("--rows", metavar="A:B", help="keep rows A to B-1 of the file, counted from 0")
    parser.add_argument("--cols", metavar="A:B", help="keep columns A to B-1 of the file, counted from 0")
    parser.add_argument("--yaml", metavar="FILE", help="write the data-set YAML there (otherwise it is printed)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser.parse_args(argv)


def _parse_variables(texts: Sequence[str], there: list[str]) -> dict[str, str]:
    if not texts:
        raise ValueError(
            f"no --variable; choose at least one of {listed(there)}, e.g. --variable {there[0]}={there[0]}"
        )
    variables: dict[str, str] = {}
    for text in texts:
        source, _, name = text.partition("=")
        if not re.fullmatch(r"[A-Za-z]\w*", name) or "_level_" in name:
            raise ValueError(f"--variable {text}: write SOURCE=NAME, NAME of letters, digits and _, e.g. air=air")
        if source not in there:
            hint = nearest(source, there, "names")
            raise ValueError(f"--variable {text}: no {source!r} in the file ({hint}); there: {listed(there)}")
        if source in variables or name in variables.values():
            raise ValueError(f"--variable {text}: {source!r} or {name!r} is given twice")
        variables[source] = name
    return variables


def _slice(text: str | None, size: int, option: str) -> slice:
    if text is None:
        return slice(0, size)
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if not match:
        raise ValueError(f"{option} {text}: write it like 0:24 (from 0 up to, not including, 24)")
    start, stop = int(match[1] or 0), int(match[2] or size)
    if not 0 <= start < stop <= size:
        raise ValueError(f"{option} {text}: the file has {size}; allowed 0 <= A < B <= {size}")
    return slice(start, stop)


def _check_hours(hours: np.ndarray, config: DataConfig) -> None:
    """时刻都落在读取时抽样的格点上（interval_hours 的整数倍），每个划分里都有数据。"""
    step = config.interval_hours
    off = np.sort(hours[hours % step != 0])
    if off.size:
        raise ValueError(
            f"time {time_text(off[0])} ({off.size} such times): the smallest step is {step} h, "
            f"and then only hours of the day divisible by {step} are read"
        )
    for name, span in split_hours(config).items():
        if not ((hours >= span.start) & (hours < span.stop)).any():
            dates, there = (
                " ".join(getattr(config.splits, name)),
                f"{time_text(hours.min())} to {time_text(hours.max())}",
            )
            raise ValueError(f"--{name} {dates}: no data in this range; the file holds {there}")


def _read_blocks(plan: Plan, source: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """逐块给出 (n,) 小时和 (n, H, W) 或 (n, 层, H, W) 的 float32；块与源文件的时间块对齐，免得反复解压。"""
    array, time = plan.dataset[source].isel(plan.region), plan.dims.time
    array = array.squeeze([dim for dim in array.dims if dim not in plan.dims])  # 只剩长度为 1 的，has_levels 查过
    order = [dim for dim in plan.dims if dim in array.dims]
    step = max(1, BLOCK_BYTES * array.sizes[time] // array.nbytes)
    chunk = plan.dataset[source].encoding.get("preferred_chunks", {}).get(time, 1)
    step -= step % chunk if step > chunk else 0
    for start in range(0, array.sizes[time], step):
        part = slice(start, start + step)
        try:
            block = array.isel({time: part}).transpose(*order).values  # 先取块再转置，否则转置会使读取变成逐点
        except (OSError, RuntimeError, ValueError) as error:  # 文件中间损坏
            where = time_text(plan.hours[start])
            raise ValueError(f"variable {source}: unreadable in the block that starts at {where} ({error})") from None
        yield plan.hours[part], np.ascontiguousarray(block, dtype=np.float32)


def _write_or_remove(plan: Plan, name: str, hour: int, field: np.ndarray) -> bool:
    """写一个场；含非有限值的不写，覆盖旧树时也不留下旧的。"""
    path = field_path(plan.config.root, name, int(hour))
    finite = bool(np.isfinite(field).all())
    if finite:
        write_field(path, field)
    else:
        path.unlink(missing_ok=True)
    return finite


def _write_moments(plan: Plan, name: str, moments: Moments) -> None:
    dates = " to ".join(plan.config.splits.train)
    if not moments.total:
        raise ValueError(f"{name}: no finite field in the training dates {dates}, so no statistics")
    std = float(np.sqrt(moments.squares / moments.total))
    if std == 0:
        raise ValueError(f"{name}: {moments.mean:g} everywhere in the training dates {dates}; std 0 cannot standardise")
    write_statistics(plan.config.root, name, moments.mean, std, moments.low, moments.high)


def _refuse_existing(plan: Plan) -> None:
    """逐个年份文件夹查，不逐个文件问盘。"""
    years = sorted({moment_of(hour).year for hour in plan.hours.tolist()})
    for name in plan.names:
        folder = Path(plan.config.root) / channel_folder(name)
        taken = [p for p in (folder / str(year) for year in years) if p.is_dir() and any(p.iterdir())]
        taken += [p for p in (folder / "mean_std.json", folder / "min_max.json") if p.exists()]
        if taken:
            raise ValueError(f"{taken[0]} exists already; give --overwrite to replace it")


def _shown(lines: list[str]) -> list[str]:
    return lines[:SHOWN] + ([f"          and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])


if __name__ == "__main__":
    run_command(main)
