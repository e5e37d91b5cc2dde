"""DiT 与 DiT-DH：参数个数逐项；潜变量、无效的目标、成员；高斯玩具上学得到条件均值与协方差。"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models import build_config
from models.layers.dit_flow import time_shift
from models.layers.draws import Draws
from models.layers.latents import encode_frames
from tests.engine.codecs import tiny_codec
from tests.models.dit_small import SMALL, SMALL_DH, randomize, small
from tests.models.small import make_model, outputs_of, small_batch, small_spec
from util.batch import Batch, DataSpec

Array = np.ndarray
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-3}  # 批的大小不同，矩阵乘的舍入就不同


def counted(channels: int, side: int, **options: Any) -> int:
    with torch.device("meta"):
        model = make_model({"name": "dit", **options}, small_spec(channels, (side, side), 1, 1))
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("size", "dim", "published"),
    [("S", 384, 32_865_056), ("B", 768, 130_315_808), ("L", 1024, 457_840_672), ("XL", 1152, 674_834_720)],
)
def test_parameter_count_of_dit(size: str, dim: int, published: int) -> None:
    """公开的：32 × 32 × 4 的潜变量，patch 2，1000 类，学方差。一个 token 里 4·2·2 = 16 个数。"""
    labels = 1001 * dim  # 类别表，连同空的一类：这里没有类别
    sigma = 16 * dim + 16  # 方差的那一半输出：流匹配没有
    history = 16 * dim  # 多一帧历史叠在输入里
    assert counted(4, 32, size=size, patch=2) == published - labels - sigma + history


@pytest.mark.parametrize(("size", "dim", "published"), [("S", 384, 196_357_204), ("XL", 1152, 838_380_628)])
def test_parameter_count_of_dit_dh(size: str, dim: int, published: int) -> None:
    """公开的：768 × 16 × 16 的潜变量，patch 1，宽头 2048 × 2 层，1000 类；输出没有方差，与这里一样。"""
    labels = 1001 * dim
    history = 768 * (dim + 2048)  # 两支各自嵌入同一输入
    options = {"variant": "dit_dh", "size": size, "patch": 1}
    assert counted(768, 16, **options) == published - labels + history
    one_more = counted(768, 16, **options, wide_depth=3) - counted(768, 16, **options)
    assert 2 * one_more == 151_065_940  # 公开的两层宽头


# ---------------------------------------------------------------- 目标、成员


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """阶段一的选项：4 × 4 一块的线性编码，每帧 4 个潜通道。"""
    tiny_codec.register(monkeypatch)
    return {"name": "tiny_codec"}


def masked(spec: DataSpec) -> Batch:
    """窗口 0 的第一个时效缺通道 1，窗口 1 全缺。"""
    batch = small_batch(spec, count=3)
    batch.valid[0, spec.frames_in, 1] = False
    batch.valid[1, spec.frames_in :] = False
    return batch


@pytest.mark.parametrize("latent", [False, True], ids=["grid", "latent"])
def test_loss_is_the_mean_over_valid_targets_and_the_input_never_holds_the_others(
    latent: bool, stage: dict[str, Any]
) -> None:
    spec = small_spec(channels=2, grid=(16, 16), frames_out=2)
    model = small(spec, first_stage=stage if latent else None, patch=2)
    batch, codes = masked(spec), 4 if latent else 2  # 一帧的通道数
    inputs = []
    model.net.register_forward_pre_hook(lambda _, args: inputs.append(args))
    with outputs_of(model.net) as made, torch.no_grad():
        torch.manual_seed(3)
        found = model.loss(batch)["loss"].item()
    torch.manual_seed(3)
    noise = Draws(batch).normal_like(torch.empty(3, 2 * codes, *model.shape[1:]))
    x, t = inputs[0]
    noisy = x[:, : 2 * codes].unflatten(1, (2, codes))
    noise, t = noise.unflatten(1, (2, codes)), t.view(-1, 1, 1, 1, 1)
    future = encode_frames(model.first_stage, batch.future)
    kept = np.ones((3, 2, codes), dtype=bool)
    kept[1] = False
    kept[0, 0, :] = False if latent else [True, False]
    total = 0.0
    p = 2
    velocity = made[0].unflatten(2, (2, codes, p, p)).unflatten(1, (-1, model.shape[2] // p))  # b h w t c p q
    velocity = torch.einsum("bhwtcpq->btchpwq", velocity).reshape(future.shape)
    for b, lead, channel in np.ndindex(*kept.shape):
        at = b, lead, channel
        data = future[at] if kept[at] else torch.zeros_like(future[at])
        torch.testing.assert_close(noisy[at], (1 - t[b, 0, 0]) * data + t[b, 0, 0] * noise[at])
        total += float((velocity[at] - noise[at] + data).square().mean()) * kept[at]
    assert found == pytest.approx(total / kept.sum(), rel=1e-5)
    assert torch.equal(x[:, 2 * codes :], encode_frames(model.first_stage, batch.history).flatten(1, 2))


def test_no_valid_target_gives_zero() -> None:
    spec = small_spec()
    model, batch = small(spec), small_batch(spec)
    batch.valid[:, spec.frames_in :] = False
    loss = model.loss(batch)["loss"]
    loss.backward()
    assert loss == 0


def test_first_stage_stays_frozen_and_in_eval(stage: dict[str, Any]) -> None:
    spec = small_spec(channels=2, grid=(16, 32), frames_out=2)
    model = small(spec, first_stage=stage, patch=2).train()
    assert model.training and model.net.training and not model.first_stage.training
    model.loss(small_batch(spec))["loss"].backward()
    assert all(not p.requires_grad and p.grad is None for p in model.first_stage.parameters())
    assert model.shape == (2 * 4, 4, 8) and model.shift == time_shift(2 * 4 * 4 * 8)


def test_portable_options_build_the_same_model(stage: dict[str, Any]) -> None:
    spec = small_spec(channels=2, grid=(16, 32), frames_out=2)
    model, history = small(spec, first_stage=stage, patch=2), small_batch(spec).history
    torch.manual_seed(1)
    other = make_model(model.portable_options(), spec).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        one, two = (m.forecast(history, None, 2, torch.Generator().manual_seed(0)) for m in (model, other))
    assert one.shape == (3, 2, 2, 2, 16, 32) and torch.equal(one, two)


def test_tendency_is_normalised_by_its_own_statistics() -> None:
    spec = small_spec(channels=2, frames_out=2)
    batches = [small_batch(spec, seed=seed) for seed in (0, 1)]
    batches[1].valid[0, -1, 0] = False
    batches[1].future[0] = 1e6  # 有无效目标的窗口整个不看
    model = small(spec, predict="tendency")
    for batch in batches:
        model.accumulate(batch)
    model.solve()
    seen = torch.cat([b.future - b.history[:, -1:] for b in batches])[[0, 1, 2, 4, 5]].double().numpy()
    mean, std = seen.mean((0, 3, 4)), seen.std((0, 3, 4))  # (T_out, C)
    np.testing.assert_allclose(model.targets.mean.view(2, 2), mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.targets.std.view(2, 2), std, rtol=1e-4)
    model.velocity = lambda noisy, past, t: torch.zeros_like(noisy)  # 不动的网络：样本就是噪声
    history = batches[0].history
    made = model.forecast(history, None, 4, torch.Generator().manual_seed(0))
    seeds = torch.randint(2**62, (3 * 4,), generator=torch.Generator().manual_seed(0)).tolist()
    noise = np.stack([torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(seed)).numpy() for seed in seeds])
    expected = noise.reshape(3, 4, 2, 2, 8, 16) * std[..., None, None] + mean[..., None, None]
    np.testing.assert_allclose(made, expected + history[:, None, -1:].numpy(), rtol=1e-4, atol=1e-4)


def test_tendency_without_a_whole_window_or_without_change_is_refused() -> None:
    spec = small_spec(channels=2)
    model, batch = small(spec, predict="tendency"), small_batch(spec)
    batch.valid[:, -1, 0] = False
    model.accumulate(batch)
    with pytest.raises(ValueError, match=r"model\.predict = tendency: no change between frames is free of"):
        model.solve()
    still = small_batch(spec)
    still.future[:, :, 1] = still.history[:, -1:, 1]
    model.accumulate(still)
    with pytest.raises(ValueError, match=r"model\.predict = tendency: the tendencies have no spread"):
        model.solve()


def test_members_are_seeded_and_independent_of_the_chunks(stage: dict[str, Any]) -> None:
    spec = small_spec(channels=2, grid=(16, 32), frames_out=2)
    history = small_batch(spec, count=2).history
    models = [small(spec, first_stage=stage, patch=2, sample_chunk=size) for size in (1, 3, 100)]
    for model in models:
        torch.manual_seed(1)
        randomize(model.net)  # 近零的网络看不见历史

    def made(model: Any, members: int, seed: int = 0) -> Tensor:
        with torch.no_grad():
            return model.forecast(history, None, members, torch.Generator().manual_seed(seed))

    one, few, whole = (made(model, 5) for model in models)
    torch.testing.assert_close(one, whole, **CLOSE)
    torch.testing.assert_close(few, whole, **CLOSE)
    assert torch.equal(made(models[1], 5), few)
    torch.testing.assert_close(made(models[1], 2)[0], few[0, :2], **CLOSE)  # 第一个窗口：多要几个，前几个不变
    apart = (whole[:, :, None] - whole[:, None]).abs().amax((-4, -3, -2, -1))[:, ~torch.eye(5, dtype=torch.bool)]
    assert apart.min() > 1e-3
    assert (made(models[1], 5, seed=1) - few).abs().amax() > 1e-3


def test_a_short_training_learns_the_conditional_mean_and_covariance_of_a_gaussian() -> None:
    """4 个格点：未来 = A·历史 + b + L·ε，由历史给定之后是高斯，均值与协方差写得出来。"""
    spec = small_spec(channels=1, grid=(2, 2), frames_in=1)
    model = small(spec, patch=1, dim=32, depth=1, sampling_steps=60, sample_chunk=4096).train()
    generator = torch.Generator().manual_seed(0)
    slope = torch.tensor([[0.6, 0.3, 0, 0], [0, 0.6, 0.3, 0], [0, 0, 0.6, 0.3], [0.3, 0, 0, 0.6]])
    root = torch.tensor([[0.5, 0, 0, 0], [0.4, 0.3, 0, 0], [0, 0.4, 0.3, 0], [-0.3, 0, 0.3, 0.3]])
    offset = torch.tensor([0.5, -0.5, 0.0, 1.0])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    steps = 400
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    blank = small_batch(spec, count=128)
    for _ in range(steps):
        past, noise = torch.randn(2, 128, 4, generator=generator)
        future = past @ slope.T + offset + noise @ root.T
        batch = blank._replace(history=past.view(-1, 1, 1, 2, 2), future=future.view(-1, 1, 1, 2, 2))
        optimizer.zero_grad()
        model.loss(batch)["loss"].backward()
        optimizer.step()
        decay.step()
    past = torch.tensor([[0.0, 0, 0, 0], [1.0, -1, 0.5, 0]])
    with torch.no_grad():
        made = model.eval().forecast(past.view(2, 1, 1, 2, 2), None, 1000, generator).flatten(2)  # (2, M, 4)
    for window in range(2):
        mean, covariance = made[window].mean(0), made[window].T.cov()
        assert (mean - past[window] @ slope.T - offset).abs().max() < 0.15
        assert (covariance - root @ root.T).abs().max() < 0.1


# ---------------------------------------------------------------- 写错的配置


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": "M", "dim": None}, r"model\.size = 'M': sizes with a name: S, B, L, XL; or null"),
        ({"size": "S"}, r"model: give either size, or all of dim, depth and heads with size = null"),
        ({"depth": None}, r"model: give either size, or all of dim, depth and heads with size = null"),
        ({"heads": 3}, r"model: heads = 3 does not divide the width 16"),
        ({**SMALL_DH, "wide_heads": 8}, r"model: wide_heads = 8 does not divide the width 24 .* multiple of 4"),
    ],
)
def test_mistakes_in_the_config(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_config({**SMALL, **options})


def test_mistakes_about_the_grid() -> None:
    with pytest.raises(ValueError, match=r"model\.patch = 3 does not divide 8 x 16; sizes that work: \[1, 2, 4, 8\]"):
        small(small_spec(grid=(8, 16)), patch=3)


def test_a_stream_narrower_than_a_token_is_told(caplog: pytest.LogCaptureFixture) -> None:
    small(small_spec(channels=2, grid=(8, 16)), patch=2)
    assert not caplog.messages
    small(small_spec(channels=2, grid=(8, 16)))
    assert caplog.messages == [
        "model.dim: width 16 is less than the 32 values of a token, part of the noise is out of its reach"
    ]
