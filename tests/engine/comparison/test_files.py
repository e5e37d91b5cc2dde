"""别处做的预报与自己的并排：自己存的 forecast.nc 换成别人的写法再来，成绩与原来的相同。"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from engine.commands import compare_command, evaluate_command
from engine.comparison import files
from tests.engine.runs import train_here, write_run

MODEL = "ar_pred_video_vanilla"


@pytest.fixture(scope="module")
def evaluated(make_tree: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tree = make_tree(folder / "tree", ("t2m", "z_level_00"), (8, 16), "2000-01-01", "2000-02-20")
    train_here(write_run(folder, tree, data={"pressure_hpa": [500.0]}, train={"epochs": 1}), "run.name=a")
    checkpoint = str(folder / "checkpoints/a/best.ckpt")
    words = ["--steps", "3", "--out", str(folder / "own"), "--save", "netcdf"]
    assert evaluate_command(["--checkpoint", checkpoint, *words]) == 0
    return folder


def elsewhere(folder: Path) -> xr.Dataset:
    """WeatherBench2 的名字与次序：纬度由南到北，经度从 180 起，时效在前。"""
    with xr.open_dataset(folder / "own/forecast.nc", decode_timedelta=True) as own:
        there = own.load().rename({"t2m": "2m_temperature", "z": "geopotential"}).drop_vars("valid_time")
    there["2m_temperature"].attrs["units"], there["geopotential"].attrs["units"] = "K", "m**2 s**-2"
    there = there.sortby("latitude").roll(longitude=there.sizes["longitude"] // 2, roll_coords=True)
    return there.transpose("prediction_timedelta", "time", ..., "longitude", "latitude")


def test_the_same_forecast_has_the_same_scores(evaluated: Path, tmp_path: Path) -> None:
    there = elsewhere(evaluated)
    there.isel(time=slice(2, None)).to_netcdf(tmp_path / "peer.nc")
    out = tmp_path / "compared"
    words = ["--runs", str(evaluated / "own"), "--files", str(tmp_path / "peer.nc"), "--out", str(out)]
    assert compare_command(words) == 0
    found = json.loads((out / "comparison.json").read_text())
    assert found["initial_times"] == there.sizes["time"] - 2
    mine, peer = (found["scores"][name] for name in ("a", "peer"))
    for channel in mine:
        for score in ("rmse", "bias", "acc"):
            np.testing.assert_allclose(peer[channel][score], mine[channel][score], rtol=2e-4, atol=1e-6)
    run = next(run for run in found["runs"] if run["name"] == "peer")
    assert run["cost"]["parameters"] is None and run["checkpoint"].endswith("peer.nc")
    assert f"--files {tmp_path / 'peer.nc'}" in (out / "report.html").read_text(encoding="utf-8")


def test_members_are_an_ensemble(evaluated: Path, tmp_path: Path) -> None:
    """公平的 CRPS（Ferro 2014）逐窗口写开，以纬度加权。"""
    there, noise = elsewhere(evaluated).isel(time=slice(0, 4)), np.random.default_rng(0)
    members = [there.map(lambda field: field + noise.normal(size=field.shape), keep_attrs=True) for _ in range(3)]
    xr.concat(members, "number").to_netcdf(tmp_path / "ens.nc")
    out = tmp_path / "compared"
    compare_command(["--runs", str(evaluated / "own"), "--files", str(tmp_path / "ens.nc"), "--out", str(out)])
    found = json.loads((out / "files/ens/metrics.json").read_text())
    assert found["members"] == 3
    with xr.open_dataset(evaluated / "own/truth.nc") as truth:
        target = truth.t2m.load()
    weights = np.cos(np.deg2rad(target.latitude))
    values = [member["2m_temperature"] for member in members]
    for lead, hours in enumerate(found["lead_hours"]):
        step = np.timedelta64(hours, "h")
        total = []
        for init in there.time.values:
            ours = [one.sel(time=init, prediction_timedelta=step) for one in values]
            fact = target_at(target, init, step)
            none = xr.zeros_like(fact)
            error = sum((abs(one - fact) for one in ours), none) / 3
            apart = sum((abs(one - other) for one in ours for other in ours), none) / (2 * 3 * 2)
            total.append(float((error - apart).weighted(weights).mean()))
        np.testing.assert_allclose(found["scores"]["ens"]["t2m"]["crps"][lead], np.mean(total), rtol=1e-4)


def test_members_are_never_cut_apart(evaluated: Path, tmp_path: Path) -> None:
    """批比成员少时也是全部成员：离散度与成员自己的相同。"""
    there = elsewhere(evaluated).isel(time=slice(0, 3))
    members = [there + 10.0 * k for k in range(6)]  # 批是 4
    for member in members:
        for name, field in member.items():
            field.attrs = there[name].attrs
    xr.concat(members, "number").to_netcdf(tmp_path / "many.nc")
    out = tmp_path / "compared"
    compare_command(["--runs", str(evaluated / "own"), "--files", str(tmp_path / "many.nc"), "--out", str(out)])
    spread = json.loads((out / "files/many/metrics.json").read_text())["scores"]["many"]["t2m"]["spread"]
    np.testing.assert_allclose(spread, np.std(10.0 * np.arange(6), ddof=1), rtol=1e-3)


def test_a_run_of_several_leads_and_a_file_with_a_gap(
    evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """运行一次走几种时效（data.lead_hours）也不要紧；文件里断开以后的时效说出来，不悄悄丢掉。"""
    real = files.checkpoint_config

    def several(*arguments: Any) -> Any:
        config = real(*arguments)
        return config.model_copy(update={"data": config.data.model_copy(update={"lead_hours": [6, 12]})})

    monkeypatch.setattr(files, "checkpoint_config", several)
    elsewhere(evaluated).isel(prediction_timedelta=[0, 2]).to_netcdf(tmp_path / "gap.nc")
    folder = files.score_file(str(tmp_path / "gap.nc"), evaluated / "own", tmp_path)
    found, own = (json.loads((one / "metrics.json").read_text()) for one in (folder, evaluated / "own"))
    assert found["lead_hours"] == [6]
    np.testing.assert_allclose(
        found["scores"]["gap"]["t2m"]["rmse"], own["scores"][MODEL]["t2m"]["rmse"][:1], rtol=1e-2
    )
    assert "gap.nc: 1 lead times left out, only steps of 6 h in a row are scored" in caplog.text


def test_an_address_stays_one(evaluated: Path, tmp_path: Path) -> None:
    words = ["--runs", str(evaluated / "own"), "--files", "https://127.0.0.1:1/peer.zarr", "--out", str(tmp_path / "c")]
    with pytest.raises(
        ValueError, match=r"^--files https://127\.0\.0\.1:1/peer\.zarr: https://127\.0\.0\.1:1/peer\.zarr"
    ):
        compare_command(words)


def test_names_are_told_apart(evaluated: Path, tmp_path: Path) -> None:
    twins = [str(tmp_path / "a/x.nc"), str(tmp_path / "b/x.nc")]
    words = ["--runs", str(evaluated / "own"), "--out", str(tmp_path / "c"), "--files"]
    with pytest.raises(ValueError, match=r"a/x\.nc: another file is called x too"):
        compare_command([*words, *twins])
    with pytest.raises(ValueError, match="climatology is the name of a baseline"):
        compare_command([*words, str(tmp_path / "climatology.nc")])


def target_at(target: xr.DataArray, init: np.datetime64, step: np.timedelta64) -> xr.DataArray:
    if "prediction_timedelta" in target.dims:
        return target.sel(time=init, prediction_timedelta=step)
    return target.sel(time=init + step)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.isel(prediction_timedelta=0, drop=True), "no lead-time dimension such as prediction_timedelta"),
        (lambda d: d.isel(prediction_timedelta=slice(1, None)), r"the first step of the run, is not among them"),
        (lambda d: d.drop_vars("geopotential"), r"z_level_00: no variable"),
        (lambda d: d.assign_coords(latitude=d.latitude + 1), "latitude: .* is not there"),
        (
            lambda d: d.assign_coords(time=d.time + np.timedelta64(3650, "D")),
            "none of them starts",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(evaluated: Path, tmp_path: Path, change: Any, message: str) -> None:
    change(elsewhere(evaluated)).to_netcdf(tmp_path / "peer.nc")
    words = ["--runs", str(evaluated / "own"), "--files", str(tmp_path / "peer.nc"), "--out", str(tmp_path / "c")]
    with pytest.raises(ValueError, match=rf"^--files .*peer\.nc: .*{message}"):
        compare_command(words)
