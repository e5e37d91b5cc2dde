"""预报的起点：历史帧由 .npy 文件给出，或按时刻从目录树取；树里有真值时一并取出。"""

from __future__ import annotations

import numpy as np
import torch

from util.batch import DataSpec
from util.calendar import moment_of, time_text
from util.config import DataConfig
from util.data.dataset import open_origin
from util.data.index import Index, bridgeable
from util.data.reader import FieldReader
from util.data.windows import window_valid


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
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"--inputs {path}: cannot be read ({str(error).splitlines()[0]}); {wanted}") from None
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            found = f"dtype {array.dtype}" if isinstance(array, np.ndarray) else "an archive"
            raise ValueError(f"--inputs {path}: holds {found}, not real numbers; {wanted}")
        if array.shape == (spec.frames_in, *frame) and len(paths) == 1:
            arrays = list(array)
        elif array.shape == frame:
            arrays.append(array)
        else:
            alone = " alone" if array.ndim == 4 and len(paths) > 1 else ""
            raise ValueError(f"--inputs {path}: shape {array.shape}; {wanted}{alone}")
        if not np.isfinite(array).all():
            raise ValueError(f"--inputs {path}: {int((~np.isfinite(array)).sum())} non-finite values")
    if len(arrays) != spec.frames_in:
        raise ValueError(f"--inputs: {len(arrays)} frames; {wanted}")
    history = torch.from_numpy(np.stack(arrays).astype(np.float32)).permute(0, 3, 1, 2).contiguous()  # (T_in, C, H, W)
    return history if spec.standardized else spec.to_standard(history)


def read_tree(
    config: DataConfig, spec: DataSpec, init: int, steps: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """按时刻从目录树读：历史 (T_in, C, H, W)，以及存在时的真值 (steps, C, H, W) 与 valid (steps, C)。

    Raises:
        ValueError: 时刻不在抽样的钟点上，或目录树里没有那些历史帧。
    """
    origin = open_origin(config.model_copy(update={"max_missing": 1.0}))  # 只读几帧，缺一帧就超过百分之一
    if tuple(origin.channels) != spec.channels:
        raise ValueError(
            f"data.root {origin.root}: channels {origin.channels}, the checkpoint has {list(spec.channels)}"
        )
    hour = init + config.utc_offset_hours  # 文件名的历法
    step = spec.interval_hours
    if hour % step != config.first_hour:
        before = init - (hour - config.first_hour) % step
        near = f"{time_text(before)} and {time_text(before + step)} UTC"
        raise ValueError(f"--time {time_text(init)}: the tree is sampled every {step} h; the nearest are {near}")
    wanted = hour + np.arange(1 - spec.frames_in, steps + 1) * step
    past = wanted[: spec.frames_in]
    there = origin.years(sorted({moment_of(int(h)).year for h in wanted}))
    index = origin.index(there) if there else None
    gone = [int(h) for h in past if index is None or not covered(index, int(h), config.max_gap_hours)]
    if index is None or gone:
        lost = ", ".join(time_text(h - config.utc_offset_hours) for h in gone)
        raise ValueError(
            f"--time {time_text(init)}: the tree {origin.root} lacks history at {lost} UTC "
            f"(needed: {spec.frames_in} frames every {step} h up to the given time)"
        )
    for channel, found, *saved in zip(origin.channels, origin.mean_std(), spec.mean, spec.std, strict=True):
        if found != (*saved,):
            raise ValueError(f"{channel}: mean_std.json in {origin.root} holds {found}, the checkpoint {(*saved,)}")
    reader = FieldReader(origin, spec, index, past, None)
    return _read_frames(reader, spec, past.tolist(), wanted[len(past) :].tolist())


def covered(index: Index, hour: int, max_gap: int) -> bool:
    """这一小时每个通道或有文件、或补得上。"""
    place = hour - index.start
    return 0 <= place < index.present.shape[1] and all(bridgeable(row, max_gap)[place] for row in index.present)


def _read_frames(
    reader: FieldReader, spec: DataSpec, history_hours: list[int], target_hours: list[int]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    frames = [reader.frame(h, until=history_hours[-1]) for h in history_hours]
    history = torch.from_numpy(np.stack([f.fields for f in frames]))
    if not all(reader.available(h) for h in target_hours):
        return history, None, None
    hours = np.array(history_hours + target_hours)
    frames += [reader.frame(h) for h in target_hours]
    valid = window_valid(hours, frames, len(history_hours))[len(history_hours) :]
    truth = np.stack([f.fields for f in frames[len(history_hours) :]])
    return history, torch.from_numpy(truth), torch.from_numpy(valid)
