"""卷积网络：与 NumPy 写开的循环逐数相比；参数个数；经度的接缝；做不到的事。"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.models.small import make_model, small_batch, small_spec, terms_of

SPEC = small_spec(channels=2, grid=(4, 6), frames_in=3, frames_out=2)
every_variant = pytest.mark.parametrize("variant", ["cnn", "deep"])
every_padding = pytest.mark.parametrize("padding", ["zeros", "circular_lon"])


def made(spec: Any = SPEC, **options: Any) -> Any:
    """评测模式；BN 的参数与统计量取随机数，免得都是 0 和 1。"""
    torch.manual_seed(0)
    model = make_model({"name": "cnn", "width": 3, **options}, spec)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for name, tensor in module.state_dict().items():
                if name in ("weight", "running_var"):
                    torch.nn.init.uniform_(tensor, 0.5, 1.5)
                elif name in ("bias", "running_mean"):
                    torch.nn.init.normal_(tensor, std=0.3)
    return model.eval()


def padded(x: np.ndarray, width: int, circular: bool) -> np.ndarray:
    """(C, H, W)：经度循环或补零，纬度补零。"""
    x = np.pad(x, [(0, 0), (0, 0), (width, width)], mode="wrap" if circular else "constant")
    return np.pad(x, [(0, 0), (width, width), (0, 0)])


def convolve(x: np.ndarray, weight: np.ndarray, circular: bool, stride: int = 1) -> np.ndarray:
    """(C, H, W)、(O, C, 3, 3)。"""
    x = padded(x, 1, circular)
    out = np.zeros((len(weight), (x.shape[1] - 3) // stride + 1, (x.shape[2] - 3) // stride + 1))
    for o, i, j in np.ndindex(*out.shape):
        out[o, i, j] = (x[:, stride * i : stride * i + 3, stride * j : stride * j + 3] * weight[o]).sum()
    return out


def transpose_convolve(x: np.ndarray, weight: np.ndarray, circular: bool) -> np.ndarray:
    """(C, H, W)、(C, O, 4, 4)，步长 2、填充 1：输入 (i, j) 落到输出 (2i - 1 + a, 2j - 1 + b)。"""
    height, width = 2 * x.shape[1], 2 * x.shape[2]
    out = np.zeros((weight.shape[1], height, width))
    for c, i, j, a, b in np.ndindex(*x.shape, 4, 4):
        row, column = 2 * i - 1 + a, 2 * j - 1 + b
        if circular:
            column %= width
        if 0 <= row < height and 0 <= column < width:
            out[:, row, column] += x[c, i, j] * weight[c, :, a, b]
    return out


class Written:
    """按次序取用模型的权重，一层层写开。"""

    def __init__(self, model: Any, circular: bool) -> None:
        self.values = [v.double().numpy() for k, v in model.state_dict().items() if "num_batches" not in k]
        self.circular = circular

    def conv(self, x: np.ndarray, stride: int = 1) -> np.ndarray:
        return convolve(x, self.values.pop(0), self.circular, stride)

    def norm(self, x: np.ndarray) -> np.ndarray:
        weight, bias, mean, var = (self.values.pop(0)[:, None, None] for _ in range(4))
        return (x - mean) / np.sqrt(var + 1e-5) * weight + bias

    def block(self, x: np.ndarray, stride: int = 1) -> np.ndarray:
        return np.maximum(self.norm(self.conv(x, stride)), 0)

    def head(self, x: np.ndarray) -> np.ndarray:
        x = self.conv(x)
        return x + self.values.pop(0)[:, None, None]


@every_padding
def test_cnn_is_the_written_out_network(padding: str) -> None:
    model, batch = made(padding=padding), small_batch(SPEC)
    with torch.no_grad():
        forecast = model.forecast(batch.history, batch.time)
    for window, found in zip(batch.history, forecast[:, 0], strict=True):
        net = Written(model, padding == "circular_lon")
        x = window.double().numpy().reshape(6, 4, 6)  # 通道次序：先帧后变量
        x = net.block(net.block(net.block(net.block(x)), stride=2))
        x = np.maximum(net.norm(transpose_convolve(x, net.values.pop(0), net.circular)), 0)
        expected = net.head(net.block(x)).reshape(2, 2, 4, 6)
        assert not net.values
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@every_padding
def test_deep_is_the_written_out_network(padding: str) -> None:
    model, batch = made(variant="deep", blocks=2, padding=padding), small_batch(SPEC)
    with torch.no_grad():
        forecast = model.forecast(batch.history, batch.time)
    for window, found in zip(batch.history, forecast[:, 0], strict=True):
        net = Written(model, padding == "circular_lon")
        x = net.block(window.double().numpy().reshape(6, 4, 6))
        for _ in range(2):
            x = np.maximum(x + net.norm(net.conv(net.block(x))), 0)
        expected = net.head(x).reshape(2, 2, 4, 6)
        assert not net.values
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 9])
def test_parameter_counts(channels: int) -> None:
    """逐层：卷积 9·进·出，转置卷积 16·进·出，BN 两倍宽度，输出层有偏置。"""
    spec = small_spec(channels=channels, grid=(32, 64), frames_in=12, frames_out=4)
    first, last = 12 * channels, 4 * channels
    norms = 2 * (64 + 128 + 128 + 256 + 128 + 64)
    convs = 9 * (first * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 128 * 64 + 64 * last) + last + 16 * 256 * 128
    assert count(make_model({"name": "cnn"}, spec)) == convs + norms
    blocks = 3 * 2 * (9 * 64 * 64 + 2 * 64)
    deep = 9 * first * 64 + 2 * 64 + blocks + 9 * 64 * last + last
    assert count(make_model({"name": "cnn", "variant": "deep"}, spec)) == deep


def count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@every_variant
def test_circular_longitude_has_no_seam(variant: str) -> None:
    """网格转两列，预报也转两列；补零时不然。"""
    batch = small_batch(SPEC)
    with torch.no_grad():
        for padding, same in (("circular_lon", True), ("zeros", False)):
            model = made(variant=variant, padding=padding)
            turned = model.forecast(batch.history.roll(2, -1), None).roll(-2, -1)
            assert torch.allclose(turned, model.forecast(batch.history, None), atol=1e-6) is same


@pytest.mark.parametrize(("grid", "name"), [((5, 6), "latitude"), ((4, 7), "longitude")])
def test_an_odd_grid_is_refused_by_cnn_only(grid: tuple[int, int], name: str) -> None:
    spec = small_spec(grid=grid)
    with pytest.raises(ValueError, match=f"^model.variant = cnn .*odd in {name} .{grid[0]} x {grid[1]}.*deep works"):
        made(spec)
    assert made(spec, variant="deep").forecast(small_batch(spec).history, None).shape == (3, 1, 1, 3, *grid)


def test_blocks_without_residual_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="model.blocks = 3: has no meaning for model.variant = cnn"):
        made(blocks=3)


@every_variant
def test_autocast_and_compile(variant: str) -> None:
    spec = small_spec(channels=2, grid=(8, 16), frames_in=3, frames_out=2)
    model, batch = made(spec, variant=variant, width=8), small_batch(spec)
    expected = model(batch.history)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(batch.history), expected)
    with torch.autocast("cpu", torch.bfloat16):
        loss = terms_of(model.train(), batch)["loss"]
        loss.backward()
        lower = model.eval()(batch.history)
    assert loss.isfinite()
    torch.testing.assert_close(lower.float(), model(batch.history), atol=0.1, rtol=0.1)
