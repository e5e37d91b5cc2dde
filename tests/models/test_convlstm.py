"""ConvLSTM：单元、整个模型与逐点写开的 NumPy 循环相比；参数个数与公开的实现相比；教师强制不泄漏目标。"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

from models import build_config, build_model
from models.convlstm import ConvLSTMCell
from tests.models.small import small_batch, small_spec, terms_of
from util.batch import Batch, DataSpec

Array = NDArray[np.float64]
SPEC = small_spec(channels=2, grid=(4, 6), frames_in=3, frames_out=3)
every_variant = pytest.mark.parametrize("variant", ["convlstm", "seq2seq"])
every_padding = pytest.mark.parametrize("padding", ["zeros", "circular_lon"])


def make(spec: DataSpec = SPEC, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_model({"name": "convlstm", "hidden": 4, **options}, spec)


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def convolve(x: Array, weight: Array, bias: Array, padding: str) -> Array:
    """(Ci, H, W) 与 (Co, Ci, k, k) 的相关，逐点写开：出了南北边界是零，出了东西边界是零或绕回来。"""
    outputs, _, kernel, _ = weight.shape
    _, rows, columns = x.shape
    result = np.zeros((outputs, rows, columns))
    for output, row, column in np.ndindex(outputs, rows, columns):
        total = bias[output]
        for down, right in np.ndindex(kernel, kernel):
            i, j = row + down - kernel // 2, column + right - kernel // 2
            if padding == "circular_lon":
                j %= columns
            if 0 <= i < rows and 0 <= j < columns:
                total += weight[output, :, down, right] @ x[:, i, j]
        result[output, row, column] = total
    return result


def cell_step(cell: ConvLSTMCell, x: Array, h: Array, c: Array, padding: str) -> tuple[Array, Array]:
    assert cell.gates.bias is not None
    gates = convolve(np.concatenate([x, h]), array(cell.gates.weight), array(cell.gates.bias), padding)
    i, f, o, g = np.split(gates, 4)
    c = expit(f) * c + expit(i) * np.tanh(g)
    return expit(o) * np.tanh(c), c


def written_out(model: Any, history: Array, padding: str, truth: Array | None = None) -> Array:
    """一个窗口 (T_in, C, H, W) → (T_out, C, H, W)；给了 truth 时，seq2seq 每步都以真值作下一步的输入。"""
    sequence = list(history)
    h = c = np.zeros(0)
    for cell in model.encoder:
        h = c = np.zeros((model.config.hidden, *history.shape[2:]))
        for step, frame in enumerate(sequence):
            h, c = cell_step(cell, frame, h, c, padding)
            sequence[step] = h
    convs = [layer for layer in model.head if hasattr(layer, "weight")]
    weights = [(array(conv.weight), array(conv.bias), padding) for conv in convs]
    if model.config.variant == "convlstm":
        middle = convolve(h, *weights[0])
        return convolve(middle * expit(middle), *weights[1]).reshape(-1, *history.shape[1:])
    frame, made = history[-1], []
    for step in range(model.spec.frames_out):
        h, c = cell_step(model.decoder, frame, h, c, padding)
        made.append(convolve(h, *weights[0]))
        frame = made[-1] if truth is None else truth[step]
    return np.stack(made)


@every_padding
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_cell_equals_a_numpy_loop(padding: Any, kernel: int) -> None:
    torch.manual_seed(1)
    cell = ConvLSTMCell(2, 3, kernel, padding).double()
    x, h, c = (torch.randn(1, n, 4, 5, dtype=torch.float64) for n in (2, 3, 3))
    made = cell(x, (h, c))
    expected = cell_step(cell, array(x)[0], array(h)[0], array(c)[0], padding)
    for found, wanted in zip(made, expected, strict=True):
        np.testing.assert_allclose(array(found)[0], wanted, rtol=1e-12, atol=1e-12)


@every_padding
@every_variant
def test_model_equals_a_numpy_loop(variant: str, padding: str) -> None:
    model, batch = make(variant=variant, padding=padding).double(), small_batch(SPEC, count=2)
    made = array(model.eval().forecast(batch.history.double(), batch.time)[:, 0])
    for window, history in enumerate(array(batch.history)):
        np.testing.assert_allclose(made[window], written_out(model, history, padding), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "hidden", "layers", "public"),
    [(64, 16, 1, 46_144), (1, 64, 2, 445_184), (4, 64, 2, 452_096), (12, 64, 2, 470_528)],
)
def test_encoder_has_as_many_parameters_as_the_public_one(channels: int, hidden: int, layers: int, public: int) -> None:
    model = make(small_spec(channels=channels), hidden=hidden, layers=layers)
    assert sum(p.numel() for p in model.encoder.parameters()) == public


def test_only_the_circular_model_moves_with_the_fields_around_the_globe() -> None:
    history = small_batch(SPEC).history
    moved = history.roll(2, -1)
    for padding, same in (("zeros", False), ("circular_lon", True)):
        for variant in ("convlstm", "seq2seq"):
            model = make(variant=variant, padding=padding).eval()
            shifted = model.forecast(history, None).roll(2, -1)
            assert torch.allclose(model.forecast(moved, None), shifted, atol=1e-6) is same


def test_teacher_forcing_feeds_the_truth_in_training_only() -> None:
    batch = small_batch(SPEC, count=2)
    model = make(variant="seq2seq", teacher_forcing=1.0)
    for training, truth in ((True, array(batch.future)), (False, [None, None])):
        made = np.stack([written_out(model, h, "zeros", t) for h, t in zip(array(batch.history), truth, strict=True)])
        expected = np.mean((made - array(batch.future)) ** 2)
        assert terms_of(model.train(training), batch)["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_teacher_forcing_never_shows_an_interpolated_frame() -> None:
    """插值得来的场不是真值，还可能用了更晚的场；那个通道改喂自己的预测。"""
    model, batch = make(variant="seq2seq", teacher_forcing=1.0).train(), small_batch(SPEC)
    valid = batch.valid.clone()
    valid[:, SPEC.frames_in, 0] = False  # 第一个目标帧的一个通道
    batch = batch._replace(valid=valid)
    loss = terms_of(model, batch)["loss"]
    assert torch.equal(terms_of(model, _changed(batch, 0))["loss"], loss)
    assert not torch.equal(terms_of(model, _changed(batch, 1))["loss"], loss)


def _changed(batch: Batch, channel: int) -> Batch:
    future = batch.future.clone()
    future[:, 0, channel] += 100
    return batch._replace(future=future)


def test_teacher_forcing_is_drawn_for_each_window_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make(variant="seq2seq", teacher_forcing=0.3), small_batch(SPEC, count=200)
    seen: list[Tensor] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *inputs: (seen.append(inputs[3]), forward(*inputs))[1])
    terms_of(model, batch)
    (forced,) = seen
    assert forced.shape == (200, 3, 2, 1, 1)
    assert torch.equal(forced[:, :, 0], forced[:, :, 1])  # 一帧的各通道同进退
    shares = forced[:, :, 0].double().mean(0).flatten()  # 每一步
    assert ((shares - 0.3).abs() < 0.1).all()  # 200 次抽取的三个标准差
    assert 0 < (forced[:, 0, 0] & forced[:, 1, 0]).double().mean() < 0.2  # 各步独立：0.09


@every_variant
def test_gradients_reach_every_parameter(variant: str) -> None:
    model = make(variant=variant).train()
    terms_of(model, small_batch(SPEC))["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_options_without_meaning_are_refused() -> None:
    for options, message in (
        ({"teacher_forcing": 0.0}, r"model\.teacher_forcing = 0\.0: only variant = seq2seq feeds frames back"),
        ({"variant": "seq2seq", "teacher_forcing": 1.5}, r"model\.teacher_forcing = 1\.5"),
        ({"kernel": 4}, r"model\.kernel = 4: must be odd.*nearest: 3, 5"),
        ({"hidden": 1}, r"model\.hidden = 1"),
        ({"variant": "seq2sec"}, r"model\.variant = 'seq2sec'.*nearest: seq2seq"),
    ):
        with pytest.raises(ValueError, match=message):
            build_config({"name": "convlstm", **options})


def test_a_kernel_wider_than_the_globe_is_refused() -> None:
    small = small_spec(grid=(4, 2))
    make(small, kernel=5, padding="circular_lon")(small_batch(small).history)
    make(small, kernel=7, padding="zeros")(small_batch(small).history)
    with pytest.raises(ValueError, match=r"^model\.kernel = 7 reaches around 2 longitudes.*odd numbers up to 5"):
        make(small, kernel=7, padding="circular_lon")
