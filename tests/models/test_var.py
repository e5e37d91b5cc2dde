"""VAR：损失与交叉熵相比；由粗到细的份量；目标与历史取自哪几帧；滚动；成员；不衰减的参数；写错的配置。"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from engine.optim import make_optimizer
from models.layers.latents import LatentScaling
from models.layers.var_condition import month_of, patches_of
from models.layers.var_sampling import sample
from models.var import Progressive, scale_weights
from tests.engine.runs import ROOT
from tests.models.small import changed, make_model, rollout, small_batch, small_spec
from util.batch import Batch, DataSpec
from util.training_config import TrainConfig

STAGE = {
    "name": "vqvae", "width": 8, "groups": 4, "multipliers": [1, 2], "blocks": 1, "attention": False,
    "middle_attention": False, "latent_dim": 4, "vocabulary": 16, "scales": 4,
}  # fmt: skip
TINY = {"name": "var", "first_stage": STAGE, "depth": 2, "width": 16, "heads": 2}
SPEC = small_spec(channels=2, grid=(8, 16), frames_in=3, frames_out=2)
FREE = {"cfg": 0.0, "top_k": None, "top_p": 1.0}


def small(spec: DataSpec = SPEC, seed: int = 0, **options: Any) -> Any:
    """权重与码本放大过：随机的场用得到许多码，条件看得出来。"""
    torch.manual_seed(seed)
    model = make_model({**TINY, **options}, spec)
    nn.init.normal_(model.first_stage.quantizer.codebook.weight, std=0.3)
    for parameter in [*model.net.parameters(), *model.condition.parameters()]:
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


def tokens_of(model: Any, fields: Tensor) -> Tensor:
    return torch.cat(model.first_stage.encode_tokens(fields), 1)


def logits_of(model: Any, frames: Tensor, hours: Tensor, keep: Tensor | None = None) -> Tensor:
    """frames (N, n + 1, C, H, W)，末一帧是目标。"""
    keep = torch.ones(len(frames), dtype=torch.bool) if keep is None else keep
    indices = model.first_stage.encode_tokens(frames[:, -1])
    if model.config.condition == "month":
        given = month_of(hours)
    else:
        given = torch.stack([model.first_stage.encode(one[:-1]) for one in frames])
    return model.net(model.condition(given, keep), model.first_stage.quantizer.teacher_inputs(indices))


@pytest.mark.parametrize("condition", ["history", "month"])
def test_loss_is_the_mean_cross_entropy_over_every_lead(condition: str) -> None:
    model, batch = small(condition=condition), small_batch(SPEC)
    window = torch.cat([batch.history, batch.future], 1)
    with torch.no_grad():
        found = model.loss(batch)
        losses, hits = [], []
        for lead in range(2):
            frames = window[:, lead : lead + 4]
            logits = logits_of(model, frames, batch.time[:, 3 + lead])
            targets = tokens_of(model, frames[:, -1])
            losses.append(F.cross_entropy(logits.mT, targets, reduction="none"))
            hits.append((logits.argmax(-1) == targets).float())
    entropy, hit = torch.cat(losses), torch.cat(hits)  # (2·B, L)
    assert found["loss"].item() == pytest.approx(entropy.mean().item(), rel=1e-5)
    lengths = model.net.lengths
    for k, (part, hit_part) in enumerate(zip(entropy.split(lengths, 1), hit.split(lengths, 1), strict=True), 1):
        assert found[f"loss_scale_{k}"].item() == pytest.approx(part.mean().item(), rel=1e-5)
        assert found[f"accuracy_scale_{k}"].item() == pytest.approx(hit_part.mean().item(), abs=1e-6)
    assert 0 < found["predicted_codes"].item() <= 1
    assert len(tokens_of(model, batch.future[:, 0]).unique()) > 4


def test_label_smoothing_is_torchs_and_only_in_training() -> None:
    spec = small_spec(channels=2, grid=(8, 16), frames_in=3, frames_out=1)  # 只有一个时效可抽
    model, batch = small(spec, label_smoothing=0.1, condition_dropout=0.0, sampling=FREE), small_batch(spec)
    frames = torch.cat([batch.history, batch.future], 1)
    with torch.no_grad():
        logits = logits_of(model, frames, batch.time[:, -1])
        targets = tokens_of(model, batch.future[:, 0])
        expected = {s: F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=s) for s in (0.0, 0.1)}
        by_hand = -(
            0.9 * logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0] + 0.1 * logits.log_softmax(-1).mean(-1)
        )
        assert by_hand.mean().item() == pytest.approx(expected[0.1].item(), rel=1e-5)
        assert model.eval().loss(batch)["loss"].item() == pytest.approx(expected[0.0].item(), rel=1e-5)
        assert model.train().loss(batch)["loss"].item() == pytest.approx(expected[0.1].item(), rel=1e-5)


def test_invalid_frames_are_no_targets() -> None:
    """一个通道无效，整帧不算；其余的窗口照常平均。"""
    spec = small_spec(channels=2, grid=(8, 16), frames_in=3, frames_out=1)
    model, batch = small(spec), small_batch(spec)
    batch.valid[0, -1, 1] = False
    rest = changed(batch, itemgetter(slice(1, None)))
    with torch.no_grad():
        for name, value in model.loss(rest).items():
            if name != "predicted_codes":
                assert model.loss(batch)[name].item() == pytest.approx(value.item(), rel=1e-5)
        batch.valid[:] = False
        assert model.loss(batch)["loss"].item() == 0


def test_training_draws_leads_and_drops_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    """各时效、丢与不丢都抽得到；历史总是目标前面的几帧。"""
    model = small(condition_dropout=0.5, history={"frames": 2}).train()
    window = torch.arange(5.0)[None, :, None, None, None].expand(400, 5, 2, 8, 16)  # 第 i 帧处处是 i
    batch = Batch(window[:, :3], window[:, 3:], torch.arange(5).expand(400, 5), torch.ones(400, 5, 2, dtype=torch.bool))
    drawn: list[tuple[Tensor, Tensor, Tensor]] = []
    pairs = model._pairs
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(model, "_pairs", lambda *given: drawn.append(pairs(*given)) or drawn[-1])
        model.loss(batch)
    ((frames, hours, valid),) = drawn
    seen = frames[..., 0, 0, 0]  # (N, 3)
    assert seen.shape == (400, 3) and valid.all()
    assert torch.equal(seen - seen[:, -1:], torch.tensor([-2.0, -1.0, 0.0]).expand(400, 3))
    assert torch.equal(seen[:, -1].long(), hours)
    assert 150 < (hours == 3).sum() < 250 and set(hours.tolist()) == {3, 4}
    kept: list[Tensor] = []
    handle = model.condition.register_forward_pre_hook(lambda _module, args: kept.append(args[1]))
    model.loss(small_batch(SPEC, count=40))
    handle.remove()
    assert 8 < kept[0].sum() < 32


def test_scales_join_evenly_and_grow_from_a_hundredth() -> None:
    plan = Progressive(first_scales=2, until=0.5, warmup_steps=4)  # 共 60 步，30 步时全有

    def weights(step: int) -> list[float]:
        return scale_weights(step, 60, plan, 5)

    assert weights(0) == [1, 1] == weights(9)
    assert weights(10) == [1, 1, 0.01]
    assert weights(11) == [1, 1, 0.25]
    assert weights(13) == [1, 1, 0.75]
    assert weights(14) == [1, 1, 1] == weights(19)
    assert weights(20) == [1, 1, 1, 0.01]
    assert weights(30) == [1, 1, 1, 1, 0.01]
    assert weights(34) == [1] * 5 == weights(59)
    assert scale_weights(10, 60, Progressive(first_scales=2, until=0.5), 5) == [1, 1, 1]
    uneven = Progressive(first_scales=1, until=0.5, warmup_steps=2)  # 共 20 步；10 / 3 与 20 / 3 不是整数
    assert [len(scale_weights(n, 20, uneven, 4)) for n in range(11)] == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]


@pytest.mark.parametrize(("until", "warmup", "total"), [(0.9, 0, 3), (0.8, 50, 100), (0.5, 0, 1)])
def test_a_finest_scale_never_fully_trained_is_said(until: float, warmup: int, total: int) -> None:
    model = small(progressive={"first_scales": 1, "until": until, "warmup_steps": warmup})
    with pytest.raises(ValueError, match=rf"finest scale no step at full weight; the training has {total} steps"):
        model.at_step(0, total)
    with pytest.raises(ValueError, match=r"model\.progressive\.until"):
        small(progressive={"first_scales": 1, "until": 1.0})


def test_progressive_training_cuts_the_sequence() -> None:
    """份量仍是 1 / L；评测时总是全部的尺度；引擎没有说走到哪里时也是全部。"""
    spec = small_spec(channels=2, grid=(8, 16), frames_in=3, frames_out=1)
    plan = {"first_scales": 2, "until": 0.4, "warmup_steps": 2}  # 10 步：第 2、4 步加入
    model, batch = small(spec, progressive=plan, condition_dropout=0.0, sampling=FREE), small_batch(spec)
    lengths = model.net.lengths
    with torch.no_grad():
        whole = model.loss(batch)
        per_scale = [whole[f"loss_scale_{k}"].item() for k in range(1, 5)]
        model.train()
        assert model.loss(batch)["loss"].item() == pytest.approx(whole["loss"].item(), rel=1e-5)
        for step, weights in ((0, [1, 1]), (2, [1, 1, 0.01]), (4, [1, 1, 1, 0.01]), (5, [1, 1, 1, 0.5]), (9, [1] * 4)):
            model.at_step(step, 10)
            found = model.loss(batch)
            expected = sum(w * n * e for w, n, e in zip(weights, lengths, per_scale, strict=False)) / sum(lengths)
            assert found["loss"].item() == pytest.approx(expected, rel=1e-4)
            assert sum(name.startswith("accuracy") for name in found) == len(weights)
        model.at_step(0, 10)
        assert torch.equal(model.eval().loss(batch)["loss"], whole["loss"])


def test_compiled_training_is_the_same_and_does_not_recompile_each_step() -> None:
    """训练模式：随机的时效、丢掉的条件、逐步变的份量；一个尺度加入时才重新编译。只取图（eager），不生成反向。"""
    torch._dynamo.reset()
    model, batch = small(progressive={"first_scales": 2, "until": 0.5, "warmup_steps": 3}).train(), small_batch(SPEC)
    compiled = torch.compile(model.loss, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=False), torch.no_grad():
        for step in (0, 5, 6, 20):
            model.at_step(step, 20)
            torch.manual_seed(step)
            expected = model.loss(batch)["loss"]
            torch.manual_seed(step)
            torch.testing.assert_close(compiled(batch)["loss"], expected, rtol=1e-4, atol=1e-6)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step in (6, 7, 8):  # 份量在变，个数不变
                model.at_step(step, 20)
                compiled(batch)


def test_forecast_rolls_one_pyramid_a_frame() -> None:
    """两帧一次报出，与只会报一帧的同一个模型由引擎滚两次相同（头一帧）；第二帧的条件里有生成的头一帧。"""
    one_frame = small_spec(channels=2, grid=(8, 16), frames_in=3, frames_out=1)
    two, one = (small(spec, sampling={**FREE, "top_k": 1}) for spec in (SPEC, one_frame))
    batch = small_batch(SPEC)
    with torch.no_grad():
        made = two.forecast(batch.history, batch.time)
        rolled = rollout(one, batch.history, batch.time[:, :3], 2, one_frame)
    assert made.shape == (3, 1, 2, 2, 8, 16)
    torch.testing.assert_close(made, rolled, rtol=1e-4, atol=1e-4)
    assert not torch.isclose(made[:, :, 0], made[:, :, 1]).all()


def changing(spec: DataSpec = SPEC, **options: Any) -> Any:
    """阶段一编码差，差的均值与标准差不是 0 与 1。"""
    model = small(spec, first_stage={**STAGE, "encodes": "tendency"}, **options)
    model.first_stage.inputs.mean.copy_(torch.tensor([0.1, -0.2]).view(2, 1, 1))
    model.first_stage.inputs.std.copy_(torch.tensor([0.5, 2.0]).view(2, 1, 1))
    return model


def test_patches_hold_the_scaled_changes_and_the_last_frame() -> None:
    frames, scaling = torch.randn(2, 3, 2, 4, 6), LatentScaling((2, 1, 1))
    scaling.mean.copy_(torch.tensor([0.1, -0.2]).view(2, 1, 1))
    scaling.std.copy_(torch.tensor([0.5, 2.0]).view(2, 1, 1))
    found = patches_of(frames, scaling, 2, 3).numpy()  # 每块 2 × 2
    assert found.shape == (2, 3, 2 * 4, 2, 3)
    x = frames.numpy()
    for n, t, c, y, z in np.ndindex(2, 3, 2, 4, 6):
        change = (x[n, t + 1, c, y, z] - x[n, t, c, y, z] - [0.1, -0.2][c]) / [0.5, 2.0][c] if t < 2 else 0
        expected = x[n, 2, c, y, z] if t == 2 else change
        place = (c * 2 + y % 2) * 2 + z % 2
        assert found[n, t, place, y // 2, z // 2] == pytest.approx(expected, abs=1e-5)
    assert torch.equal(patches_of(frames[:, -1:], scaling, 2, 3), torch.from_numpy(found[:, 2:]))  # 只有一帧时没有差


def test_tokens_of_changes_are_predicted_and_added_to_the_last_frame() -> None:
    """损失的目标是差的编号；预报是最后一帧加解码的差，滚动与引擎滚动相同。"""
    spec = small_spec(channels=2, grid=(8, 16), frames_in=3, frames_out=1)
    options = {"history": {"frames": 2}, "sampling": {**FREE, "top_k": 1}}
    model, batch = changing(spec, **options), small_batch(spec)
    stage, everyone = model.first_stage, torch.ones(3, dtype=torch.bool)
    with torch.no_grad():
        given = patches_of(batch.history[:, 1:], stage.inputs, *stage.latent_shape[1:])
        indices = stage.encode_tokens(batch.future[:, 0] - batch.history[:, -1])
        logits = model.net(model.condition(given, everyone), stage.quantizer.teacher_inputs(indices))
        expected = F.cross_entropy(logits.mT, torch.cat(indices, 1)).item()
        assert model.loss(batch)["loss"].item() == pytest.approx(expected, rel=1e-5)
        made = model.forecast(batch.history, batch.time)[:, 0, 0]
        f_hat = sample(model.net, stage.quantizer, model.condition, given, model.config.sampling, [Generator()] * 3)
        torch.testing.assert_close(made, batch.history[:, -1] + stage.decode_latents(f_hat), rtol=1e-5, atol=1e-5)
        two = changing(SPEC, **options)
        rolled = rollout(model, batch.history, batch.time[:, :3], 2, spec)
        torch.testing.assert_close(two.forecast(batch.history, None), rolled, rtol=1e-4, atol=1e-4)
        members = two.forecast(batch.history, None, 2, Generator().manual_seed(0))
    assert members.shape == (3, 2, 2, 2, 8, 16)
    torch.testing.assert_close(members[:, 0], rolled[:, 0], rtol=1e-4, atol=1e-4)  # top_k = 1：成员都一样


def test_changes_from_an_invalid_frame_are_no_targets() -> None:
    """与阶段一相同：最后一帧历史是插值来的，那个差不作目标；编码场的不管历史。"""
    spec = small_spec(channels=2, grid=(8, 16), frames_in=3, frames_out=1)
    batch = small_batch(spec)
    batch.valid[0, 2, 1] = False
    rest = changed(batch, itemgetter(slice(1, None)))
    with torch.no_grad():
        for model, same in ((changing(spec), True), (small(spec), False)):
            pair = [model.loss(part)["loss"].item() for part in (batch, rest)]
            assert (pair[0] == pytest.approx(pair[1], rel=1e-5)) == same


def test_only_the_last_history_frames_count() -> None:
    model, batch = small(history={"frames": 2}, sampling=FREE), small_batch(SPEC)
    changed = batch.history.clone()

    def made() -> Tensor:
        with torch.no_grad():
            return model.forecast(changed, batch.time, 1, Generator().manual_seed(0))

    before = made()
    changed[:, 0] += 5
    assert torch.equal(made(), before)
    changed[:, 1] += 5
    assert not torch.isclose(made(), before).all()


def test_members_do_not_depend_on_the_batch() -> None:
    """两个窗口各三个成员：引擎怎样切都是同样的。"""
    model, batch = small(sampling=FREE), small_batch(SPEC, count=2)

    def made(first: int, limit: int | None = None) -> Tensor:
        generators = [Generator().manual_seed(first + i) for i in range(6)]
        with torch.no_grad():
            return rollout(model, batch.history, batch.time[:, :3], 4, SPEC, generators, limit)

    found, other = [made(7, limit) for limit in (None, 2, 1)], made(13)
    for again in found[1:]:
        torch.testing.assert_close(again, found[0], rtol=1e-4, atol=1e-4)
    assert not torch.isclose(found[0][:, 0], found[0][:, 1]).all()
    assert not torch.isclose(found[0], other).all()


def test_month_model_makes_fields_of_the_target_month() -> None:
    model, batch = small(condition="month", sampling={**FREE, "top_k": 1}), small_batch(SPEC, count=2)
    january, july = (torch.tensor([[hour + 6 * i for i in range(5)]] * 2) for hour in (24 * 10, 24 * 200))
    with torch.no_grad():
        made = model.forecast(batch.history, january)
        assert torch.equal(made, model.forecast(batch.history + 1, january))  # 不看历史
        assert torch.equal(made[0], made[1])
        assert not torch.isclose(made, model.forecast(batch.history, july)).all()
        with pytest.raises(ValueError, match="needs the time"):
            model.forecast(batch.history, None)


def test_first_stage_is_frozen_and_travels_with_the_checkpoint() -> None:
    model = small().train()
    assert not model.first_stage.training and not any(p.requires_grad for p in model.first_stage.parameters())
    options = model.portable_options()
    assert options["first_stage"]["name"] == "vqvae"
    again = make_model(options, SPEC)
    again.load_state_dict(model.state_dict())
    batch = small_batch(SPEC)
    assert torch.equal(model.eval().loss(batch)["loss"], again.eval().loss(batch)["loss"])


@pytest.mark.parametrize("condition", ["history", "month"])
def test_only_matrices_decay(condition: str) -> None:
    model = small(condition=condition)
    config = TrainConfig(epochs=1, batch_size=1, optimizer="adamw", lr=1e-3, weight_decay=0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [
        ({names[id(p)] for p in g["params"]}, g["weight_decay"]) for g in make_optimizer(model, config).param_groups
    ]
    (decayed, weight), (kept, zero) = groups
    assert (weight, zero) == (0.05, 0.0)
    assert decayed | kept == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"net.embed.weight", "net.head.weight", "net.blocks.0.attention.qkv.weight"} < decayed
    assert {"net.position", "net.start_position", "net.level", "net.blocks.0.attention.log_temperature"} < kept
    assert all(name.endswith(("weight", "bias")) for name in decayed)


WRONG: dict[str, dict[str, Any]] = {
    "no tokens of several scales": {
        "first_stage": {"name": "sd_vae", "weights": "random", "architecture": {"block_out_channels": [32, 32]}}
    },
    r"encodes tendencies, not fields; only var with a history": {
        "condition": "month",
        "first_stage": {**STAGE, "encodes": "tendency"},
    },
    r"data\.frames_in = 3: model\.history\.frames = 4 asks for more": {"history": {"frames": 4}},
    r"first_scales is at most 3": {"progressive": {"first_scales": 4, "until": 0.5}},
    r"sampling\.cfg = 1\.5 guides away from the unconditional branch": {
        "condition_dropout": 0.0,
        "sampling": {"cfg": 1.5},
    },
    "nothing of the history is seen": {"history": {"context": False, "adaln": False, "start": False, "local": False}},
    r"model\.heads = 3: does not divide model\.width = 16; heads that work: \[1, 2, 4, 8\]": {"heads": 3},
}


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_are_one_line(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message) as error:
        make_model({**TINY, **WRONG[message]}, SPEC)
    assert "\n" not in str(error.value)
