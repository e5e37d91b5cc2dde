"""各测试共用的夹具。

real_data   真实数据的文件夹（环境变量 AR_PRED_REAL_DATA）；没有设就跳过。
make_tree   函数：按用户的目录布局写一棵小树，返回 Tree。用法：

    tree = make_tree(tmp_path / "tree", channels=("t2m", "z_level_00"), shape=(8, 16),
                     first_day="2000-01-01", last_day="2000-01-31", interval=6, seed=0)
    config = DataConfig(**tree.data, splits={...}, frames_in=3)      # tree.data 只缺 splits 与 frames_in
    tree.fields[i, c]                                                # 第 i 个时刻 tree.hours[i]、第 c 个通道的真值
unrendered  图照样摆，只不渲染成 PNG、PDF：一张要三分之一秒，训练一次有五六张；真渲染的在图、预报、编码的测试里。

测试里不联网、不用显示器、每个进程一个计算线程（两个 xdist 进程恰好占满两个核）。
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import settings

os.environ["WANDB_MODE"] = "disabled"
os.environ.pop("WANDB_API_KEY", None)
os.environ["MPLBACKEND"] = "Agg"
if "PYTEST_XDIST_WORKER" in os.environ:  # 须在 torch 导入之前；测试所起的子进程也随之继承
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

# 套件里例子少而固定；久测（tests/soak.py）用后一种
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40, database=None)
settings.register_profile("soak", deadline=None, max_examples=4000, database=None, print_blob=True)
settings.load_profile("suite")

# 各变量大致的均值与标准差（物理单位），好让「是否已标准化」的判断有真实的量级可看
CLIMATE = {
    "t2m": (280.0, 12.0),
    "tp": (1e-3, 4e-4),
    "u10": (0.5, 5.0),
    "v10": (0.2, 4.0),
    "r": (60.0, 18.0),
    "t": (250.0, 10.0),
    "u": (8.0, 9.0),
    "v": (0.0, 6.0),
    "z": (5.4e4, 2.5e3),
}


class Tree(NamedTuple):
    """写好的树。hours: 1970 年以来的小时（文件名的历法）；fields: (N, C, H, W) float32，物理单位。"""

    root: Path
    channels: tuple[str, ...]
    hours: list[int]
    fields: np.ndarray
    data: dict[str, Any]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """真实数据的文件夹，没有就跳过这个测试；设了却不在，是设错了，不跳过。"""
    folder = os.environ.get("AR_PRED_REAL_DATA")
    if not folder:
        pytest.skip("AR_PRED_REAL_DATA is not set")
    assert Path(folder).is_dir(), f"AR_PRED_REAL_DATA={folder} is not a directory"
    return Path(folder)


@pytest.fixture(scope="module")
def unrendered() -> Iterator[None]:
    """见文件开头；用在整个文件上：`pytestmark = pytest.mark.usefixtures("unrendered")`。"""
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _, path, **__: Path(path).write_bytes(b"not rendered"))
        yield


@pytest.fixture(scope="session")
def make_tree() -> Callable[..., Tree]:
    """写树的函数，见文件开头。"""
    return _make_tree


def _make_tree(
    root: Path,
    channels: Sequence[str] = ("t2m", "z_level_00"),
    shape: tuple[int, int] = (8, 16),
    first_day: str = "2000-01-01",
    last_day: str = "2000-01-31",
    interval: int = 6,
    seed: int = 0,
) -> Tree:
    from util.calendar import parse_time
    from util.data.tree_files import field_path, write_field, write_mean_std
    from util.variables import split_channel

    hours = list(range(parse_time(first_day), parse_time(last_day) + 24, interval))  # 首日 00 时到末日的最后一刻
    anomaly = _smooth_evolution(len(hours), len(channels), shape, interval, np.random.default_rng(seed))
    mean, std = np.array([CLIMATE[split_channel(c)[0]] for c in channels]).T[:, :, None, None]  # (C, 1, 1)
    fields = (mean + std * anomaly).astype(np.float32)  # (N, C, H, W)
    for c, channel in enumerate(channels):
        values = fields[:, c]
        for hour, field in zip(hours, values, strict=True):
            write_field(field_path(root, channel, hour), field)
        moments = [float(f(values, dtype=np.float64)) for f in (np.mean, np.std)]
        write_mean_std(root, channel, moments[0], moments[1], float(values.min()), float(values.max()))
    return Tree(root, tuple(channels), hours, fields, _data_section(root, channels, shape, interval))


def _smooth_evolution(
    steps: int, count: int, shape: tuple[int, int], interval: int, rng: np.random.Generator
) -> np.ndarray:
    """(steps, count, H, W)：空间上平滑（谱截断）、时间上一阶自回归（两天的记忆）的随机场，方差约为 1。"""
    rows, columns = (np.fft.fftfreq(n) * n for n in shape)
    spectrum = np.exp(-(rows[:, None] ** 2 + columns[None, :] ** 2) / 8.0)  # (H, W) 只留几个波
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((steps, count, *shape))) * spectrum).real
    noise /= noise.std()
    memory = np.exp(-interval / 48.0)
    for i in range(1, steps):
        noise[i] = memory * noise[i - 1] + np.sqrt(1.0 - memory**2) * noise[i]
    return noise


def _data_section(root: Path, channels: Sequence[str], shape: tuple[int, int], interval: int) -> dict[str, Any]:
    """与这棵树相配的 data 段；缓存也放在树旁，测试之间互不相干。"""
    from util.variables import split_channel

    variables: dict[str, Any] = {}
    for name, level in map(split_channel, channels):
        if level is None:
            variables[name] = "single"
        else:
            variables.setdefault(name, []).append(level)
    height, width = shape
    return {
        "root": str(root),
        "variables": variables,
        "latitude": {"first": 90.0 - 90.0 / height, "step": -180.0 / height, "count": height},
        "longitude": {"first": 0.0, "step": 360.0 / width, "count": width},
        "interval_hours": interval,
        "workers": 0,
        "pin_memory": False,
        "cache_dir": str(root.with_name(f"{root.name}_cache")),
    }
