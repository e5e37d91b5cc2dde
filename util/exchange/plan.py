"""导入：排计划（plan_import），分块（blocks_of），读一块（read_block）；过一遍在 survey，写在 into_tree、into_store。

先只读坐标，把能查的都查完；再按时间分块读场、换单位、换网格，占用的内存只与一块有关，与时间长短无关。
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from util.calendar import time_text
from util.config import Axis, DataConfig
from util.data.index import check_splits, planned_index
from util.exchange.joining import FileVariable, choose_pressures, common_hours, find_layers, find_units, view_files
from util.exchange.masking import Filled, mask_fills, source_fills
from util.exchange.regrid import Regridder, Target, make_regridder
from util.source.axes import Dims, find_dims, read_axis, read_coordinates
from util.source.grib import decoding_errors
from util.source.request import Request, Wanted
from util.source.wanted import Held
from util.source.zarr_chunks import hide_absent, settle_absent
from util.strict import validate
from util.variables import channel_name

if TYPE_CHECKING:
    import xarray as xr

BLOCK_BYTES = 16 * 2**20  # 一块约这么大：再大，处理器的缓存放不下，分配内存也慢
MOST_BYTES = 64 * 2**20  # 源文件的时间块大的，一块就是它，至多这么大


@dataclass(frozen=True)
class ImportPlan:
    """一次导入要做的全部事情，排好时还没有读任何场。

    hours: (T,) int64，有序；region: 行、列的裁剪；files: 变量 → 各文件里的它；channels: 变量 → 通道名；
    regrid: 换网格，None 为不换；values: 将写进 YAML 的键值；config: 它们检查过的样子。
    """

    request: Request
    hours: np.ndarray
    region: tuple[slice, slice]
    files: dict[str, list[FileVariable]]
    channels: dict[str, list[str]]
    regrid: Regridder | None
    values: dict[str, Any]
    config: DataConfig

    @property
    def names(self) -> list[str]:
        return [name for names in self.channels.values() for name in names]

    @property
    def sources(self) -> dict[str, list[str]]:
        """用到的来源的名字 → 其中的变量（目录树里的名字）。"""
        found: dict[str, list[str]] = {}
        for name, files in self.files.items():
            for held in files:
                found.setdefault(held.source.name, []).append(name)
        return found

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """相邻两个时刻相距大于最小步长之处：(前, 后)。"""
        hours = self.hours
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
    held: Mapping[str, Sequence[Held]],
    root: str | Path,
    request: Request,
    splits: dict[str, list[str]],
    crop: str | None = None,
    rows: str | None = None,
    cols: str | None = None,
    target: Target | None = None,
    into_store: bool = False,
) -> ImportPlan:
    """查完坐标、变量、日期、裁剪，排出计划；不读场，不写文件。

    Args:
        held: 目录树里的名字 → 有它的各文件（source.open_wanted）；各文件的时刻接起来。
        splits: train、val、test 各为 [起, 止]，写法同 YAML。
        target: 裁剪之后换到的网格。
        into_store: 写成存档：划分只能是各来源里的，树里已有的不算。

    Raises:
        ValueError: 任何一样不对，一行说清。
    """
    names = list(request.variables)  # 与 held 的相同
    first = held[names[0]][0]
    dims = find_dims(first.dataset)
    sizes = first.dataset.sizes[dims.latitude], first.dataset.sizes[dims.longitude]
    region = choose_region(sizes, crop, rows, cols)
    layered = find_layers(held, request)
    pressures = choose_pressures(held, request, layered)
    files = view_files(held, request, region, pressures)
    hours = common_hours(files)
    axes, regrid = find_grid(first.dataset, dims, region, target)
    levels = [f"level_{i:02d}" for i in range(len(pressures))]
    values = {
        "root": str(root),
        "variables": {name: "all" if layered[name] else "single" for name in names},
        "units": {name: units for name in names if (units := find_units(files[name], name, request.variables[name]))},
        "valid_range": {name: limits for name in names if (limits := request.variables[name].valid_range)},
        "pressure_hpa": pressures,
        "latitude": axes[0].model_dump(),
        "longitude": axes[1].model_dump(),
        "interval_hours": (step := int(np.diff(hours).min())),
        "first_hour": int(hours[0]) % step,
        "splits": splits,
        "standardize": "yes",
    }
    for file in (file for several in files.values() for file in several):
        settle_absent(file.array, request.absent_chunks)
    config = validate(DataConfig, values | {"frames_in": 1}, "import", "data")  # frames_in 属于运行 YAML，这里只为检查
    channels = {name: [channel_name(name, level) for level in levels] if layered[name] else [name] for name in names}
    _check_hours(hours, config, [channel for several in channels.values() for channel in several], into_store)
    return ImportPlan(request, hours, region, files, channels, regrid, values, config)


class Block(NamedTuple):
    """一个变量在一个文件里的几个时刻，一次读的。"""

    name: str
    held: FileVariable
    part: slice

    @property
    def hours(self) -> np.ndarray:
        """(n,)"""
        return self.held.hours[self.part]


def blocks_of(plan: ImportPlan) -> list[Block]:
    return [
        Block(name, held, part) for name, files in plan.files.items() for held in files for part in block_parts(held)
    ]


def block_parts(held: FileVariable) -> list[slice]:
    """这个文件分成几块读；与源文件的时间块对齐，免得反复解压。"""
    times = held.hours.size
    row = held.array.nbytes // times
    chunk = held.array.encoding.get("preferred_chunks", {}).get(held.dims.time, 1)
    step = min(max(1, BLOCK_BYTES // (chunk * row)) * chunk, max(1, MOST_BYTES // row))
    return [slice(start, start + step) for start in range(0, times, step)]


def read_block(plan: ImportPlan, block: Block) -> tuple[np.ndarray, Filled]:
    """(n, 通道, H, W) 的 float32，单位与网格都换好，缺测不补；另给其中的填充值，见 mask_fills。

    Raises:
        ValueError: 文件中间损坏。
    """
    wanted, limits = plan.request.variables[block.name], plan.config.limits(block.name)
    values, filled = read_values(block.held, block.part, wanted, limits)
    values = plan.regrid(values) if plan.regrid else values
    return np.ascontiguousarray(values, dtype=np.float32), filled


def read_blocks(plan: ImportPlan, blocks: Iterable[Block]) -> Iterator[tuple[np.ndarray, Filled]]:
    """逐块 read_block；交出一块时，另一个线程在读下一块：解压不占解释器的锁。"""
    ahead: Future[tuple[np.ndarray, Filled]] | None = None
    with ThreadPoolExecutor(1) as pool:
        for block in blocks:
            ready, ahead = ahead, pool.submit(read_block, plan, block)
            if ready:
                yield ready.result()
        if ahead:
            yield ahead.result()


def read_values(
    held: FileVariable, part: slice, wanted: Wanted, limits: tuple[float, float] | None
) -> tuple[np.ndarray, Filled]:
    """(n, 通道, H, W)，填充值换成缺测，单位换好（在双精度里）；另给填充值。limits 是合理范围，不知道是 None。

    Raises:
        ValueError: 文件中间损坏。
    """
    values, filled = mask_fills(_read_part(held, part), source_fills(held.array, limits, wanted.scale, wanted.offset))
    return values.astype(np.float64) * wanted.scale + wanted.offset if wanted.converts else values, filled


def _read_part(held: FileVariable, part: slice) -> np.ndarray:
    """(n, 通道, H, W)，文件里的数；先取块再转置，否则转置会使读取变成逐点。"""
    array, time = held.array, held.dims.time
    order = [dim for dim in held.dims if dim in array.dims]
    try:
        array = (array.isel({time: part}) if time else array).transpose(*order)
        block = hide_absent(array.values, array)
    except (OSError, EOFError, RuntimeError, ValueError, *decoding_errors()) as error:  # 文件中间损坏
        hours = held.hours[part]  # 不随时间变的场没有
        where = f" in the block that starts at {time_text(int(hours[0]))}" if hours.size else ""
        raise ValueError(f"{held.source.name}: variable {array.name}: unreadable{where} ({error})") from None
    block = block if time else block[None]
    return block[:, held.ranks] if held.ranks else block[:, None]


def find_grid(
    dataset: xr.Dataset | xr.DataArray, dims: Dims, region: tuple[slice, slice], target: Target | None
) -> tuple[tuple[Axis, Axis], Regridder | None]:
    """写进 YAML 的两条坐标轴，和换到那里的权重。"""
    names = dims.latitude, dims.longitude
    if target is None:
        return (read_axis(dataset, names[0], region[0]), read_axis(dataset, names[1], region[1])), None
    latitudes, longitudes = (read_coordinates(dataset, name)[part] for name, part in zip(names, region, strict=True))
    return (target.latitude, target.longitude), make_regridder(latitudes, longitudes, target)


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


def _check_hours(hours: np.ndarray, config: DataConfig, channels: list[str], into_store: bool) -> None:
    """时刻都落在读取时抽样的格点上（first_hour 起每 interval_hours）；连同树里已有的，划分经得起训练时的检查。"""
    step = config.interval_hours
    off = hours[hours % step != config.first_hour]
    if off.size:
        raise ValueError(
            f"time {time_text(off[0])} ({off.size} such times): the smallest step is {step} h, the first time "
            f"{time_text(hours[0])}, and this one is not on a step; import it apart"
        )
    try:
        check_splits(config, planned_index(config, channels, hours))
    except ValueError as error:
        others = " and what the tree holds already, or several years as one --source"
        if into_store:
            others = ", or its earlier sources too: a store grows from all years as --source, with the same --train"
        raise ValueError(
            f"{error}; the source holds {time_text(hours[0])} to {time_text(hours[-1])}: give --train, --val and "
            f"--test dates within it{others}"
        ) from None
