"""扩散的加噪、目标、采样：与 diffusers、与写开的式子、与高斯场的精确答案比；带时间的 U-Net 的参数个数。"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Generator, Tensor, nn

from models.layers.diffusion_schedule import NoiseSchedule, Prediction, Sampler, make_scheduler, sample
from models.layers.diffusion_unet import TimeUNet, time_codes

BETAS = (1e-4, 0.02)
SCHEDULE = NoiseSchedule(1000, *BETAS)
MEAN = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)  # 一个三维的高斯场
ROOT = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0.1, -0.2, 0.3]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T


def of_diffusers() -> Any:
    return DDPMScheduler(num_train_timesteps=1000, beta_start=BETAS[0], beta_end=BETAS[1])


def pair(shape: tuple[int, ...] = (6, 3, 4, 5)) -> tuple[Tensor, Tensor, Tensor]:
    generator = Generator().manual_seed(0)
    clean, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    return clean, noise, torch.tensor([0, 1, 250, 500, 998, 999])


def test_noise_and_velocity_are_those_of_diffusers() -> None:
    clean, noise, t = pair()
    theirs = of_diffusers()
    torch.testing.assert_close(SCHEDULE.add_noise(clean, noise, t), theirs.add_noise(clean, noise, t))
    torch.testing.assert_close(SCHEDULE.target(clean, noise, t, "v"), theirs.get_velocity(clean, noise, t))


def test_the_last_step_still_holds_a_little_signal() -> None:
    assert SCHEDULE.signal[-1].square().item() == pytest.approx(4.04e-5, rel=1e-2)
    torch.testing.assert_close(SCHEDULE.signal**2 + SCHEDULE.noise**2, torch.ones(1000))


@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_the_right_answer_gives_back_the_clean_field(prediction: Prediction) -> None:
    clean, noise, t = pair()
    noisy, answer = SCHEDULE.add_noise(clean, noise, t), SCHEDULE.target(clean, noise, t, prediction)
    signal, level = (part[t].view(-1, *(1,) * (clean.ndim - 1)) for part in (SCHEDULE.signal, SCHEDULE.noise))
    held = {"epsilon": (noisy - level * answer) / signal, "sample": answer, "v": signal * noisy - level * answer}
    torch.testing.assert_close(held[prediction], clean, atol=1e-4, rtol=1e-4)


def test_uniform_numbers_become_every_step_alike() -> None:
    t = SCHEDULE.steps_at(torch.linspace(0, 1, 4000))
    assert np.bincount(t[:-1].numpy(), minlength=1000).tolist() == pytest.approx([4] * 1000, abs=1)
    assert t.min() == 0 and t[-1] == 999


def test_ddpm_step_is_the_posterior_written_out() -> None:
    """q(x_{t−1} | x_t, x0) 的均值与方差，Ho et al. 2020 式 6、7；β 与 ᾱ 由 NumPy 重算。"""
    beta = np.linspace(*BETAS, 1000)
    kept = np.cumprod(1 - beta)
    clean, noise, _ = pair()
    t = 400
    noisy = math.sqrt(kept[t]) * clean + math.sqrt(1 - kept[t]) * noise
    scheduler = make_scheduler("ddpm", SCHEDULE, "epsilon", 1000)
    made = scheduler.step(noise, t, noisy, generator=Generator().manual_seed(1)).prev_sample
    mean = math.sqrt(kept[t - 1]) * beta[t] / (1 - kept[t]) * clean
    mean = mean + math.sqrt(1 - beta[t]) * (1 - kept[t - 1]) / (1 - kept[t]) * noisy
    spread = math.sqrt((1 - kept[t - 1]) / (1 - kept[t]) * beta[t])
    drawn = torch.randn(clean.shape, generator=Generator().manual_seed(1))
    torch.testing.assert_close(made, mean + spread * drawn, atol=1e-5, rtol=1e-4)


def test_ddim_step_is_the_formula() -> None:
    """η = 0：x' = √ᾱ'·x0 + √(1−ᾱ')·ε，Song et al. 2021 式 12。"""
    kept = np.cumprod(1 - np.linspace(*BETAS, 1000))
    clean, noise, _ = pair()
    scheduler = make_scheduler("ddim", SCHEDULE, "epsilon", 10)
    assert scheduler.timesteps.tolist() == list(range(999, 0, -100))
    noisy = math.sqrt(kept[599]) * clean + math.sqrt(1 - kept[599]) * noise
    wanted = math.sqrt(kept[499]) * clean + math.sqrt(1 - kept[499]) * noise
    torch.testing.assert_close(scheduler.step(noise, 599, noisy).prev_sample, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_samplers_do_not_clip(sampler: Sampler) -> None:
    made = sample_gaussian(sampler, 20, members=2000, scale=5.0)
    assert made.abs().max() > 10


def best_network(prediction: Prediction, scale: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """高斯场的最优去噪：E[x0 | x_t] = μ + α Σ (α² Σ + σ² I)⁻¹ (x_t − α μ)，换成网络该给出的。"""
    mean, covariance = scale * MEAN, scale**2 * COVARIANCE

    def network(noisy: Tensor, t: Tensor) -> Tensor:  # (B, M, 3)
        alpha, sigma = SCHEDULE.signal[t].double(), SCHEDULE.noise[t].double()
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(3))
        clean = mean + (noisy.double() - alpha * mean) @ gain.T
        noise = (noisy.double() - alpha * clean) / sigma
        return {"epsilon": noise, "sample": clean, "v": alpha * noise - sigma * clean}[prediction].float()

    return network


def sample_gaussian(
    sampler: Sampler, steps: int, prediction: Prediction = "epsilon", members: int = 20_000, scale: float = 1.0
) -> Tensor:
    """(members, 3)。"""
    scheduler = make_scheduler(sampler, SCHEDULE, prediction, steps)
    generators = [Generator().manual_seed(0)]
    return sample(best_network(prediction, scale), scheduler, (members, 3), generators, torch.device("cpu"))[0]


def check_moments(made: Tensor, tolerance: float) -> None:
    """均值与协方差；两万个样本的抽样误差在 0.01 上下。"""
    np.testing.assert_allclose(made.double().mean(0), MEAN, atol=tolerance)
    np.testing.assert_allclose(np.cov(made.double().numpy().T), COVARIANCE, atol=tolerance)


@pytest.mark.parametrize("prediction", get_args(Prediction))
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 200), ("dpm_solver", 20)])
def test_few_steps_sample_the_gaussian(sampler: Sampler, steps: int, prediction: Prediction) -> None:
    check_moments(sample_gaussian(sampler, steps, prediction), 0.05)


def test_all_ddpm_steps_sample_the_gaussian_and_few_ddim_steps_agree() -> None:
    """最优去噪的 DDPM 与 50 步的 DDIM：逐维的分位数相同；DDIM 的离散误差使方差略小。"""
    many, few = sample_gaussian("ddpm", 1000), sample_gaussian("ddim", 50)
    check_moments(many, 0.03)
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(few.quantile(levels, 0), many.quantile(levels, 0), atol=0.1, rtol=0)
    assert (few.var(0) < many.var(0)).all()


@pytest.mark.parametrize("steps", [1, 10, 100, 1000])
def test_dpm_solver_takes_any_number_of_steps(steps: int) -> None:
    assert sample_gaussian("dpm_solver", steps, members=4).isfinite().all()


@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_the_objective_teaches_the_gaussian(prediction: Prediction) -> None:
    """一个小的 MLP 只靠训练目标学那个三维的高斯场：均值与协方差。"""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3 + 16, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 3))
    steps = 1000
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        clean = (MEAN + torch.randn(256, 3).double() @ ROOT.T).float()
        noise, t = torch.randn_like(clean), SCHEDULE.steps_at((torch.rand(()) + torch.arange(256) / 256) % 1)
        made = net(torch.cat([SCHEDULE.add_noise(clean, noise, t), time_codes(t, 16)], 1))
        optimizer.zero_grad()
        (made - SCHEDULE.target(clean, noise, t, prediction)).square().mean().backward()
        optimizer.step()
        cosine.step()

    @torch.no_grad()
    def network(noisy: Tensor, t: Tensor) -> Tensor:  # (1, M, 3)
        return net(torch.cat([noisy, time_codes(t.expand(noisy.shape[1]), 16)[None]], 2))

    scheduler = make_scheduler("dpm_solver", SCHEDULE, prediction, 20)
    generators = [Generator().manual_seed(0)]
    check_moments(sample(network, scheduler, (20_000, 3), generators, torch.device("cpu"))[0], 0.15)


def test_time_codes_are_sines_and_cosines() -> None:
    codes = time_codes(torch.tensor([0, 7]), 8).double().numpy()
    rates = 1e4 ** -(np.arange(4) / 4)
    np.testing.assert_allclose(codes[0], [0] * 4 + [1] * 4)
    np.testing.assert_allclose(codes[1], np.concatenate([np.sin(7 * rates), np.cos(7 * rates)]), rtol=1e-5)


def conv(width_in: int, width_out: int, kernel: int = 3) -> int:
    return kernel**2 * width_in * width_out + width_out


def block(width_in: int, width_out: int, embedding: int, attends: bool) -> int:
    """GroupNorm 2·w；时间 Linear；形状不同时 1 × 1 的直路；注意力：GroupNorm、没有偏置的 qkv、输出。"""
    count = 2 * width_in + conv(width_in, width_out) + 2 * width_out + conv(width_out, width_out)
    count += embedding * 2 * width_out + 2 * width_out
    count += conv(width_in, width_out, 1) if width_in != width_out else 0
    return count + (2 * width_out + 3 * width_out**2 + width_out**2 + width_out if attends else 0)


def test_unet_parameters_are_the_written_out_count() -> None:
    """两层，各两块，第二层有注意力：逐块数。"""
    e = 4 * 16
    parts = [
        16 * e + e + e * e + e,  # 时间的 MLP
        conv(10, 16),
        *(block(16, 16, e, False) for _ in range(2)),  # 下去
        conv(16, 16),
        block(16, 32, e, True),
        block(32, 32, e, True),
        block(32, 32, e, True),  # 最深处：总有注意力
        block(32, 32, e, False),
        *(block(width, 32, e, True) for width in (32 + 32, 32 + 32, 32 + 16)),  # 上来：拼上 32、32、缩小后的 16
        conv(32, 32),
        *(block(width, 16, e, False) for width in (32 + 16, 16 + 16, 16 + 16)),
        2 * 16 + conv(16, 5),
    ]
    net = TimeUNet(10, 5, [16, 32], depth=2, attention=[1], heads=4, padding="zeros")
    assert sum(p.numel() for p in net.parameters()) == sum(parts)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_unet_keeps_a_rectangle_and_looks_around_the_circle(levels: int) -> None:
    torch.manual_seed(0)
    net = TimeUNet(3, 2, [8] * levels, depth=1, attention=[], heads=2, padding="circular_lon").eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, t = torch.randn(2, 3, 8, 16), torch.tensor([3, 700])
    made = net(x, t)
    shift = 2 ** (levels - 1)  # 缩小之后的网格上的一格
    assert made.shape == (2, 2, 8, 16)
    torch.testing.assert_close(net(x.roll(shift, -1), t), made.roll(shift, -1), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(net(x, t.flip(0)), made, atol=1e-3)  # 时间有用
