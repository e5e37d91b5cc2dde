"""模型测试共用：小的 DataSpec、随机窗口、几千个参数的 AR_pred，和看进模型里的几个小工具。"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.forecasting.rollout import roll
from engine.objective import Objective, objective_loss
from models import build_model
from util.batch import Batch, DataSpec

TINY = {
    "name": "ar_pred_video_vanilla",
    "token_size": [4, 4],
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "decoder_depth": 1,
    "decoder_width": 8,
    "decoder_heads": 2,
}

# diffusers 的 AutoencoderKL，边长减半一次
SMALL_VAE: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
}


def small_spec(
    channels: int = 3,
    grid: tuple[int, int] = (8, 16),
    frames_in: int = 3,
    frames_out: int = 1,
    interval: int = 6,
) -> DataSpec:
    """标准化过的数据集；网格与通道数随意。"""
    height, width = grid
    return DataSpec(
        channels=tuple(f"c{i}" for i in range(channels)),
        units=("1",) * channels,
        pressures=(None,) * channels,
        latitudes=tuple(90 - 180 * (i + 0.5) / height for i in range(height)),
        longitudes=tuple(360 * i / width for i in range(width)),
        frames_in=frames_in,
        frames_out=frames_out,
        interval_hours=interval,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        standardized=True,
    )


def small_batch(spec: DataSpec, count: int = 3, seed: int = 0) -> Batch:
    """互不相干的高斯噪声，全部有效；不动全局随机数。"""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, spec.window, spec.num_channels, spec.height, spec.width)
    fields = torch.randn(shape, generator=generator)
    first = torch.randint(300_000, 400_000, (count, 1), generator=generator) * spec.interval_hours
    time = first + torch.arange(spec.window) * spec.interval_hours
    valid = torch.ones(count, spec.window, spec.num_channels, dtype=torch.bool)
    return Batch(fields[:, : spec.frames_in], fields[:, spec.frames_in :], time, valid)


def make_model(options: dict[str, Any], spec: DataSpec) -> Any:
    """build_model；测试看进模型里，不只看它的约定。"""
    return build_model(options, spec)


def tiny_model(spec: DataSpec, seed: int = 42, **options: Any) -> Any:
    """几千个参数的 AR_pred，训练模式。"""
    torch.manual_seed(seed)
    return build_model({**TINY, **options}, spec)


def on_paper(name: str, shape: tuple[int, int, int, int], frames_out: int | None = None, **options: Any) -> Any:
    """只有形状的模型，不占内存；shape 为公开代码里的 (T, C, H, W)。"""
    frames, channels, *grid = shape
    spec = small_spec(channels, (grid[0], grid[1]), frames, frames_out or frames)
    with torch.device("meta"):
        return build_model({"name": name, **options}, spec)


def terms_of(model: Any, batch: Batch) -> dict[str, Tensor]:
    """缺省的目标：直接给出场的模型没有自己的 loss。"""
    return objective_loss(model, batch, Objective())


def count(module: nn.Module) -> int:
    """参数的个数。"""
    return sum(p.numel() for p in module.parameters())


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Any]]:
    """依次收下一个模块每次调用的输出。"""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def remove(model: Any, which: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """指定每个窗口拿掉哪个区块。"""
    monkeypatch.setattr(model, "_draw_removed", lambda draws: torch.tensor(which))


def changed(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """四个张量各自变一变：取几个窗口，换个设备。"""
    history, future, time, valid = map(change, batch.tensors)
    return batch._replace(history=history, future=future, time=time, valid=valid)


def window_of(batch: Batch) -> Tensor:
    return torch.cat([batch.history, batch.future], 1)  # (B, t, k, H, W)


def with_window(batch: Batch, window: Tensor) -> Batch:
    return batch._replace(history=window[:, :-1], future=window[:, -1:])


def rollout(*arguments: Any, **more: Any) -> Tensor:
    """engine.forecasting.rollout.roll 的全部时效接在一起：(B, M, steps, C, H, W)。"""
    return torch.stack(list(roll(*arguments, **more)), 2)
