"""AR_pred 的遮挡、整个前向（与一份 NumPy 写法相比）、预报与评测的一致、别的区块划分、精度与存取。"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import models.layers.attention as attention_module
from tests.models.small import outputs_of, remove, small_batch, small_spec, tiny_model, window_of, with_window
from util.batch import Batch

TUBES = {"order": "h w t", "size": 4}  # 每个地方四个时刻是一个区块
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}


def encodings(model: Any, window: Tensor, batch: Batch) -> Tensor:
    """编码器最后一块的输出 (B, G-1, n, D)；随机数每次从头。"""
    torch.manual_seed(5)
    with torch.no_grad(), outputs_of(model.encoder[-1]) as seen:
        model.loss(with_window(batch, window))
    return seen[0].unflatten(1, (model.groups - 1, model.size))


@pytest.mark.parametrize(
    ("training", "options", "causal"),
    [
        (True, {"mask_ratio": 1.0}, True),
        (True, {"mask_ratio": 0.0}, False),
        (False, {"mask_ratio": 1.0}, True),
        (False, {"mask_ratio": 0.5}, True),
        (False, {"mask_ratio": 0.0}, True),
        (False, {"mask_ratio": 1.0, "eval_mask": "none"}, False),
    ],
)
def test_later_frames_reach_earlier_encodings_only_through_the_mask(
    training: bool, options: dict[str, Any], causal: bool
) -> None:
    spec = small_spec(frames_in=4)
    model = tiny_model(spec, random_patchify=False, **options).train(training)
    batch = small_batch(spec)
    window = window_of(batch)
    before = encodings(model, window, batch)
    for changed in range(1, 4):
        other = window.clone()
        other[:, changed] += 1
        after = encodings(model, other, batch)
        same = [torch.equal(before[:, i], after[:, i]) for i in range(4)]
        assert same == [causal and i < changed for i in range(4)]


def test_the_mask_is_drawn_per_layer_step_and_pair_with_the_given_share() -> None:
    spec = small_spec(grid=(4, 8), frames_in=5)
    model = tiny_model(spec, depth=3, mask_ratio=0.3)
    batch = small_batch(spec)
    seen: list[Tensor] = []
    for block in model.encoder:
        block.register_forward_pre_hook(lambda _module, args: seen.append(args[1]))
    with torch.no_grad():
        for _ in range(200):
            model.loss(batch)
    visible = torch.stack(seen).view(200, 3, 5, 2, 5, 2)  # (步, 层, G, n, G, n)
    hidden = ~visible[:, :, :, 0, :, 0]
    assert torch.equal(~visible, hidden[:, :, :, None, :, None].expand_as(visible))  # 整块整块地遮
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    assert not hidden[..., ~later].any()  # 自己和更早的永远看得见
    pairs = hidden[..., later].double()  # (步, 层, 10)
    assert float((pairs.mean((0, 1)) - 0.3).abs().max()) < 0.09  # 4.8 个标准差
    independent = torch.corrcoef(pairs.flatten(1).T)  # 层与层、对与对互不相干
    assert float((independent - torch.eye(30)).abs().max()) < 0.36  # 5 个标准差
    assert abs(float(torch.corrcoef(torch.stack([pairs[1:].flatten(), pairs[:-1].flatten()]))[0, 1])) < 0.07


def test_flex_is_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """token 恰为 128 个一帧时，flex 与 sdpa 的预报相同；编译换成图（aot_eager），CPU 上不生成核。"""
    compiled = torch.compile(attention_module.flex_attention, dynamic=False, backend="aot_eager")
    monkeypatch.setattr(attention_module, "compiled_flex", lambda: compiled)
    spec = small_spec(channels=1, grid=(8, 16), frames_in=3)
    history = small_batch(spec).history
    made = []
    for attention in ("flex", "sdpa"):
        model = tiny_model(spec, token_size=[1, 1], dim=32, attention=attention).eval()
        with torch.inference_mode():
            made.append(model.forecast(history, None))
    torch.testing.assert_close(made[0], made[1], **CLOSE)
    with pytest.raises(ValueError, match="flex cannot train on a CPU"):
        tiny_model(spec, token_size=[1, 1], dim=32, attention="flex").loss(small_batch(spec))


def numpy_forecast(model: Any, history: np.ndarray, causal: bool) -> np.ndarray:
    """一个窗口 (t-1, k, H, W) → (k, H, W)：整个前向照需求用 float64 再写一遍，只从模型里取权重。"""
    weights = {name: p.detach().double().numpy() for name, p in model.state_dict().items()}
    (p, q), config = model.config.token_size, model.config
    frames, channels, height, width = history.shape

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def mlp(x: np.ndarray, name: str) -> np.ndarray:
        x = linear(x, f"{name}.0")
        return linear(x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))), f"{name}.3")

    def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray, heads: int, mask: Any) -> np.ndarray:
        made = []
        for a, b, c in zip(*(np.split(x, heads, axis=1) for x in (query, key, value)), strict=True):
            scores = a @ b.T / math.sqrt(a.shape[1]) - 1e9 * mask
            scores = np.exp(scores - scores.max(1, keepdims=True))
            made.append(scores / scores.sum(1, keepdims=True) @ c)
        return np.concatenate(made, 1)

    rows, columns = height // p, width // q
    places = list(itertools.product(range(frames), range(rows), range(columns)))
    x = np.stack([history[t, :, p * h : p * h + p, q * w : q * w + q].transpose(1, 2, 0).ravel() for t, h, w in places])
    group = np.array([t for t, _, _ in places])
    inside = model.position.spatial[0].double().numpy()  # 公式另有测试
    x = linear(x, "embed") + weights["position.group"][group] + np.tile(inside, (frames, 1))
    mask = (group[:, None] < group[None]) if causal else 0.0
    for i in range(config.depth):
        query, key, value = np.split(linear(norm(x, f"encoder.{i}.norm1"), f"encoder.{i}.attention.qkv"), 3, axis=1)
        x = x + linear(attend(query, key, value, config.heads, mask), f"encoder.{i}.attention.out")
        x = x + mlp(norm(x, f"encoder.{i}.norm2"), f"encoder.{i}.mlp")
    memory = linear(x, "decoder.memory")
    place = weights["position.group"][frames] + inside
    y = weights["decoder.query"] + linear(place, "decoder.code")
    for i in range(config.decoder_depth):
        name = f"decoder.blocks.{i}"
        key, value = np.split(linear(memory, f"{name}.attention.kv"), 2, axis=1)
        query = linear(norm(y, f"{name}.norm1"), f"{name}.attention.q")
        y = y + linear(attend(query, key, value, config.decoder_heads, 0.0), f"{name}.attention.out")
        y = y + mlp(norm(y, f"{name}.norm2"), f"{name}.mlp")
    y = linear(norm(y, "decoder.norm"), "decoder.head")
    frame = np.zeros((channels, height, width))
    for n, (h, w) in enumerate(itertools.product(range(rows), range(columns))):
        frame[:, p * h : p * h + p, q * w : q * w + q] = y[n].reshape(p, q, channels).transpose(2, 0, 1)
    return frame


@pytest.mark.parametrize("eval_mask", ["causal", "none"])
@pytest.mark.parametrize("query", ["learned", "resampled"])
def test_the_whole_forward_equals_a_written_out_one_and_is_what_the_loss_scores(query: str, eval_mask: str) -> None:
    spec = small_spec()
    model = tiny_model(spec, decoder_depth=2, query=query, eval_mask=eval_mask).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)  # 偏置与归一化也不能是零和一
    batch = small_batch(spec)
    batch = batch._replace(history=batch.history.double(), future=batch.future.double())
    with torch.no_grad():
        found = model.forecast(batch.history, batch.time)
        loss = model.loss(batch)["loss"].item()
    expected = np.stack([numpy_forecast(model, window, eval_mask == "causal") for window in batch.history.numpy()])
    assert found.shape == (3, 1, 1, 3, 8, 16)
    np.testing.assert_allclose(found[:, 0, 0].numpy(), expected, rtol=1e-9, atol=1e-9)
    assert loss == pytest.approx(((expected - batch.future[:, 0].numpy()) ** 2).mean(), rel=1e-9)


@pytest.mark.parametrize("order", ["t h w", "t w h"])
@pytest.mark.parametrize("predict", ["state", "tendency"])
def test_forecast_is_what_the_loss_scores(predict: str, order: str) -> None:
    spec = small_spec()
    model = tiny_model(spec, predict=predict, grouping={"order": order}).eval()
    nn.init.normal_(model.decoder.head.weight)
    batch = small_batch(spec)
    with torch.no_grad():
        made = model.forecast(batch.history, batch.time)[:, 0]
        assert model.loss(batch)["loss"].item() == pytest.approx(float((made - batch.future).square().mean()), rel=1e-5)
        changed = model.forecast(batch.history.flip(0), None)[:, 0].flip(0)
    torch.testing.assert_close(made, changed, **CLOSE)  # 一个窗口的预报与同批的别的窗口无关


def test_a_resampled_query_is_fresh_noise_in_training_and_fixed_in_evaluation() -> None:
    spec = small_spec()
    model = tiny_model(spec, query="resampled", random_patchify=False, mask_ratio=1.0, decoder_width=256)
    batch = small_batch(spec)
    seen: list[Tensor] = []
    model.decoder.blocks[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        for _ in range(2):
            model.loss(batch)
        noise = torch.stack(seen) - model.decoder.code(model.position.group[-1] + model.position.spatial)
        assert len(torch.unique(noise.flatten(0, 2), dim=0)) == 2 * 3 * 8  # 每步、每个窗口、每个 token 各一份
        assert 0.019 < float(noise.std()) < 0.021
        model.eval()
        assert model.loss(batch)["loss"] == model.loss(batch)["loss"]
    assert "decoder.query" in model.state_dict() and "decoder.query" not in dict(model.named_parameters())


@pytest.mark.parametrize("grouping", [TUBES, {"order": "t h w", "size": 4}, {"order": "h w t", "size": "frame"}])
def test_other_groupings_reconstruct_and_refuse_to_forecast(
    grouping: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """训练拿掉任意一块都对得上它的像素与编码；验证计最后一块；预报拒绝。"""
    spec = small_spec()
    model = tiny_model(spec, grouping=grouping)
    nn.init.zeros_(model.decoder.head.weight)
    batch = small_batch(spec, count=2)
    tokens = model.tokenize(window_of(batch).permute(0, 3, 4, 1, 2).flatten(3)).unflatten(1, (model.groups, -1)).numpy()
    assert model.eval().loss(batch)["loss"].item() == pytest.approx((tokens[:, -1] ** 2).mean(), rel=1e-5)
    remove(model.train(), [1, 0], monkeypatch)
    with outputs_of(model.decoder.blocks[0].norm1) as queries:
        loss = model.loss(batch)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx((np.stack([tokens[0, 1], tokens[1, 0]]) ** 2).mean(), rel=1e-5)
    codes = model.position.group[[1, 0], None] + model.position.spatial[[1, 0]]
    place = model.decoder.query + model.decoder.code(codes)
    torch.testing.assert_close(queries[0], model.decoder.blocks[0].norm1(place))  # 各块用各自的位置
    assert not model.can_forecast
    with pytest.raises(ValueError, match="one group per frame"):
        model.forecast(batch.history, batch.time)


def test_bf16_autocast_keeps_the_loss_in_float32() -> None:
    spec = small_spec()
    model = tiny_model(spec, random_patchify=False, mask_ratio=1.0)
    batch = small_batch(spec)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(batch)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(model.loss(batch)["loss"].item(), rel=0.02)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", [{"query": "resampled"}, {"spatial_position": "learned", "norm": "RMSNorm"}])
def test_the_state_dict_carries_the_whole_model(options: dict[str, Any]) -> None:
    spec = small_spec()
    one, other = (tiny_model(spec, seed=seed, **options).eval() for seed in (1, 2))
    history = small_batch(spec).history
    assert not torch.equal(one.forecast(history, None), other.forecast(history, None))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.forecast(history, None), other.forecast(history, None))


def test_evaluation_draws_no_random_numbers() -> None:
    spec = small_spec()
    model = tiny_model(spec, query="resampled", dropout=0.5).eval()
    state = torch.random.get_rng_state()
    model.loss(small_batch(spec))
    model.forecast(small_batch(spec).history, None)
    assert torch.equal(state, torch.random.get_rng_state())
