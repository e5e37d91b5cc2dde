"""evaluate.py：表里的数与从原始场、从存下的预报写开算的相同；多进程等于一个进程；坏输入一行说清。"""

from __future__ import annotations

import base64
import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray as xr

import models
from engine.commands import compare_command, evaluate_command, inference_command
from engine.evaluation import evaluate as evaluation
from engine.evaluation.baselines import BASELINES, NAMES
from engine.evaluation.task import standardize_thresholds, threshold_tensor
from tests.engine.runs import ROOT, train_here, train_small, write_run
from tests.models.small import small_spec
from util.calendar import parse_time
from util.checkpoint import load_checkpoint, save_checkpoint
from util.data.tree_files import field_path

pytestmark = pytest.mark.usefixtures("unrendered")
ZERO = """
from models.persistence import Config, Model as Persistence

class Model(Persistence):
    def forecast(self, *inputs, **options):
        return 0 * super().forecast(*inputs, **options)
"""
CHANNELS = ("t2m", "u10", "z_level_00")
WEATHERBENCH = {"t2m": "2m_temperature", "u10": "10m_u_component_of_wind", "z": "geopotential"}
FIRST = parse_time("2000-02-11")  # 测试的第一个时刻


@pytest.fixture(scope="module")
def tree(make_tree, tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree") / "tree", CHANNELS, (8, 16), "2000-01-01", "2000-02-20")


@pytest.fixture(scope="module")
def trained(tree, tmp_path_factory) -> Path:
    return train_small(tmp_path_factory.mktemp("run"), tree, data={"pressure_hpa": [50.0]})


def run(checkpoint: Path, out: Path, *arguments: str) -> dict[str, Any]:
    assert evaluate_command(["--checkpoint", str(checkpoint), "--out", str(out), *arguments]) == 0
    return json.loads((out / "metrics.json").read_text())


def weights() -> np.ndarray:
    edges = np.deg2rad(np.linspace(90, -90, 9))
    area = np.sin(edges[:-1]) - np.sin(edges[1:])
    return (area / area.mean())[:, None]


def test_persistence_from_the_raw_fields(tree, trained, tmp_path):
    table = run(trained, tmp_path, "--steps", "3", "--save", "none")
    test = tree.fields[[i for i, h in enumerate(tree.hours) if h >= FIRST]].astype(float)  # (40, C, H, W)
    assert table["initial_times"] == 40 - 3 - 3 + 1
    for lead in range(3):
        error = test[2 : 37 - 0][: table["initial_times"]] - test[3 + lead :][: table["initial_times"]]
        for c, channel in enumerate(CHANNELS):
            found = table["scores"]["persistence"][channel]
            assert found["rmse"][lead] == pytest.approx(np.sqrt((error[:, c] ** 2 * weights()).mean()), rel=1e-4)
            assert found["mae"][lead] == pytest.approx((np.abs(error[:, c]) * weights()).mean(), rel=1e-4)
            assert found["bias"][lead] == pytest.approx((error[:, c] * weights()).mean(), rel=1e-3, abs=1e-4)
            assert found["mse_unweighted"][lead] == pytest.approx((error[:, c] ** 2).mean(), rel=1e-4)
            assert found["crps"] == found["mae"]
    assert not (tmp_path / "forecast.nc").exists()


def test_outside_tools_get_the_same_scores_from_the_saved_fields(tree, trained, tmp_path):
    """forecast.nc 与 truth.nc 按 WeatherBench-X 的写法取出来，自己算 RMSE。"""
    table = run(trained, tmp_path, "--steps", "2", "--stride", "3")
    forecast = xr.open_dataset(tmp_path / "forecast.nc", decode_timedelta=True)
    truth = xr.open_dataset(tmp_path / "truth.nc")
    area = xr.DataArray(weights()[:, 0], dims="latitude", coords={"latitude": forecast.latitude})
    for lead in range(2):
        one = forecast.isel(prediction_timedelta=lead)
        real = truth.sel(time=one.time + one.prediction_timedelta)
        for name, channel in (("t2m", "t2m"), ("u10", "u10"), ("z", "z_level_00")):
            error = (one[name].values - real[name].values).reshape(len(one.time), 8, 16)
            rmse = np.sqrt((error.astype(float) ** 2 * area.values[:, None]).mean())
            assert table["scores"]["ar_pred_video_vanilla"][channel]["rmse"][lead] == pytest.approx(rmse, rel=1e-3)
    for name in ("report.html", "metrics.csv", "statistics.nc", "figures/rmse.png", "figures/rmse.pdf", "evaluate.log"):
        assert (tmp_path / name).is_file(), name


def test_arrays_for_openstl(tree, trained, tmp_path):
    table = run(trained, tmp_path, "--stride", "2", "--save", "npy", "--split", "val")
    inputs, trues, preds = (np.load(tmp_path / f"{n}.npy") for n in ("inputs", "trues", "preds"))
    first = tree.hours.index(parse_time("2000-02-01"))
    count = table["initial_times"]
    assert inputs.shape == (count, 3, 3, 8, 16) and trues.shape == preds.shape == (count, 1, 3, 8, 16)
    for n in (0, count - 1):
        np.testing.assert_allclose(inputs[n], tree.fields[first + 2 * n : first + 2 * n + 3], rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(trues[n, 0], tree.fields[first + 2 * n + 3], rtol=1e-5, atol=1e-3)
    for c, channel in enumerate(CHANNELS):
        error = (preds[:, 0, c] - trues[:, 0, c]).astype(float)
        found = table["scores"]["ar_pred_video_vanilla"][channel]
        assert found["mse_unweighted"][0] == pytest.approx((error**2).mean(), rel=1e-3)
        assert found["mae_unweighted"][0] == pytest.approx(np.abs(error).mean(), rel=1e-3)


def test_perturbed_ensemble(tree, trained, tmp_path):
    table = run(
        trained, tmp_path, "--members", "4", "--perturb", "0.3", "--stride", "4", "--thresholds", "t2m=280,285"
    )  # fmt: skip
    members = xr.open_dataset(tmp_path / "forecast.nc", decode_timedelta=True)["t2m"]
    truth = xr.open_dataset(tmp_path / "truth.nc")["t2m"]
    crps, brier, variance, square = [], [], [], []
    for i in range(len(members.time)):
        x = members.isel(time=i, prediction_timedelta=0).values.astype(float)  # (4, H, W)
        y = truth.sel(time=members.valid_time.values[i, 0]).values.astype(float)
        pairs = sum(np.abs(x[a] - x[b]) for a in range(4) for b in range(4))
        crps.append((np.abs(x - y).mean(0) - pairs / (2 * 4 * 3)) * weights())
        brier.append((((x > 280).mean(0) - (y > 280)) ** 2) * weights())
        variance.append(x.var(0, ddof=1) * weights())
        square.append((x.mean(0) - y) ** 2 * weights())
    found = table["scores"]["ar_pred_video_vanilla"]["t2m"]
    assert found["crps"][0] == pytest.approx(np.mean(crps), rel=1e-3)
    assert found["brier>280"][0] == pytest.approx(np.mean(brier), abs=2e-3)
    assert found["spread"][0] == pytest.approx(np.sqrt(np.mean(variance)), rel=1e-3)
    assert found["spread_skill"][0] == pytest.approx(np.sqrt(5 / 4 * np.mean(variance) / np.mean(square)), rel=1e-3)
    assert found["rmse"][0] == pytest.approx(np.sqrt(np.mean(square)), rel=1e-3)
    ranks = np.array(table["rank_histogram"]["t2m"][0])
    assert ranks.shape == (5,) and ranks.sum() == pytest.approx(1)
    base = table["scores"]["persistence"]["t2m"]
    assert base["crps"] == base["mae"] and "spread" not in base
    again = run(trained, tmp_path / "again", "--members", "4", "--perturb", "0.3", "--stride", "4", "--save", "none")
    assert again["scores"]["ar_pred_video_vanilla"]["t2m"]["crps"] == found["crps"]


def test_sampling_can_be_changed_after_training(tree, tmp_path):
    """评测与预报都按改过的步数采样：与本来就这样训练的配置相同；改了什么记进成绩与可以照抄的命令。"""
    model = {
        "name": "latent_diffusion", "base_channels": 8, "multipliers": [1, 2], "depth": 1, "attention_levels": [],
        "sampling_steps": 2,
    }  # fmt: skip
    config = write_run(tmp_path, tree._replace(data={**tree.data, "pressure_hpa": [50.0]}), train={"epochs": 1})
    train_here(config, f"model={model}", "run.name=two")
    train_here(config, f"model={ {**model, 'sampling_steps': 3} }", "run.name=three")
    two, three = (tmp_path / f"checkpoints/{name}/best.ckpt" for name in ("two", "three"))
    common, change = ["--members", "2", "--stride", "9", "--save", "none"], ["--set", "model.sampling_steps=3"]
    plain = run(two, tmp_path / "plain", *common)
    changed = run(two, tmp_path / "changed", *common, *change)
    trained_so = run(three, tmp_path / "trained_so", *common)
    crps = [table["scores"]["latent_diffusion"]["t2m"]["crps"] for table in (plain, changed, trained_so)]
    assert crps[1] == crps[2] != crps[0]
    assert changed["set"] == "model.sampling_steps=3" and "set" not in plain
    compare_command(["--runs", str(tmp_path / "plain"), str(tmp_path / "changed"), "--out", str(tmp_path / "compared")])
    compared = json.loads((tmp_path / "compared/comparison.json").read_text(encoding="utf-8"))
    assert [member.get("set") for member in compared["runs"]] == [None, "model.sampling_steps=3"]
    assert "--set model.sampling_steps=3" in (tmp_path / "changed/report.html").read_text(encoding="utf-8")
    made = []
    for checkpoint, words in ((two, []), (two, change), (three, [])):
        out = tmp_path / f"forecast{len(made)}"
        inference_command(["--checkpoint", str(checkpoint), "--time", "2000-02-12T00", "--out", str(out), *words])
        made.append(np.load(out / "forecast+006h.npy"))
    assert np.array_equal(made[1], made[2]) and not np.array_equal(made[0], made[1])
    with pytest.raises(ValueError, match=r"--set model\.depth=2: the weights were trained with it"):
        run(two, tmp_path / "wrong", "--set", "model.depth=2")


def test_thresholds_fall_where_the_reader_puts_the_data():
    """值恰好等于阈值时不算超过：两边以同样的 float32 标准化，几百组统计量都如此。"""
    rng = np.random.default_rng(0)
    for mean, std, value in zip(rng.normal(0, 1e-3, 300), rng.random(300) + 1e-3, rng.normal(0, 300, 300), strict=True):
        spec = replace(small_spec(channels=1), mean=(float(mean),), std=(float(std),))
        field = np.full((1, 1, 1), value, np.float32)
        field -= np.float32(mean)
        field /= np.float32(std)
        table = threshold_tensor({"c0": (float(np.float32(value)),)}, spec)
        assert standardize_thresholds(table, spec).item() == field.item()


def test_thresholds_keep_their_names_and_add_up(trained, tmp_path):
    table = run(
        trained, tmp_path, "--thresholds", "t2m=280.1", "t2m=0", "t2m=101325.25", "--stride", "20", "--save", "none"
    )
    found = table["scores"]["persistence"]["t2m"]
    assert [n for n in found if n.startswith("brier")] == ["brier>0", "brier>280.1", "brier>101325.25"]
    assert found["brier>101325.25"] == [0.0]


def test_files_of_an_earlier_evaluation_do_not_stay(trained, tmp_path):
    run(trained, tmp_path, "--stride", "10")
    run(trained, tmp_path, "--stride", "20", "--save", "npy")
    assert not (tmp_path / "forecast.nc").exists() and (tmp_path / "preds.npy").exists()


def test_a_run_trained_on_a_gpu_is_scored_without_one(trained, tmp_path):
    content = load_checkpoint(trained)
    content["config"]["run"]["device"] = "cuda"
    save_checkpoint(tmp_path / "gpu.ckpt", content)
    run(tmp_path / "gpu.ckpt", tmp_path / "out", "--stride", "20", "--save", "none")


def test_interpolated_truth_is_left_out_and_counted(make_tree, trained, tmp_path):
    """另一棵同样的树，测试段少一个文件：那一刻不作真值，用到它作来源的也不算。"""
    tree = make_tree(tmp_path / "tree", CHANNELS, (8, 16), "2000-01-01", "2000-02-20")
    field_path(tree.root, "u10", FIRST + 10 * 6).unlink()
    content = load_checkpoint(trained)
    content["config"]["data"] |= {"root": str(tree.root), "cache_dir": str(tmp_path / "cache"), "max_missing": 0.1}
    save_checkpoint(tmp_path / "moved.ckpt", content)
    table = run(tmp_path / "moved.ckpt", tmp_path / "out", "--save", "npy", "netcdf")
    trues, hole = np.load(tmp_path / "out/trues.npy"), 10 - 3  # 第几个窗口的目标
    assert np.isnan(trues[hole, 0, 1]).all() and np.isfinite(trues[hole, 0, 0]).all()
    saved = xr.open_dataset(tmp_path / "out/truth.nc")["u10"].isel(time=hole)
    assert np.isnan(saved.values).all()
    assert table["left_out"]["t2m"] == [0] and table["left_out"]["u10"][0] >= 1
    assert table["left_out"]["u10"][0] + table["pairs"]["u10"][0] == table["initial_times"]
    assert "u10" in (tmp_path / "out/missing.csv").read_text()


REGIONS = """regions:
  band: {latitude: [-45, 30]}
  across: {latitude: [0, 90], longitude: [300, 60]}
  triangle: {polygon: [[60, 20], [-60, 60], [0, 170]]}
"""


@pytest.fixture
def regions(tmp_path) -> str:
    (tmp_path / "regions.yaml").write_text(REGIONS)
    return str(tmp_path / "regions.yaml")


def test_regions_and_hours_from_the_raw_fields(tree, trained, tmp_path, regions):
    """持续性预报：各区域、各有效钟点的均方根误差由原始的场逐点写开；没有区域时的数一个也不变。"""
    words = ("--steps", "2", "--save", "none", "--thresholds", "t2m=280")
    table = run(trained, tmp_path / "a", *words, "--regions", regions, "--by", "season", "hour")
    old = ("scorecard.csv", "figures/scorecard-climatology-2.png", "figures/roc.pdf", "figures/drift_mean.png")
    (tmp_path / "b/figures").mkdir(parents=True)
    for name in (*old, "figures/ranks.png", "figures/mine.png"):
        (tmp_path / "b" / name).write_text("of an earlier evaluation")
    plain = run(trained, tmp_path / "b", *words)
    names = {path.name for path in (tmp_path / "b/figures").iterdir()}
    assert names == {"rmse.png", "rmse.pdf", "spectra.png", "spectra.pdf", "mine.png"}
    assert not (tmp_path / "b/scorecard.csv").exists() and (tmp_path / "a/scorecard.csv").exists()
    assert {key: table[key] for key in ("scores", "skill", "pairs")} == {
        k: plain[k] for k in ("scores", "skill", "pairs")
    }
    assert table.keys() == plain.keys()  # 各格只在 CSV：metrics.json 不随 --regions、--by 变大，总读得回来
    assert (tmp_path / "b/metrics.csv").read_text() == "".join(
        line.removesuffix(end) + "\n"
        for line in (tmp_path / "a/metrics.csv").read_text().splitlines()
        for end in (",all,all", ",region,period")
        if line.endswith(end)
    )
    test = tree.fields[[i for i, h in enumerate(tree.hours) if h >= FIRST]].astype(float)  # (40, C, H, W)
    latitudes, longitudes = np.linspace(78.75, -78.75, 8)[:, None], np.arange(16) * 22.5
    inside = {
        "all": np.ones((8, 16), bool),
        "band": ((latitudes >= -45) & (latitudes <= 30)) & (longitudes >= 0),
        "across": (latitudes >= 0) & ((longitudes >= 300) | (longitudes <= 60)),
    }
    found: dict[tuple[str, str], dict[tuple[str, str, str, int], float]] = {}
    for row in csv.DictReader((tmp_path / "a/metrics.csv").read_text().splitlines()):
        key = (row["model"], row["channel"], row["metric"], int(row["lead_hours"]))
        if (row["region"], row["period"]) != ("all", "all") and row["value"]:
            found.setdefault((row["region"], row["period"]), {})[key] = float(row["value"])
    assert {r for r, _ in found} == {*inside, "triangle"}
    assert {p for _, p in found} == {"all", "DJF", "00 UTC", "06 UTC", "12 UTC", "18 UTC"}
    for (region, period), cell in found.items():
        for lead in range(2 if region != "triangle" else 0):
            hours = [FIRST + 6 * (3 + lead + n) for n in range(table["initial_times"])]
            rows = [n for n, h in enumerate(hours) if period in ("all", "DJF", f"{h % 24:02d} UTC")]
            weight = np.broadcast_to(weights(), (8, 16))[inside[region]]
            for c, channel in enumerate(CHANNELS):
                error = np.stack([test[2 + n, c] - test[3 + lead + n, c] for n in rows])[:, inside[region]]
                rmse = np.sqrt((error**2 * weight).sum() / (weight.sum() * len(rows)))
                assert cell["persistence", channel, "rmse", 6 * (lead + 1)] == pytest.approx(rmse, rel=1e-4)
    assert ("persistence", "t2m", "ssim", 6) not in found["band", "all"]
    assert ("persistence", "t2m", "brier>280", 6) in found["band", "all"]
    file = xr.open_dataset(tmp_path / "a/statistics.nc")
    assert file["square_by_region"].dims == ("model", "time", "prediction_timedelta", "channel", "region")
    assert file["region"].values.tolist() == ["band", "across", "triangle"]
    np.testing.assert_array_equal(file["region_mask"][0], inside["band"])
    assert "region" not in xr.open_dataset(tmp_path / "b/statistics.nc").dims


def test_two_processes_equal_one(trained, tmp_path, regions):
    arguments = ["--checkpoint", str(trained), "--steps", "2", "--members", "2", "--perturb", "0.2"]
    arguments += ["--regions", regions, "--by", "hour", "--events", "--save", "netcdf", "zarr"]
    one = run(trained, tmp_path / "one", *arguments[2:])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "evaluate.py"]
    done = subprocess.run(
        [*command, *arguments, "--out", str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two/metrics.json").read_text())
    for key in ("scores", "rank_histogram", "events"):
        assert one[key] == two[key], key
    assert (tmp_path / "one/metrics.csv").read_text() == (tmp_path / "two/metrics.csv").read_text()
    for name in ("forecast.nc", "truth.nc", "statistics.nc"):
        left, right = (xr.open_dataset(tmp_path / f / name, decode_timedelta=True) for f in ("one", "two"))
        xr.testing.assert_equal(left, right)
    for name in ("forecast", "truth"):  # 各进程写自己的块，与一个进程的 NetCDF 逐位相同
        expected = xr.open_dataset(tmp_path / f"one/{name}.nc", decode_timedelta=True).rename(WEATHERBENCH)
        for folder in ("one", "two"):
            xr.testing.assert_equal(xr.open_zarr(tmp_path / folder / f"{name}.zarr", chunks=None), expected)


def test_zarr_grows(trained, tmp_path):
    """两个划分接在一个文件夹里，只存 Zarr；再评同样的时刻要 --overwrite，没有它，算之前就停。"""
    words = ("--stride", "9", "--save", "zarr")
    tables = [run(trained, tmp_path, "--split", split, *words) for split in ("val", "test")]
    assert not (tmp_path / "forecast.nc").exists()
    forecast, truth = (xr.open_zarr(tmp_path / f"{name}.zarr", chunks=None) for name in ("forecast", "truth"))
    counts = [table["initial_times"] for table in tables]
    assert forecast.sizes["time"] == sum(counts) and bool((forecast.time.diff("time") > np.timedelta64(0)).all())
    error = forecast["2m_temperature"][:, 0].values - truth["2m_temperature"].sel(time=forecast.valid_time[:, 0]).values
    for table, part in zip(tables, np.split(error.astype(float), counts[:1]), strict=True):
        found = table["scores"]["ar_pred_video_vanilla"]["t2m"]["rmse"][0]
        assert found == pytest.approx(np.sqrt((part**2 * weights()).mean()), rel=1e-3)
    (tmp_path / "metrics.json").unlink()
    with pytest.raises(ValueError, match=r"forecast.zarr holds \d+ of these \d+ times already, .*; --overwrite"):
        run(trained, tmp_path, *words)
    run(trained, tmp_path, *words, "--overwrite")
    assert "--overwrite --save zarr" in (tmp_path / "report.html").read_text(encoding="utf-8")
    xr.testing.assert_equal(xr.open_zarr(tmp_path / "forecast.zarr", chunks=None), forecast)


def test_batch_size_changes_nothing_but_rounding(trained, tmp_path):
    content = load_checkpoint(trained)
    content["config"]["train"]["batch_size"] = 7
    save_checkpoint(tmp_path / "other.ckpt", content)
    options = ("--steps", "2", "--members", "3", "--perturb", "0.2", "--save", "none", "--stride", "2")
    one, two = run(trained, tmp_path / "one", *options), run(tmp_path / "other.ckpt", tmp_path / "two", *options)
    for model, channels in one["scores"].items():
        for channel, metrics in channels.items():
            for name, values in metrics.items():
                other = two["scores"][model][channel][name]
                pairs = (np.array(v, dtype=float) for v in (values, other))  # None → NaN
                np.testing.assert_allclose(*pairs, rtol=1e-4, atol=1e-5, err_msg=f"{model} {channel} {name}")


def test_one_window_is_enough(trained, tmp_path):
    table = run(trained, tmp_path, "--stride", "1000", "--save", "none")
    assert table["initial_times"] == 1
    assert table["cost"]["inference_samples_per_second"] is None  # 只有一批，量不出速度
    assert set(table["skill"]["ar_pred_video_vanilla"]["persistence"]["t2m"]["rmse"]) == {"value", "difference"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--members", "3"], "is deterministic: --members 3 needs --perturb"),
        (["--perturb", "0.1"], "--perturb 0.1 with one member changes nothing"),
        (["--smooth", "10"], "--smooth 10 shapes the noise of --perturb"),
        (["--thresholds", "t2n=280"], "no channel 't2n'; nearest: t2m"),
        (["--steps", "38"], "needs frames_in + steps = 3 + 38; --steps 37 is the most"),
        (["--points", "40"], "--points 40: write latitude,longitude like 39.9N,116.4E or 33.9S,151.2E"),
        (["--points", "95N,10E"], "--points 95N,10E: outside the grid"),
        (["--save", "none", "npy"], "none stands alone"),
    ],
)
def test_mistakes_are_one_line(trained, tmp_path, arguments, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  内容在下面查
        run(trained, tmp_path, *arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_full_disk_is_noticed_before_the_work(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="--save netcdf needs up to 0.0 GiB in .*; use --save none"):
        run(trained, tmp_path)
    assert not (tmp_path / "statistics.nc").exists()


def test_another_data_set_is_refused_with_both_sides_named(make_tree, trained, tmp_path):
    tree = make_tree(tmp_path / "tree", CHANNELS, (8, 16), "2000-01-01", "2000-02-20", seed=1)
    content = load_checkpoint(trained)
    for change, message in (
        ({"root": str(tree.root)}, r"changed\.ckpt was trained with mean = \[.*\], the data set has \["),
        ({"latitude": {"first": 70.0, "step": -10.0, "count": 8}}, "trained with latitudes = "),
        ({"variables": {"t2m": "single", "u10": "single"}}, r"trained with channels = \['t2m', 'u10', 'z_level_00'\]"),
        ({"interval_hours": 12}, "trained with interval_hours = 6, the data set has 12"),
    ):
        data = {**content["config"]["data"], "cache_dir": str(tmp_path / "cache"), **change}
        save_checkpoint(tmp_path / "changed.ckpt", {**content, "config": {**content["config"], "data": data}})
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "changed.ckpt", tmp_path / "out")


def test_a_forecast_that_is_not_finite_names_its_window(trained, tmp_path):
    content = load_checkpoint(trained)
    weight = next(k for k in content["model"] if k.endswith("weight"))
    content["model"][weight][:] = float("nan")
    save_checkpoint(tmp_path / "bad.ckpt", content)
    with pytest.raises(ValueError, match=r"the forecast from 2000-02-11T12 UTC holds non-finite values at \+6 h"):
        run(tmp_path / "bad.ckpt", tmp_path / "out")
    assert not (tmp_path / "out/statistics.nc").exists()
    assert not list((tmp_path / "out").glob(".*"))


def test_metrics_csv_holds_every_score(trained, tmp_path):
    table = run(trained, tmp_path, "--save", "none", "--stride", "5")
    with (tmp_path / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(r["model"], r["channel"], r["metric"]): r["value"] for r in rows}
    for model in ("ar_pred_video_vanilla", "persistence", "climatology"):
        for name in ("rmse", "mae", "bias", "acc", "ssim", "psnr", "activity_ratio", "log_spectral_distance", "crps"):
            value = table["scores"][model]["t2m"][name][0]
            assert found[model, "t2m", name] == ("" if value is None else str(value))
    assert table["scores"]["climatology"]["t2m"]["acc"] == [None]  # 距平为零，相关没有定义
    assert table["scores"]["climatology"]["t2m"]["activity_ratio"] == [0.0]


def test_a_fitted_model_joins_the_baselines(tree, trained, tmp_path, monkeypatch):
    """训练过的线性回归自动成为基线；这里借 AR_pred 的检查点当作它。"""
    folder = trained.parents[2]
    config = write_run(
        tmp_path, tree._replace(data={**tree.data, "pressure_hpa": [50.0]}), model={"name": "persistence"},
        checkpoint={"dir": str(folder / "checkpoints")}, log={"dir": str(folder / "log")}, train={"epochs": 0},
    )  # fmt: skip
    config.write_text(re.sub(r"(?s)model:.*?(?=\nrun:)", "model: {name: persistence}", config.read_text()))
    monkeypatch.setattr("engine.evaluation.baselines.FITTED", "ar_pred_video_vanilla")
    train_here(config, "run.name=judged")
    table = json.loads((folder / "log/judged/test/metrics.json").read_text())
    assert set(table["scores"]) == {"persistence", "climatology", "ar_pred_video_vanilla"}
    assert set(table["skill"]["persistence"]) == {"climatology", "ar_pred_video_vanilla"}


def test_the_page_shows_the_saved_fields(trained, tmp_path):
    """地图解码出来是 forecast.nc 里的场（差不过一级），序列是最近的格点。"""
    run(trained, tmp_path, "--steps", "2", "--points", "33.9S,151.2E")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = re.search(r'(?s)<script[^>]*type="application/json"[^>]*>(.*?)</script>', page)
    assert text is not None
    content = json.loads(text[1])
    forecast = xr.open_dataset(tmp_path / "forecast.nc", decode_timedelta=True)
    maps, series = content["maps"], content["series"]
    for lead in range(2):
        for t, moment in enumerate(maps["times"]):
            found = maps["fields"]["t2m"][lead][t]["forecast"]
            step = (found["high"] - found["low"]) / 255
            data = np.frombuffer(base64.b64decode(found["data"]), np.uint8).reshape(8, 16)
            saved = forecast["t2m"].sel(time=moment).isel(prediction_timedelta=lead).values
            np.testing.assert_allclose(found["low"] + step * data, saved, atol=0.51 * step + 1e-4)
        line = forecast["t2m"].isel(prediction_timedelta=lead).sel(latitude=-33.75, longitude=157.5)
        model = series["models"]["ar_pred_video_vanilla"]["t2m"][lead]
        np.testing.assert_allclose(model[1], line.values, rtol=1e-3)
        assert len(series["valid_times"][lead]) == len(model[0]) == forecast.sizes["time"]
        assert series["valid_times"][lead][0] == str(line.valid_time.values[0])[:16]
    assert content["curves"]["train"] and content["data"]["missing"] == []
    assert content["costs"][0]["parameters"] > 0 and "evaluate.py" in content["reproduce"][0]


def test_figures_and_page_of_more_channels_than_the_page_draws(trained, tmp_path, monkeypatch, caplog):
    """地图与谱只有几个通道：成绩的图、报告、比较一样不少；一种图画不成是错误，先画好的已经在了。"""
    for module in ("evaluation.glimpse", "comparison.compare"):
        monkeypatch.setattr(f"engine.{module}.MAP_CHANNELS", 2)
    draw, drawn = evaluation.draw_scores, []
    monkeypatch.setattr(evaluation, "draw_scores", lambda *given: drawn.append(given) or draw(*given))
    run(trained, tmp_path / "a", "--members", "2", "--perturb", "0.1", "--save", "none", "--stride", "9")
    assert {p.name for p in (tmp_path / "a/figures").glob("*.png")} == {"rmse.png", "spectra.png", "ranks.png"}
    assert compare_command(["--runs", str(tmp_path / "a"), "--out", str(tmp_path / "c")]) == 0
    assert (tmp_path / "c/figures/rmse.png").is_file()
    for folder in ("a", "c"):
        text = (tmp_path / folder / "report.html").read_text(encoding="utf-8")
        found = re.search(r'(?s)<script[^>]*type="application/json"[^>]*>(.*?)</script>', text)
        assert found is not None
        content = json.loads(found[1])
        assert [line["name"] for line in content["channels"]] == list(CHANNELS)
        assert list(content["spectra"]["truth"]) == ["t2m", "z_level_00"]
    assert not [r for r in caplog.records if r.levelname == "WARNING" and "failed" in r.getMessage()]

    def broken(*_: object) -> None:
        raise KeyError("u10")

    monkeypatch.setattr(evaluation, "spectra_figure", broken)
    result, page, _ = drawn[0]
    with pytest.raises(KeyError, match="u10"):
        draw(result, page, tmp_path / "b")
    assert (tmp_path / "b/rmse.png").is_file()


def test_a_baseline_is_a_model_file_and_a_name(trained, tmp_path, monkeypatch):
    """加一个基线：models/ 里一个文件，BASELINES 里一个名字；评测、技巧、比较里就有它。"""
    (tmp_path / "zero.py").write_text(ZERO)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    names = [*models.model_names(), "zero"]
    monkeypatch.setattr("models.model_names", lambda: names)
    monkeypatch.setattr("engine.evaluation.baselines.BASELINES", (*BASELINES, "zero"))
    monkeypatch.setattr("engine.evaluation.baselines.NAMES", (*NAMES, "zero"))
    table = run(trained, tmp_path / "a", "--save", "none")
    assert list(table["scores"]) == ["persistence", "climatology", "zero", "ar_pred_video_vanilla"]
    assert "zero" in table["skill"]["ar_pred_video_vanilla"]
    assert compare_command(["--runs", str(tmp_path / "a"), "--out", str(tmp_path / "c")]) == 0
    assert json.loads((tmp_path / "c/comparison.json").read_text())["baselines"] == [*BASELINES, "zero"]
