"""写一棵样例目录树，布局与用户自己的相同（dataset.py sample）。

数据来自球面准地转湍流的模拟（simulation.py、weather.py）。先写在旁边的临时文件夹里，完整之后才改名为 root：
中断不会留下半棵树。标记 sample.json 最后写，记着参数；参数相同就不再做一遍。
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from util.atomic import reserved
from util.calendar import year_start
from util.data.tree_files import Field, field_path, write_field, write_mean_std
from util.sample.simulation import SPIN_UP_HOURS, Planet, make_planet, simulate
from util.sample.weather import compute_field, make_scene, take_snapshot
from util.variables import PRESSURE_LEVEL, SINGLE_LEVEL, channel_name

MARKER = "sample.json"


class Settings(NamedTuple):
    """决定内容的全部参数；原样写进标记。"""

    grid: tuple[int, int]
    years: tuple[int, int]
    train_years: tuple[int, int]
    interval: int
    levels: tuple[str, ...]
    seed: int
    standardize: bool
    drop: float
    corrupt: float
    first_hour: int = 0  # 从前的标记里没有


class RunningSums(NamedTuple):
    """一个通道的累计量，float64；值减去第一帧的均值再累加，位势这样的大数才不损失精度。"""

    shift: float
    number: int
    total: float
    squares: float
    low: float
    high: float


def coordinates(grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """全球规则网格 (H, W) 的纬度（由北向南，两极各让半格）与经度（自 0 起），度。"""
    height, width = grid
    return 90.0 - 180.0 / height * (np.arange(height) + 0.5), 360.0 / width * np.arange(width)


def channels_of(settings: Settings) -> list[str]:
    """四个单层变量，加五个多层变量的所选各层。"""
    layered = [channel_name(variable, level) for variable in PRESSURE_LEVEL for level in settings.levels]
    return [*SINGLE_LEVEL, *layered]


def sample_planet(settings: Settings) -> Planet:
    """截断随网格：32 行用 T21，64 行及以上用 T42（再细太慢），很小的网格用 T10。"""
    return make_planet(settings.seed, min(max(2 * settings.grid[0] // 3, 10), 42))


def sample_frames(
    settings: Settings, first_hour: int, last_hour: int, channels: Sequence[str], spin_up: int = SPIN_UP_HOURS
) -> Iterator[tuple[int, list[Field]]]:
    """逐时刻给出 (小时, 各通道的场 (H, W) float32)，物理单位，不含 last_hour；可以短于整年。"""
    planet = sample_planet(settings)
    scene = make_scene(planet, *coordinates(settings.grid))
    for state in simulate(planet, settings.seed, first_hour, last_hour, settings.interval, spin_up):
        snapshot = take_snapshot(scene, planet, state)
        yield round(state.hour), [compute_field(scene, snapshot, name).astype(np.float32) for name in channels]


def add_moments(moments: RunningSums | None, field: Field) -> RunningSums:
    """把一帧并入累计量。"""
    values = field.astype(np.float64)
    shift = moments.shift if moments else float(values.mean())
    new = RunningSums(
        shift, field.size, float((values - shift).sum()), float(((values - shift) ** 2).sum()),
        float(values.min()), float(values.max()),
    )  # fmt: skip
    if moments is None:
        return new
    number, total, squares = (getattr(moments, key) + getattr(new, key) for key in ("number", "total", "squares"))
    return RunningSums(shift, number, total, squares, min(moments.low, new.low), max(moments.high, new.high))


def mean_std(moments: RunningSums) -> tuple[float, float]:
    """均值与（总体）标准差。"""
    offset = moments.total / moments.number
    return moments.shift + offset, float(np.sqrt(moments.squares / moments.number - offset**2))


def write_tree(root: Path, settings: Settings) -> dict[str, Any]:
    """在空文件夹 root 里写出整棵树与标记，返回标记的内容。"""
    from tqdm import tqdm

    channels = channels_of(settings)
    first, last = year_start(settings.years[0]) + settings.first_hour, year_start(settings.years[1] + 1)
    train = range(year_start(settings.train_years[0]), year_start(settings.train_years[1] + 1))
    moments: dict[str, RunningSums] = {}
    files: list[tuple[str, Path]] = []
    frames, total = sample_frames(settings, first, last, channels), (last - first) // settings.interval
    for hour, fields in tqdm(frames, "sample", total, unit="frame", mininterval=1.0):
        for name, field in zip(channels, fields, strict=True):
            path = field_path(root, name, hour)
            write_field(path, field)
            files.append((name, path))
            if hour in train:
                moments[name] = add_moments(moments.get(name), field)
    for name in channels:
        write_mean_std(root, name, *mean_std(moments[name]), moments[name].low, moments[name].high)
    if settings.standardize:  # 统计量要等训练年份写完才知道，所以回头重写一遍
        for name, path in tqdm(files, "standardize", unit="file", mininterval=1.0):
            mean, std = mean_std(moments[name])
            write_field(path, (np.load(path) - mean) / std)
    dropped, corrupted = damage([path for _, path in files], settings)
    marker = {
        "arguments": settings_json(settings),
        "files": len(files) - len(dropped),
        "dropped": [str(path.relative_to(root)) for path in dropped],
        "corrupted": {str(path.relative_to(root)): kind for path, kind in corrupted.items()},
    }
    (root / MARKER).write_text(json.dumps(marker, indent=2), encoding="utf-8")
    return marker


def damage(files: Sequence[Path], settings: Settings) -> tuple[list[Path], dict[Path, str]]:
    """按种子删掉一部分文件、弄坏另一部分（截断、含 NaN、形状不对轮流），返回 (删掉的, 弄坏的 → 怎样坏)。"""
    rng = np.random.default_rng([settings.seed, 2])
    num_drop, num_corrupt = (round(share * len(files)) for share in (settings.drop, settings.corrupt))
    chosen = [files[i] for i in rng.permutation(len(files))[: num_drop + num_corrupt]]
    for path in chosen[:num_drop]:
        path.unlink()
    corrupted: dict[Path, str] = {}
    for i, path in enumerate(chosen[num_drop:]):
        kind = ("truncated", "nan", "shape")[i % 3]
        field = np.load(path)
        if kind == "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif kind == "nan":
            field[rng.integers(field.shape[0]), rng.integers(field.shape[1])] = np.nan
            write_field(path, field)
        else:
            write_field(path, field[:, 1:])
        corrupted[path] = kind
    return sorted(chosen[:num_drop]), dict(sorted(corrupted.items()))


def settings_json(settings: Settings) -> dict[str, Any]:
    """元组写成列表，与 JSON 读回来的一样，才能相比。"""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in settings._asdict().items()}


def already_there(root: Path, settings: Settings, overwrite: bool) -> bool:
    """root 里已是同一份样例。

    Raises:
        ValueError: root 里有别的东西；不是本命令写的，给 --overwrite 也不碰。
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if not (root / MARKER).is_file():
        raise ValueError(f"--root {root} holds files that this command did not write; choose another folder")
    if overwrite:
        return False
    there = Settings._field_defaults | json.loads((root / MARKER).read_text(encoding="utf-8"))["arguments"]
    wanted = settings_json(settings)
    different = [f"{key} {there.get(key)} (asked: {wanted[key]})" for key in wanted if there.get(key) != wanted[key]]
    if different:
        raise ValueError(f"--root {root} holds another sample: {', '.join(different)}; replace it with --overwrite")
    return True


def remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def create(root: Path, settings: Settings, overwrite: bool = False) -> dict[str, Any] | None:
    """在旁边写好整棵树，再换成 root；失败或中断时不留下半成品。别的进程刚写好了同一份就不再写，返回 None。

    Raises:
        ValueError: 磁盘不够，不能写，或别的进程正在写；见 already_there。
    """
    frames = (year_start(settings.years[1] + 1) - year_start(settings.years[0])) // settings.interval
    needed = frames * len(channels_of(settings)) * (4 * settings.grid[0] * settings.grid[1] + 4096)  # 头与块的零头
    partial = root.with_name(f".{root.name}.partial")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root.parent).free
        if needed > free:
            raise ValueError(
                f"the sample needs about {needed / 1e9:.1f} GB, {root.parent} has {free / 1e9:.1f} GB free"
            )
        with reserved(partial, "another sample is being written there, wait for it"):
            return None if already_there(root, settings, overwrite) else replace_tree(root, settings, partial)
    except OSError as error:
        raise ValueError(f"--root {root}: cannot write ({error})") from None
    finally:
        with suppress(OSError):  # 别人占着，或从来没有
            partial.rmdir()


def replace_tree(root: Path, settings: Settings, partial: Path) -> dict[str, Any]:
    """create 占下 partial 之后的事。"""
    tree, old = partial / "tree", partial / "old"
    remove(tree, old)  # 上次被强行结束的残余
    tree.mkdir()
    try:
        marker = write_tree(tree, settings)
        if root.exists():  # 整棵移开：一个个删到一半被杀，从前的标记旁边就不是全部的文件了
            root.rename(old)
        tree.rename(root)
    finally:
        remove(tree, old)
    return marker
