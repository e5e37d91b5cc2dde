"""外强迫：太阳辐射与另一套公式（Spencer 1971）的数值积分相比；哪一帧带着哪些时刻的；不随时间变的；差加在哪里。"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
import torch

from models.layers.forcings import CHANGING, CONSTANT, Inputs, axes_of, solar, sun
from tests.models.small import small_batch, small_spec
from util.batch import DataSpec
from util.calendar import YEAR_HOURS, moment_of, parse_time
from util.variables import FORCINGS

SPEC = small_spec(channels=3, grid=(6, 8), frames_in=3, frames_out=2)


def spencer(hour: float) -> tuple[float, float, float]:
    """赤纬、时差（弧度）、(r₀/r)²：Spencer 1971, Search 2(5), 172；日数从 1 数起，一年按 365 天。"""
    whole = int(hour)
    moment = moment_of(whole)
    days = (moment - datetime(moment.year, 1, 1)).total_seconds() / 86400 + (hour - whole) / 24
    g = 2 * math.pi * days / 365
    declination = (
        0.006918 - 0.399912 * math.cos(g) + 0.070257 * math.sin(g) - 0.006758 * math.cos(2 * g)
        + 0.000907 * math.sin(2 * g) - 0.002697 * math.cos(3 * g) + 0.00148 * math.sin(3 * g)
    )  # fmt: skip
    equation = (
        0.000075 + 0.001868 * math.cos(g) - 0.032077 * math.sin(g)
        - 0.014615 * math.cos(2 * g) - 0.040849 * math.sin(2 * g)
    )  # fmt: skip
    nearness = (
        1.000110 + 0.034221 * math.cos(g) + 0.001280 * math.sin(g)
        + 0.000719 * math.cos(2 * g) + 0.000077 * math.sin(2 * g)
    )  # fmt: skip
    return declination, equation, nearness


def almanac(hour: float) -> tuple[float, float, float]:
    declination, equation, nearness = sun(torch.tensor(hour, dtype=torch.float64))
    return float(declination), float(equation), float(nearness)


def integrated(
    position: Callable[[float], tuple[float, float, float]], hour: int, interval: int, spec: DataSpec
) -> np.ndarray:
    """(H, W)：(hour − interval, hour] 里太阳高度正弦的正的部分，逐四分钟取中点求平均。"""
    total, steps = np.zeros((spec.height, spec.width)), interval * 15
    phi, lam = np.radians(spec.latitudes)[:, None], np.radians(spec.longitudes)
    for step in range(steps):
        now = hour - interval + (step + 0.5) / 15
        declination, equation, nearness = position(now)
        angle = 2 * math.pi * (now % 24 - 12) / 24 + equation + lam
        height = np.sin(phi) * math.sin(declination) + np.cos(phi) * math.cos(declination) * np.cos(angle)
        total += np.maximum(0.0, height) * nearness
    return total / steps


@pytest.mark.parametrize("interval", [1, 6, 24, 36])
def test_solar_is_the_integral(interval: int) -> None:
    """闭式与自己的太阳的数值积分差不到 0.001，与 Spencer 的差不到 0.005：他的一年总是 365 天，春分时赤纬差到 0.2°。"""
    spec = replace(SPEC, interval_hours=interval, latitudes=(90.0, 52.5, 10.0, -30.0, -75.0, -90.0))
    times = ["1987-12-21T18", "2001-03-20T03", "2020-02-29T06", "2013-06-21T13", "2018-09-30T00", "1979-01-01T12"]
    hours = torch.tensor([[parse_time(text) for text in times]])
    made = solar(hours, axes_of(spec), interval)[0][0].numpy()  # (6, H, W)
    for field, hour in zip(made, hours[0].tolist(), strict=True):
        np.testing.assert_allclose(field, integrated(almanac, hour, interval, spec), rtol=0, atol=1e-3)
        np.testing.assert_allclose(field, integrated(spencer, hour, interval, spec), rtol=0, atol=5e-3)


def test_the_sun_of_the_almanac() -> None:
    """二至的赤纬 ±23.44°、二分的 0；时差十一月初 +16.4 分、二月中 −14.2 分；近日点 0.9833、远日点 1.0167 天文单位。"""
    days = ["06-21T02", "12-21T13", "03-20T07", "11-03T12", "02-11T12", "01-03T05", "07-03T23"]
    declination, equation, nearness = sun(torch.tensor([parse_time(f"2000-{day}") for day in days]))
    assert declination[:3].rad2deg().tolist() == pytest.approx([23.44, -23.44, 0.0], abs=0.02)
    minutes = equation.rad2deg() * 4
    assert minutes[3:5].tolist() == pytest.approx([16.4, -14.2], abs=0.1)
    assert (nearness[5:] ** -0.5).tolist() == pytest.approx([0.9833, 1.0167], abs=1e-4)


def test_a_day_over_the_sphere_is_a_quarter() -> None:
    """球面上一天的平均是太阳常数的四分之一，乘 (r₀/r)²。"""
    spec = small_spec(grid=(180, 4), interval=24)
    hours = torch.arange(parse_time("2010-01-01"), parse_time("2010-12-31"), 24 * 30)[None]
    made = solar(hours, axes_of(spec), 24)[0].mean(-1)  # (1, L, H)
    weights = torch.tensor(spec.latitudes, dtype=torch.float32).deg2rad().cos()
    mean = (made * weights).sum(-1) / weights.sum()
    torch.testing.assert_close(mean[0], (sun(hours - 12)[2][0] / 4).float(), rtol=2e-4, atol=0)
    assert made.min() == 0 and made.max() < 0.6


def test_names_are_those_of_the_configuration() -> None:
    assert {*CHANGING, *CONSTANT} == set(FORCINGS)


def written_out(name: str, hour: int) -> np.ndarray:
    """(n, H, W)：一个时刻的一种外强迫，逐格点写开；太阳另有测试。"""
    latitudes, longitudes = np.radians(SPEC.latitudes), np.radians(SPEC.longitudes)
    found = []
    for phi in latitudes:
        row = []
        for lam in longitudes:
            year, clock = 2 * math.pi * hour / YEAR_HOURS, 2 * math.pi * (hour % 24) / 24 + lam
            row.append(
                {
                    "day_of_year": [math.sin(year), math.cos(year)],
                    "hour_of_day": [math.sin(clock), math.cos(clock)],
                    "latitude": [math.sin(phi)],
                    "longitude": [math.sin(lam), math.cos(lam)],
                }[name]
            )
        found.append(row)
    return np.array(found).transpose(2, 0, 1)


@pytest.mark.parametrize(("frames_in", "frames_out"), [(3, 1), (3, 2), (2, 2), (2, 5), (1, 1)])
def test_every_frame_carries_its_own_and_those_ahead(frames_in: int, frames_out: int) -> None:
    names = ("latitude", "day_of_year", "longitude", "hour_of_day")
    spec = replace(SPEC, frames_in=frames_in, frames_out=frames_out, forcings=names)
    inputs, batch = Inputs(spec), small_batch(spec)
    made = inputs(batch.history, batch.time).numpy()
    shift, seen = min(frames_in, frames_out), set[int]()
    for b, i in np.ndindex(*made.shape[:2]):
        start, parts = int(batch.time[b, 0]), [batch.history[b, i].numpy()]
        parts += [written_out(name, start) for name in ("latitude", "longitude")]
        for ahead in range(math.ceil(frames_out / shift) + 1):
            hour = start + (i + ahead * shift) * spec.interval_hours
            seen.add(hour)
            parts += [written_out(name, hour) for name in ("day_of_year", "hour_of_day")]
        np.testing.assert_allclose(made[b, i], np.concatenate(parts), atol=2e-6)
    assert made.shape[2] == inputs.channels and set(batch.time.flatten().tolist()) <= seen


def test_static_fields_are_weights_of_the_checkpoint() -> None:
    field = torch.randn(6, 8)
    spec = replace(SPEC, forcings=("static/oro", "latitude"), static={"static/oro": field})
    inputs, batch = Inputs(spec), small_batch(SPEC)
    made = inputs(batch.history, None)  # 都不随时间变，不必知道时刻
    assert list(inputs.state_dict()) == ["static"] and made.shape[2] == 5
    torch.testing.assert_close(made[:, :, 4], field.expand(3, 3, 6, 8))
    again = Inputs(type(spec).from_dict(spec.to_dict()))  # 检查点里的说明没有场
    again.load_state_dict(inputs.state_dict())
    torch.testing.assert_close(again(batch.history, None), made, rtol=0, atol=0)
    assert "static" not in spec.to_dict() and hash(spec) == hash(replace(spec, static={}))


def test_nothing_asked_nothing_changed() -> None:
    inputs, batch = Inputs(SPEC), small_batch(SPEC)
    assert inputs(batch.history, None) is batch.history and inputs.base(batch.history) is batch.history
    assert not inputs.state_dict() and inputs.channels == 3


def test_a_diagnostic_channel_is_not_seen_and_not_a_base() -> None:
    inputs, batch = Inputs(replace(SPEC, diagnostic=("c1",))), small_batch(SPEC)
    torch.testing.assert_close(inputs(batch.history, None), batch.history[:, :, [0, 2]], rtol=0, atol=0)
    base = inputs.base(batch.history)
    torch.testing.assert_close(base[:, :, [0, 2]], batch.history[:, :, [0, 2]], rtol=0, atol=0)
    assert not base[:, :, 1].any()


def test_without_the_time_one_line() -> None:
    inputs = Inputs(replace(SPEC, forcings=("latitude", "solar")))
    with pytest.raises(ValueError, match=r"^data\.forcings = \['solar'\] need the time of the forecast: give --time"):
        inputs(small_batch(SPEC).history, None)
