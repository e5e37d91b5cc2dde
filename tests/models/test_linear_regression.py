"""岭回归：原问题与对偶都与 scikit-learn 的 Ridge 逐数相比；内存与帧数的上限。"""

from __future__ import annotations

import re
from dataclasses import replace
from operator import itemgetter
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.compose import TransformedTargetRegressor
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from engine.loading import load_weights
from engine.one_pass import solve_one_pass
from models.layers.forcings import Inputs
from models.linear_regression import ALPHAS, Dual, Primal
from tests.models.small import changed, make_model, small_spec, terms_of
from util.batch import Batch, DataSpec

SPEC = small_spec(channels=2, grid=(4, 8), frames_in=3, frames_out=2)  # F = 64，D = 192，P = 128
SMALL, LARGE = 60, 300  # max_frames：对偶小、原问题小


def series(count: int, seed: int = 0, spec: DataSpec = SPEC) -> np.ndarray:
    """(count, C, H, W) float32：有记忆，各格点的平均与幅度不同，其中一个格点不变。"""
    rng = np.random.default_rng(seed)
    fields = rng.standard_normal((count, spec.num_channels, spec.height, spec.width))
    for i in range(1, count):
        fields[i] += 0.8 * np.roll(fields[i - 1], 1, axis=-1)
    scale = np.random.default_rng(7).uniform(0.05, 3, (2, *fields.shape[1:]))
    fields = fields * scale[0] + scale[1]
    fields[:, 1, 0, 0] = 0.3
    return fields.astype(np.float32)


def windows(fields: np.ndarray, spec: DataSpec = SPEC) -> Batch:
    """步长 1 的全部窗口。"""
    index = np.arange(len(fields) - spec.window + 1)[:, None] + np.arange(spec.window)
    window = torch.from_numpy(fields[index])
    valid = torch.ones(*index.shape, spec.num_channels, dtype=torch.bool)
    return Batch(window[:, : spec.frames_in], window[:, spec.frames_in :], torch.from_numpy(6 * index), valid)


def take(batch: Batch, rows: Any) -> Batch:
    return changed(batch, itemgetter(rows))


def fitted(batch: Batch, max_frames: int, spec: DataSpec = SPEC, val: Batch | None = None, **options: Any) -> Any:
    """分几批、打乱次序看一遍。"""
    model = make_model({"name": "linear_regression", "alpha": 1.0, "max_frames": max_frames, **options}, spec)
    solve_one_pass(model, shuffled(batch), [] if val is None else shuffled(val))
    return model.eval()


def shuffled(batch: Batch) -> list[Batch]:
    order = torch.randperm(len(batch.time), generator=torch.Generator().manual_seed(1))
    return [take(batch, part) for part in order.split(7)]


def flat(fields: torch.Tensor) -> np.ndarray:
    return fields.flatten(1).double().numpy()


def assert_forecasts(model: Any, batch: Batch, expected: np.ndarray, atol: float = 5e-5) -> None:
    made = model.forecast(batch.history, batch.time)
    assert made.shape == (len(expected), 1, *batch.future.shape[1:])
    np.testing.assert_allclose(made.flatten(1).numpy(), expected, atol=atol)


@pytest.mark.parametrize("count", [50, 250])  # 窗口比输入（192）少、多
@pytest.mark.parametrize("max_frames", [SMALL, LARGE])
@pytest.mark.parametrize("alpha", [0.1, 1.0, 30.0])
def test_ridge_is_scikit_learn(count: int, max_frames: int, alpha: float) -> None:
    if count > max_frames:
        return
    train, test = windows(series(count)), windows(series(20, seed=1))
    model = fitted(train, max_frames, alpha=alpha)
    assert isinstance(model.system, Dual if max_frames == SMALL else Primal)
    expected = Ridge(alpha=alpha).fit(flat(train.history), flat(train.future)).predict(flat(test.history))
    assert_forecasts(model, test, expected)


FORCED = replace(SPEC, forcings=("hour_of_day", "latitude"), diagnostic=("c1",))


@pytest.mark.parametrize("variant", ["ridge", "multi_output"])
@pytest.mark.parametrize("max_frames", [50, 500])
def test_forcings_are_inputs_and_diagnostic_channels_are_not(max_frames: int, variant: str) -> None:
    """与 scikit-learn 的相同，它看的是 Inputs 给出的历史；预报的仍是全部通道；惩罚照样挑得出。"""
    train, test = windows(series(45)), windows(series(20, seed=1))
    model = fitted(train, max_frames, FORCED, variant=variant, alpha=10.0)
    assert isinstance(model.system, Dual if max_frames == 50 else Primal)
    inputs = Inputs(FORCED)
    past, asked = (inputs(batch.history, batch.time).flatten(2).double().numpy() for batch in (train, test))
    scale = np.ones(past.shape[2])
    if variant == "multi_output":
        scale = past.reshape(-1, past.shape[2]).std(0)
        scale[scale < 1e-6] = 1
    past, asked = ((part / scale).reshape(len(part), -1) for part in (past, asked))
    assert_forecasts(model, test, Ridge(alpha=10.0).fit(past, flat(train.future)).predict(asked), 2e-4)
    chosen = fitted(train, max_frames, FORCED, test, variant=variant, alpha="auto")
    errors = [
        float(np.square(Ridge(alpha=alpha).fit(past, flat(train.future)).predict(asked) - flat(test.future)).sum())
        for alpha in ALPHAS
    ]
    best = Ridge(alpha=ALPHAS[int(np.argmin(errors))]).fit(past, flat(train.future)).predict(asked)
    assert_forecasts(chosen, test, best, 2e-4)


@pytest.mark.parametrize("variant", ["ridge", "multi_output"])
@pytest.mark.parametrize("max_frames", [SMALL, LARGE])
def test_the_penalty_is_the_best_of_scikit_learn(max_frames: int, variant: str, caplog) -> None:
    """验证误差最小的 α，与逐个 α 重新解、逐个窗口算误差选出的相同；预报也是它的。"""
    caplog.set_level("INFO")
    train, test = windows(series(50)), windows(series(20, seed=1))
    val = windows(0.5 * series(30, seed=2) + 0.5 * series(30, seed=3))
    val.valid[3, SPEC.frames_in, 1] = False
    val.future[3] = 1e3
    model = fitted(train, max_frames, variant=variant, alpha="auto", val=val)

    mean, scale = np.zeros(1), np.ones(1)
    if variant == "multi_output":
        frames = train.history.flatten(2).flatten(0, 1).double().numpy()
        mean, scale = np.tile(frames.mean(0), SPEC.frames_in), np.tile(frames.std(0), SPEC.frames_in)
        scale[scale < 1e-6] = 1  # 不变的那个格点
    good, errors = take(val, [i for i in range(len(val.time)) if i != 3]), {}
    for alpha in ALPHAS:
        ridge = Ridge(alpha=alpha, solver="svd").fit((flat(train.history) - mean) / scale, flat(train.future))
        made = ridge.predict((flat(good.history) - mean) / scale)
        errors[alpha] = np.square(made - flat(good.future)).sum(), ridge
    best = min(errors, key=lambda alpha: errors[alpha][0])
    assert ALPHAS[0] < best < ALPHAS[-1]
    assert f"alpha {best:.3g} has the lowest error of {len(good.time)} validation windows" in caplog.text
    assert_forecasts(model, test, errors[best][1].predict((flat(test.history) - mean) / scale))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("max_frames", [SMALL, LARGE])
def test_the_penalty_is_chosen_on_a_gpu(max_frames: int) -> None:
    """批在处理器上，模型在显卡上，与都在处理器上的相同。"""
    train, val, test = (windows(series(count, seed)) for count, seed in ((50, 0), (20, 2), (20, 1)))
    expected = fitted(train, max_frames, alpha="auto", val=val)(test.history)
    model = make_model({"name": "linear_regression", "alpha": "auto", "max_frames": max_frames}, SPEC).cuda()
    solve_one_pass(model, shuffled(train), shuffled(val))
    torch.testing.assert_close(model(test.history.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", [0, -1.0, True, "none", float("inf")])
def test_penalties_that_are_none(alpha: object) -> None:
    with pytest.raises(ValueError, match=r"model.alpha.*must be auto .* or a number above 0"):
        make_model({"name": "linear_regression", "alpha": alpha, "max_frames": 9}, SPEC)


def test_a_validation_split_without_a_good_window() -> None:
    batch = windows(series(50))
    with pytest.raises(ValueError, match=r"^data.splits.val: none of its windows .* give model.alpha a number"):
        fitted(batch, SMALL, alpha="auto", val=changed(batch, lambda part: part[:0]))


@pytest.mark.parametrize("max_frames", [SMALL, LARGE])
def test_multi_output_is_one_scikit_learn_ridge_per_variable(max_frames: int) -> None:
    """每个变量一个：输入与输出都标准化；输入的标准差按格点取，各历史帧合计。"""
    train, test = windows(series(50)), windows(series(20, seed=1))
    scaler = StandardScaler().fit(train.history.flatten(2).flatten(0, 1).double().numpy())

    def scaled(batch: Batch) -> np.ndarray:
        return np.concatenate(
            [scaler.transform(frame.flatten(1).double().numpy()) for frame in batch.history.unbind(1)], 1
        )

    expected = np.empty(test.future.shape)
    for variable in range(SPEC.num_channels):
        regressor = TransformedTargetRegressor(Ridge(alpha=10.0), transformer=StandardScaler())
        regressor.fit(scaled(train), flat(train.future[:, :, variable]))
        expected[:, :, variable] = regressor.predict(scaled(test)).reshape(len(expected), SPEC.frames_out, 4, 8)
    model = fitted(train, max_frames, variant="multi_output", alpha=10.0)
    assert_forecasts(model, test, expected.reshape(len(expected), -1))


@pytest.mark.parametrize("max_frames", [SMALL, LARGE])
def test_windows_with_an_invalid_target_are_left_out(max_frames: int) -> None:
    train, test = windows(series(50)), windows(series(20, seed=1))
    train.valid[:, : SPEC.frames_in] = False  # 历史无效不要紧
    train.valid[5, 3, 0] = train.valid[9, 4, 1] = False
    train.future[5, 0, 0] = train.future[9, 1, 1] = 1e3
    model = fitted(train, max_frames)
    used = [i for i in range(len(train.time)) if i not in (5, 9)]
    good = take(train, used)
    expected = Ridge(alpha=1.0).fit(flat(good.history), flat(good.future)).predict(flat(test.history))
    assert_forecasts(model, test, expected)
    with pytest.raises(ValueError, match="none of its 2 windows has all targets valid"):
        fitted(take(train, [5, 9]), max_frames)


def test_one_hour_may_look_different_in_different_windows() -> None:
    """插值的历史帧「只看过去」：同一时刻在不同窗口里不是同一个样子。"""
    train, test = windows(series(50)), windows(series(20, seed=1))
    train.history[10, 2] += 0.5
    train.history[30, 0, 1] -= 0.5
    expected = Ridge(alpha=1.0).fit(flat(train.history), flat(train.future)).predict(flat(test.history))
    model = fitted(train, SMALL)
    assert isinstance(model.system, Dual)
    assert_forecasts(model, test, expected)


def test_loss_is_the_valid_mean_square() -> None:
    train, test = windows(series(50)), windows(series(20, seed=1))
    model = fitted(train, SMALL)
    test.valid[:, -1, 0] = False
    made = model.forecast(test.history, test.time)[:, 0]
    error = (made - test.future).square().mean((-2, -1))[test.valid[:, SPEC.frames_in :]]
    assert terms_of(model, test)["loss"].item() == pytest.approx(error.mean().item(), rel=1e-5)


@pytest.mark.parametrize("max_frames", [SMALL, LARGE])
def test_weights_are_restored_from_a_checkpoint(max_frames: int) -> None:
    """buffer 的形状只由配置定，与看过多少窗口无关。"""
    options = {"name": "linear_regression", "variant": "multi_output", "alpha": 1.0, "max_frames": max_frames}
    batch = windows(series(20, seed=1))
    model, again = fitted(windows(series(50)), max_frames, variant="multi_output"), make_model(options, SPEC)
    load_weights(again, model.state_dict())
    assert torch.equal(again.forecast(batch.history, None), model.forecast(batch.history, None))
    if isinstance(model.system, Dual):
        with pytest.raises(ValueError, match=r"system.frames is \(60, 64\) in the checkpoint, \(61, 64\) here"):
            load_weights(make_model({**options, "max_frames": 61}, SPEC), model.state_dict())


@pytest.mark.parametrize("max_frames", [SMALL, LARGE])
def test_autocast_and_compile(max_frames: int) -> None:
    model, batch = fitted(windows(series(50)), max_frames), windows(series(20, seed=1))
    expected = model(batch.history)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(batch.history), expected)
    with torch.autocast("cpu", torch.bfloat16):
        made = model(batch.history).float()
    torch.testing.assert_close(made, expected, atol=1e-6 if max_frames == SMALL else 0.1, rtol=0.05)


def test_too_large_a_system_is_refused_before_any_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small_spec(channels=9, grid=(32, 64), frames_in=12, frames_out=4)
    gram, moment = 221_184**2 * 8 / 1e9, 221_184 * 73_728 * 8 / 1e9  # 391 GB、130 GB
    frames, square = 60_000 * 18_432 * 4 / 1e9, 60_000**2 * 8 / 1e9
    needed = f"need {4 * gram + 2.5 * moment:.3g} GB as primal, {5 * frames + 6 * square:.3g} GB as dual"
    options = {"name": "linear_regression", "alpha": 1.0, "max_frames": 60_000}
    monkeypatch.setattr(torch, "zeros", None)
    with pytest.raises(ValueError, match="^model.memory_gb = 8: .* " + re.escape(needed)):
        make_model(options, spec)


def test_more_frames_than_declared_are_refused() -> None:
    with pytest.raises(ValueError, match="^model.max_frames = 49: the training windows hold more frames"):
        fitted(windows(series(50)), 49)


@pytest.mark.parametrize("max_frames", [SMALL, LARGE])
def test_too_small_an_alpha_is_named(max_frames: int) -> None:
    batch = windows(series(12))
    with pytest.raises(ValueError, match="model.alpha = 1e-300 is too small"):
        fitted(take(batch, [*range(8)] * 5), max_frames, alpha=1e-300)
