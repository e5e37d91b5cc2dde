"""潜扩散：给编码过的未来加噪声，带时间嵌入的 U-Net 看着编码过的历史把噪声认出来；采样几次就是几个成员。

论文：Rombach et al. 2022（CVPR），High-Resolution Image Synthesis with Latent Diffusion Models。
`first_stage: null` 时在像素里扩散，编码就是场本身。与原版不同之处：
* 条件是历史各帧的编码，叠在通道里与加了噪声的未来拼在一起；没有交叉注意力。
* `predict: tendency`：扩散的是未来与最后一帧历史之差，各通道、各时效按训练窗口上自己的均值与标准差标准化
  （先看一遍训练窗口）；`state` 扩散未来本身，潜变量与标准化的场本来就是单位方差。
* 像素空间里不必再缩到 [-1, 1]：扩散要的是单位方差，而且差按自己的统计量标准化之后，先乘一个常数等于没有乘。
* `data.lead_hours`：目标是其中一个时效的一帧，时效的码加在时间嵌入上；差各时效按自己的统计量标准化。
* 阶段一总是冻结的：让它跟着去噪的损失走，最省事的编码是常数。

无效的目标：像素里逐通道，潜空间里逐帧（一帧有一个通道无效，整帧的编码都变了）；目标换成 0，损失里不算。

字母：B 批，M 成员，T_in / T_out 帧数，C 通道，H×W 网格；c×h×w 是一帧的编码，像素里就是 C×H×W。
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from models.interface import Autoencoder
from models.layers.attention import check_heads
from models.layers.diffusion_schedule import NoiseSchedule, Prediction, Sampler, last_signal, make_scheduler, sample
from models.layers.diffusion_unet import ResBlock, TimeUNet
from models.layers.draws import Draws
from models.layers.latents import (
    LatentScaling,
    decode_frames,
    encode_frames,
    require_states,
    solve_tendency,
    valid_codes,
)
from models.layers.lead_codes import LeadCodes
from models.layers.losses import weighed
from models.layers.members import Generators, sample_generators
from models.layers.padding import Padding, check_padding
from models.layers.unet import Width
from util.batch import Batch, DataSpec, Predict
from util.strict import PositiveInt, Strict

MOST_SIGNAL = 0.1  # 加完噪声还留着的信号 √ᾱ_T 至多这么多


class Config(Strict):
    """潜扩散的选项；帧数与通道数来自 data 段，编码的大小来自阶段一。"""

    first_stage: str | dict[str, Any] | None = None
    """checkpoint of the autoencoder whose latents are generated, frozen; null: on the grid itself"""
    base_channels: Width = 128
    multipliers: list[PositiveInt] = Field([1, 2, 4], min_length=1)
    """channels of each level over base_channels; sides halve from one to the next"""
    depth: PositiveInt = 2
    """residual blocks of each level"""
    attention_levels: list[int] = Field(default_factory=list)
    """levels with attention, 0 is the finest; the deepest always has it"""
    heads: PositiveInt = 4
    """attention heads; must divide base_channels"""
    padding: Padding = "zeros"
    predict: Predict = "state"
    prediction: Prediction = "epsilon"
    """what the network gives: the noise, the clean sample, or v"""
    noise_steps: PositiveInt = 1000
    """steps from the data to noise"""
    beta_start: float = Field(1e-4, gt=0, lt=1)
    """variance added by the first of them"""
    beta_end: float = Field(0.02, gt=0, lt=1, validate_default=True)  # 默认的值与写明的 noise_steps 也可能不合
    """by the last; linear between"""
    sampler: Sampler = "dpm_solver"
    """ddpm takes all noise_steps; dpm_solver keeps the spread in few steps"""
    sampling_steps: PositiveInt = 20
    """network calls of a forecast"""
    sample_chunk: PositiveInt = 16
    """members computed at once in a forecast; memory only"""

    @field_validator("attention_levels")
    @classmethod
    def _levels(cls, levels: list[int], info: ValidationInfo) -> list[int]:
        there = range(len(info.data.get("multipliers", [])))
        if any(level not in there for level in levels):
            raise ValueError(f"levels run from 0 to {len(there) - 1}, one for each of model.multipliers")
        return levels

    @field_validator("heads")
    @classmethod
    def _divides(cls, heads: int, info: ValidationInfo) -> int:
        return (
            check_heads(heads, info.data["base_channels"], "base_channels") if "base_channels" in info.data else heads
        )

    @field_validator("beta_end")
    @classmethod
    def _ends_in_noise(cls, last: float, info: ValidationInfo) -> float:
        if "noise_steps" not in info.data or "beta_start" not in info.data:
            return last  # 它们自己已经报错
        steps, first = info.data["noise_steps"], info.data["beta_start"]
        if first > last:
            raise ValueError(f"less than model.beta_start = {first:g}; the noise must grow")
        left = last_signal(steps, first, last)
        if left > MOST_SIGNAL:
            raise ValueError(
                f"after model.noise_steps = {steps} a share {left:.2g} of the signal is left, but sampling starts from "
                f"pure noise; raise beta_end or noise_steps until it is at most {MOST_SIGNAL:g}"
            )
        return last

    @field_validator("sampling_steps")
    @classmethod
    def _even(cls, steps: int, info: ValidationInfo) -> int:
        whole, kind = info.data.get("noise_steps", steps), info.data.get("sampler")
        if steps > whole:
            raise ValueError(f"more than model.noise_steps = {whole}")
        if kind != "dpm_solver" and whole % steps:
            works = [n for n in range(1, whole + 1) if whole % n == 0]
            raise ValueError(f"{kind} takes equal steps through model.noise_steps = {whole}; steps that work: {works}")
        return steps


class Model(nn.Module):
    """编码、去噪的 U-Net、采样、解码。OnePass：差的统计量要先看一遍训练窗口。

    Raises:
        ValueError: 编码的网格不能整除 2^(层数 − 1)。
    """

    probabilistic = True
    can_forecast = True
    field_loss = False
    takes_leads = True
    at_inference = ("sampler", "sampling_steps", "sample_chunk")
    starts_anew = ("targets.",)

    def __init__(self, config: Config, spec: DataSpec, first_stage: Autoencoder | None = None) -> None:
        super().__init__()
        require_states(first_stage)
        self.config = config
        self.first_stage = None if first_stage is None else first_stage.requires_grad_(False).eval()
        frame = (spec.num_channels, spec.height, spec.width)
        self.weighs_fields = first_stage is None
        self.latent = frame if first_stage is None else first_stage.latent_shape
        check_padding(config.padding, spec)
        _check_grid(config, self.latent)
        codes = spec.frames_out * self.latent[0]
        self.frames_out = spec.frames_out
        self.needs_pass = config.predict == "tendency"
        self.leads, self.jumps = LeadCodes(spec), spec.jumps
        # 各通道、各时效一个均值与标准差；state 时原样
        self.targets = LatentScaling((max(1, len(spec.jumps)) * codes, 1, 1))
        self.schedule = NoiseSchedule(config.noise_steps, config.beta_start, config.beta_end)
        self.net = TimeUNet(
            spec.frames_in * self.latent[0] + codes,
            codes,
            [config.base_channels * times for times in config.multipliers],
            config.depth,
            config.attention_levels,
            config.heads,
            config.padding,
            len(spec.jumps),
        )

    def train(self, mode: bool = True) -> Model:
        """阶段一是冻结的，永远 eval。"""
        super().train(mode)
        if self.first_stage is not None:
            self.first_stage.eval()
        return self

    def portable_options(self) -> dict[str, Any]:
        """不必读阶段一的检查点的选项：first_stage 换成它自己的。"""
        stage = None if self.first_stage is None else self.first_stage.portable_options()
        return {"name": "latent_diffusion", **self.config.model_dump(), "first_stage": stage}

    def accumulate(self, batch: Batch) -> None:
        """收下一批训练窗口的目标；有无效目标的窗口不看。"""
        ahead = [jump - 1 for jump in self.jumps] or list(range(self.frames_out))  # 目标里的第几帧
        future = batch.future[:, ahead]
        whole = batch.valid[:, batch.history.shape[1] :][:, ahead].all(-1).all(-1)  # (B,)
        last, future = (fields[whole].to(self.targets.mean.device) for fields in (batch.history[:, -1:], future))
        if len(last):
            self.targets.observe(
                self._target(encode_frames(self.first_stage, last), encode_frames(self.first_stage, future))
            )

    def solve(self) -> None:
        """差的均值与标准差。

        Raises:
            ValueError: 没有一个窗口的目标全部有效；某个通道从不变化。
        """
        solve_tendency(self.targets)

    def network_call(self, history: Tensor) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """去噪的 U-Net；输入 (B, (T_out + T_in)·c, h, w) 与步序 t (B,)（、时效的码），给出 (B, T_out·c, h, w)。"""
        past = encode_frames(self.first_stage, history).flatten(1, 2)
        noisy = past.new_zeros(len(past), self.frames_out * self.latent[0], *self.latent[1:])
        lead = (past.new_zeros(len(past), len(self.jumps)),) if self.jumps else ()
        return self.net, (torch.cat([noisy, past], 1), past.new_zeros(len(past), dtype=torch.long), *lead)

    @property
    def blocks(self) -> list[nn.Module]:
        """U-Net 的各块。"""
        return [module for module in self.net.modules() if isinstance(module, ResBlock)]

    def loss(self, batch: Batch, weights: Tensor | None = None) -> dict[str, Tensor]:
        """有效目标上预测的均方误差：加的噪声（或 x0、v），标准化的尺度。"""
        history = encode_frames(self.first_stage, batch.history)  # (B, T_in, c, h, w)
        valid = valid_codes(self.first_stage, batch.valid[:, -self.frames_out :], self.latent[0])  # (B, T_out·c, 1, 1)
        lead = self.leads(batch.time)
        mean, std = self._statistics(lead)
        target = self._target(history[:, -1:], encode_frames(self.first_stage, batch.future))
        clean = ((target - mean) / std).masked_fill(~valid, 0.0)
        draws = Draws(batch)
        t = self.schedule.steps_at(draws.spread())
        noise = draws.normal_like(clean)
        noisy = self.schedule.add_noise(clean, noise, t)
        made = self.net(torch.cat([noisy, history.flatten(1, 2)], 1), t, lead)
        wanted = self.schedule.target(clean, noise, t, self.config.prediction)
        error = weighed((made - wanted).square().unflatten(1, (self.frames_out, -1)), weights).flatten(1, 2)
        error = error.mean((-2, -1), keepdim=True) * valid
        return {"loss": error.sum() / valid.sum().clamp(min=1)}

    @torch.no_grad()
    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generators | None = None
    ) -> Tensor:
        """(B, T_in, C, H, W) → (B, M, T_out, C, H, W)；每个成员有自己的发生器。"""
        config = self.config
        past = encode_frames(self.first_stage, history)  # (B, T_in, c, h, w)
        condition = past.flatten(1, 2)
        owner = torch.arange(len(past), device=past.device).repeat_interleave(num_members)  # (B·M,) 属于哪个窗口
        lead = self.leads(time)
        mean, std = self._statistics(None if lead is None else lead[owner])

        def network(noisy: Tensor, t: Tensor) -> Tensor:  # (B·M, T_out·c, h, w)
            parts = zip(noisy.split(config.sample_chunk), owner.split(config.sample_chunk), strict=True)
            made = [
                self.net(torch.cat([part, condition[of]], 1), t.expand(len(part)), None if lead is None else lead[of])
                for part, of in parts
            ]
            return torch.cat(made)

        scheduler = make_scheduler(config.sampler, self.schedule, config.prediction, config.sampling_steps)
        shape = (self.frames_out * self.latent[0], *self.latent[1:])
        drawn = sample(network, scheduler, shape, sample_generators(len(owner), generator), past.device)
        future = (drawn * std + mean).view(len(past), num_members, self.frames_out, *self.latent)
        if config.predict == "tendency":
            future = future + past[:, None, -1:]
        return decode_frames(self.first_stage, future)

    def _statistics(self, lead: Tensor | None) -> tuple[Tensor, Tensor]:
        """目标的均值与标准差 (T_out·c, 1, 1)；有几种时效时，各样本是自己的那一种的 (B, c, 1, 1)。"""
        mean, std = self.targets.mean, self.targets.std
        if lead is None:
            return mean, std
        which = lead.argmax(1)
        mean, std = (part.view(lead.shape[1], -1, 1, 1)[which] for part in (mean, std))
        return mean, std

    def _target(self, last: Tensor, future: Tensor) -> Tensor:
        """编码 (B, 1, c, h, w)、(B, T_out, c, h, w) → 还没有标准化的目标 (B, T_out·c, h, w)。"""
        return (future - last if self.config.predict == "tendency" else future).flatten(1, 2)


def _check_grid(config: Config, latent: tuple[int, int, int]) -> None:
    _, *grid = latent
    halvings = len(config.multipliers) - 1
    if any(side % 2**halvings for side in grid):
        works = [n + 1 for n in range(halvings) if all(side % 2**n == 0 for side in grid)]
        raise ValueError(
            f"model.multipliers = {config.multipliers} halves the latent grid {grid[0]} x {grid[1]} {halvings} times, "
            f"which its sides do not allow; numbers of levels that work: {works}"
        )
