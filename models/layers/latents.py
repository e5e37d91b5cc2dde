"""潜变量：标准化、分块地编码与解码、把场缩放到编码器要的大小。"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.ranks import add_ranks
from util.batch import Predict


class LatentScaling(nn.Module):
    """潜变量减均值、除标准差；统计量由 observe 在训练的各帧上看一遍得到，存为 buffer，没有看过时原样。

    shape: (c, 1, 1) 按通道（Rombach et al. 2022 附录 G 的缩放，这里每个通道各一个），或 (c, h, w) 逐点
    （RAE，Zheng et al. 2025）。
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(shape))
        self.std = nn.Buffer(torch.ones(shape))
        self.known = nn.Buffer(torch.zeros((), dtype=torch.bool))
        self.sums: list[Tensor] = []  # 个数、和、平方和，float64；求解之后清掉

    def observe(self, latents: Tensor) -> None:
        """收下一批还没有标准化的 (N, c, h, w)。"""
        values = latents.detach().double()
        held = [dim + 1 for dim, size in enumerate(self.mean.shape) if size == 1]  # 合并掉的维
        count = torch.full_like(self.mean, values.numel() / self.mean.numel(), dtype=torch.float64)
        found = [count, values.sum([0, *held], keepdim=True)[0], values.square().sum([0, *held], keepdim=True)[0]]
        self.sums = [a + b for a, b in zip(self.sums, found, strict=True)] if self.sums else found

    def solve(self) -> None:
        """求出统计量；多进程时各进程的和相加，各看一份（可以一帧也没有）与都看全部，结果相同。

        Raises:
            ValueError: 某个潜变量没有变化；每个进程都抛。
        """
        nothing = [torch.zeros_like(self.mean, dtype=torch.float64) for _ in range(3)]
        count, total, squares = self.sums or nothing
        add_ranks(count, total, squares)
        assert count.all(), "observe the training frames first"
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        flat = int((std == 0).sum())
        if flat:
            raise ValueError(
                f"{flat} of {std.numel()} latent values are the same in every training frame (a dead latent)"
            )
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.known.fill_(True)
        self.sums = []

    def forward(self, latents: Tensor) -> Tensor:
        return (latents - self.mean) / self.std

    def inverse(self, latents: Tensor) -> Tensor:
        return latents * self.std + self.mean


class Stage(Protocol):
    """阶段一，只说这里用到的。"""

    encodes: Predict

    def encode(self, fields: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


def require_states(first_stage: Stage | None) -> None:
    """潜空间里的模型要的是场的潜变量；None 是直接在格点上。

    Raises:
        ValueError: 阶段一编码的是相邻两帧之差。
    """
    if first_stage is not None and first_stage.encodes != "state":
        raise ValueError(
            "model.first_stage encodes tendencies, not fields; only var with a history takes such a one; train it with "
            "model.encodes=state"
        )


def encode_frames(first_stage: Stage | None, frames: Tensor) -> Tensor:
    """(B, T, C, H, W) → (B, T, c, h, w) float32；first_stage 为 None（直接在格点上）时原样。"""
    if first_stage is None:
        return frames
    return first_stage.encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).float()


def decode_frames(first_stage: Stage | None, codes: Tensor) -> Tensor:
    """(..., c, h, w) → (..., C, H, W) float32；encode_frames 的逆。"""
    if first_stage is None:
        return codes
    return first_stage.decode(codes.flatten(0, -4)).unflatten(0, codes.shape[:-3]).float()


def valid_codes(first_stage: Stage | None, valid: Tensor, channels: int) -> Tensor:
    """目标的 valid (B, T_out, C) → (B, T_out·c, 1, 1)：格点上逐通道；一帧的编码要各通道都有效。"""
    if first_stage is not None:
        valid = valid.all(-1, keepdim=True).expand(-1, -1, channels)
    return valid.flatten(1, 2)[..., None, None]


def solve_tendency(targets: LatentScaling, key: str = "model.predict") -> None:
    """差的均值与标准差。

    Raises:
        ValueError: 没有一个窗口的目标全部有效；某个通道从不变化。
    """
    if not targets.sums:
        raise ValueError(f"{key} = tendency: no change between frames is free of interpolated fields; use state")
    try:
        targets.solve()
    except ValueError as error:
        raise ValueError(f"{key} = tendency: the tendencies have no spread: {error}") from None


def in_chunks(function: Callable[[Tensor], Tensor], fields: Tensor, size: int) -> Tensor:
    """一次至多 size 个样本：不求导时，峰值内存只与 size 有关。"""
    return torch.cat([function(part) for part in fields.split(size)])


def resize(fields: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, H, W) → (N, C, *size)：放大双三次，缩小用带抗混叠的双线性；大小相同时原样。"""
    if tuple(fields.shape[-2:]) == size:
        return fields
    smaller = size[0] < fields.shape[-2] or size[1] < fields.shape[-1]
    mode = "bilinear" if smaller else "bicubic"
    return F.interpolate(fields, size, mode=mode, align_corners=False, antialias=smaller)
