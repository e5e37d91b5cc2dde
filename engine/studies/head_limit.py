"""解码器的出口限住了什么：`python -m engine.studies.head_limit --config config/quickstart.yaml [key=value ...]`。

AR_pred 的头是一个 Linear：每个 token 的 P = p·q·k 个值都出自 E = decoder_width 个数，所以不论怎样训练，`predict: state`
给出的 token 落在一个 E 维的平面上，离它的距离就是误差的下限；`tendency` 的下限由变化（与前一帧之差）的平面定。
最好的平面是训练日期的主成分，距离在验证日期上量。标准化空间，与训练的损失同一单位，旁边是持续性预报的。不训练。
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from util.cli import Parser, aligned, run_command
from util.config import load_config

if TYPE_CHECKING:  # --help 不必等 torch
    from torch import Tensor

    from util.data.dataset import WeatherData


class Frames(NamedTuple):
    """一个划分里等距的 n 个窗口：末一帧与它减前一帧，各切成 token，(n·h·w, P)。"""

    state: Tensor
    tendency: Tensor


def read_frames(data: WeatherData, split: str, count: int, token: Sequence[int]) -> Frames:
    """不用有无效的场的窗口。

    Raises:
        ValueError: 那个划分里没有这么多窗口，或一个也不能用。
    """
    import numpy as np
    import torch

    from util.data.batches import all_starts

    starts = all_starts(data.segments[split], data.spec.window)
    if count > len(starts):
        raise ValueError(f"--windows {count}: data.splits.{split} has {len(starts)}")
    chosen = starts[np.linspace(0, len(starts) - 1, count).round().astype(int)]
    batch = data.windows.__getitems__(chosen.tolist())
    frames = torch.cat([batch.history, batch.future], 1)[batch.valid.all((1, 2))].double()  # (n, t, k, H, W)
    if not len(frames):
        raise ValueError(f"no window of the {count} of data.splits.{split} is complete; raise --windows")
    return Frames(cut(frames[:, -1], token), cut(frames[:, -1] - frames[:, -2], token))


def cut(fields: Tensor, token: Sequence[int]) -> Tensor:
    """(n, k, H, W) → (n·h·w, p·q·k)。

    Raises:
        ValueError: token 不整除网格。
    """
    (rows, cols), (p, q) = fields.shape[-2:], token
    if rows % p or cols % q:
        raise ValueError(f"model.token_size = {list(token)} does not divide the grid {rows} x {cols}")
    tokens = fields.unflatten(3, (-1, q)).unflatten(2, (-1, p))  # (n, k, h, p, w, q)
    return tokens.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(0, 2)


def left_over(fitted: Tensor, measured: Tensor) -> Tensor:
    """(P + 1,)：出口有 0…P 个数时，measured 离 fitted 的主成分平面的均方距离，每个值。"""
    import torch

    mean = fitted.mean(0)
    _, directions = torch.linalg.eigh(torch.cov((fitted - mean).T))  # 由小到大
    energy = ((measured - mean) @ directions).square().mean(0)  # (P,)
    return torch.cat([energy.new_zeros(1), energy.cumsum(0)]).flip(0) / len(energy)


def limits_table(data: WeatherData, windows: int, token: Sequence[int], width: int) -> str:
    """一行一个解码宽度：width 的四分之一到四倍，至多 P。"""
    train, val = (read_frames(data, split, windows, token) for split in ("train", "val"))
    state, tendency = left_over(train.state, val.state), left_over(train.tendency, val.tendency)
    values = len(state) - 1
    rows = [["decoder_width", "values / numbers", "state at least", "tendency at least"]]
    for numbers in dict.fromkeys(min(values, width * times // 4) for times in (1, 2, 4, 8, 16)):
        floors = [f"{float(left[numbers]):.4f}" for left in (state, tendency)]
        rows.append([str(numbers), f"{values / numbers:.2f}", *floors])
    persistence = float(val.tendency.square().mean())
    title = f"tokens of {token[0]} x {token[1]} x {data.spec.num_channels} = {values} values; loss of persistence "
    return "\n".join([title + f"{persistence:.4f}", *aligned(rows)])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m engine.studies.head_limit",
        description="The least loss that AR_pred's output layer allows on the data of a run YAML, without training.",
    )
    parser.add_argument("--config", required=True, help="a run YAML of ar_pred_video_vanilla")
    parser.add_argument("--windows", type=int, default=150, help="windows of a split (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. model.token_size=[8,8]")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """命令行入口，返回退出码。

    Raises:
        ValueError: 配置、数据不对，不是 AR_pred，或见 read_frames。
    """
    arguments = parse_arguments(argv)
    if arguments.windows < 2:
        raise ValueError(f"--windows {arguments.windows}: must be at least 2")
    config = load_config(arguments.config, arguments.overrides)
    from models import build_config
    from util.data.dataset import open_data
    from util.logger import setup_logging

    options = dict(build_config(config.model, arguments.config))
    if not {"token_size", "decoder_width"} <= options.keys():
        raise ValueError(f"{arguments.config}: {config.model['name']} has no tokens that leave a decoder_width")
    setup_logging(None)
    print(limits_table(open_data(config.data), arguments.windows, options["token_size"], options["decoder_width"]))
    return 0


if __name__ == "__main__":
    run_command(main)
