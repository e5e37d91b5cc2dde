"""PastNet：参数个数与公开的相等，差的逐项列出；滤波与 numpy.fft 相比；逐帧、相加、T_out ≠ T_in；预训练与冻结。"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.training.preflight import smoke
from models.pastnet import FourierBranch, FourierFilter, Halve, Residual
from tests.engine.runs import ROOT
from tests.models.layers.numpy_layers import batch_norm, conv, values
from tests.models.small import count, make_model, on_paper, outputs_of, small_batch, small_spec
from util.batch import Batch
from util.config import load_config

SIZES = {"width": 8, "res_units": 4, "res_layers": 1, "latent_dim": 8, "codebook_size": 16}
SMALL = {"name": "pastnet", **SIZES, "hid_T": 16, "N_T": 2, "patch": [4, 4], "fourier_dim": 8}
MEMORY = {"name": "pastnet", "task": "reconstruct", **SIZES}


def small(spec: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return make_model({**SMALL, **options}, spec).eval()


CODEBOOK, AVERAGES, SECOND_LINEAR = 512 * 64, 512 * 64, 256 * 128 + 128  # 公开的计数里从来没有梯度的三样


@pytest.mark.parametrize(
    ("shape", "options", "public"),
    [
        ((10, 1, 64, 64), {}, 16_498_326),  # train_model.py 的默认值，也是它的日志里的 16.498326
        ((10, 1, 64, 64), {"res_units": 64, "res_layers": 2}, 16_497_302),  # 类的默认值
        ((12, 1, 32, 64), {}, 16_933_014),
        ((12, 4, 32, 64), {}, 17_066_904),
    ],
)
def test_counts_are_the_public_ones_less_what_never_had_a_gradient(
    shape: tuple[int, int, int, int], options: dict[str, int], public: int
) -> None:
    assert count(on_paper("pastnet", shape, **options)) == public - CODEBOOK - AVERAGES - SECOND_LINEAR
    assert CODEBOOK + AVERAGES + SECOND_LINEAR == 98_432


def test_each_part_has_the_public_count() -> None:
    model = on_paper("pastnet", (10, 1, 64, 64))
    assert count(model.encoder) + count(model.decoder) == 889_921 - CODEBOOK - AVERAGES
    assert count(model.fourier) == 127_061 - SECOND_LINEAR
    assert count(model.propagation) == 15_481_344
    assert count(model.memory) == 0
    assert {name: tuple(b.shape) for name, b in model.memory.named_buffers()} == {
        "codes": (512, 64), "counts": (512,), "sums": (512, 64),
    }  # fmt: skip


def test_other_numbers_of_frames_out_change_only_the_last_block() -> None:
    per_channel = 204 * 256 // 2 // 8 + 4 * 3  # 3² + 5² + 7² + 11² = 204；四个偏置、四个 GroupNorm
    same, fewer = on_paper("pastnet", (12, 1, 32, 64)), on_paper("pastnet", (12, 1, 32, 64), frames_out=4)
    assert count(same) - count(fewer) == 8 * 64 * per_channel


def randomize(module: nn.Module) -> Any:
    """初值里的 0、1 与小数会盖住抄漏的地方。"""
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return module.double().eval()


@pytest.mark.parametrize("grid", [(4, 4), (2, 4), (3, 5), (4, 2), (1, 3)])
def test_fourier_filter_equals_numpy(grid: tuple[int, int]) -> None:
    filter_ = randomize(FourierFilter(12))
    x = np.random.default_rng(0).normal(size=(2, *grid, 12))
    spectrum = np.fft.rfft2(x, axes=(1, 2), norm="ortho")
    mixed = np.zeros_like(spectrum)
    for block in range(4):
        part = slice(3 * block, 3 * block + 3)
        made = spectrum[..., part]
        for layer in (filter_.first, filter_.second):
            weight, bias = (values(p)[0, block] + 1j * values(p)[1, block] for p in (layer.weight, layer.bias))
            made = made @ weight + bias
            if layer is filter_.first:
                made = np.maximum(made.real, 0) + 1j * np.maximum(made.imag, 0)
        mixed[..., part] = made
    expected = np.fft.irfft2(mixed, grid, axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(values(filter_.float()(torch.from_numpy(x))), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch", [(4, 4), (8, 4), (4, 12)])
def test_fourier_branch_equals_its_steps(patch: tuple[int, int]) -> None:
    branch: Any = randomize(FourierBranch((2, 2), (16, 24), 8, patch)).float()
    frames = torch.randn(3, 2, 16, 24)
    tiles = frames.unfold(2, patch[0], patch[0]).unfold(3, patch[1], patch[1])  # (N, C, h', w', p, q)
    tokens = torch.einsum("nchwpq,dcpq->nhwd", tiles, branch.embed.weight) + branch.embed.bias + branch.position
    tokens = tokens + branch.filter(F.layer_norm(tokens, [8], branch.norm1.weight, branch.norm1.bias, 1e-6))
    inner = F.gelu(F.layer_norm(tokens, [8], branch.norm2.weight, branch.norm2.bias, 1e-6) @ branch.widen.weight.T
                   + branch.widen.bias)  # fmt: skip
    tokens = tokens + F.adaptive_avg_pool1d(inner.flatten(0, 2)[None], 8)[0].view_as(tokens)
    made = F.layer_norm(tokens, [8], branch.norm3.weight, branch.norm3.bias, 1e-6)
    for layer in (branch.to_grid[0], branch.to_grid[2], branch.to_grid[4]):  # 核与步长相同：各块互不相干
        made = torch.einsum("nhwd,dcpq->nhpwqc", made, layer.weight) + layer.bias
        made = made.flatten(1, 2).flatten(2, 3)
        made = made.tanh() if layer is not branch.to_grid[4] else made
    assert [branch.to_grid[i].out_channels for i in (0, 2, 4)] == [32, 8, 2]
    torch.testing.assert_close(branch(frames), made.movedim(-1, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", ["identity", "released"])
def test_residual_equals_the_written_out_formula(residual: Any) -> None:
    """released：公开代码的第一个 ReLU 就地改了 x，加的是 relu(x)。"""
    unit: Any = randomize(Residual(4, 3, "zeros", residual))
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    _, wide, norm, _, narrow, last = unit.block
    assert (wide.bias, narrow.bias) == (None, None)
    wide.bias, narrow.bias = (nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (3, 4))
    y = batch_norm(conv(np.maximum(values(x), 0), wide), norm)
    y = batch_norm(conv(np.maximum(y, 0), narrow), last)
    added = values(x) if residual == "identity" else np.maximum(values(x), 0)
    np.testing.assert_allclose(values(unit(x)), added + y, rtol=1e-9, atol=1e-9)


def test_the_two_branches_are_added() -> None:
    spec = small_spec(frames_in=4, frames_out=2)
    model, history = small(spec), small_batch(spec).history
    with outputs_of(model.decoder) as decoded, outputs_of(model.fourier) as filtered:
        made, _, _ = model(history)
    assert torch.equal(made.flatten(0, 1), decoded[0] + filtered[0])
    last = make_model({**SMALL, "predict": "tendency"}, spec).eval()
    last.load_state_dict(model.state_dict())
    assert torch.equal(last(history)[0], made + history[:, -1:])


@pytest.mark.parametrize(
    ("frames_in", "frames_out", "partner"),
    [(3, 3, [0, 1, 2]), (4, 2, [2, 3]), (3, 1, [2]), (2, 4, [0, 1, 1, 1])],
)
def test_the_fourier_branch_sees_one_frame(frames_in: int, frames_out: int, partner: list[int]) -> None:
    spec = small_spec(frames_in=frames_in, frames_out=frames_out)
    model, history = small(spec), small_batch(spec, count=1).history
    model.propagation.register_forward_hook(lambda _module, _args, output: torch.zeros_like(output))  # 关掉另一路
    for frame in range(frames_in):
        other = history.clone()
        other[:, frame] += 1
        changed = (model(other)[0] != model(history)[0]).flatten(2).any(2)[0]
        assert changed.tolist() == [p == frame for p in partner]


def test_the_fourier_branch_sees_all_frames_when_told() -> None:
    spec = small_spec(frames_in=3, frames_out=2)
    model, history = small(spec, fourier_frames="all"), small_batch(spec, count=2).history
    with outputs_of(model.fourier) as filtered:
        made = model.filtered(history)
    assert filtered[0].shape == (2, 2 * 3, 8, 16)  # T_out · C 个通道
    assert torch.equal(made, torch.stack([filtered[0][:, :3], filtered[0][:, 3:]], 1))  # 时间在外，通道在内
    for frame in range(3):
        other = history.clone()
        other[:, frame] += 1
        assert (model.filtered(other) != made).flatten(2).any(2).all()


def test_latents_are_the_codes_before_quantisation() -> None:
    spec = small_spec()
    model, frames = small(spec), small_batch(spec, count=2).history[:, -1:]
    encoded = model.encoder(frames[:, 0])  # (N, D, h, w)
    rows = model.latents(frames, None)
    assert rows.shape == (2 * 2 * 4, 8)
    for (n, y, x), row in zip(np.ndindex(2, 2, 4), rows, strict=True):
        torch.testing.assert_close(row, encoded[n, :, y, x])


def test_circular_longitude_has_no_seam() -> None:
    spec = small_spec(grid=(8, 32), frames_out=2)
    history = small_batch(spec).history
    for padding in ("circular_lon", "zeros"):
        model = small(spec, padding=padding)
        model.fourier.register_forward_hook(lambda _module, _args, output: torch.zeros_like(output))  # 它认得经度
        with torch.no_grad():
            turned, made = model(history.roll(12, -1))[0], model(history)[0].roll(12, -1)  # 12 是步长的倍数
        assert torch.allclose(turned, made, atol=1e-5) == (padding == "circular_lon")


def test_circular_halving_equals_plain_on_a_field_laid_out_three_times() -> None:
    torch.manual_seed(0)
    halve, plain = Halve(3, 4, "circular_lon"), Halve(3, 4, "zeros")
    plain.load_state_dict(halve.state_dict())
    x = torch.randn(2, 3, 6, 8)
    assert halve(x).shape == plain(x).shape == (2, 4, 3, 4)
    assert torch.allclose(halve(x), plain(x.repeat(1, 1, 1, 3))[..., 4:8], atol=1e-6)


def masked_error(made: Tensor, truth: Tensor, valid: Tensor) -> float:
    made = made.detach()
    kept = [float((made[i] - truth[i]).square().mean()) for i in np.ndindex(*valid.shape) if valid[i]]
    return sum(kept) / len(kept)


def some_invalid(batch: Batch) -> Batch:
    batch.valid[0, -1, 1] = batch.valid[1, 0, 2] = batch.valid[2, 1] = False
    return batch


def test_commitment_is_part_of_the_loss() -> None:
    spec = small_spec()
    batch = some_invalid(small_batch(spec))
    model = small(spec, commitment=0.7)
    made, commitment, _ = model(batch.history)
    found = model.loss(batch)
    error = masked_error(made, batch.future, batch.valid[:, spec.frames_in :])
    assert float(found["loss"].detach()) == pytest.approx(error + 0.7 * float(commitment.detach()), rel=1e-5)
    assert float(found["mse"]) == pytest.approx(error, rel=1e-5)
    assert not any(found[name].requires_grad for name in ("mse", "commitment", "perplexity"))
    (gradient,) = torch.autograd.grad(commitment, model.encoder[0].weight)
    assert gradient.abs().sum() > 0


def test_reconstruction_covers_every_valid_field_of_the_window() -> None:
    spec = small_spec(frames_out=2)
    batch = some_invalid(small_batch(spec))
    torch.manual_seed(0)
    model = make_model({**MEMORY, "commitment": 0.0}, spec).eval()
    window = torch.cat([batch.history, batch.future], 1)
    frames = [model.decoder(model.memory(model.encoder(window[:, t]))[0]) for t in range(spec.window)]
    expected = masked_error(torch.stack(frames, 1), window, batch.valid)
    assert float(model.loss(batch)["loss"].detach()) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="model.task = reconstruct trains the memory bank only"):
        model.forecast(batch.history, batch.time)


def test_both_tasks_name_their_common_parts_alike() -> None:
    spec = small_spec()
    memory = make_model(MEMORY, spec)
    forecast = small(spec).state_dict()
    assert not memory.can_forecast
    assert {name for name, _ in memory.named_children()} == {"inputs", "encoder", "memory", "decoder"}
    for name, value in memory.state_dict().items():
        assert forecast[name].shape == value.shape


@pytest.mark.parametrize("frozen", [False, True])
def test_freezing_stops_the_encoder_and_the_codes(frozen: bool) -> None:
    spec = small_spec()
    torch.manual_seed(0)
    model = make_model({**SMALL, "freeze_memory": frozen}, spec)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    model.loss(small_batch(spec))["loss"].backward()  # 造好就训练，没有先叫 train()
    optimizer.step()
    model.train().loss(small_batch(spec))
    still = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert still == ({name for name in before if name.startswith(("encoder.", "memory."))} if frozen else set())


@pytest.mark.parametrize("name", ["pastnet", "pastnet_memory"])
def test_a_step_after_restoring_equals_the_uninterrupted_one(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    """码本与它的计数都在检查点里：预检逐位比对。"""
    monkeypatch.chdir(ROOT)
    overrides = [f"data.cache_dir={tmp_path}", "run.device=cpu", "train.accumulate=2", "train.ema_decay=0.9"]
    assert smoke(load_config(f"config/{name}.yaml", overrides, smoke=True)) == 0


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        ({}, (10, 16), "model.name = pastnet shrinks the grid 10 x 16 by a factor of 4, which 10 in latitude"),
        ({}, (8, 18), "which 18 in longitude does not allow"),
        ({"patch": [8, 6]}, (8, 48), "in longitude: 6 must divide 48, be a multiple of 4 and leave at"),
        ({"patch": [12, 4]}, (8, 16), "model.patch = [12, 4] does not fit the grid 8 x 16 in latitude: 12 must"),
        ({"patch": [4, 8]}, (16, 16), "a multiple of 4 and leave at least 3; sizes that work there: [4]"),
        ({"padding": "circular_lon"}, (8, 16), "reach 5 columns, the latent of the grid 8 x 16 has 4; use zeros"),
        ({"latent_dim": 12}, (8, 16), "model.latent_dim = 12: input should be a multiple of 8"),
        ({"hid_T": 24}, (8, 16), "model.hid_T = 24: input should be a multiple of 16"),
        ({"task": "reconstruct"}, (8, 16), "model.hid_T = 16: has no meaning for model.task = reconstruct; leave"),
        ({"memory": 3}, (8, 16), "unknown key model.memory = 3"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named_with_its_rule(options: dict[str, Any], grid: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  下一行逐字比对
        small(small_spec(grid=grid), **options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("option", [{"predict": "tendency"}, {"freeze_memory": True}, {"N_T": 8}, {"patch": [4, 4]}])
def test_reconstruction_refuses_the_keys_of_the_forecast(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="has no meaning for model.task = reconstruct"):
        make_model({**MEMORY, **option}, small_spec())


@pytest.mark.parametrize("grid", [(4, 12), (8, 12), (12, 16)])
def test_no_parameter_is_dead(grid: tuple[int, int]) -> None:
    spec = small_spec(grid=grid)
    model = small(spec).train()
    model.loss(small_batch(spec))["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    for layer in (model.fourier.filter.first, model.fourier.filter.second):  # 实部与虚部都有
        assert layer.weight.grad.flatten(1).any(1).all() and layer.bias.grad.flatten(1).any(1).all()
