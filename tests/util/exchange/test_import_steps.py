"""步长不整除 24 的数据（5、36、48 小时，跨着年）：从 1970 年起接着数，树、存档、检查、预报、气候态都对得上源文件。"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from lightning.fabric import Fabric

from engine.evaluation.baselines import fit_baselines
from engine.forecasting.inputs import read_tree
from util.calendar import moment_of, parse_time, time_text
from util.commands.import_fields import main
from util.config import DataConfig, RunConfig, TrainConfig, read_mapping
from util.data.batches import all_starts
from util.data.dataset import open_data
from util.data.tree_files import field_path
from util.inspection.check import check_tree
from util.inspection.statistics import channel_statistics
from util.strict import validate

COUNT = {5: 92, 36: 40, 48: 40}  # 步长 → 时刻的个数；末一个是那一天的末一个
START = {step: parse_time("2001-01-01") - 10 * step + 2 for step in COUNT}  # 第十一个已是下一年；相位不是 0
Case = tuple[np.ndarray, np.ndarray, Path]


@pytest.fixture(params=COUNT, ids=lambda step: f"{step}h")
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    """(T,) 小时、(T, 4, 8) 的 t2m，钟点各有自己的一份；源文件在 tmp_path。"""
    hours = START[request.param] + request.param * np.arange(COUNT[request.param])
    noise = np.random.default_rng(0).normal(0, 1, (hours.size, 4, 8))
    values = (280 + hours[:, None, None] % 24 + noise).astype(np.float32)
    coordinates = {"lat": np.linspace(67.5, -67.5, 4), "lon": np.arange(8) * 45.0}
    times = {"time": np.array([moment_of(int(h)) for h in hours], "datetime64[ns]")}
    dataset = xr.Dataset({"t2m": (("time", "lat", "lon"), values, {"units": "K"})}, times | coordinates)
    dataset.to_netcdf(tmp_path / "source.nc")
    return hours, values, tmp_path


def imported(hours: np.ndarray, tmp_path: Path, *where: str) -> DataConfig:
    """前六成训练，其余验证、测试各半，在日子的边上分开。"""
    days = [time_text(int(hours[int(share * (len(hours) - 1))]))[:10] for share in (0, 0.6, 0.8, 1)]
    after = [time_text(parse_time(day) + 24)[:10] for day in days]
    out = tmp_path / "set.yaml"
    words = ["--source", str(tmp_path / "source.nc"), "--variable", "t2m=t2m", "--yaml", str(out), "--overwrite"]
    words += ["--train", days[0], days[1], "--val", after[1], days[2], "--test", after[2], days[3]]
    main([*words, *where])
    more = {"frames_in": 1, "workers": 0, "pin_memory": False, "cache_dir": str(tmp_path / "cache")}
    return validate(DataConfig, read_mapping(out) | more, "set")


def test_tree_and_store_agree(case: Case) -> None:
    hours, values, tmp_path = case
    step = int(hours[1] - hours[0])
    config = imported(hours, tmp_path, "--root", str(tmp_path / "tree"))
    assert (config.interval_hours, config.first_hour) == (step, hours[0] % step)
    tree, store = open_data(config), open_data(imported(hours, tmp_path, "--store", str(tmp_path / "store")))
    seen = []
    for split in ("train", "val", "test"):
        starts = all_starts(tree.segments[split], 2)
        assert np.array_equal(starts, all_starts(store.segments[split], 2))
        batch, other = (data.windows.__getitems__(starts.tolist()) for data in (tree, store))
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True)) and batch.valid.all()
        expected = values[np.searchsorted(hours, starts + step)]
        np.testing.assert_allclose(tree.spec.to_physical(batch.future[:, 0])[:, 0], expected, rtol=1e-6)
        seen += np.concatenate(tree.segments[split]).tolist()
    assert seen == hours.tolist()
    reports, bad = check_tree(config, 1)
    assert not bad and reports[0].expected == hours.size
    train = values[np.isin(hours, np.concatenate(tree.segments["train"]))].astype(np.float64)
    moments = channel_statistics(config)["t2m"].moments
    np.testing.assert_allclose((moments.mean, moments.std), (train.mean(), train.std()), rtol=1e-12)


def test_forecast_and_climatology(case: Case) -> None:
    """气候态的钟点是数据里有的；起报不在数据的时刻上，说出最近的两个。"""
    hours, values, tmp_path = case
    step = int(hours[1] - hours[0])
    config = imported(hours, tmp_path, "--root", str(tmp_path / "tree"))
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


def test_a_multiple_of_the_step_starts_anywhere(case: Case) -> None:
    """从存档里取两倍的步长：两种相位各取一半。"""
    hours, _, tmp_path = case
    step = int(hours[1] - hours[0])
    packed = imported(hours, tmp_path, "--store", str(tmp_path / "store"))
    found = []
    for first in (packed.first_hour, packed.first_hour + step):
        data = open_data(packed.model_copy(update={"interval_hours": 2 * step, "first_hour": first}))
        found += [h for split in data.segments.values() for h in np.concatenate(split).tolist()]
    assert sorted(found) == hours.tolist()
    with pytest.raises(ValueError, match=f"holds every {step} h from hour {packed.first_hour}"):
        open_data(packed.model_copy(update={"first_hour": (packed.first_hour + 1) % step}))
