"""AR_pred 逐句对照需求：各级形状、token、编码、裁去、目标、不泄漏、无效的场。"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.training.shapes import record_shapes
from models.layers.draws import Draws
from tests.models.small import (
    make_model,
    outputs_of,
    remove,
    small_batch,
    small_spec,
    tiny_model,
    window_of,
    with_window,
)

TUBES = {"order": "h w t", "size": 4}  # 每个地方四个时刻是一个区块


def test_every_shape_of_the_requirement(caplog: pytest.LogCaptureFixture) -> None:
    """t = 8，k = 9，128 × 256，其余取默认（即需求的数字）：128·t 个 token，每个 256·k 个值。"""
    spec = small_spec(channels=9, grid=(128, 256), frames_in=7)
    with caplog.at_level("INFO", "ar_pred"):
        model = make_model({"name": "ar_pred_video_vanilla"}, spec)
    assert "294912 values leaves the decoder through 65536 numbers, ratio 4.50" in caplog.text
    with torch.no_grad(), record_shapes(model) as rows:
        model.loss(small_batch(spec, count=1))
    top = [(row.name, row.inputs[0], row.outputs[0]) for row in rows if "." not in row.name or row.name[-2] == "."]
    kept = (1, 896, 768)
    chain = [
        ("tokenize", (1, 128, 256, 72), (1, 1024, 2304)),
        ("embed", (1, 1024, 2304), (1, 1024, 768)),
        ("position", (1, 1024, 768), (1, 1024, 768)),
        ("remove_group", (1, 1024, 768), kept),
        *((f"encoder.{i}", kept, kept) for i in range(8)),
        ("decoder", kept, (1, 128, 2304)),
        ("to_frame", (1, 128, 2304), (1, 128, 256, 9)),
    ]
    assert [row for row in top if row[0] in {name for name, _, _ in chain}] == [*chain, chain[-1]]  # 预测一次，目标一次
    blocks = [row for row in rows if row.type == "DecoderBlock"]
    assert [(row.inputs, row.outputs) for row in blocks] == [(((1, 128, 512), (1, 896, 512)), ((1, 128, 512),))] * 4
    heads = {row.name: model.get_submodule(row.name).heads for row in rows if row.name.endswith(".attention")}
    assert [h for name, h in heads.items() if name.startswith("encoder")] == [12] * 8
    assert {row.type for row in rows if ".norm" in row.name} == {"LayerNorm"} and "GELU" in {row.type for row in rows}
    assert model.config.random_patchify and model.config.mask_ratio == 0.8


@pytest.mark.parametrize("order", [" ".join(axes) for axes in itertools.permutations("thw")])
def test_tokens_hold_the_right_pixels_in_the_right_order(order: str) -> None:
    spec = small_spec(channels=2, grid=(4, 6), frames_in=2)
    model = tiny_model(spec, token_size=[2, 3], grouping={"order": order})
    window = window_of(small_batch(spec))
    found = model.tokenize(window.permute(0, 3, 4, 1, 2).flatten(3))  # (B, H, W, t·k)：帧在通道维上叠起来
    counts = {"t": 3, "h": 2, "w": 2}
    tokens = []
    for index in itertools.product(*(range(counts[axis]) for axis in order.split())):
        at = dict(zip(order.split(), index, strict=True))
        patch = window[:, at["t"], :, 2 * at["h"] : 2 * at["h"] + 2, 3 * at["w"] : 3 * at["w"] + 3]
        tokens.append(patch.permute(0, 2, 3, 1).flatten(1))  # (B, p·q·k)
    assert torch.equal(found, torch.stack(tokens, 1))
    if order.startswith("t"):
        frames = found.unflatten(1, (3, 4))
        for i in range(3):
            assert torch.equal(model.to_frame(frames[:, i]), window[:, i].permute(0, 2, 3, 1))


def test_one_learned_code_per_group_for_all_its_tokens() -> None:
    spec = small_spec(frames_in=7)
    model = tiny_model(spec, dim=256, spatial_position="none")
    codes = model.position(torch.zeros(1, 8 * 8, 256)).detach()[0].unflatten(0, (8, 8))  # (t, n, D)
    assert torch.equal(codes, model.position.group[:, None].expand(-1, 8, -1))
    assert len(torch.unique(codes[:, 0], dim=0)) == 8
    assert 0.9 < model.position.group.std().item() < 1.1  # 单位方差起步：区块才分得开
    assert 0.015 < model.decoder.query.std().item() < 0.025
    assert 0.0008 < model.decoder.head.weight.std().item() < 0.0012


@pytest.mark.parametrize("width", [16, 18])
def test_sincos_codes_follow_the_formula_in_encoder_and_decoder(width: int) -> None:
    spec = small_spec(frames_in=7)
    model = tiny_model(spec, dim=width, decoder_width=width, grouping={"order": "t w h"})  # 帧内先 w 后 h
    half = width // 4
    expected = np.zeros((8, width))
    for n, (w, h) in enumerate(itertools.product(range(4), range(2))):
        for axis, place in enumerate((h, w)):
            for i in range(half):
                angle = math.pi * place / (2 * (2, 4)[axis]) ** (i / (half - 1))  # 波长 2 … 4 倍边长
                expected[n, 2 * axis * half + i] = math.sqrt(2) * math.sin(angle)
                expected[n, (2 * axis + 1) * half + i] = math.sqrt(2) * math.cos(angle)
    codes = model.position(torch.zeros(1, 8 * 8, width))[0].unflatten(0, (8, 8)) - model.position.group[:, None]
    guide = model.position.of(torch.tensor([3])) - model.position.group[3]  # 解码器得到的
    for found in (*codes.detach(), guide[0].detach()):
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)
    assert not [name for name, _ in model.named_parameters() if "spatial" in name]


def test_learned_spatial_codes_belong_to_the_place_not_to_the_frame() -> None:
    spec = small_spec()
    model = tiny_model(spec, spatial_position="learned")
    codes = model.position(torch.zeros(1, 4 * 8, 16))[0].unflatten(0, (4, 8)) - model.position.group[:, None]
    torch.testing.assert_close(codes, codes[:1].expand(4, -1, -1))
    assert {tuple(p.shape) for name, p in model.named_parameters() if "spatial" in name} == {(1, 8, 16)}
    model.loss(small_batch(spec))["loss"].backward()
    assert model.position.spatial.grad.abs().min() > 0


def draws(model: Any, count: int = 4000) -> np.ndarray:
    drawn = model._draw_removed(Draws(small_batch(small_spec(), count=count)))
    return np.bincount(drawn.numpy(), minlength=model.groups) / count


def test_a_window_loses_a_uniformly_drawn_group_in_training_only() -> None:
    model = tiny_model(small_spec())
    torch.manual_seed(0)
    np.testing.assert_allclose(draws(model), 0.25, atol=0.03)  # 4.4 个标准差
    assert draws(model.eval())[-1] == 1
    off = tiny_model(small_spec(), random_patchify=False)
    assert off.training and draws(off)[-1] == 1
    torch.manual_seed(0)
    np.testing.assert_allclose(draws(tiny_model(small_spec(), last_group_share=0.6))[-1], 0.6 + 0.4 / 4, atol=0.03)
    assert draws(tiny_model(small_spec(), last_group_share=1.0))[-1] == 1


def test_kept_groups_stay_in_order() -> None:
    model = tiny_model(small_spec())
    tokens = torch.arange(4 * 32.0).view(4, 32, 1)
    kept = model.remove_group(tokens, torch.arange(4))
    for b in range(4):
        expected = np.delete(tokens[b].numpy().reshape(4, 8), b, axis=0).reshape(24, 1)
        np.testing.assert_array_equal(kept[b].numpy(), expected)


@pytest.mark.parametrize("predict", ["state", "tendency"])
@pytest.mark.parametrize("training", [True, False])
def test_the_target_is_the_removed_frame_itself(predict: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """每个窗口各拿掉一帧；输出层归零之后，预测就是零（state）或最近的可见帧（tendency）。"""
    spec = small_spec()
    model = tiny_model(spec, predict=predict).train(training)
    nn.init.zeros_(model.decoder.head.weight)
    batch = small_batch(spec, count=4)
    window = window_of(batch).numpy()
    which = [2, 0, 3, 1] if training else [3, 3, 3, 3]
    if training:
        remove(model, which, monkeypatch)
    with outputs_of(model.to_frame) as frames:
        loss = model.loss(batch)["loss"].item()
    target = np.stack([window[b, i] for b, i in enumerate(which)])  # (B, k, H, W)
    nearest = np.stack([window[b, i - 1 if i > 0 else 1] for b, i in enumerate(which)])
    guess = nearest if predict == "tendency" else np.zeros_like(target)
    np.testing.assert_array_equal(frames[1].numpy(), target.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(frames[0].detach().numpy(), guess.transpose(0, 2, 3, 1))
    assert loss == pytest.approx(((guess - target) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"predict": "tendency"}, {"grouping": TUBES}, {"query": "resampled"}])
def test_the_removed_pixels_cannot_leak(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """预测对被拿掉区块的原始像素的梯度逐位为零，对每个可见区块都不为零。"""
    spec = small_spec()
    model = tiny_model(spec, mask_ratio=0.0, **options)
    batch = small_batch(spec, count=model.groups)
    window = window_of(batch).requires_grad_()
    remove(model, list(range(model.groups)), monkeypatch)
    with outputs_of(model.to_frame) as made:
        model.loss(with_window(batch, window))
    (gradient,) = torch.autograd.grad((made[0] * torch.randn(made[0].shape)).sum(), window)
    tokens = model.tokenize(gradient.permute(0, 3, 4, 1, 2).flatten(3)).unflatten(1, (model.groups, model.size))
    moved = tokens.abs().sum((2, 3))  # (B, G)
    assert torch.equal(moved == 0, torch.eye(model.groups, dtype=torch.bool))


def test_the_decoder_is_told_which_group_by_the_encoders_own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small_spec()
    model = tiny_model(spec)
    batch = small_batch(spec, count=3)
    remove(model, [1, 1, 1], monkeypatch)
    with outputs_of(model.decoder.code) as codes:
        loss = model.loss(batch)["loss"]
    place = model.position.spatial[0] + model.position.group[1]
    expected = model.decoder.code(place).expand(3, -1, -1)
    torch.testing.assert_close(codes[0], expected)
    loss.backward()
    assert (model.position.group.grad.abs().sum(1) > 0).all()  # 第 1 块的 token 不在了，梯度只能从解码器来
    with torch.no_grad(), outputs_of(model.to_frame) as made:
        torch.manual_seed(0)
        model.loss(batch)
        model.position.group[1] += 1
        torch.manual_seed(0)
        model.loss(batch)
    assert not torch.allclose(made[0], made[2])


@pytest.mark.parametrize("options", [{}, {"predict": "tendency"}, {"grouping": TUBES}])
@pytest.mark.parametrize("training", [True, False])
def test_invalid_fields_are_neither_trained_on_nor_scored(training: bool, options: dict[str, Any]) -> None:
    """插值得来的场可以作输入，不能作目标：改掉被拿掉的无效场，损失与梯度逐位不变。"""
    spec = small_spec()
    model = tiny_model(spec, **options).train(training)
    nn.init.normal_(model.decoder.head.weight)
    batch = small_batch(spec, count=4)
    batch = batch._replace(valid=torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(1)) > 0.4)

    def step(window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(9)
        model.zero_grad()
        with outputs_of(model.to_frame) as frames:
            loss = model.loss(with_window(batch, window))["loss"]
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()]), frames[1]

    window = window_of(batch)
    torch.manual_seed(9)
    removed = model._draw_removed(Draws(batch))
    group = torch.arange(model.groups).repeat_interleave(model.size)
    gone = group[None] == removed[:, None]  # (B, N) 被拿掉的 token
    unseen = gone[..., None] & ~batch.valid[:, model.token_time]  # (B, N, k)
    value = model.tokenize(window.permute(0, 3, 4, 1, 2).flatten(3)).unflatten(2, (-1, 3))
    assert 0 < int(unseen.sum()) < int(gone.sum()) * 3
    noise = torch.where(unseen[:, :, None], 100.0, 0.0).expand_as(value)
    changed = window + _untokenize(model, noise.flatten(2), window.shape)
    (loss, gradient, target), (loss2, gradient2, target2) = step(window), step(changed)
    assert not torch.equal(target, target2)
    assert torch.equal(loss, loss2) and torch.equal(gradient, gradient2)
    kept = value[(gone[..., None] & ~unseen)[:, :, None].expand_as(value)]
    nn.init.zeros_(model.decoder.head.weight)
    if model.config.predict == "state":
        assert step(window)[0].item() == pytest.approx(float(kept.square().mean()), rel=1e-5)


def _untokenize(model: Any, tokens: Tensor, shape: torch.Size) -> Tensor:
    """tokenize 的转置（它是置换，转置就是逆）。"""
    fields = torch.zeros(shape, requires_grad=True)
    made = model.tokenize(fields.permute(0, 3, 4, 1, 2).flatten(3))
    return torch.autograd.grad(made, fields, tokens)[0]


def test_a_batch_without_one_valid_target_changes_nothing() -> None:
    spec = small_spec()
    model = tiny_model(spec)
    batch = small_batch(spec)
    loss = model.loss(batch._replace(valid=torch.zeros_like(batch.valid)))["loss"]
    loss.backward()
    assert loss.item() == 0 and all(float(p.grad.abs().max()) == 0 for p in model.parameters())
