"""潜扩散：成员可重复、与分块无关；差的统计量；无效的目标；冻结的阶段一；由高斯场学出条件均值与协方差。"""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from models import build_model
from models.latent_diffusion import Config, Model
from models.layers.diffusion_schedule import Sampler
from models.layers.draws import Draws
from tests.models.small import small_batch, small_spec
from util.batch import Batch, DataSpec
from util.strict import validate

SPEC = small_spec(channels=2, grid=(8, 16), frames_in=3, frames_out=2)
SMALL: dict[str, Any] = {
    "base_channels": 8,
    "multipliers": [1, 2],
    "depth": 1,
    "heads": 2,
    "sampling_steps": 4,
}


class Folding(nn.Module):
    """一个恰好可逆的编码：2 × 2 格叠进通道，乘一个（冻结的）数；装作阶段一。"""

    encodes = "state"
    latents_known = True

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.latent_shape = (4 * spec.num_channels, spec.height // 2, spec.width // 2)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def encode(self, fields: Tensor) -> Tensor:
        return self.gain * F.pixel_unshuffle(fields, 2)

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents / self.gain, 2)

    def portable_options(self) -> dict[str, Any]:
        return {"name": "folding"}


def make(spec: DataSpec = SPEC, stage: bool = False, seed: int = 0, **options: Any) -> Model:
    """输出层放大到看得见：初值 0.001 时预报几乎与网络无关。"""
    torch.manual_seed(seed)
    folding: Any = Folding(spec) if stage else None  # 只有这里用到的几样
    model = Model(Config(**{**SMALL, **options}), spec, folding)
    nn.init.normal_(model.net.out.weight, std=0.1)
    if model.needs_pass:
        for number in range(2):
            model.accumulate(small_batch(spec, count=4, seed=number))
        model.solve()
    return model.eval()


@torch.no_grad()
def forecast(model: Model, history: Tensor, members: int = 3, seed: int = 0) -> Tensor:
    return model.forecast(history, None, members, Generator().manual_seed(seed))


@pytest.mark.parametrize("stage", [False, True])
@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_members_do_not_depend_on_chunks_or_on_later_windows(sampler: Sampler, stage: bool) -> None:
    """chunk 1、3、全部；一个窗口与四个窗口。卷积的算法随批的大小变，所以不是逐位。"""
    history = small_batch(SPEC, count=4).history
    models = [make(stage=stage, sampler=sampler, prediction="v", sample_chunk=chunk) for chunk in (1, 3, 100)]
    made = [forecast(model, history) for model in models]
    assert made[0].shape == (4, 3, 2, 2, 8, 16)
    for other in made[1:]:
        torch.testing.assert_close(other, made[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(forecast(models[0], history[:1]), made[0][:1], atol=1e-4, rtol=1e-4)
    assert torch.equal(forecast(models[0], history), made[0])
    assert not torch.allclose(forecast(models[0], history, seed=1), made[0], atol=1e-2)
    assert (made[0].std(1) > 1e-3).all()  # 成员互不相同


def test_windows_have_their_own_noise() -> None:
    """历史相同的两个窗口，成员不同。"""
    history = small_batch(SPEC, count=1).history.repeat(2, 1, 1, 1, 1)
    one, two = forecast(make(), history)
    assert (one - two).abs().mean() > 0.1


def test_training_uses_the_global_generator_and_forecasting_can() -> None:
    model, batch = make(), small_batch(SPEC)
    torch.manual_seed(5)
    one = model.loss(batch)["loss"].item(), model.forecast(batch.history, None, 2)
    torch.manual_seed(5)
    two = model.loss(batch)["loss"].item(), model.forecast(batch.history, None, 2)
    assert one[0] == two[0] and torch.equal(one[1], two[1])


def test_tendency_statistics_are_those_of_numpy() -> None:
    """各通道、各时效：与最后一帧之差的均值与标准差；有插值目标的窗口不看。"""
    model = make(predict="tendency")
    batches = [small_batch(SPEC, count=4, seed=number) for number in range(2)]
    model = Model(Config(**SMALL, predict="tendency"), SPEC)
    batches[1].valid[2, -1, 0] = False
    for batch in batches:
        model.accumulate(batch)
    model.solve()
    kept = [(b, i) for b in batches for i in range(4) if b.valid[i, 3:].all()]
    steps = np.stack([(b.future[i] - b.history[i, -1:]).numpy() for b, i in kept])  # (7, T_out, C, H, W)
    assert len(steps) == 7
    np.testing.assert_allclose(model.targets.mean.flatten(), steps.mean((0, 3, 4)).flatten(), atol=1e-5)
    np.testing.assert_allclose(model.targets.std.flatten(), steps.std((0, 3, 4)).flatten(), rtol=1e-5)


def test_a_channel_that_never_changes_is_refused() -> None:
    model, batch = Model(Config(**SMALL, predict="tendency"), SPEC), small_batch(SPEC)
    batch.future[:, :, 1] = batch.history[:, -1:, 1]
    model.accumulate(batch)
    with pytest.raises(ValueError, match="model.predict = tendency: .* 2 of 4 "):
        model.solve()


def test_no_whole_window_is_an_error() -> None:
    model, batch = Model(Config(**SMALL, predict="tendency"), SPEC), small_batch(SPEC)
    batch.valid[:, -1, 0] = False
    model.accumulate(batch)
    with pytest.raises(ValueError, match="no change between frames is free of interpolated fields"):
        model.solve()


@pytest.mark.parametrize("predict", ["state", "tendency"])
@pytest.mark.parametrize("stage", [False, True])
def test_invalid_targets_do_not_reach_the_loss(stage: bool, predict: str) -> None:
    """像素里只盖住那个通道；潜空间里一个通道无效，整帧不算：改那一帧的任何通道都不变，改别的帧会变。"""
    model, batch = make(stage=stage, predict=predict), small_batch(SPEC)
    batch.valid[0, -1, 0] = False
    losses = {}
    for name, frame, channel in (("as it is", -1, None), ("invalid", -1, 0), ("beside", -1, 1), ("other", 0, 0)):
        future = batch.future.clone()
        if channel is not None:
            future[0, frame, channel] += 100
        torch.manual_seed(0)
        losses[name] = model.loss(batch._replace(future=future))["loss"].item()
    assert losses["invalid"] == losses["as it is"]
    assert (losses["beside"] == losses["as it is"]) is stage
    assert losses["other"] != losses["as it is"]


def test_loss_is_the_mean_over_valid_targets() -> None:
    """网络输出为零时，epsilon 的损失就是有效通道上噪声平方的平均。"""
    model, batch = make(), small_batch(SPEC, count=2)
    nn.init.zeros_(model.net.out.weight)
    batch.valid[1, 3:, 0] = False
    torch.manual_seed(3)
    found = model.loss(batch)["loss"].item()
    torch.manual_seed(3)
    noise = Draws(batch).normal_like(torch.empty(2, 4, 8, 16)).unflatten(1, (2, 2))
    assert found == pytest.approx((noise.square().mean((-2, -1))[batch.valid[:, 3:]]).mean().item(), rel=1e-5)


def test_nothing_valid_is_a_zero_loss() -> None:
    model, batch = make(), small_batch(SPEC)
    batch.valid[:] = False
    assert model.loss(batch)["loss"].item() == 0


def test_the_first_stage_is_frozen_and_stays_in_eval() -> None:
    model = make(stage=True).train()
    assert model.first_stage is not None and model.training and not model.first_stage.training
    model.loss(small_batch(SPEC))["loss"].backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"first_stage.gain"}
    assert model.portable_options() == {
        "name": "latent_diffusion",
        **Config(**SMALL).model_dump(),
        "first_stage": {"name": "folding"},
    }
    rebuilt = build_model(make().portable_options(), SPEC)
    assert rebuilt.state_dict().keys() == make().state_dict().keys()


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver"])
@pytest.mark.parametrize("stage", [False, True])
def test_a_network_that_says_zero_forecasts_the_mean_tendency(stage: bool, sampler: Sampler) -> None:
    """网络给出 x0 = 0，即平均的差：预报就是最后一帧加各通道、各时效的平均的差，成员都相同。"""
    model = make(stage=stage, predict="tendency", prediction="sample", sampler=sampler)
    nn.init.zeros_(model.net.out.weight)
    history = small_batch(SPEC, count=2).history
    mean = model.targets.mean.view(1, 2, -1, 1, 1)  # (1, T_out, c, 1, 1)
    if stage:
        assert model.first_stage is not None
        mean = model.first_stage.decode(mean[0].expand(-1, -1, *model.latent[1:]))[None]
    wanted = (history[:, -1:] + mean)[:, None].expand(-1, 3, -1, -1, -1, -1)
    torch.testing.assert_close(forecast(model, history), wanted, atol=1e-5, rtol=1e-5)


def gaussian_windows(count: int, seed: int) -> Batch:
    """最后一帧历史任意，未来 = 0.6·历史 + 0.5 + 沿经度平滑的噪声：条件的均值与协方差都写得出来。"""
    spec = small_spec(channels=1, grid=(4, 8), frames_in=1, frames_out=1)
    batch = small_batch(spec, count, seed)
    white = torch.randn(batch.future.shape, generator=Generator().manual_seed(seed + 10_000))
    return batch._replace(future=0.6 * batch.history + 0.5 + 0.4 * (white + white.roll(1, -1)))


def test_a_trained_diffusion_knows_a_gaussian_field() -> None:
    """短训练之后：成员的均值与协方差是那个场的（给定历史）。"""
    torch.manual_seed(0)
    spec = small_spec(channels=1, grid=(4, 8), frames_in=1, frames_out=1)
    options = {"base_channels": 16, "multipliers": [1], "padding": "circular_lon", "prediction": "v"}
    model = Model(Config(**{**SMALL, **options, "sampling_steps": 10, "sample_chunk": 512}), spec).train()
    steps = 300
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(gaussian_windows(32, step))["loss"].backward()
        optimizer.step()
        cosine.step()
    history = gaussian_windows(4, 20_000).history
    made = forecast(model.eval(), history, members=200)[:, :, 0, 0]  # (B, M, H, W)
    wanted = 0.6 * history[:, 0, 0] + 0.5
    error, anomaly = made.mean(1) - wanted, made - wanted[:, None]
    along = [(anomaly * anomaly.roll(lag, -1)).mean().item() for lag in range(3)]
    down = (anomaly[..., 1:, :] * anomaly[..., :-1, :]).mean().item()
    assert error.mean().item() == pytest.approx(0, abs=0.06)
    assert error.square().mean().sqrt().item() < 0.2  # 那个场自己的标准差是 0.82
    assert [*along, down] == pytest.approx([0.32, 0.16, 0, 0], abs=0.06)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_channels": 20}, "model.base_channels = 20: .*multiple of the 8"),
        ({"attention_levels": [2]}, r"model.attention_levels = \[2\]: .*from 0 to 1"),
        ({"heads": 3}, "model.heads = 3: .*heads that work"),
        ({"sampler": "ddim", "sampling_steps": 30}, "model.sampling_steps = 30: .*equal steps .* 25"),
        ({"sampling_steps": 2000}, "model.sampling_steps = 2000: .*more than model.noise_steps = 1000"),
        ({"beta_start": 0.03}, r"model.beta_end = 0.02: less than model.beta_start = 0.03"),
        # √Π(1 − β)：100 步 0.60；1000 步、末端 0.008 是 0.13，0.01 是 0.079
        ({"noise_steps": 100}, r"model.beta_end = 0.02: after model.noise_steps = 100 a share 0.6 of the signal"),
        ({"beta_end": 0.008}, r"model.beta_end = 0.008: after model.noise_steps = 1000 a share 0.13 .* at most 0.1"),
        ({"prediction": "noise"}, "model.prediction = 'noise'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(Config, {**SMALL, **options}, "x.yaml", "model")


def test_a_schedule_that_ends_in_noise_is_taken() -> None:
    assert Config(**SMALL, beta_end=0.01).beta_end == 0.01
    assert Config(**SMALL, noise_steps=100, beta_end=0.2).noise_steps == 100


def test_a_grid_that_does_not_halve_is_refused() -> None:
    with pytest.raises(ValueError, match=r"multipliers = \[1, 2, 4\] halves the latent grid 2 x 16 2 times.*\[1, 2\]"):
        Model(Config(**{**SMALL, "multipliers": [1, 2, 4]}), small_spec(grid=(2, 16)))
