"""在 Python 里预报：与 inference.py 逐位相同；怎样写的数据集都认得，不合的一行说清。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from engine.commands import inference_command
from engine.forecasting.api import LoadedForecaster, load_forecaster
from engine.forecasting.datasets import read_history

BEFORE = Path(__file__).resolve().parents[2] / "from_before"  # 8 × 16 全球，t2m 与 50 hPa 的 z，三帧、6 小时
pytestmark = pytest.mark.usefixtures("unrendered")
LATITUDES, LONGITUDES = np.linspace(78.75, -78.75, 8), np.arange(16) * 22.5
START = np.datetime64("2000-01-10T00", "ns")


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """(T_in, H, W, k)，物理单位。"""
    noise = np.random.default_rng(3).standard_normal((3, 8, 16, 2))
    return (np.array([280, 5.4e4]) + noise * np.array([12, 2.5e3])).astype(np.float32)


@pytest.fixture
def history(frames: np.ndarray) -> xr.Dataset:
    coords = {"time": START + np.timedelta64(6, "h") * np.arange(-2, 1), "level": [50.0]}
    coords |= {"latitude": LATITUDES, "longitude": LONGITUDES}
    return xr.Dataset(
        {
            "t2m": (("time", "latitude", "longitude"), frames[..., 0], {"units": "K"}),
            "z": (("time", "level", "latitude", "longitude"), frames[:, None, ..., 1], {"units": "m**2 s**-2"}),
        },
        coords,
    )


@pytest.fixture(scope="module")
def forecaster() -> LoadedForecaster:
    return load_forecaster(BEFORE / "ar_pred.ckpt")


@pytest.mark.parametrize(
    ("name", "options"),
    [("ar_pred", {"steps": 2}), ("ar_pred", {"members": 2, "perturb": 0.1}), ("var", {"members": 2})],
)
def test_as_inference_does(
    name: str, options: dict[str, float], frames: np.ndarray, history: xr.Dataset, tmp_path: Path
) -> None:
    np.save(tmp_path / "frames.npy", frames)
    arguments = ["--checkpoint", str(BEFORE / f"{name}.ckpt"), "--time", "2000-01-10T00", "--out", str(tmp_path)]
    arguments += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    assert inference_command([*arguments, "--inputs", str(tmp_path / "frames.npy")]) == 0
    made = load_forecaster(BEFORE / f"{name}.ckpt").forecast(history, **options)  # type: ignore[arg-type]
    with xr.open_dataset(tmp_path / "forecast.nc", decode_timedelta=True) as written:
        xr.testing.assert_identical(made, written)
    assert made["z"].dims[-3:] == ("level", "latitude", "longitude")


def hourly(history: xr.Dataset) -> xr.Dataset:
    times = np.arange(START - np.timedelta64(20, "h"), START + np.timedelta64(1, "h"), np.timedelta64(1, "h"))
    return history.reindex(time=times)


def weatherbench(history: xr.Dataset) -> xr.Dataset:
    shuffled = history.isel(latitude=slice(None, None, -1)).roll(longitude=7, roll_coords=True)
    named = shuffled.assign_coords(longitude=(shuffled.longitude + 180) % 360 - 180).rename(
        {"t2m": "2m_temperature", "z": "geopotential", "latitude": "lat", "longitude": "lon"}
    )
    return named.transpose("lon", "lat", "level", "time")


def earth2studio(history: xr.Dataset) -> xr.Dataset:
    """它的数据源给的是 DataArray (time, variable, lat, lon)，没有单位。"""
    fields = {"t2m": history["t2m"], "z50": history["z"].isel(level=0, drop=True)}
    array = xr.Dataset(fields).to_dataarray("variable").rename(latitude="lat", longitude="lon")
    dataset = array.drop_attrs().to_dataset("variable")
    for name, units in {"t2m": "K", "z50": "m2 s-2"}.items():
        dataset[name].attrs["units"] = units
    return dataset


def more_levels(history: xr.Dataset) -> xr.Dataset:
    return history.reindex(level=[1000.0, 50.0]).assign_coords(level=("level", [100000, 5000], {"units": "Pa"}))


VARIANTS: list[Callable[[xr.Dataset], xr.Dataset]] = [
    hourly, weatherbench, earth2studio, more_levels,
    lambda history: history.isel(level=0).expand_dims(number=1),
    lambda history: history.astype(np.float64).chunk(time=1),
]  # fmt: skip


@pytest.mark.parametrize("change", VARIANTS)
def test_written_otherwise(
    change: Callable[[xr.Dataset], xr.Dataset], history: xr.Dataset, forecaster: LoadedForecaster
) -> None:
    xr.testing.assert_identical(forecaster.forecast(change(history)), forecaster.forecast(history))


def test_one_frame_without_a_time_axis(history: xr.Dataset, forecaster: LoadedForecaster) -> None:
    whole, start = read_history(history, forecaster.spec)
    last, same = read_history(history.isel(time=-1), replace(forecaster.spec, frames_in=1))
    assert start == same
    assert torch.equal(whole[-1:], last)


def units(name: str, text: str | None) -> Callable[[xr.Dataset], xr.Dataset]:
    return lambda history: history.assign(
        {name: history[name].drop_attrs().assign_attrs({"units": text} if text else {})}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.drop_vars("t2m"), "t2m: no variable t2m or 2m_temperature; the data set has z"),
        (lambda d: d.drop_vars("z"), "z_level_00: no variable z or z50 or geopotential; the data set has t2m"),
        (lambda d: d.assign_coords(level=[500.0]), "z: no 50 hPa; there: 500 hPa"),
        (lambda d: d.isel(level=0, drop=True), "z: no pressure coordinate"),
        (
            units("t2m", "degC"),
            "t2m: units 'degC', wanted 'K': convert it and write dataset['t2m'].attrs",
        ),
        (units("z", None), "z: no units; if they are 'm2 s-2', write dataset['z'].attrs['units'] = 'm2 s-2'"),
        (lambda d: d.isel(time=slice(1, None)), "time: 2000-01-09T12 absent; the forecast from 2000-01-10T00 needs 3"),
        (lambda d: d.isel(time=slice(0, 0)), "the data set has no times"),
        (lambda d: d.assign_coords(time=d.time - np.timedelta64(30, "m")), "is not a full hour"),
        (lambda d: d.isel(latitude=slice(4)), "latitude: -11.25 is not there (4 of 8 points are not); wanted 8 values"),
        (lambda d: d.assign_coords(longitude=d.longitude + 1), "longitude: 0 is not there (16 of 16 points are not)"),
        (lambda d: d.drop_vars("latitude"), "no axis named latitude or lat"),
        (lambda d: d.expand_dims(number=2), "t2m: dimension number has 2 entries; take one: dataset.isel(number=0)"),
        (lambda d: d.assign(t2m=d.t2m.isel(longitude=0)), "t2m: dimensions time, latitude; wanted time, latitude, lon"),
        (lambda d: d.where(d.latitude > 0), "t2m: 192 non-finite values in the 3 frames"),
        (lambda d: d.t2m, "the history is a DataArray, not an xarray.Dataset"),
    ],
)
def test_what_does_not_fit_is_one_line(
    change: Callable[[xr.Dataset], xr.Dataset], message: str, history: xr.Dataset, forecaster: LoadedForecaster
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  内容在下面查
        forecaster.forecast(change(history))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_impossible_wishes(history: xr.Dataset, forecaster: LoadedForecaster) -> None:
    for wish, message in (
        ({"steps": 0}, "steps = 0: give a whole number of 1 or more"),
        ({"members": 2}, "is deterministic: --members 2 needs --perturb"),
    ):
        with pytest.raises(ValueError, match=message):
            forecaster.forecast(history, **wish)
    with pytest.raises(ValueError, match="it cannot forecast"):
        load_forecaster(BEFORE / "vqvae.ckpt")
