"""预报命令：按时刻、按文件两种输入结果相同，输出单位、坐标、成绩对得上，坏输入一行说清。"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from engine.commands import inference_command
from engine.forecasting import outputs, starts
from engine.forecasting.inputs import read_start
from tests.engine.runs import train_small
from util.calendar import parse_time
from util.checkpoint import load_checkpoint, save_checkpoint
from util.data.tree_files import field_path

CHANNELS = ("t2m", "u10", "z_level_00")


@pytest.fixture(scope="module")
def tree(make_tree, tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree") / "tree", CHANNELS, (8, 16), "2000-01-01", "2000-02-20")


@pytest.fixture(scope="module")
def trained(tree, tmp_path_factory) -> Path:
    return train_small(tmp_path_factory.mktemp("run"), tree, data={"pressure_hpa": [50.0]})


def infer(checkpoint: Path, out: Path, *arguments: str) -> None:
    assert inference_command(["--checkpoint", str(checkpoint), "--out", str(out), *arguments]) == 0


def frames_at(tree, time: str, count: int = 3) -> np.ndarray:
    """直接从造树时的数组取 (count, H, W, k)，止于 time。"""
    last = tree.hours.index(parse_time(time))
    return tree.fields[last - count + 1 : last + 1].transpose(0, 2, 3, 1)


def test_by_time_and_by_files_agree(tree, trained, tmp_path):
    infer(trained, tmp_path / "time", "--time", "2000-02-15T06")
    frames = frames_at(tree, "2000-02-15T06")
    np.save(tmp_path / "window.npy", frames)
    for i, frame in enumerate(frames):
        np.save(tmp_path / f"frame{i}.npy", frame)
    infer(trained, tmp_path / "window", "--inputs", str(tmp_path / "window.npy"))
    infer(trained, tmp_path / "files", "--inputs", *(str(tmp_path / f"frame{i}.npy") for i in range(3)))
    made = np.load(tmp_path / "time/forecast+006h.npy")
    assert made.shape == (8, 16, 3)
    assert made.dtype == np.float32
    for other in ("window", "files"):
        np.testing.assert_array_equal(np.load(tmp_path / other / "forecast+006h.npy"), made)
    assert not (tmp_path / "files/scores.json").exists()


def test_outputs(tree, trained, tmp_path):
    infer(trained, tmp_path, "--time", "2000-02-15T06")
    made, standard = (np.load(tmp_path / f"forecast+006h{s}.npy") for s in ("", "_standardized"))
    statistics = [
        json.loads((tree.root / f / "mean_std.json").read_text()) for f in ("t2m_npy", "u10_npy", "z_npy/level_00")
    ]
    mean, std = (np.array([s[key][0] for s in statistics]) for key in ("mean", "std"))
    np.testing.assert_allclose(made, standard * std + mean, rtol=1e-5, atol=1e-3)
    data = xr.open_dataset(tmp_path / "forecast.nc", decode_timedelta=True)
    assert data["t2m"].attrs["units"] == "K"
    assert data["time"].values[0] == np.datetime64("2000-02-15T06")
    assert data["prediction_timedelta"].values[0] == np.timedelta64(6, "h")
    np.testing.assert_array_equal(data["t2m"].squeeze().values, made[..., 0])
    np.testing.assert_array_equal(data["z"].sel(level=50.0).squeeze().values, made[..., 2])
    np.testing.assert_allclose(
        data["u10_truth"].squeeze().values, frames_at(tree, "2000-02-15T12", 1)[0, ..., 1], rtol=1e-4, atol=1e-4
    )
    edges = np.deg2rad(np.linspace(90, -90, 9))
    weights = np.sin(edges[:-1]) - np.sin(edges[1:])
    error = (made - frames_at(tree, "2000-02-15T12", 1)[0]).astype(float) ** 2
    expected = np.sqrt((error * weights[:, None, None]).sum((0, 1)) / (weights.sum() * 16))
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [scores["rmse"][c][0] for c in CHANNELS] == pytest.approx(expected, rel=1e-4)
    assert (tmp_path / "forecast+006h.png").stat().st_size > 10_000


def test_works_without_the_tree(tree, trained, tmp_path):
    """检查点自带配置与统计量：目录树不在也能由文件预报。"""
    content = load_checkpoint(trained)
    content["config"]["data"]["root"] = str(tmp_path / "gone")
    save_checkpoint(tmp_path / "alone.ckpt", content)
    np.save(tmp_path / "window.npy", frames_at(tree, "2000-02-15T06"))
    infer(tmp_path / "alone.ckpt", tmp_path / "out", "--inputs", str(tmp_path / "window.npy"))
    with pytest.raises(ValueError, match="is not a directory"):
        infer(tmp_path / "alone.ckpt", tmp_path / "out2", "--time", "2000-02-15T06")


def test_rolls_on_past_the_end_of_the_tree(tree, trained, tmp_path):
    infer(trained, tmp_path / "long", "--time", "2000-02-20T18", "--steps", "3")
    infer(trained, tmp_path / "short", "--time", "2000-02-20T18")
    assert len(list((tmp_path / "long").glob("forecast+*h.npy"))) == 3
    assert not (tmp_path / "long/scores.json").exists()
    first = np.load(tmp_path / "short/forecast+006h.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "long/forecast+006h.npy"), first)
    window = np.concatenate([frames_at(tree, "2000-02-20T18", 2), first[None]])  # 第二步的历史里有自己的第一步
    np.save(tmp_path / "window.npy", window)
    infer(trained, tmp_path / "second", "--inputs", str(tmp_path / "window.npy"))
    second = np.load(tmp_path / "second/forecast+006h.npy")
    np.testing.assert_allclose(np.load(tmp_path / "long/forecast+012h.npy"), second, rtol=1e-4, atol=1e-3)


def test_members_differ_and_repeat(trained, tmp_path):
    for name in ("a", "b"):
        infer(trained, tmp_path / name, "--time", "2000-02-15T06", "--members", "3", "--perturb", "0.1")
    infer(trained, tmp_path / "one", "--time", "2000-02-15T06")
    made = np.load(tmp_path / "a/forecast+006h.npy")
    assert made.shape == (3, 8, 16, 3)
    np.testing.assert_array_equal(made, np.load(tmp_path / "b/forecast+006h.npy"))
    np.testing.assert_allclose(made[0], np.load(tmp_path / "one/forecast+006h.npy"), rtol=1e-4, atol=1e-3)
    assert (made[0] != made[1]).all(-1).any()


def test_history_never_looks_ahead(make_tree, trained, tmp_path):
    """历史最后一帧缺了，第二个邻居正是目标：不用它，沿用前一帧；目标照常计分。真值缺了则不计。"""
    tree = make_tree(tmp_path / "tree", CHANNELS, (8, 16), "2000-01-01", "2000-02-20")
    field_path(tree.root, "u10", parse_time("2000-02-15T06")).unlink()
    content = load_checkpoint(trained)
    content["config"]["data"].update(root=str(tree.root), cache_dir=str(tmp_path / "cache"))
    save_checkpoint(tmp_path / "moved.ckpt", content)
    infer(tmp_path / "moved.ckpt", tmp_path / "out", "--time", "2000-02-15T06")
    frames = frames_at(tree, "2000-02-15T06")
    frames[2, ..., 1] = frames[1, ..., 1]
    np.save(tmp_path / "held.npy", frames)
    infer(trained, tmp_path / "held", "--inputs", str(tmp_path / "held.npy"))
    held = np.load(tmp_path / "held/forecast+006h.npy")
    np.testing.assert_allclose(np.load(tmp_path / "out/forecast+006h.npy"), held, rtol=1e-5, atol=1e-3)
    assert json.loads((tmp_path / "out/scores.json").read_text())["rmse"]["u10"][0] > 0
    assert "interpolated" in (tmp_path / "out/inference.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--time", "2000-02-15T07"], "sampled every 6 h"),
        (["--time", "2000-03-15T00"], "lacks history at 2000-03-14T12"),
        (["--time", "1999-06-01T00"], "lacks history at 1999-05-31T12"),
        (["--time", "2000-01-01T00"], "lacks history at 1999-12-31T12"),
        (["--time", "9999-12-31T18"], "years 1000 to 9000"),
        (["--time", "yesterday"], "write it like 2015-06-01T00"),
        (["--time", "2000-02-15T06", "2000-02-16T06"], "give one time, or FROM TO EVERY"),
        (["--time", "2000-02-15T06", "2000-02-16T06", "0"], "give one time, or FROM TO EVERY"),
        (["--time", "2000-02-16T06", "2000-02-15T06", "6"], "2000-02-15T06 lies before 2000-02-16T06"),
        (["--time", "2000-02-15T06", "2000-02-16T06", "3"], "--time 2000-02-15T09: the tree is sampled every 6 h"),
        (["--time", "2000-02-20T18", "2000-02-22T00", "6"], "--time 2000-02-22T00: .* lacks history at 2000-02-22T00"),
        (["--time", "2000-02-15T06", "2000-02-16T06", "6", "--inputs", "x.npy"], "one --time, or none"),
        ([], "give --time"),
        (["--time", "2000-02-15T06", "--members", "3"], "needs --perturb"),
        (["--inputs", "missing.npy"], "cannot be read"),
        (["--time", "2000-02-15T06", "--out", "README.md"], "is a file"),
    ],
)
def test_bad_requests(trained, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        infer(trained, tmp_path / "out", *arguments)
    assert not list(tmp_path.glob("out/forecast*"))


def test_bad_frames(tree, trained, tmp_path):
    frames = frames_at(tree, "2000-02-15T06")
    for array, message in (
        (frames[:2], r"shape \(2, 8, 16, 3\); expected 3 files of shape \(8, 16, 3\), or one of \(3, 8, 16, 3\)"),
        (frames[0], "1 frames; expected 3 files"),
        (frames[0].transpose(2, 0, 1), r"shape \(3, 8, 16\)"),
        (np.full_like(frames, np.nan), "non-finite"),
        (frames.astype(complex), "dtype complex128, not real numbers"),
        (frames.astype(str), "not real numbers"),
    ):
        np.save(tmp_path / "bad.npy", array)
        with pytest.raises(ValueError, match=message):
            infer(trained, tmp_path / "out", "--inputs", str(tmp_path / "bad.npy"))


def test_weights_that_do_not_fit_are_refused(trained, tmp_path):
    content = load_checkpoint(trained)
    wrong = {**content, "model": {**content["model"], "embed.weight": torch.zeros(3, 3)}}
    save_checkpoint(tmp_path / "wrong.ckpt", wrong)
    with pytest.raises(ValueError, match=r"embed.weight is \(3, 3\) in the checkpoint"):
        infer(tmp_path / "wrong.ckpt", tmp_path / "out", "--time", "2000-02-15T06")


def test_added_to_zarr(trained, tmp_path):
    """两次预报接在一起，与各自的 NetCDF 逐位相同；真值也在；已有的时刻、没有时刻的，一行说清。"""
    words = ("--save", "zarr", "--members", "2", "--perturb", "0.1")
    kept = []
    for time in ("2000-02-15T06", "2000-02-15T18"):
        infer(trained, tmp_path, "--time", time, *words)
        with xr.open_dataset(tmp_path / "forecast.nc", decode_timedelta=True) as file:
            kept.append(file.load())
    expected = xr.concat(kept, "time")
    found, truth = (xr.open_zarr(tmp_path / f"{name}.zarr", chunks=None) for name in ("forecast", "truth"))
    names = {"t2m": "2m_temperature", "u10": "10m_u_component_of_wind", "z": "geopotential"}
    for name, known in names.items():
        np.testing.assert_array_equal(found[known], expected[name])
        real = truth[known].sel(time=found.valid_time)
        np.testing.assert_array_equal(real, expected[f"{name}_truth"].transpose(*real.dims))
    with pytest.raises(ValueError, match="holds 1 of these 1 times already, first 2000-02-15T18; --overwrite"):
        infer(trained, tmp_path, "--time", "2000-02-15T18", *words)
    with pytest.raises(ValueError, match="its perturb is 0.1, here 0.2"):
        infer(trained, tmp_path, "--time", "2000-02-16T00", *words, "--perturb", "0.2")
    with pytest.raises(ValueError, match="--save zarr adds a forecast by its initial time"):
        infer(trained, tmp_path, "--inputs", "x.npy", "--save", "zarr")
    with pytest.raises(ValueError, match="--overwrite is about forecast.zarr"):
        infer(trained, tmp_path, "--time", "2000-02-15T18", "--overwrite")


def test_many_starts_are_those_of_one_by_one(tree, trained, tmp_path, monkeypatch):
    """起止都在内；批切得不齐，成员一次放不下：与逐个预报的相同；真值只到目录树的末尾，没有的是 NaN。"""
    monkeypatch.setattr(outputs, "draw_lead", lambda *_: [tmp_path])  # 图要几秒，这里不看
    content = load_checkpoint(trained)
    content["config"]["train"]["batch_size"] = 5  # 两个起报时刻一批，一次模型调用至多五个样本
    save_checkpoint(tmp_path / "five.ckpt", content)
    words = ("--members", "2", "--perturb", "0.1", "--steps", "3", "--save", "zarr")
    span = ("2000-02-18T18", "2000-02-20T18", "12")
    infer(tmp_path / "five.ckpt", tmp_path / "many", "--time", *span, f"data.root={tree.root}", *words)
    kept = []
    for day, hour in ((18, 18), (19, 6), (19, 18), (20, 6), (20, 18)):
        infer(trained, tmp_path / "one", "--time", f"2000-02-{day}T{hour:02d}", *words)
        with xr.open_dataset(tmp_path / "one/forecast.nc", decode_timedelta=True) as file:
            kept.append(file.load())
    many = xr.open_dataset(tmp_path / "many/forecast.nc", decode_timedelta=True).load()
    expected = xr.concat(kept, "time", data_vars="minimal", coords="minimal", compat="override", join="outer")
    for name in many.data_vars:
        rtol = 0 if str(name).endswith("_truth") else 1e-5
        np.testing.assert_allclose(many[name], expected[name].transpose(*many[name].dims), rtol=rtol, atol=1e-3)
    assert many["t2m_truth"].notnull().all(("prediction_timedelta", "latitude", "longitude")).values.tolist() == [
        *([True] * 3), False, False,
    ]  # fmt: skip
    for name in ("forecast", "truth"):  # Zarr 里的与 NetCDF、与逐个接起来的都相同
        found, other = (xr.open_zarr(tmp_path / f / f"{name}.zarr", chunks=None).load() for f in ("many", "one"))
        xr.testing.assert_allclose(found, other, rtol=1e-5, atol=1e-3)
    found = xr.open_zarr(tmp_path / "many/forecast.zarr", chunks=None)
    np.testing.assert_array_equal(found["2m_temperature"], many["t2m"])
    assert not list((tmp_path / "many").glob("*.npy")) and not list((tmp_path / "many").glob("*.png"))


def test_interrupted_it_leaves_the_batches_done(tree, trained, tmp_path, monkeypatch):
    """三个一批，第二批里停下：第一批与照常走完的逐位相同，其余是 NaN。"""
    content = load_checkpoint(trained)
    content["config"]["train"]["batch_size"] = 3
    save_checkpoint(tmp_path / "three.ckpt", content)
    words = ("--time", "2000-02-15T06", "2000-02-16T06", "6")
    infer(tmp_path / "three.ckpt", tmp_path / "whole", *words)

    def stopped(reader, init, steps):
        if init == parse_time("2000-02-16T00"):
            raise KeyboardInterrupt
        return read_start(reader, init, steps)

    monkeypatch.setattr(starts, "read_start", stopped)
    with pytest.raises(KeyboardInterrupt):
        infer(tmp_path / "three.ckpt", tmp_path / "stopped", *words)
    for name, fields in xr.open_dataset(tmp_path / "whole/forecast.nc", decode_timedelta=True).load().data_vars.items():
        found = xr.open_dataset(tmp_path / "stopped/forecast.nc", decode_timedelta=True)[name]
        np.testing.assert_array_equal(found[:3], fields[:3])
        assert found[3:].isnull().all() and fields.notnull().all()


def test_a_flipped_bit_is_one_line_unless_taken_as_it_is(trained, tmp_path):
    content, weight = bytearray(trained.read_bytes()), load_checkpoint(trained)["model"]["decoder.head.weight"]
    content[content.index(weight.numpy().tobytes())] ^= 1
    (tmp_path / "flipped.ckpt").write_bytes(content)
    arguments = tmp_path / "flipped.ckpt", tmp_path / "out", "--time", "2000-02-15T06"
    with pytest.raises(ValueError, match=r"flipped.ckpt: model.decoder.head.weight is damaged, .* --no-verify"):
        infer(*arguments)
    infer(*arguments, "--no-verify")


def test_a_broken_model_is_named_with_its_start(trained, tmp_path):
    content = load_checkpoint(trained)
    content["model"] = {name: value * float("nan") for name, value in content["model"].items()}
    content["ema"] = None
    save_checkpoint(tmp_path / "broken.ckpt", content)
    with pytest.raises(ValueError, match=r"the forecast from 2000-02-15T06 UTC holds non-finite values at \+6 h"):
        infer(tmp_path / "broken.ckpt", tmp_path / "out", "--time", "2000-02-15T06", "2000-02-16T06", "6")
