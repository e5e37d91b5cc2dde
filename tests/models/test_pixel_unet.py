"""像素 U-Net：整个前向与 NumPy 写法相比；极值与缩放；经度一圈；写错的配置。"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit

from models import build_model
from tests.models.layers.numpy_layers import conv, group_norm, values
from tests.models.small import small_batch, small_spec, terms_of
from util.batch import Batch, DataSpec

SMALL = {"name": "pixel_unet", "base_channels": 8, "depth": 2}


def small(spec: DataSpec, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_model({**SMALL, **options}, spec).eval()


def test_parameter_count_is_that_of_the_written_out_layers() -> None:
    with torch.device("meta"):
        model = build_model({"name": "pixel_unet"}, small_spec(1, (32, 64), frames_in=12, frames_out=4))
    total = 0
    for inside, out in [(12, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]:  # 下去，最后一个是瓶颈
        total += 9 * inside * out + out + 9 * out * out + out + 2 * 2 * out
    for inside, out in [(1024, 512), (512, 256), (256, 128), (128, 64)]:  # 上来：转置卷积，拼上跳接，再两次卷积
        total += 4 * inside * out + out + 9 * 2 * out * out + out + 9 * out * out + out + 2 * 2 * out
    total += 64 * 4 + 4
    assert sum(p.numel() for p in model.parameters()) == total == 31_048_900


def test_forward_equals_the_written_out_network() -> None:
    spec = small_spec(channels=2, frames_in=3, frames_out=2)
    model, history = small(spec, scaling="zscore").double(), small_batch(spec, count=2).history.double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    net = model.net
    x = values(history).reshape(2, 6, 8, 16)  # 时间在外，通道在内
    one = block(x, net.down[0])
    two = block(pool(one), net.down[1])
    up = block(np.concatenate([grow(block(pool(two), net.bottleneck), net.grow[0]), two], 1), net.up[0])
    up = block(np.concatenate([grow(up, net.grow[1]), one], 1), net.up[1])
    expected = conv(up, net.out).reshape(2, 2, 2, 8, 16)
    with torch.no_grad():
        np.testing.assert_allclose(values(model(history)), expected, rtol=1e-9, atol=1e-9)


def block(x: np.ndarray, layers: Any) -> np.ndarray:
    for i in (0, 3):
        x = group_norm(conv(x, layers[i]), layers[i + 1])
        assert layers[i + 1].num_groups == 8
        x = x * expit(x)  # SiLU
    return x


def pool(x: np.ndarray) -> np.ndarray:
    return np.maximum.reduce([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)])


def grow(x: np.ndarray, layer: Any) -> np.ndarray:
    """2 × 2、步长 2 的转置卷积：每个格点铺成 2 × 2。"""
    count, _, height, width = x.shape
    made = np.zeros((count, layer.out_channels, 2 * height, 2 * width))
    for i, j in np.ndindex(2, 2):
        made[..., i::2, j::2] = np.einsum("bihw,io->bohw", x, values(layer.weight)[:, :, i, j])
    return made + values(layer.bias)[:, None, None]


def trained(spec: DataSpec, batches: list[Batch], **options: Any) -> Any:
    model = small(spec, **options)
    for batch in batches:
        model.accumulate(batch)
    model.solve()
    return model


def test_extrema_are_those_of_the_valid_training_fields() -> None:
    spec = small_spec(frames_out=2)
    batches = [small_batch(spec, seed=seed) for seed in (0, 1)]
    batches[1].valid[0, 4, 2] = False
    batches[1].future[0, 1, 2] = 1e6  # 插值得来的场，不作数
    model = trained(spec, batches)
    fields = [torch.cat([b.history, b.future], 1) for b in batches]  # (B, t, C, H, W)
    for channel in range(3):
        used = np.concatenate(
            [f[:, :, channel][b.valid[:, :, channel]].numpy().ravel() for f, b in zip(fields, batches, strict=True)]
        )
        assert model.scaling.low[channel] == used.min() and model.scaling.high[channel] == used.max()
        scaled = model.scaling(fields[0])[:, :, channel]
        expected = (fields[0][:, :, channel] - used.min()) / (used.max() - used.min()) * 2 - 1
        assert torch.allclose(scaled, expected, atol=1e-6)
    assert torch.allclose(model.scaling.inverse(model.scaling(fields[0])), fields[0], atol=1e-5)


def test_minmax_is_the_same_network_on_scaled_fields() -> None:
    spec = small_spec(frames_out=2)
    batch = small_batch(spec)
    model, plain = trained(spec, [batch]), trained(spec, [batch], scaling="zscore")
    low, high = (v[:, None, None] for v in (model.scaling.low, model.scaling.high))
    assert (low < -2).all() and (high > 2).all()
    plain.net.load_state_dict(model.net.state_dict())
    with torch.no_grad():
        made = plain((batch.history - low) / (high - low) * 2 - 1)
        assert torch.allclose(model(batch.history), (made + 1) / 2 * (high - low) + low, atol=1e-5)
    assert plain.scaling.low.tolist() == [-1, -1, -1]  # zscore：看过也不缩


def test_loss_is_the_mean_over_valid_targets_of_the_standardised_error() -> None:
    spec = small_spec(frames_out=2)
    batch = small_batch(spec)
    batch.valid[1, 3, 0] = False
    batch.valid[0, 0] = False  # 历史里的不算
    model = trained(spec, [batch])
    with torch.no_grad():
        error = (model.forecast(batch.history, None)[:, 0] - batch.future).square().numpy()
        found = float(terms_of(model, batch)["loss"])
    kept = [error[b, t, c].mean() for b, t, c in np.ndindex(3, 2, 3) if (b, t, c) != (1, 0, 0)]
    assert found == pytest.approx(np.mean(kept), rel=1e-5)


@pytest.mark.parametrize("padding", ["circular_lon", "zeros"])
def test_circular_longitude_has_no_seam(padding: str) -> None:
    spec = small_spec(grid=(8, 32))
    model, history = small(spec, padding=padding), small_batch(spec).history
    with torch.no_grad():
        turned, made = model(history.roll(4, -1)), model(history).roll(4, -1)  # 4 = 2^depth
    assert torch.allclose(turned, made, atol=1e-5) == (padding == "circular_lon")


def test_a_channel_without_a_range_is_named() -> None:
    spec = small_spec()
    batch = small_batch(spec)
    batch.history[:, :, 1], batch.future[:, :, 1] = 0.5, 0.5
    with pytest.raises(ValueError, match=r"model\.scaling = minmax: c1 has no range .*\(minimum 0\.5, maximum 0\.5"):
        trained(spec, [batch])
    batch = small_batch(spec)
    batch.valid[:, :, 2] = False
    with pytest.raises(ValueError, match=r"c2 has no range in the training windows \(minimum inf, maximum -inf"):
        trained(spec, [batch])
    trained(spec, [batch], scaling="zscore")


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        (
            {"depth": 4},
            (24, 48),
            "model.depth = 4 halves the grid 24 x 48 4 times, which 24 in latitude does not allow",
        ),
        ({"depth": 4}, (24, 48), "values that work: [1, 2, 3]"),
        ({"depth": 3}, (8, 12), "12 in longitude does not allow; values that work: [1, 2]"),
        ({"depth": 1}, (7, 12), "values that work: none, both sides must be even"),
        ({"base_channels": 20}, (8, 16), "model.base_channels = 20: must be a multiple of the 8 normalisation groups"),
        ({"base_channels": 20}, (8, 16), "e.g. 16 or 24"),
        ({"scaling": "min_max"}, (8, 16), "nearest: minmax"),
    ],
)
def test_a_wrong_setting_is_named_with_its_rule(options: dict[str, Any], grid: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  下一行逐字比对
        small(small_spec(grid=grid), **options)
    assert message in str(error.value) and "\n" not in str(error.value)
