"""流匹配：时间平移与它的极限、训练时间的分布、采样的格点与一步（对照 diffusers）、解析速度下高斯的均值与协方差。"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from scipy.stats import kstest, truncnorm
from torch import Tensor

from models.layers.dit_flow import between, euler, sampling_times, shifted, time_shift, times_at

CPU = torch.device("cpu")
STEPS = [1, 2, 10, 50]


@pytest.mark.parametrize(
    ("dim", "expected"), [(1, 1.0), (4095, 1.0), (4096, 1.0), (16384, 2.0), (196_608, 6.93), (786_432, 13.86)]
)
def test_the_shift_is_the_root_of_the_dimension_over_4096_and_at_least_one(dim: int, expected: float) -> None:
    assert time_shift(dim) == pytest.approx(max(1.0, np.sqrt(dim / 4096)))
    assert time_shift(dim) == pytest.approx(expected, abs=0.005)


def test_shifted_times_keep_the_ends_and_divide_the_signal_to_noise_ratio() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.equal(shifted(t, 1.0), t)
    for s in (1.0, 2.5, 13.86):
        made = shifted(t, s)
        assert made[0] == 0 and made[-1] == 1 and (made.diff() > 0).all() and (made >= t).all()
        inner, here = t[1:-1], made[1:-1]
        torch.testing.assert_close((1 - here) / here, (1 - inner) / inner / s)  # x_t 里数据与噪声的系数之比
        torch.testing.assert_close(shifted(made, 1 / s), t)
    assert shifted(torch.tensor(0.5), 1e9).item() == pytest.approx(1.0)  # s → ∞：都成了噪声


@pytest.mark.parametrize("s", [1.0, 3.0])
def test_training_times_are_truncated_logit_normal_then_shifted(s: float) -> None:
    t = times_at((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000, s)
    plain = shifted(t, 1 / s)
    most = np.log(0.999 / 0.001)
    assert plain.min() >= 0 and plain.max() <= 0.999 + 1e-6
    assert kstest(torch.logit(plain).numpy(), truncnorm(-np.inf, most).cdf).statistic < 1e-4
    assert times_at(torch.zeros(1), s) == 0  # 均匀的数可以恰好是 0


def test_the_target_is_the_derivative_of_the_path() -> None:
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 3, 2, 4, 5, dtype=torch.float64, generator=generator)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    made, later = between(data, noise, t), between(data, noise, t + 0.25)  # 直线：差商就是导数
    torch.testing.assert_close((later - made) / 0.25, noise - data)
    assert torch.equal(made[0], data[0]) and torch.equal(made[2], noise[2])


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("s", [1.0, 6.93])
def test_times_and_steps_are_those_of_diffusers(s: float, steps: int) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=s)
    scheduler.set_timesteps(sigmas=(1 - np.linspace(0, 0.999, steps)).tolist())
    times = sampling_times(steps, s)
    np.testing.assert_allclose(times, scheduler.sigmas.numpy(), rtol=1e-6)
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x @ weight) * t[:, None]

    x = noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    for now, t in zip(times[:-1], scheduler.timesteps, strict=True):
        x = scheduler.step(velocity(x, torch.full((4,), now)), t, x, return_dict=False)[0]
    torch.testing.assert_close(euler(velocity, noise, times), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("s", [1.0, 3.0])
def test_the_exact_velocity_of_a_gaussian_gives_its_mean_and_covariance(s: float) -> None:
    """数据 N(m, Σ)：x_t 是高斯，v = E[噪声 − 数据 | x_t] 是 x 的一次函数，Euler 的结果也是，不必抽样就知道它的矩。"""
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    root = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [-0.3, 0.2, 0.1]], dtype=torch.float64)
    covariance, eye = root @ root.T, torch.eye(3, dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        now = t[0].double()
        spread = (1 - now) ** 2 * covariance + now**2 * eye  # x_t 的协方差
        cross = now * eye - (1 - now) * covariance  # cov(噪声 − 数据, x_t)
        return (x - (1 - now) * mean) @ torch.linalg.solve(spread, cross) - mean

    errors = []
    for steps in (50, 400):
        start = torch.cat([torch.zeros(1, 3, dtype=torch.float64), eye])  # 零与各坐标：一次函数由此定下
        made = euler(velocity, start, sampling_times(steps, s))
        slope = made[1:] - made[0]  # (3, 3)，每行一个坐标
        errors.append([(made[0] - mean).abs().max().item(), (slope.T @ slope - covariance).abs().max().item()])
    assert max(errors[0]) < 0.1 and max(errors[1]) < 0.02
    assert errors[1][1] < errors[0][1] / 5  # 一阶：步数八倍，误差约八分之一
