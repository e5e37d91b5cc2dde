"""预报的起点：历史帧由 .npy 文件给出，或按时刻从目录树取；树里有真值时一并取出。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from util.batch import DataSpec
from util.calendar import moment_of, time_text
from util.config import DataConfig
from util.data.dataset import open_origin
from util.data.index import Index, bridgeable
from util.data.reader import FieldReader
from util.data.windows import window_valid
from util.files.bounded import open_regular, read_npy_header, read_npy_values


def read_inputs(paths: list[str], spec: DataSpec) -> torch.Tensor:
    """`.npy` 文件 → (T_in, C, H, W) 标准化；文件的标准化状态与训练时目录树的相同。

    Raises:
        ValueError: 读不了、形状或个数不对、含非有限值；说明要的和给的。
    """
    frame = (spec.height, spec.width, spec.num_channels)
    wanted = f"expected {spec.frames_in} files of shape {frame}, or one of {(spec.frames_in, *frame)}"
    arrays = []
    for path in paths:
        try:
            with open_regular(path) as file:
                header = read_npy_header(file)
                right = header.shape == frame or (header.shape == (spec.frames_in, *frame) and len(paths) == 1)
                array = read_npy_values(file, header) if right and header.dtype.kind in "fiu" else None
        except (OSError, ValueError) as error:
            reason = error.strerror or error if isinstance(error, OSError) else error
            raise ValueError(f"--inputs {path}: cannot be read ({reason}); {wanted}") from None
        if header.dtype.kind not in "fiu":
            raise ValueError(f"--inputs {path}: holds dtype {header.dtype}, not real numbers; {wanted}")
        if array is None:
            alone = " alone" if len(header.shape) == 4 and len(paths) > 1 else ""
            raise ValueError(f"--inputs {path}: shape {header.shape}; {wanted}{alone}")
        arrays += [array] if header.shape == frame else list(array)
        if not np.isfinite(array).all():
            raise ValueError(f"--inputs {path}: {int((~np.isfinite(array)).sum())} non-finite values")
    if len(arrays) != spec.frames_in:
        raise ValueError(f"--inputs: {len(arrays)} frames; {wanted}")
    history = torch.from_numpy(np.stack(arrays).astype(np.float32)).permute(0, 3, 1, 2).contiguous()  # (T_in, C, H, W)
    return history if spec.standardized else spec.to_standard(history)


class Start(NamedTuple):
    """一个初始时刻：历史 (T_in, C, H, W)，标准化；目标都在时的真值 (L, C, H, W) 与 valid (L, C)。"""

    history: torch.Tensor
    truth: torch.Tensor | None = None
    valid: torch.Tensor | None = None


def open_tree(config: DataConfig, spec: DataSpec, inits: Sequence[int], steps: int) -> FieldReader:
    """目录树或存档，读得出这些初始时刻（UTC 小时，升序）的历史；前后 max_gap_hours 之内的也在，插值与读几个无关。

    Raises:
        ValueError: 时刻不在抽样的钟点上，或目录树里没有那些历史帧。
    """
    origin = open_origin(config.model_copy(update={"max_missing": 1.0}))  # 只读几帧，缺一帧就超过百分之一
    if tuple(origin.channels) != spec.channels:
        raise ValueError(
            f"data.root {origin.root}: channels {origin.channels}, the checkpoint has {list(spec.channels)}"
        )
    hours = np.asarray(inits) + config.utc_offset_hours  # 文件名的历法
    step, every = spec.interval_hours, config.sampling[0]
    for init in np.asarray(inits)[hours % every != config.first_hour][:1].tolist():
        before = init - (init + config.utc_offset_hours - config.first_hour) % every
        near = f"{time_text(before)} and {time_text(before + every)} UTC"
        raise ValueError(f"--time {time_text(init)}: the tree is sampled every {every} h; the nearest are {near}")
    past = hours[:, None] + np.arange(1 - spec.frames_in, 1) * step  # (N, T_in)
    ends = (past.min() - config.max_gap_hours, hours.max() + steps * step + config.max_gap_hours)
    first, last = (moment_of(int(hour)).year for hour in ends)
    there = origin.years(range(first, last + 1))
    index = origin.index(there) if there else None
    held = np.zeros(past.shape, bool) if index is None else covered(index, past, config.max_gap_hours)
    if index is None or not held.all():
        row = int(held.all(1).argmin())
        lost = ", ".join(time_text(h - config.utc_offset_hours) for h in past[row][~held[row]].tolist())
        raise ValueError(
            f"--time {time_text(inits[row])}: the tree {origin.root} lacks history at {lost} UTC "
            f"(needed: {spec.frames_in} frames every {step} h up to the given time)"
        )
    for channel, found, *saved in zip(origin.channels, origin.mean_std(), spec.mean, spec.std, strict=True):
        if found != (*saved,):
            raise ValueError(f"{channel}: mean_std.json in {origin.root} holds {found}, the checkpoint {(*saved,)}")
    return FieldReader(origin, spec, index, np.unique(past), None)


def covered(index: Index, hours: np.ndarray, max_gap: int) -> np.ndarray:
    """这些小时每个通道或有文件、或补得上，同样的形状。"""
    whole = np.all([bridgeable(row, max_gap) for row in index.present], axis=0)
    places = hours - index.start
    inside = (places >= 0) & (places < whole.size)
    return inside & whole[np.where(inside, places, 0)]


def has_truth(reader: FieldReader, init: int, steps: int) -> bool:
    """每个时效的真值按名字都有文件。"""
    first, step = init + reader.config.utc_offset_hours, reader.spec.interval_hours
    return all(reader.available(first + step * (i + 1)) for i in range(steps))


def read_start(reader: FieldReader, init: int, steps: int) -> Start:
    """一个初始时刻（UTC 小时）的历史，以及存在时的真值。"""
    spec, last = reader.spec, init + reader.config.utc_offset_hours
    past, ahead = (last + np.arange(*span) * spec.interval_hours for span in ((1 - spec.frames_in, 1), (1, steps + 1)))
    frames = [reader.frame(h, until=last) for h in past.tolist()]
    history = torch.from_numpy(np.stack([f.fields for f in frames]))
    if not has_truth(reader, init, steps):
        return Start(history)
    frames += [reader.frame(h) for h in ahead.tolist()]
    valid = window_valid(np.concatenate([past, ahead]), frames, len(past))[len(past) :]
    truth = np.stack([f.fields for f in frames[len(past) :]])
    return Start(history, torch.from_numpy(truth), torch.from_numpy(valid))


def read_tree(config: DataConfig, spec: DataSpec, init: int, steps: int) -> Start:
    """只有一个初始时刻；参数与异常见 open_tree。"""
    return read_start(open_tree(config, spec, [init], steps), init, steps)
