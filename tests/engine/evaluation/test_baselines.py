"""持续性预报与气候态：与 NumPy 的最小二乘逐点相比。"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.models.small import make_model, small_batch, small_spec, terms_of
from util.batch import Batch, DataSpec
from util.calendar import YEAR_HOURS, year_start

PERIOD = 2 * np.pi / YEAR_HOURS


def series(spec: DataSpec, hours: np.ndarray, seed: int = 0) -> np.ndarray:
    """(N, C, H, W)：日变化、年变化、半年变化，各格点不同，再加噪声。"""
    rng = np.random.default_rng(seed)
    shape = (spec.num_channels, spec.height, spec.width)
    fields = rng.standard_normal((len(hours), *shape))
    for wave in (np.cos(PERIOD * hours), np.sin(2 * PERIOD * hours), np.sin(2 * np.pi * hours / 24)):
        fields += wave[:, None, None, None] * rng.standard_normal(shape)
    return fields.astype(np.float32)


def windows(spec: DataSpec, hours: np.ndarray, fields: np.ndarray, valid: np.ndarray) -> list[Batch]:
    """步长 1、不跨缺口的全部窗口，分成大小不一的几批，次序打乱。"""
    length, step = spec.window, spec.interval_hours
    starts = [i for i in range(len(hours) - length + 1) if hours[i + length - 1] - hours[i] == (length - 1) * step]
    order = np.random.default_rng(1).permutation(starts)
    batches = []
    for part in np.array_split(order, 5):
        index = part[:, None] + np.arange(length)
        window = torch.from_numpy(fields[index])
        batches.append(
            Batch(
                window[:, : spec.frames_in],
                window[:, spec.frames_in :],
                torch.from_numpy(hours[index]),
                torch.from_numpy(valid[index]),
            )
        )
    return batches


def fitted(spec: DataSpec, batches: list[Batch]) -> Any:
    model = make_model({"name": "climatology"}, spec)
    for batch in batches:
        model.accumulate(batch)
    model.solve()
    return model


def least_squares(
    spec: DataSpec, hours: np.ndarray, fields: np.ndarray, valid: np.ndarray, at: np.ndarray, terms: int
) -> np.ndarray:
    """在 at 各时刻的气候态 (len(at), C, H, W)：每个通道、每个钟点各解一次 lstsq。"""

    def design(times: np.ndarray) -> np.ndarray:
        angle = PERIOD * times
        columns = [np.ones(len(times)), np.cos(angle), np.sin(angle), np.cos(2 * angle), np.sin(2 * angle)]
        return np.stack(columns[:terms], 1)

    made = np.zeros((len(at), *fields.shape[1:]))
    for channel in range(spec.num_channels):
        for hour in range(24):
            used = valid[:, channel] & (hours % 24 == hour)
            asked = at % 24 == hour
            if used.any() and asked.any():
                flat = fields[used, channel].reshape(used.sum(), -1).astype(np.float64)
                solution = np.linalg.lstsq(design(hours[used]), flat, rcond=None)[0]
                made[asked, channel] = (design(at[asked]) @ solution).reshape(-1, spec.height, spec.width)
    return made


def targets_only(batches: list[Batch], hours: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """在 valid 里只留下作过目标的时刻（每段开头的 T_in 帧没有作过）。"""
    seen = np.isin(hours, np.concatenate([batch.time[:, -1].numpy() for batch in batches]))
    return valid & seen[:, None]


def forecast_at(model: Any, spec: DataSpec, at: np.ndarray) -> np.ndarray:
    time = torch.from_numpy(at[:, None] + spec.interval_hours * np.arange(-spec.window + 1, 1))
    history = torch.zeros(len(at), spec.frames_in, spec.num_channels, spec.height, spec.width)
    return model.forecast(history, time)[:, 0, -1].numpy()


@pytest.mark.parametrize(("interval", "offset"), [(6, 0), (6, 2), (12, 0), (24, 18)])
def test_climatology_is_least_squares_per_point_and_hour_of_day(interval: int, offset: int) -> None:
    """一年多的序列，中间缺一段，四分之一的场无效；offset：零点不在 UTC 的数据集。"""
    spec = small_spec(channels=2, grid=(2, 3), frames_in=3, interval=interval)
    start = year_start(2001) + offset
    hours = start + np.arange(0, 500 * 24, interval)
    hours = hours[(hours < start + 120 * 24) | (hours >= start + 150 * 24)]
    fields = series(spec, hours)
    valid = np.random.default_rng(2).random((len(hours), 2)) > 0.25
    fields[~valid] = 1e3
    batches = windows(spec, hours, fields, valid)
    model = fitted(spec, batches)
    at = start + 900 * 24 + np.arange(0, 40 * 24, interval)
    expected = least_squares(spec, hours, fields, targets_only(batches, hours, valid), at, terms=5)
    np.testing.assert_allclose(forecast_at(model, spec, at), expected, atol=2e-5)


@pytest.mark.parametrize(("days", "terms"), [(365, 5), (364, 1), (40, 1)])
def test_less_than_a_year_gives_the_mean_of_each_hour(days: int, terms: int) -> None:
    """训练日期恰好满一年就够解谐波；开头的 T_in 帧虽不作目标，也算在日期之内。"""
    spec = small_spec(channels=1, grid=(2, 2), frames_in=3)
    hours = year_start(2003) + np.arange(0, days * 24, 6)
    fields, valid = series(spec, hours), np.ones((len(hours), 1), dtype=bool)
    batches = windows(spec, hours, fields, valid)
    at = hours[-1] + 6 + np.arange(0, 48, 6)
    expected = least_squares(spec, hours, fields, targets_only(batches, hours, valid), at, terms)
    np.testing.assert_allclose(forecast_at(fitted(spec, batches), spec, at), expected, atol=2e-5)


def test_climatology_of_several_frames_out_and_its_loss() -> None:
    spec = small_spec(channels=2, grid=(2, 2), frames_in=2, frames_out=3)
    hours = year_start(2001) + np.arange(0, 60 * 24, 6)
    fields, valid = series(spec, hours), np.ones((len(hours), 2), dtype=bool)
    batches = windows(spec, hours, fields, valid)
    model = fitted(spec, batches)
    batch = batches[0]
    made = model.forecast(batch.history, batch.time)
    assert made.shape == (len(batch.time), 1, 3, 2, 2, 2)
    for lead in range(3):
        expected = forecast_at(model, spec, batch.time[:, 2 + lead].numpy())
        np.testing.assert_array_equal(made[:, 0, lead].numpy(), expected)
    assert terms_of(model, batch)["loss"].item() == pytest.approx(
        float((made[:, 0] - batch.future).square().mean()), rel=1e-5
    )


def test_climatology_says_what_it_needs() -> None:
    spec = small_spec()
    model, history = make_model({"name": "climatology"}, spec), small_batch(spec).history
    with pytest.raises(ValueError, match="needs the time of the forecast"):
        model.forecast(history, None)


@pytest.mark.parametrize("frames_out", [1, 3])
def test_persistence_repeats_the_last_frame(frames_out: int) -> None:
    spec = small_spec(frames_out=frames_out)
    model, batch = make_model({"name": "persistence"}, spec), small_batch(spec)
    made = model.forecast(batch.history, None)
    assert made.shape == (3, 1, frames_out, 3, 8, 16)
    for lead in range(frames_out):
        assert torch.equal(made[:, 0, lead], batch.history[:, -1])


@pytest.mark.parametrize("name", ["persistence", "climatology"])
def test_baseline_loss_skips_invalid_fields(name: str) -> None:
    spec = small_spec(frames_out=2)
    batch = small_batch(spec)
    model = make_model({"name": name}, spec) if name == "persistence" else fitted(spec, [batch])
    valid = torch.rand(batch.valid.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    made, errors = model.forecast(batch.history, batch.time)[:, 0], []
    for b, lead, c in torch.nonzero(valid[:, 3:]).tolist():
        errors.append(((made[b, lead, c] - batch.future[b, lead, c]) ** 2).mean().item())
    assert terms_of(model, batch._replace(valid=valid))["loss"].item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert terms_of(model, batch._replace(valid=torch.zeros_like(valid)))["loss"].item() == 0
