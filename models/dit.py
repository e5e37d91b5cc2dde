"""扩散 Transformer（DiT）与它的宽头变体（DiT-DH）：在潜变量或格点上由历史生成未来，流匹配。

未来 T_out 帧叠进通道，是要生成的一整块 (T_out·c, h, w)；历史 T_in 帧也叠进通道，与加了噪声的未来一起切块嵌入：
同一位置的历史与未来进同一个 token，这是给历史的唯一通路（原版的类别向量、汇总的历史向量都没有，条件 c 只是时间）。

* `dit`：Peebles & Xie 2023。固定的二维正余弦位置编码、adaLN-Zero 的块。原版的目标是 DDPM 的噪声与方差，这里是
  流匹配的速度，没有方差那一半输出；位置编码是本库的（layers/position.py），几十格的边上也分得开邻居；
  t ∈ [0, 1] 先乘 1000 再进原版的正余弦。
* `dit_dh`：Zheng et al. 2025（RAE）。窄而深的一支给出逐 token 的条件，宽而浅的一支去噪：宽度不小于一个 token 里的
  数的个数，速度里的噪声（各个数互不相干）才表示得出来。帧叠进通道，一个 token 有 T_out·c·patch² 个数，宽度按它取。

两者的初值只有一处不同于原版：置零的层从 0.001 起步（layers/dit_blocks.py 说为什么）。
阶段一总是冻结的：目标由编码器给出，让损失改编码器，潜变量只会缩成一点。

字母：B 批，T_in / T_out 帧数，C 通道，H×W 网格；c、h、w 潜变量的（没有阶段一时就是 C、H、W），N token，D 宽度。
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from einops import rearrange
from pydantic import field_validator, model_validator
from torch import Tensor, nn

from models.interface import Autoencoder
from models.layers.dit_blocks import Block, FinalLayer, FourierTime, Patches, SinusoidTime, Variant, rotary_angles
from models.layers.dit_flow import between, euler, sampling_times, time_shift, times_at
from models.layers.draws import Draws
from models.layers.latents import (
    LatentScaling,
    decode_frames,
    encode_frames,
    require_states,
    solve_tendency,
    valid_codes,
)
from models.layers.losses import weighed
from models.layers.members import Generators, sample_generators
from models.layers.position import sincos_codes
from util.batch import Batch, DataSpec, Predict
from util.strict import PositiveInt, Strict

log = logging.getLogger("ar_pred")

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}  # 宽度、层数、头数


class Config(Strict):
    """DiT 的选项；wide_* 是 dit_dh 的宽头，dit 不看。"""

    first_stage: str | dict[str, Any] | None = None
    """checkpoint of the autoencoder whose latents are generated, frozen; null: on the grid itself"""
    variant: Variant = "dit"
    """dit: one stream; dit_dh: a narrow deep one conditions a wide shallow one"""
    size: str | None = None
    """S, B, L or XL as in the paper; null: give dim, depth and heads"""
    dim: PositiveInt | None = None
    """width; with size: null"""
    depth: PositiveInt | None = None
    """blocks; with size: null"""
    heads: PositiveInt | None = None
    """attention heads; with size: null"""
    wide_dim: PositiveInt = 2048
    """dit_dh: width of the wide stream, at least the numbers in a token"""
    wide_depth: PositiveInt = 2
    """dit_dh: its blocks"""
    wide_heads: PositiveInt = 16
    """dit_dh: its attention heads"""
    patch: PositiveInt = 2
    """side of a token, in points of the latents"""
    predict: Predict = "state"
    sampling_steps: PositiveInt = 50
    """Euler steps of a forecast, one network call each"""
    sample_chunk: PositiveInt = 16
    """members computed at once in a forecast; memory only"""

    @field_validator("size")
    @classmethod
    def _named(cls, size: str | None) -> str | None:
        if size is not None and size not in SIZES:
            raise ValueError(f"sizes with a name: {', '.join(SIZES)}; or null and model.dim, depth, heads")
        return size

    @model_validator(mode="after")
    def _sized(self) -> Config:
        given = [value is not None for value in (self.dim, self.depth, self.heads)]
        if any(given) if self.size else not all(given):
            raise ValueError("give either size, or all of dim, depth and heads with size = null")
        streams = {"heads": self.trunk} | ({"wide_heads": self.head} if self.variant == "dit_dh" else {})
        for key, (dim, _, heads) in streams.items():
            pieces = heads if self.variant == "dit" else 4 * heads  # 旋转编码把每个头分成行、列，各成对
            if dim % pieces:
                raise ValueError(
                    f"{key} = {heads} does not divide the width {dim} into parts of a multiple of {pieces // heads}"
                )
        return self

    @property
    def trunk(self) -> tuple[int, int, int]:
        """主干的宽度、层数、头数。"""
        if self.size is not None:
            return SIZES[self.size]
        assert self.dim and self.depth and self.heads, "checked above"
        return self.dim, self.depth, self.heads

    @property
    def head(self) -> tuple[int, int, int]:
        """dit_dh 的宽头。"""
        return self.wide_dim, self.wide_depth, self.wide_heads


class DiT(nn.Module):
    """一支：嵌入、位置、调制的块、输出层。"""

    def __init__(self, channels_in: int, values: int, grid: tuple[int, int], config: Config) -> None:
        super().__init__()
        dim, depth, heads = config.trunk
        self.embed = Patches(channels_in, dim, config.patch)
        self.place = nn.Buffer(token_codes(grid, dim), persistent=False)
        self.time = SinusoidTime(dim)
        self.blocks = nn.ModuleList(Block(dim, heads, "dit") for _ in range(depth))
        self.final = FinalLayer(dim, values, "dit")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, c_in, h, w)，t (B,) → (B, N, values)。"""
        tokens, condition = self.embed(x) + self.place, self.time(t)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.final(tokens, condition)


class DiTDH(nn.Module):
    """两支：窄的由时间调制，宽的由窄的逐 token 调制；同一输入各自嵌入，宽的没有位置编码（旋转编码两支都有）。"""

    def __init__(self, channels_in: int, values: int, grid: tuple[int, int], config: Config) -> None:
        super().__init__()
        (dim, depth, heads), (wide, wide_depth, wide_heads) = config.trunk, config.head
        self.embed, self.wide_embed = Patches(channels_in, dim, config.patch), Patches(channels_in, wide, config.patch)
        self.place = nn.Buffer(token_codes(grid, dim), persistent=False)
        self.angles = nn.Buffer(rotary_angles(grid, dim // heads), persistent=False)
        self.wide_angles = nn.Buffer(rotary_angles(grid, wide // wide_heads), persistent=False)
        self.time = FourierTime(dim)
        self.blocks = nn.ModuleList(Block(dim, heads, "dit_dh") for _ in range(depth))
        self.widen = nn.Linear(dim, wide)
        self.wide_blocks = nn.ModuleList(Block(wide, wide_heads, "dit_dh") for _ in range(wide_depth))
        self.final = FinalLayer(wide, values, "dit_dh")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, c_in, h, w)，t (B,) → (B, N, values)。"""
        time = self.time(t)  # (B, 1, D)
        tokens, condition = self.embed(x) + self.place, nn.functional.silu(time)  # 块里再过一次 SiLU，如原版
        for block in self.blocks:
            tokens = block(tokens, condition, self.angles)
        condition = self.widen(nn.functional.silu(time + tokens))  # (B, N, 宽)
        tokens = self.wide_embed(x)
        for block in self.wide_blocks:
            tokens = block(tokens, condition, self.wide_angles)
        return self.final(tokens, condition)


def token_codes(grid: tuple[int, int], dim: int) -> Tensor:
    """(N, D) 固定的二维正余弦：每个 token 的行、列。"""
    return sincos_codes(torch.cartesian_prod(*(torch.arange(n) for n in grid)), dim)


class Model(nn.Module):
    """编码、速度的网络、采样、解码。OnePass：predict 为 tendency 时先看一遍训练窗口。"""

    probabilistic = True
    can_forecast = True
    field_loss = False
    at_inference = ("sampling_steps", "sample_chunk")
    starts_anew = ("targets.",)

    def __init__(self, config: Config, spec: DataSpec, first_stage: Autoencoder | None = None) -> None:
        """Raises ValueError: 块不能整除一帧编码的网格。"""
        super().__init__()
        require_states(first_stage)
        self.config, self.first_stage = config, first_stage
        self.weighs_fields = first_stage is None
        if first_stage is not None:
            first_stage.freeze(encoder=True, decoder=True)
        frame = (spec.num_channels, spec.height, spec.width)
        self.channels, height, width = frame if first_stage is None else first_stage.latent_shape
        check_patch(config.patch, height, width)
        grid, self.frames_out = (height // config.patch, width // config.patch), spec.frames_out
        self.shape = (spec.frames_out * self.channels, height, width)  # 一次生成的
        self.shift = time_shift(math.prod(self.shape))
        self.targets = LatentScaling((self.shape[0], 1, 1))  # 差的均值与标准差，各时效、各通道；state 时原样
        self.needs_pass = config.predict == "tendency"
        self.unpatch = {"h": grid[0], "p": config.patch, "q": config.patch}
        values = self.shape[0] * config.patch**2
        warn_narrow(config, values)
        network = DiT if config.variant == "dit" else DiTDH
        self.net = network(spec.window * self.channels, values, grid, config)
        self.train()

    def train(self, mode: bool = True) -> Model:
        """阶段一是冻结的，永远 eval。"""
        super().train(mode)
        if self.first_stage is not None:
            self.first_stage.eval()
        return self

    def portable_options(self) -> dict[str, Any]:
        """不必读阶段一的检查点的选项：first_stage 换成它自己的。"""
        stage = None if self.first_stage is None else self.first_stage.portable_options()
        return {"name": "dit", **self.config.model_dump(), "first_stage": stage}

    def accumulate(self, batch: Batch) -> None:
        """收下一批训练窗口的差；有无效目标的窗口不看。"""
        if not self.needs_pass:
            return
        whole = batch.valid[:, -self.frames_out :].flatten(1).all(1)  # (B,)
        last, future = (fields[whole].to(self.targets.mean.device) for fields in (batch.history[:, -1:], batch.future))
        if len(last):
            self.targets.observe(
                (encode_frames(self.first_stage, future) - encode_frames(self.first_stage, last)).flatten(1, 2)
            )

    def solve(self) -> None:
        """差的均值与标准差；state 时不必。

        Raises:
            ValueError: 没有一个窗口的目标全部有效；某个通道从不变化。
        """
        if not self.needs_pass:
            return
        solve_tendency(self.targets)

    def velocity(self, noisy: Tensor, past: Tensor, t: Tensor) -> Tensor:
        """noisy (B, T_out·c, h, w)，past (B, T_in, c, h, w)，t (B,) → (B, T_out·c, h, w)，与 noisy 同精度。"""
        made = self.net(torch.cat([noisy, past.flatten(1, 2)], 1), t)  # (B, N, T_out·c·p·q)
        return rearrange(made, "b (h w) (c p q) -> b c (h p) (w q)", **self.unpatch).to(noisy.dtype)

    def network_call(self, history: Tensor) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """velocity 里的网络；输入 (B, (T_out + T_in)·c, h, w) 与 t (B,)，给出 (B, N, T_out·c·p·q)。"""
        past = encode_frames(self.first_stage, history).flatten(1, 2)
        noisy = past.new_zeros(len(past), *self.shape)
        return self.net, (torch.cat([noisy, past], 1), past.new_zeros(len(past)))

    @property
    def blocks(self) -> list[nn.Module]:
        """两支的各块。"""
        return [module for module in self.net.modules() if isinstance(module, Block)]

    def loss(self, batch: Batch, weights: Tensor | None = None) -> dict[str, Tensor]:
        """速度的均方误差，只算有效的目标；无效的目标换成零，加了噪声的输入里也没有它。"""
        past, valid = (
            encode_frames(self.first_stage, batch.history),
            valid_codes(self.first_stage, batch.valid[:, -self.frames_out :], self.channels),
        )
        future = encode_frames(self.first_stage, batch.future)
        if self.config.predict == "tendency":
            future = future - past[:, -1:]
        data = self.targets(future.flatten(1, 2)).masked_fill(~valid, 0.0)  # (B, T_out·c, h, w)
        draws = Draws(batch)
        noise = draws.normal_like(data)
        t = times_at(draws.spread(), self.shift)
        error = (self.velocity(between(data, noise, t), past, t) - (noise - data)).square()
        error = weighed(error.unflatten(1, (self.frames_out, -1)), weights).flatten(1, 2)
        return {"loss": (error.mean((-2, -1), keepdim=True) * valid).sum() / valid.sum().clamp(min=1)}

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generators | None = None
    ) -> Tensor:
        """(B, T_in, C, H, W) → (B, M, T_out, C, H, W)；一次采样、解码 sample_chunk 个，每个成员有自己的发生器。"""
        past = encode_frames(self.first_stage, history)
        generators = sample_generators(len(past) * num_members, generator)
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in generators]).to(past.device)
        owner = torch.arange(len(past), device=past.device).repeat_interleave(num_members)  # (B·M,) 属于哪个窗口
        chunks = zip(noise.split(self.config.sample_chunk), owner.split(self.config.sample_chunk), strict=True)
        return torch.cat([self._sample(part, past[of]) for part, of in chunks]).unflatten(0, (len(past), num_members))

    def _sample(self, noise: Tensor, past: Tensor) -> Tensor:
        """噪声 (n, T_out·c, h, w) 与各自的历史 → 场 (n, T_out, C, H, W)。"""
        times = sampling_times(self.config.sampling_steps, self.shift)
        drawn = euler(lambda x, t: self.velocity(x, past, t), noise, times)
        future = self.targets.inverse(drawn).unflatten(1, (self.frames_out, -1))
        if self.config.predict == "tendency":
            future = future + past[:, -1:]
        return decode_frames(self.first_stage, future)


def check_patch(patch: int, height: int, width: int) -> None:
    if height % patch or width % patch:
        works = [n for n in range(1, min(height, width) + 1) if height % n == 0 and width % n == 0]
        raise ValueError(f"model.patch = {patch} does not divide {height} x {width}; sizes that work: {works}")


def warn_narrow(config: Config, values: int) -> None:
    """输出的那一支比一个 token 里的数还窄：各数独立的噪声有一部分怎么也表示不出来。"""
    name, (width, _, _) = ("dim", config.trunk) if config.variant == "dit" else ("wide_dim", config.head)
    if width < values:
        log.warning(
            "model.%s: width %d is less than the %d values of a token, part of the noise is out of its reach",
            name,
            width,
            values,
        )
