"""导入：排计划（plan_import），按计划读（survey）；写在 into_tree、into_store。

先只读坐标，把能查的都查完；再按时间分块读场、换单位、换网格，占用的内存只与一块有关，与时间长短无关。
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from util.calendar import time_text
from util.config import Axis, DataConfig
from util.data.index import check_splits, planned_index, split_hours
from util.exchange.masking import Filled, mask_fills, source_fills
from util.exchange.regrid import Regridder, Target, make_regridder
from util.moments import Moments, measure
from util.source.axes import (
    Dims,
    find_dims,
    has_levels,
    listed,
    read_axis,
    read_coordinates,
    read_pressures,
    same_coordinates,
    span,
)
from util.source.grib import decoding_errors
from util.source.lead_time import read_hours
from util.source.request import Request, Wanted
from util.source.zarr_chunks import hide_absent, settle_absent
from util.strict import validate
from util.variables import channel_name, variable_info

if TYPE_CHECKING:
    import xarray as xr

UNIT_SPELLING = {"degK": "K", "(0 - 1)": "1"}  # 常见而不合 CF 的写法
BLOCK_BYTES = 64 * 2**20


class FileVariable(NamedTuple):
    """一个文件里的一个变量，还没有读：array 已经裁剪、只留要的层；ranks 是各通道在剩下的层里的下标，单层为空。"""

    array: xr.DataArray
    dims: Dims
    hours: np.ndarray
    ranks: list[int]


@dataclass(frozen=True)
class ImportPlan:
    """一次导入要做的全部事情，排好时还没有读任何场。

    hours: (T,) int64，按源文件的次序；region: 行、列的裁剪；files: 变量 → 各文件里的它；channels: 变量 → 通道名；
    regrid: 换网格，None 为不换；values: 将写进 YAML 的键值；config: 它们检查过的样子；
    filled: 读到的 (通道, 小时) 里的填充值，边读边记。
    """

    request: Request
    hours: np.ndarray
    region: tuple[slice, slice]
    files: dict[str, list[FileVariable]]
    channels: dict[str, list[str]]
    regrid: Regridder | None
    values: dict[str, Any]
    config: DataConfig
    filled: dict[tuple[str, int], Filled] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [name for names in self.channels.values() for name in names]

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """相邻两个时刻相距大于最小步长之处：(前, 后)。"""
        hours = np.sort(self.hours)
        wide = np.flatnonzero(np.diff(hours) > self.config.interval_hours)
        return [(int(hours[i]), int(hours[i + 1])) for i in wide]


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
    sources: Sequence[Mapping[str, xr.Dataset]],
    root: str | Path,
    request: Request,
    splits: dict[str, list[str]],
    crop: str | None = None,
    rows: str | None = None,
    cols: str | None = None,
    target: Target | None = None,
) -> ImportPlan:
    """查完坐标、变量、日期、裁剪，排出计划；不读场，不写文件。

    Args:
        sources: 每个文件一份，目录树里的名字 → 数据集（source.open_wanted）；各文件的时刻接起来。
        splits: train、val、test 各为 [起, 止]，写法同 YAML。
        target: 裁剪之后换到的网格。

    Raises:
        ValueError: 任何一样不对，一行说清。
    """
    names = list(request.variables)
    first = sources[0][names[0]]
    dims = find_dims(first)
    region = choose_region((first.sizes[dims.latitude], first.sizes[dims.longitude]), crop, rows, cols)
    layered = {name: _layered(sources, name, request.source(name)) for name in names}
    pressures = _choose_pressures(sources[0], request, layered)
    files = {
        name: [_view(source[name], request.source(name), first, region, pressures) for source in sources]
        for name in names
    }
    hours = _common_hours(files)
    axes, regrid = _grid(first, dims, region, target)
    levels = [f"level_{i:02d}" for i in range(len(pressures))]
    values = {
        "root": str(root),
        "variables": {name: "all" if layered[name] else "single" for name in names},
        "units": {name: units for name in names if (units := _units(files[name], name, request.variables[name]))},
        "valid_range": {name: limits for name in names if (limits := request.variables[name].valid_range)},
        "pressure_hpa": pressures,
        "latitude": axes[0].model_dump(),
        "longitude": axes[1].model_dump(),
        "interval_hours": (step := int(np.diff(np.sort(hours)).min())),
        "first_hour": int(hours.min()) % step,
        "splits": splits,
        "standardize": "yes",
    }
    for held in (held for several in files.values() for held in several):
        settle_absent(held.array, request.absent_chunks)
    config = validate(DataConfig, values | {"frames_in": 1}, "import", "data")  # frames_in 属于运行 YAML，这里只为检查
    channels = {name: [channel_name(name, level) for level in levels] if layered[name] else [name] for name in names}
    _check_hours(hours, config, [channel for several in channels.values() for channel in several])
    return ImportPlan(request, hours, region, files, channels, regrid, values, config)


def survey(
    plan: ImportPlan, take: Callable[[str, int, np.ndarray], bool]
) -> tuple[dict[str, Moments], list[tuple[str, int]]]:
    """全部场逐块过一遍：take(通道, 小时, 场) 说它用不用得了；返回各通道训练日期内的统计量，用不了的 (通道, 小时)。"""
    from tqdm import tqdm

    moments = {name: Moments() for name in plan.names}
    holes: list[tuple[str, int]] = []
    train = split_hours(plan.config)["train"]
    with tqdm(total=plan.hours.size * len(plan.names), unit="field", desc="import", disable=None) as bar:
        for variable, channels in plan.channels.items():
            for hours, block in read_blocks(plan, variable):
                inside = (hours >= train.start) & (hours < train.stop)
                for name, fields in zip(channels, block.swapaxes(0, 1), strict=True):  # (n, H, W)
                    good = np.array([take(name, int(h), field) for h, field in zip(hours, fields, strict=True)])
                    holes += [(name, hour) for hour in hours[~good].tolist()]
                    moments[name] = moments[name].merge(measure(fields[good & inside]))
                    bar.update(hours.size)
    return moments, holes


def read_blocks(plan: ImportPlan, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """逐块给出 (n,) 小时和 (n, 通道, H, W) 的 float32，同 read_block；含缺测的场照样交出去。"""
    for held in plan.files[name]:
        for part in block_parts(held):
            yield held.hours[part], read_block(plan, name, held, part)


def block_parts(held: FileVariable) -> list[slice]:
    """这个文件分成几块读；与源文件的时间块对齐，免得反复解压。"""
    step = max(1, BLOCK_BYTES * held.hours.size // held.array.nbytes)
    chunk = held.array.encoding.get("preferred_chunks", {}).get(held.dims.time, 1)
    step -= step % chunk if step > chunk else 0
    return [slice(start, start + step) for start in range(0, held.hours.size, step)]


def read_block(plan: ImportPlan, name: str, held: FileVariable, part: slice) -> np.ndarray:
    """(n, 通道, H, W) 的 float32，单位与网格都换好；换网格在双精度里做，缺测不补。

    Raises:
        ValueError: 文件中间损坏。
    """
    wanted = plan.request.variables[name]
    block = _read_part(held, plan.request.source(name), part)
    fills = source_fills(held.array, plan.config.limits(name), wanted.scale, wanted.offset)
    block, found = mask_fills(block, fills)
    hours = held.hours[part]
    plan.filled.update({(plan.channels[name][c], int(hours[i])): filled for (i, c), filled in found.items()})
    if wanted.converts:
        block = block.astype(np.float64) * wanted.scale + wanted.offset
    if plan.regrid:
        block = plan.regrid(block)
    return np.ascontiguousarray(block, dtype=np.float32)


def _read_part(held: FileVariable, source: str, part: slice) -> np.ndarray:
    """(n, 通道, H, W)，文件里的数；先取块再转置，否则转置会使读取变成逐点。"""
    array, time = held.array, held.dims.time
    order = [dim for dim in held.dims if dim in array.dims]
    try:
        array = (array.isel({time: part}) if time else array).transpose(*order)
        block = hide_absent(array.values, array)
    except (OSError, EOFError, RuntimeError, ValueError, *decoding_errors()) as error:  # 文件中间损坏
        where = time_text(int(held.hours[part.start]))
        raise ValueError(f"variable {source}: unreadable in the block that starts at {where} ({error})") from None
    block = block if time else block[None]
    return block[:, held.ranks] if held.ranks else block[:, None]


def _layered(sources: Sequence[Mapping[str, xr.Dataset]], name: str, source: str) -> bool:
    """变量有没有气压维；各文件须相同。"""
    found = {has_levels(datasets[name], source, find_dims(datasets[name])) for datasets in sources}
    if len(found) > 1:
        raise ValueError(f"{name}: levels in some files, none in others; import them apart")
    return found.pop()


def _choose_pressures(source: Mapping[str, xr.Dataset], request: Request, layered: dict[str, bool]) -> list[float]:
    """依次为 level_00、level_01……的气压：写明的，或文件里的全部（各变量须相同）；没有多层变量时为空。"""
    held = {
        name: read_pressures(source[name], str(find_dims(source[name]).level))[1] for name in layered if layered[name]
    }
    if request.pressure_hpa or not held:
        return request.pressure_hpa if held else []
    (one, pressures), *others = held.items()
    for name, found in others:
        if found != pressures:
            raise ValueError(
                f"{one} and {name} have different levels ({len(pressures)} and {len(found)}); "
                "list those to import as pressure_hpa in a --map file"
            )
    return pressures


def _view(
    dataset: xr.Dataset, source: str, first: xr.Dataset, region: tuple[slice, slice], pressures: list[float]
) -> FileVariable:
    """裁剪、选层；网格须与第一个文件的第一个变量相同。"""
    dims, like = find_dims(dataset), find_dims(first)
    for name, expected in ((dims.latitude, like.latitude), (dims.longitude, like.longitude)):
        there, wanted = read_coordinates(dataset, name), read_coordinates(first, expected)
        if not same_coordinates(there, wanted):
            raise ValueError(
                f"variable {source}: its {name} ({span(there)}) differs from that of the first file or variable "
                f"({span(wanted)})"
            )
    array = dataset[source].isel({dims.latitude: region[0], dims.longitude: region[1]})
    array = array.squeeze([dim for dim in array.dims if dim not in dims])  # 只剩长度为 1 的，has_levels 查过
    ranks: list[int] = []
    if has_levels(dataset, source, dims):
        places, held = read_pressures(dataset, str(dims.level))
        absent = [p for p in pressures if p not in held]
        if absent:
            raise ValueError(f"variable {source}: no level {listed(absent)} hPa; there: {listed(held)}")
        chosen = [places[held.index(p)] for p in pressures]
        kept = sorted(chosen)
        array = array if len(kept) == len(held) else array.isel({str(dims.level): kept})
        ranks = [kept.index(place) for place in chosen]
    return FileVariable(array, dims, read_hours(dataset[source]), ranks)


def _common_hours(files: dict[str, list[FileVariable]]) -> np.ndarray:
    """(T,) 各文件的时刻接起来；各变量相同，没有重复，至少两个。"""
    found = {name: np.concatenate([held.hours for held in several]) for name, several in files.items()}
    (one, hours), *others = found.items()
    for name, other in others:
        if not np.array_equal(hours, other):
            raise ValueError(
                f"{one} and {name} have different times ({hours.size} and {other.size}); import them apart"
            )
    unique, counts = np.unique(hours, return_counts=True)
    twice = unique[counts > 1]
    if twice.size:
        raise ValueError(f"time: {twice.size} times occur more than once, first {time_text(twice[0])}")
    if hours.size < 2:
        raise ValueError("only one time, so no time step; at least two are needed (--source takes several files)")
    return hours


def _grid(
    dataset: xr.Dataset, dims: Dims, region: tuple[slice, slice], target: Target | None
) -> tuple[tuple[Axis, Axis], Regridder | None]:
    """写进 YAML 的两条坐标轴，和换到那里的权重。"""
    names = dims.latitude, dims.longitude
    if target is None:
        return (read_axis(dataset, names[0], region[0]), read_axis(dataset, names[1], region[1])), None
    latitudes, longitudes = (dataset[name].values[part] for name, part in zip(names, region, strict=True))
    return (target.latitude, target.longitude), make_regridder(latitudes, longitudes, target)


def _units(files: list[FileVariable], name: str, wanted: Wanted) -> str:
    """写明的，或文件里的，或变量表里的。

    Raises:
        ValueError: 各文件不同，或写明的与文件里的不同，却没有写怎样换。
    """
    texts = [str(held.array.attrs.get("units", "")).replace("**", "") for held in files]
    given, *others = dict.fromkeys(UNIT_SPELLING.get(text, text) for text in texts)
    if others:
        raise ValueError(f"{name}: units {given!r} in the first file, {others[0]!r} in another; import them apart")
    if wanted.units and given and wanted.units != given and not wanted.converts:
        raise ValueError(
            f"{name}: units {wanted.units!r} wanted, the file has {given!r}; write the scale and offset that convert "
            "it, or leave units out"
        )
    return wanted.units or given or variable_info(name).units


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


def _check_hours(hours: np.ndarray, config: DataConfig, channels: list[str]) -> None:
    """时刻都落在读取时抽样的格点上（first_hour 起每 interval_hours）；连同树里已有的，划分经得起训练时的检查。"""
    step = config.interval_hours
    off = np.sort(hours[hours % step != config.first_hour])
    if off.size:
        raise ValueError(
            f"time {time_text(off[0])} ({off.size} such times): the smallest step is {step} h, the first time "
            f"{time_text(hours.min())}, and this one is not on a step; import it apart"
        )
    try:
        check_splits(config, planned_index(config, channels, hours))
    except ValueError as error:
        raise ValueError(
            f"{error}; the source holds {time_text(hours.min())} to {time_text(hours.max())}: give --train, --val and "
            "--test dates within it and what the tree holds already, or several years as one --source"
        ) from None
