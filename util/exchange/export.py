"""把存档还原成目录树、NetCDF，或两样都要（dataset.py export）。

还原的是打包时有文件的场（存档的 valid）；插值得来的不写：目录树里没有那个文件，NetCDF 里是 NaN。
存档里是标准化的 float32，换回物理单位差在舍入之内（z 的相对误差至多两次舍入，约 1e-7 · |x - mean|）；
本来就标准化的目录树逐位还原。半精度的存档还原的是舍入之后的数，误差见 fields 的属性。
不随时间变的场总是 float32、物理单位，逐位还原。
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from util.calendar import moment_of
from util.config import Axis
from util.variables import channel_folder

if TYPE_CHECKING:
    from util.batch import DataSpec
    from util.data.tree_files import StaticField
    from util.files.store_files import StorePlan


def export(store: Path, root: Path | None, netcdf: Path | None, overwrite: bool = False) -> int:
    """写出全部有文件的场；返回它们的个数。内存里只有一块。

    Raises:
        ValueError: 不是完整的存档，块的大小不对；要写的已经在而没有 overwrite；别的进程正往这棵树里写。
    """
    from util.data.tree_files import owned
    from util.exchange.into_tree import refuse_static
    from util.files.store_files import StorePlan, check_sizes, read_hours, read_mark

    plan = StorePlan(**read_mark(store)["plan"])
    hours = read_hours(store, plan)
    check_sizes(store, plan, -(-hours.size // plan.chunk_rows))
    if netcdf is not None and netcdf.exists() and not overwrite:
        raise ValueError(f"{netcdf} exists already; give --overwrite to replace it")
    with nullcontext() if root is None else owned(root, plan.channels, static=bool(plan.static)):
        if root is not None and not overwrite:
            _refuse_existing(root, plan.channels, hours)
            refuse_static(root, plan.static)
        return _write(store, plan, hours, root, netcdf)


def _write(store: Path, plan: StorePlan, hours: np.ndarray, root: Path | None, netcdf: Path | None) -> int:
    """export 查过、占下之后的事。"""
    from tqdm import tqdm

    from util.data.tree_files import write_static
    from util.files.netcdf import TruthFile
    from util.files.zarr_metadata import chunk_name

    static = {name: read_stored_static(store, plan, name) for name in plan.static}
    valid = np.fromfile(store / "valid" / chunk_name(0, 2), bool).reshape(hours.size, -1)  # (N, C)
    held = np.asarray(valid.any(axis=1))  # (N,) 首尾有几行全是插值的：一个文件也没有，不是数据里的时刻
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=hours.size, unit="time", desc="export", disable=None))
        file = None
        if netcdf is not None:
            about = {"title": "fields of a packed store of ar_pred", "source": str(store)}
            utc = hours[held] - plan.utc_offset_hours
            file = stack.enter_context(TruthFile(netcdf, _spec(plan), utc, about, static))
        for start, values in read_chunks(store, plan, hours.size):
            rows = slice(start, start + len(values))
            kept = held[rows]
            physical = _physical(plan, values)
            if root is not None:
                _write_tree(root, plan, hours[rows], values if plan.standardized else physical, valid[rows])
            if file is not None and kept.any():
                file.write(hours[rows][kept] - plan.utc_offset_hours, physical[kept], valid[rows][kept])
            bar.update(len(values))
    if root is not None:
        _write_statistics(root, plan)
        for name, field in static.items():
            write_static(root, name, field, _axis(plan.latitudes), _axis(plan.longitudes))
    return int(valid.sum())


def read_chunks(store: Path, plan: StorePlan, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """逐块给出 (第一行的行号, (n, C, H, W) float32 存着的数)；末一块只到第 rows 行。"""
    import torch

    from util.files.store_files import torch_type
    from util.files.zarr_metadata import chunk_name

    for number, start in enumerate(range(0, rows, plan.chunk_rows)):
        path = store / "fields" / chunk_name(number, 4)
        stored = torch.from_file(str(path), False, int(np.prod(plan.shape)), dtype=torch_type(plan)).view(plan.shape)
        yield start, stored[: rows - start].float().numpy()


def read_stored_static(store: Path, plan: StorePlan, name: str) -> StaticField:
    """存档里的一个不随时间变的场。"""
    from util.data.tree_files import StaticField
    from util.files.store_files import static_array

    path = store / static_array(name) / "0.0"
    values = np.fromfile(path, "<f4") if path.is_file() else np.empty(0)
    if values.size != len(plan.latitudes) * len(plan.longitudes):
        raise ValueError(f"{path}: missing or cut short; python dataset.py verify --out {store} lists what is damaged")
    return StaticField(values.reshape(len(plan.latitudes), -1), plan.static[name]["units"])


def _axis(values: Sequence[float]) -> Axis:
    step = (values[-1] - values[0]) / max(1, len(values) - 1)
    return Axis(first=values[0], step=round(step, 12), count=len(values))


def _physical(plan: StorePlan, values: np.ndarray) -> np.ndarray:
    """z · std + mean；读取时减去、除以的是 float32 的统计量，这里用同样的两个数，在双精度里还原。"""
    mean, std = (np.array(v, np.float32).astype(np.float64)[:, None, None] for v in (plan.mean, plan.std))
    return (values * std + mean).astype(np.float32)


def _write_tree(root: Path, plan: StorePlan, hours: np.ndarray, fields: np.ndarray, valid: np.ndarray) -> None:
    """fields (n, C, H, W)；没有文件的不写，覆盖旧树时也不留下旧的。"""
    from util.data.tree_files import field_path, write_field

    for i, hour in enumerate(hours.tolist()):
        for c, channel in enumerate(plan.channels):
            path = field_path(root, channel, hour)
            if valid[i, c]:
                write_field(path, fields[i, c])
            else:
                path.unlink(missing_ok=True)


def _write_statistics(root: Path, plan: StorePlan) -> None:
    """各通道的 mean_std.json；min_max.json、变化的标准差，打包时有的才写。"""
    from util.data.tree_files import Tendency, write_mean_std

    for c, channel in enumerate(plan.channels):
        low, high = plan.extremes[c] or (None, None)
        change = plan.tendencies[c] if plan.tendencies else None
        tendency = Tendency(change[0], int(change[1])) if change else None
        write_mean_std(root, channel, plan.mean[c], plan.std[c], low, high, tendency)


def _spec(plan: StorePlan) -> DataSpec:
    """写 NetCDF 只看通道、单位、气压与网格；窗口的长度用不到。"""
    from util.batch import DataSpec

    names = ("channels", "units", "pressures", "latitudes", "longitudes", "mean", "std")
    lists: dict[str, Any] = {name: tuple(getattr(plan, name)) for name in names}
    return DataSpec(
        **lists,
        frames_in=1,
        frames_out=1,
        interval_hours=plan.interval_hours,
        standardized=plan.standardized,
    )


def _refuse_existing(root: str | Path, channels: Sequence[str], hours: np.ndarray) -> None:
    """要写的已经有了就报错；逐个年份文件夹查，不逐个文件问盘。"""
    years = sorted({moment_of(hour).year for hour in hours.tolist()})
    for name in channels:
        folder = Path(root) / channel_folder(name)
        taken = [p for p in (folder / str(year) for year in years) if p.is_dir() and any(p.iterdir())]
        taken += [p for p in (folder / "mean_std.json", folder / "min_max.json") if p.exists()]
        if taken:
            raise ValueError(f"{taken[0]} exists already; give --overwrite to replace it")
