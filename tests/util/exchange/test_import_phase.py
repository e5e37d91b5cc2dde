"""步长相同、钟点不从 0 时起的数据（日平均记在 12 时，03、09、15、21 时）：各处都认得。"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from lightning_fabric import Fabric

from engine.evaluation.baselines import fit_baselines
from engine.forecasting.inputs import read_tree
from tests.util.exchange.test_import_fields import DATES
from util.calendar import moment_of, parse_time, time_text
from util.commands.import_fields import main
from util.config import DataConfig, RunConfig, read_mapping
from util.data.batches import all_starts
from util.data.dataset import open_data
from util.data.index import scan, split_years
from util.data.tree_files import field_path, read_mean_std
from util.exchange.export import export
from util.inspection.check import check_tree
from util.inspection.scan import summarize
from util.inspection.statistics import channel_statistics
from util.strict import validate
from util.training_config import TrainConfig

PHASES = {24: 12, 6: 3, 12: 9, 3: 1}  # 步长 → 第一个钟点
Case = tuple[xr.Dataset, Path, int]


@pytest.fixture(params=PHASES.items(), ids=[f"{step}h from {first:02d}" for step, first in PHASES.items()])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    """九天的 t2m，4 × 8；钟点自己一份日变化，气候态才分得出。"""
    step, first = request.param
    hours = parse_time("2000-01-01") + np.arange(first, 9 * 24, step)
    noise = np.random.default_rng(0).normal(0, 1, (hours.size, 4, 8))
    values = (280 + hours[:, None, None] % 24 + noise).astype(np.float32)
    dataset = xr.Dataset(
        {"t2m": (("time", "lat", "lon"), values, {"units": "K"})},
        {
            "time": np.array([moment_of(int(h)) for h in hours], "datetime64[ns]"),
            "lat": np.linspace(67.5, -67.5, 4),
            "lon": np.arange(8) * 45.0,
        },
    )
    dataset.to_netcdf(tmp_path / "source.nc")
    return dataset, tmp_path, step


def imported(tmp_path: Path, *where: str) -> DataConfig:
    """跑一遍导入；YAML 照写出来的，配上两帧的窗口。"""
    out = tmp_path / "set.yaml"
    words = ["--source", str(tmp_path / "source.nc"), "--variable", "t2m=t2m", *DATES, "--yaml", str(out)]
    main([*words, "--overwrite", *where])
    more = {"frames_in": 1, "workers": 0, "pin_memory": False, "cache_dir": str(tmp_path / "cache")}
    return validate(DataConfig, read_mapping(out) | more, "set")


def test_tree_and_store_agree(case: Case) -> None:
    """窗口逐位相同，每个时刻都在，起点就是文件里的时刻；检查、扫描、统计量数的也是它们。"""
    dataset, tmp_path, step = case
    values = dataset.t2m.values
    first = PHASES[step]
    config = imported(tmp_path, "--root", str(tmp_path / "tree"))
    assert (config.interval_hours, config.first_hour) == (step, first)
    packed = imported(tmp_path, "--store", str(tmp_path / "store"))
    tree, store = open_data(config), open_data(packed)
    hours = dataset.time.values.astype("datetime64[h]").astype(int)
    for split in ("train", "val", "test"):
        starts = all_starts(tree.segments[split], 2)
        assert np.array_equal(starts, all_starts(store.segments[split], 2))
        batch, other = (data.windows.__getitems__(starts.tolist()) for data in (tree, store))
        assert all(torch.equal(a, b) for a, b in zip(batch.tensors, other.tensors, strict=True))
        assert batch.valid.all()
        expected = values[np.searchsorted(hours, starts + step)]
        np.testing.assert_allclose(tree.spec.to_physical(batch.future[:, 0])[:, 0], expected, rtol=1e-6)
    assert sum(tree.samples(split) for split in ("train", "val", "test")) == hours.size

    reports, bad = check_tree(config, 1)
    assert not bad and [r.expected for r in reports] == [hours.size] and not reports[0].problems
    row = summarize(config, scan(config, ["t2m"], split_years(config)))[1].split()
    assert row[1:4] == [str(hours.size), str(hours.size), "0"]
    moments = channel_statistics(config)["t2m"].moments
    inside = values[: 5 * 24 // step].astype(np.float64)
    np.testing.assert_allclose((moments.mean, moments.std), (inside.mean(), inside.std()), rtol=1e-12)
    np.testing.assert_allclose(read_mean_std(tmp_path / "tree", "t2m"), (moments.mean, moments.std), rtol=1e-12)

    export(tmp_path / "store", tmp_path / "again", tmp_path / "again.nc")
    with xr.open_dataset(tmp_path / "again.nc") as written:
        np.testing.assert_array_equal(written.time.values, dataset.time.values)
        np.testing.assert_allclose(written.t2m.values, values, rtol=1e-6)
    for hour in hours:
        assert field_path(tmp_path / "again", "t2m", hour).is_file()


def test_forecast_and_climatology(case: Case) -> None:
    """起报只在数据的钟点上；气候态按钟点分开，每个钟点一份。"""
    dataset, tmp_path, step = case
    config = imported(tmp_path, "--root", str(tmp_path / "tree"))
    data = open_data(config)
    hours = dataset.time.values.astype("datetime64[h]").astype(int)
    history, truth, _ = read_tree(config, data.spec, int(hours[2]), 1)
    assert truth is not None
    np.testing.assert_allclose(
        data.spec.to_physical(torch.cat([history, truth]))[:, 0], dataset.t2m.values[2:4], rtol=1e-6
    )
    near = f"{time_text(int(hours[2]) - step)} and {time_text(int(hours[2]))} UTC"
    with pytest.raises(ValueError, match=rf"sampled every {step} h; the nearest are {near}"):
        read_tree(config, data.spec, int(hours[2]) - PHASES[step], 1)

    run = RunConfig(data=config, model={"name": "persistence"}, train=TrainConfig(epochs=0, batch_size=4))
    model = fit_baselines(data, run, 4, Fabric(accelerator="cpu", devices=1))["climatology"]
    times = torch.from_numpy(hours[: 24 // step + 1])[:, None] + torch.tensor([-step, 0])
    made = data.spec.to_physical(model.forecast(torch.zeros(len(times), 1, 1, 4, 8), times)[:, 0, 0])[:, 0]
    trained = dataset.t2m.isel(time=slice(1, 5 * 24 // step))  # 窗口的末一帧：第一个时刻只作历史
    for hour, field in zip(times[:, 1].tolist(), made, strict=True):
        expected = trained.sel(time=trained.time.dt.hour == hour % 24).mean("time").values
        np.testing.assert_allclose(field, expected, rtol=1e-5)


def test_part_of_the_hours(case: Case) -> None:
    """存档里能取出稀一些的钟点；取不出的一行说清；不是每天第一个的钟点，说该写几。"""
    _, tmp_path, step = case
    packed = imported(tmp_path, "--store", str(tmp_path / "store"))
    first = PHASES[step]
    later = packed.model_copy(update={"interval_hours": 24, "first_hour": (first + 24 - step) % 24})
    assert set((np.concatenate(open_data(later).segments["train"]) % 24).tolist()) == {later.first_hour}
    if step > 1:
        with pytest.raises(ValueError, match=rf"data.first_hour = {first - 1}: the store .* every {step} h from"):
            open_data(packed.model_copy(update={"first_hour": first - 1}))
    with pytest.raises(ValueError, match=rf"first_hour = {first} is not the first of every 1 h; write 0"):
        validate(DataConfig, packed.model_dump() | {"interval_hours": 1}, "set")


# ---- 步长不整除 24 的（5、36、48 小时，跨着年）：从 1970 年起接着数

COUNT = {5: 92, 36: 40, 48: 40}  # 步长 → 时刻的个数；末一个是那一天的末一个
START = {step: parse_time("2001-01-01") - 10 * step + 2 for step in COUNT}  # 第十一个已是下一年；相位不是 0
Odd = tuple[np.ndarray, np.ndarray, Path]


@pytest.fixture(params=COUNT, ids=lambda step: f"{step}h")
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> Odd:
    """(T,) 小时、(T, 4, 8) 的 t2m，钟点各有自己的一份；源文件在 tmp_path。"""
    hours = START[request.param] + request.param * np.arange(COUNT[request.param])
    noise = np.random.default_rng(0).normal(0, 1, (hours.size, 4, 8))
    values = (280 + hours[:, None, None] % 24 + noise).astype(np.float32)
    coordinates = {"lat": np.linspace(67.5, -67.5, 4), "lon": np.arange(8) * 45.0}
    times = {"time": np.array([moment_of(int(h)) for h in hours], "datetime64[ns]")}
    dataset = xr.Dataset({"t2m": (("time", "lat", "lon"), values, {"units": "K"})}, times | coordinates)
    dataset.to_netcdf(tmp_path / "source.nc")
    return hours, values, tmp_path


def imported_days(hours: np.ndarray, tmp_path: Path, *where: str) -> DataConfig:
    """前六成训练，其余验证、测试各半，在日子的边上分开。"""
    days = [time_text(int(hours[int(share * (len(hours) - 1))]))[:10] for share in (0, 0.6, 0.8, 1)]
    after = [time_text(parse_time(day) + 24)[:10] for day in days]
    out = tmp_path / "set.yaml"
    words = ["--source", str(tmp_path / "source.nc"), "--variable", "t2m=t2m", "--yaml", str(out), "--overwrite"]
    words += ["--train", days[0], days[1], "--val", after[1], days[2], "--test", after[2], days[3]]
    main([*words, *where])
    more = {"frames_in": 1, "workers": 0, "pin_memory": False, "cache_dir": str(tmp_path / "cache")}
    return validate(DataConfig, read_mapping(out) | more, "set")


def test_odd_steps_tree_and_store_agree(odd: Odd) -> None:
    hours, values, tmp_path = odd
    step = int(hours[1] - hours[0])
    config = imported_days(hours, tmp_path, "--root", str(tmp_path / "tree"))
    assert (config.interval_hours, config.first_hour) == (step, hours[0] % step)
    tree, store = open_data(config), open_data(imported_days(hours, tmp_path, "--store", str(tmp_path / "store")))
    seen = []
    for split in ("train", "val", "test"):
        starts = all_starts(tree.segments[split], 2)
        assert np.array_equal(starts, all_starts(store.segments[split], 2))
        batch, other = (data.windows.__getitems__(starts.tolist()) for data in (tree, store))
        assert all(torch.equal(a, b) for a, b in zip(batch.tensors, other.tensors, strict=True)) and batch.valid.all()
        expected = values[np.searchsorted(hours, starts + step)]
        np.testing.assert_allclose(tree.spec.to_physical(batch.future[:, 0])[:, 0], expected, rtol=1e-6)
        seen += np.concatenate(tree.segments[split]).tolist()
    assert seen == hours.tolist()
    reports, bad = check_tree(config, 1)
    assert not bad and reports[0].expected == hours.size
    train = values[np.isin(hours, np.concatenate(tree.segments["train"]))].astype(np.float64)
    moments = channel_statistics(config)["t2m"].moments
    np.testing.assert_allclose((moments.mean, moments.std), (train.mean(), train.std()), rtol=1e-12)


def test_odd_steps_forecast_and_climatology(odd: Odd) -> None:
    """气候态的钟点是数据里有的；起报不在数据的时刻上，说出最近的两个。"""
    hours, values, tmp_path = odd
    step = int(hours[1] - hours[0])
    config = imported_days(hours, tmp_path, "--root", str(tmp_path / "tree"))
    data = open_data(config)
    history, truth, _ = read_tree(config, data.spec, int(hours[10]), 1)  # 年内的第一个
    assert truth is not None and field_path(config.root, "t2m", int(hours[10])).name == "2001-0002.npy"
    np.testing.assert_allclose(data.spec.to_physical(torch.cat([history, truth]))[:, 0], values[10:12], rtol=1e-6)
    near = f"{time_text(int(hours[10]))} and {time_text(int(hours[11]))} UTC"
    with pytest.raises(ValueError, match=f"sampled every {step} h; the nearest are {near}"):
        read_tree(config, data.spec, int(hours[10]) + 1, 1)

    run = RunConfig(data=config, model={"name": "persistence"}, train=TrainConfig(epochs=0, batch_size=4))
    model = fit_baselines(data, run, 4, Fabric(accelerator="cpu", devices=1))["climatology"]
    times = torch.from_numpy(hours[10:34])[:, None] + torch.tensor([-step, 0])
    made = data.spec.to_physical(model.forecast(torch.zeros(len(times), 1, 1, 4, 8), times)[:, 0, 0])[:, 0]
    inside = np.isin(hours, np.concatenate(data.segments["train"])[1:])  # 窗口的末一帧：第一个时刻只作历史
    for hour, field in zip(times[:, 1].tolist(), made, strict=True):
        expected = values[inside & (hours % 24 == hour % 24)].mean(axis=0)
        np.testing.assert_allclose(field, expected, rtol=1e-5)


def test_odd_steps_a_multiple_of_the_step_starts_anywhere(odd: Odd) -> None:
    """从存档里取两倍的步长：两种相位各取一半。"""
    hours, _, tmp_path = odd
    step = int(hours[1] - hours[0])
    packed = imported_days(hours, tmp_path, "--store", str(tmp_path / "store"))
    found = []
    for first in (packed.first_hour, packed.first_hour + step):
        data = open_data(packed.model_copy(update={"interval_hours": 2 * step, "first_hour": first}))
        found += [h for split in data.segments.values() for h in np.concatenate(split).tolist()]
    assert sorted(found) == hours.tolist()
    with pytest.raises(ValueError, match=f"holds every {step} h from hour {packed.first_hour}"):
        open_data(packed.model_copy(update={"first_hour": (packed.first_hour + 1) % step}))
