"""evaluate.py --events：与存下的预报、原始的场写开算的相同；爆掉的预报一行说清；坏的 YAML 一行说清。"""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import models
from engine.commands import evaluate_command
from engine.verification.climate import Tails, wet_climate
from engine.verification.page import FIGURES
from tests.engine.runs import train_small
from util.calendar import parse_time
from util.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("unrendered")
CHANNELS = ("t2m", "tp", "u10", "v10")
NAME = "ar_pred_video_vanilla"
EXPLODES = """
import torch
from models.persistence import Config, Model as Persistence

class Model(Persistence):
    def forecast(self, history, *inputs, **options):
        found = super().forecast(history, *inputs, **options)
        large = found[:, :, :, :1].mean((-1, -2), keepdim=True) > 0.0
        return torch.where(large, found * 1e15, found)
"""


@pytest.fixture(scope="module")
def tree(make_tree, tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree") / "tree", CHANNELS, (8, 16), "2000-01-01", "2000-02-20")


@pytest.fixture(scope="module")
def trained(tree, tmp_path_factory) -> Path:
    return train_small(tmp_path_factory.mktemp("run"), tree)


def run(checkpoint: Path, out: Path, *arguments: str) -> dict[str, Any]:
    assert evaluate_command(["--checkpoint", str(checkpoint), "--out", str(out), *arguments]) == 0
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def table(trained, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("events")
    options = ("--members", "3", "--perturb", "0.4", "--steps", "2", "--stride", "3", "--thresholds", "t2m=285")
    return out, run(trained, out, "--events", *options)


def training_quantile(tree, c: int, q: float) -> tuple[np.ndarray, np.ndarray]:
    """(各钟点的气候态 (4, H, W)，距平的分位数 (H, W))；目标是训练窗口的末一帧。"""
    first, last = parse_time("2000-01-01") + 18, parse_time("2000-02-01")
    rows = [i for i, hour in enumerate(tree.hours) if first <= hour < last]
    values, clock = tree.fields[rows, c].astype(float), np.array(tree.hours)[rows] % 24 // 6
    normal = np.stack([values[clock == k].mean(0) for k in range(4)])
    return normal, np.quantile(values - normal[clock], q, axis=0)


def area() -> np.ndarray:
    edges = np.sin(np.deg2rad(np.linspace(90, -90, 9)))
    cells = edges[:-1] - edges[1:]
    return (cells / cells.sum() / 16)[:, None]


def test_events_equal_a_loop_over_the_saved_forecasts(tree, table):
    out, found = table
    forecast = xr.open_dataset(out / "forecast.nc", decode_timedelta=True)
    truth = xr.open_dataset(out / "truth.nc")
    normal, threshold = training_quantile(tree, 0, 0.95)
    hits = said_yes = yes = both_half = 0.0
    fraction = np.zeros(2)
    for one in forecast.t2m.isel(prediction_timedelta=1).transpose("time", "number", ...):
        when = one.time.values + one.prediction_timedelta.values
        limit = normal[when.astype("datetime64[h]").astype(int) % 24 // 6] + threshold
        real, count = truth.t2m.sel(time=when).values > limit, (one.values > limit).sum(0)
        half = count >= 2
        hits, yes, said_yes = (
            hits + (area() * (half & real)).sum(),
            yes + (area() * real).sum(),
            said_yes + (area() * half).sum(),
        )
        both_half += (area() * (count / 3 - real) ** 2).sum()
        wide = [np.concatenate([f, f[:, :2]], 1) for f in (count / 3, real.astype(float))]
        f, o = (np.lib.stride_tricks.sliding_window_view(w, (3, 3)).mean((-1, -2)) for w in wide)
        inside = area()[1:-1] / area()[1:-1].sum() / 16
        fraction += [((f - o) ** 2 * inside).sum(), ((f**2 + o**2) * inside).sum()]
    scores = found["events"]["scores"][NAME]["t2m"][">q0.95"]
    times = len(forecast.time)
    assert yes > 0 and scores["base_rate"][1] == pytest.approx(yes / times, rel=1e-3)
    assert scores["csi"][1] == pytest.approx(hits / (yes + said_yes - hits), rel=1e-3)
    assert scores["frequency_bias"][1] == pytest.approx(said_yes / yes, rel=1e-3)
    assert scores["brier"][1] == pytest.approx(both_half / times, rel=1e-3)
    assert scores["fss_3"][1] == pytest.approx(1 - fraction[0] / fraction[1], rel=1e-3)
    assert scores["reliability"][1] - scores["resolution"][1] + scores["uncertainty"][1] == pytest.approx(
        scores["brier"][1]
    )


def test_events_of_a_region_and_of_an_hour_equal_a_loop(tree, trained, tmp_path):
    regions = tmp_path / "regions.yaml"
    regions.write_text("regions: {box: {latitude: [-30, 60], longitude: [300, 90]}}", encoding="utf-8")
    run(trained, tmp_path, "--events", "--save", "netcdf", "--regions", str(regions), "--by", "hour")
    forecast = xr.open_dataset(tmp_path / "forecast.nc", decode_timedelta=True)
    truth = xr.open_dataset(tmp_path / "truth.nc")
    normal, threshold = training_quantile(tree, 0, 0.95)
    latitudes, longitudes = forecast.latitude.values, forecast.longitude.values
    north = ((latitudes >= -30) & (latitudes <= 60))[:, None] & ((longitudes >= 300) | (longitudes <= 90))
    box, sums = area() * north / (area() * north).sum(), {"box": np.zeros(3), "06 UTC": np.zeros(3)}
    for one in forecast.t2m.isel(prediction_timedelta=0):
        when = one.time.values + one.prediction_timedelta.values
        clock = int(when.astype("datetime64[h]").astype(int) % 24)
        limit = normal[clock // 6] + threshold
        real, said = truth.t2m.sel(time=when).values > limit, one.values > limit
        for name, weights in (("box", box), *([("06 UTC", area())] if clock == 6 else [])):
            sums[name] += [(weights * both).sum() for both in (real & said, real, said)]
    with (tmp_path / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == NAME and row["channel"] == "t2m"]
    for name, (hits, yes, told) in sums.items():
        found = {row["metric"]: row["value"] for row in rows if name in (row["region"], row["period"])}
        assert yes > 0 and float(found["csi>q0.95"]) == pytest.approx(hits / (yes + told - hits), rel=1e-3)
        assert float(found["frequency_bias>q0.95"]) == pytest.approx(told / yes, rel=1e-3)
        assert "brier>q0.95" in found and "roc_area>q0.95" in found
    with xr.open_dataset(tmp_path / "statistics.nc") as statistics:
        table = statistics[f"event_table_{NAME}_by_region"]
        assert table.dims[-1] == "region" and np.allclose(table.sum(table.dims[-3:-1]), 1)
        assert statistics.period.values.tolist() == ["00 UTC", "06 UTC", "12 UTC", "18 UTC"]
        assert f"event_table_{NAME}_by_period" in statistics


def test_what_each_channel_is_asked(table):
    out, found = table
    for name in ("reliability", "roc", "economic_value", "fractions_skill", "spherical_spectra", "drift_variance"):
        assert (out / f"figures/{name}.png").is_file(), name
    drawn = {path.stem for path in (out / "figures").iterdir()}
    assert drawn <= {"rmse", "spectra", "ranks", *FIGURES}  # 再评一次时先去掉的
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(f'"{key}":{{' in page for key in ("events", "drift", "sphere"))
    events = found["events"]
    assert set(events["scores"]) == {NAME, "persistence", "climatology"}
    assert [*events["scores"][NAME]["t2m"]] == ["<q0.02", "<q0.05", ">q0.95", ">q0.98", ">285"]
    assert [*events["scores"][NAME]["tp"]] == [">q0.95", ">q0.98"]
    assert events["kinetic_energy"].keys() == {"truth", NAME, "persistence", "climatology"}
    assert [*events["kinetic_energy"]["truth"]] == ["u10+v10"]
    assert set(events["effective_wavenumber"]) == {"zonal", "spherical"}
    brier = found["scores"][NAME]["t2m"]["brier>285"]
    assert events["scores"][NAME]["t2m"][">285"]["brier"] == pytest.approx(brier, rel=1e-6)
    assert "seeps" in found["scores"][NAME]["tp"] and "seeps" not in found["scores"][NAME]["t2m"]
    for name in ("crps_lower", "crps_upper", "energy", "variogram"):
        assert all(v > 0 for v in found["scores"][NAME]["u10"][name])


def test_drift_is_the_mean_and_the_variance_of_the_saved_fields(table):
    out, found = table
    forecast = xr.open_dataset(out / "forecast.nc", decode_timedelta=True)
    drift, energy = found["events"]["drift"][NAME], found["events"]["kinetic_energy"][NAME]["u10+v10"]
    for lead in range(2):
        one = forecast.isel(prediction_timedelta=lead).astype(float)
        mean = (one.t2m.values * area()).sum((-1, -2), keepdims=True)
        assert drift["t2m"]["mean"][lead] == pytest.approx(mean.mean(), rel=1e-6)
        spread = (((one.t2m.values - mean) ** 2) * area()).sum((-1, -2)).mean()
        assert drift["t2m"]["variance"][lead] == pytest.approx(spread, rel=1e-4)
        kinetic = ((one.u10**2 + one.v10**2).values / 2 * area()).sum((-1, -2)).mean()
        assert energy[lead] == pytest.approx(kinetic, rel=1e-4)


def test_nothing_changes_without_the_option(trained, table, tmp_path):
    options = ("--members", "3", "--perturb", "0.4", "--steps", "2", "--stride", "3", "--thresholds", "t2m=285")
    plain, full = run(trained, tmp_path, *options), copy.deepcopy(table[1])
    assert "events" not in plain and "blown_up" not in plain
    for channels in full["scores"].values():
        for found in channels.values():
            for name in ("crps_lower", "crps_upper", "energy", "variogram", "seeps"):
                found.pop(name, None)
    for found in (one for bases in full["skill"].values() for base in bases.values() for one in base.values()):
        for name in ("crps_lower", "crps_upper", "energy", "variogram", "seeps"):
            found.pop(name, None)
    assert plain["scores"] == full["scores"] and plain["skill"] == full["skill"]


def test_the_added_scores_have_a_skill(table):
    """--events 的成绩也相对基线作差；SEEPS 没有单位，差值不乘标准差。"""
    found = table[1]
    for channel, names in {"t2m": ("crps_lower", "crps_upper", "energy", "variogram"), "tp": ("seeps",)}.items():
        skill = found["skill"][NAME]["climatology"][channel]
        for name in names:
            one, two = (found["scores"][m][channel][name][1] for m in (NAME, "climatology"))
            assert skill[name]["difference"][1] == pytest.approx(one - two, rel=1e-5)
            assert skill[name]["value"][1] == pytest.approx(1 - one / two, rel=1e-5)
    assert "seeps" not in found["skill"][NAME]["climatology"]["t2m"]


def test_no_line_of_the_csv_stands_twice(table):
    with (table[0] / "metrics.csv").open() as file:
        lines = [(row["model"], row["channel"], row["lead_hours"], row["metric"]) for row in csv.DictReader(file)]
    assert len(lines) == len(set(lines))
    assert (NAME, "t2m", "6", "brier>285") in lines and (NAME, "t2m", "6", "brier>q0.95") in lines


def test_a_blow_up_is_told_and_the_rest_is_scored(trained, tmp_path, monkeypatch, caplog):
    (tmp_path / "explodes.py").write_text(EXPLODES)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    names = [*models.model_names(), "explodes"]
    monkeypatch.setattr("models.model_names", lambda: names)
    content = load_checkpoint(trained)
    config = {**content["config"], "model": {"name": "explodes"}}
    save_checkpoint(
        tmp_path / "explodes.ckpt",
        {**content, "model": {}, "config": config, "model_options": config["model"], "ema": None},
    )
    found = run(tmp_path / "explodes.ckpt", tmp_path / "out", "--steps", "3", "--save", "none", "--events")
    lost = found["blown_up"]
    assert lost and {one["model"] for one in lost} == {"explodes"} and {one["lead_hours"] for one in lost} == {12}
    assert found["left_out"]["t2m"] == [0, len(lost), len(lost)]
    assert 0 < found["pairs"]["t2m"][2] == found["initial_times"] - len(lost)
    assert f"explodes blew up: the forecast from {lost[0]['initial_time']} UTC" in caplog.text
    assert found["scores"]["explodes"]["t2m"]["rmse"][2] is not None
    assert found["events"]["drift"]["explodes"]["t2m"]["mean"][2] is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantile: [0.9]", "unknown key quantile = .*nearest: quantiles"),
        ("quantiles: [0.5]", "quantiles = .*the median is no event"),
        ("neighbourhoods: [4]", r"neighbourhoods = \[4\]: 4 is even"),
        ("quantiles: [0.0001]", r"cannot tell the quantile 0.0001; what works: quantiles from 0\.\d+ to 0\.9\d+$"),
        (
            "training_times: 1",
            r"1 cannot tell the quantile 0.02; what works: training_times: 50 or more, or quan.*\[\]$",
        ),
    ],
)
def test_a_mistake_in_the_yaml_is_one_line(trained, tmp_path, text, message):
    path = tmp_path / "events.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        run(trained, tmp_path / "out", "--events", str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--events", "quantile: [0.9]", "unknown key quantile"),
        ("--regions", "regions: {a: {lattitude: [0, 9]}}", "unknown key regions.a.lattitude"),
        ("--regions", "regions: {a: {surface: land}}", "needs land_sea"),
    ],
)
def test_a_mistake_in_a_yaml_comes_before_checkpoint_and_data(tmp_path, option, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    for given, expected in ((str(path), message), ("data.root=elsewhere", "data.root=elsewhere")):
        with pytest.raises(ValueError, match=expected):
            run(tmp_path / "no.ckpt", tmp_path / "out", option, given)
    assert not (tmp_path / "out").exists()


def test_tails_are_the_quantiles_of_numpy():
    values = np.random.default_rng(0).standard_normal((157, 2, 3, 4)).astype(np.float32)
    wanted = [0.02, 0.05, 0.3, 0.95, 0.98]
    tails = Tails(wanted, len(values))
    values[[5, 80], 1] = np.nan
    for part in np.array_split(values, 13):
        tails.add(torch.from_numpy(part))
    np.testing.assert_allclose(tails.quantiles(), np.nanquantile(values, wanted, axis=0), rtol=1e-5, atol=1e-6)


def test_wet_climate_is_the_dry_share_and_two_thirds_of_the_wet():
    values = np.random.default_rng(0).gamma(0.5, 2, (90, 1, 2, 3)).astype(np.float32)
    values[:, 0, 0, 0] = 0
    dry, heavy = wet_climate(torch.from_numpy(values), [0.3])
    for i, j in np.ndindex(2, 3):
        one = values[:, 0, i, j]
        assert float(dry[0, i, j]) == pytest.approx((one <= 0.3).mean())
        expected = np.quantile(one[one > 0.3], 2 / 3) if (one > 0.3).any() else 0.3
        assert float(heavy[0, i, j]) == pytest.approx(expected, rel=1e-5)
