"""导入：填充值有限，却是缺测；干的降水整场是 0，却是数据。"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.util.exchange.test_import_fields import DATES, make_dataset
from tests.util.exchange.test_import_layouts import TIMES, import_all
from util.commands.import_fields import main
from util.data.store_files import StorePlan, read_mark
from util.data.tree_files import field_path, read_extremes, read_mean_std
from util.data.tree_origin import Tree


def written(root: Path, channel: str) -> set[int]:
    """哪几个时刻（第几个）有文件。"""
    return {i for i, hour in enumerate(TIMES) if field_path(root, channel, hour).is_file()}


def test_fill_values_are_missing_in_every_variable(tmp_path, capsys):
    """逐点的 9.96921e36、1e20；整场的 -9999（打包成整数、没有写过的也是）；单独一点 -9999 是数据。"""
    dataset = make_dataset()[["air"]]
    air = dataset.air.values.astype(np.float32)
    air[3], air[4, 1, 1], air[5], air[6, 0, 0] = 9.969209968386869e36, 1e20, -9999, -9999
    dataset["air"] = dataset.air.copy(data=air)
    dataset["dry"] = dataset.air.copy(data=np.where(np.arange(36) % 2, 0, 1e-3)[:, None, None] * np.ones((5, 8)))
    dataset["dry"].attrs["units"] = "m"
    dataset.to_netcdf(tmp_path / "a.nc", encoding={"air": {"_FillValue": None}, "dry": {"_FillValue": None}})
    import_all([tmp_path / "a.nc"], tmp_path / "tree", "--variable", "air=t2m", "--variable", "dry=tp")
    assert written(tmp_path / "tree", "t2m") == set(range(36)) - {3, 4, 5}
    assert written(tmp_path / "tree", "tp") == set(range(36))
    assert not np.load(field_path(tmp_path / "tree", "tp", TIMES[1])).any()
    kept = np.delete(air[:20], [3, 4, 5], axis=0).astype(np.float64)
    assert read_mean_std(tmp_path / "tree", "t2m") == pytest.approx((kept.mean(), kept.std()), rel=1e-12)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fills")]
    assert [line.partition(" is a fill value")[0] for line in said] == [
        "fills     t2m: 9.96921e+36 in 1 fields",
        "fills     t2m: 1e+20 in 1 fields",
        "fills     t2m: -9999 in 1 fields",
    ]
    assert said[0].endswith("(2000-01-01T18)")


def test_the_range_may_be_stated(tmp_path):
    """之内的是数据；单位换算之后才比，换网格之前就认。"""
    dataset = make_dataset()[["air"]]
    dataset["air"][3], dataset["air"][4] = 9999.0, -9999.0
    dataset.to_netcdf(tmp_path / "a.nc", encoding={"air": {"_FillValue": None}})
    text = "variables: {flux: {source: air, scale: 10, units: W m-2, valid_range: [-1e6, 99990]}}\n"
    (tmp_path / "map.yaml").write_text(text)
    grid = ("--regrid", "bilinear", "--latitude", "10", "-10", "3", "--longitude", "5", "10", "4")
    config = import_all([tmp_path / "a.nc"], tmp_path / "tree", "--map", str(tmp_path / "map.yaml"), *grid)
    assert written(tmp_path / "tree", "flux") == set(range(36))
    assert config.limits("flux") == (-1e6, 99990)
    (tmp_path / "map.yaml").write_text(text.replace("[-1e6, 99990]", "[0, 5000]"))
    import_all([tmp_path / "a.nc"], tmp_path / "other", "--map", str(tmp_path / "map.yaml"), *grid)
    assert written(tmp_path / "other", "flux") == set(range(36)) - {3, 4}


def test_packed_records_never_written(tmp_path):
    """int16 没有写过的是 -32767，解出来像个数；范围之外的整场才是缺测。"""
    dataset = make_dataset()[["air"]]
    raw = np.rint((dataset.air.values - 280) / 0.05).astype(np.int16)
    raw[7] = -32767
    packing = {"scale_factor": 0.05, "add_offset": 280.0, "units": "K"}
    dataset["air"] = (("time", "lat", "lon"), raw, packing)
    dataset.to_netcdf(tmp_path / "a.nc", encoding={"air": {"_FillValue": None}})
    import_all([tmp_path / "a.nc"], tmp_path / "tree", "--variable", "air=t2m")
    assert written(tmp_path / "tree", "t2m") == set(range(36)) - {7}


def test_a_store_leaves_them_out_too(tmp_path, capsys):
    dataset = make_dataset()[["air"]]
    dataset["air"][3] = 1e20
    dataset.to_netcdf(tmp_path / "a.nc", encoding={"air": {"_FillValue": None}})
    main(["--source", str(tmp_path / "a.nc"), "--store", str(tmp_path / "store"), "--variable", "air=t2m", *DATES])
    assert "fills     t2m: 1e+20 in 1 fields is a fill value" in capsys.readouterr().out
    plan = StorePlan(**read_mark(tmp_path / "store")["plan"])
    assert max(abs(v) for v in plan.extremes[0] or ()) < 400
    assert read_mark(tmp_path / "store")["gaps"][0] == [0, TIMES[3], [TIMES[2], TIMES[4]]]


def test_files_that_were_imported_as_data(tmp_path):
    """从前导入的树：统计量也是拿填充值算的，读时拒绝，并说怎样重算。"""
    make_dataset()[["air"]].to_netcdf(tmp_path / "a.nc")
    config = import_all([tmp_path / "a.nc"], tmp_path / "tree", "--variable", "air=t2m")
    (tmp_path / "tree/t2m_npy/mean_std.json").write_text('{"mean": [1e35], "std": [2.2e36]}')
    with pytest.raises(ValueError, match=r"mean_std.json: std 2.2e\+36, so fill values.*dataset.py statistics"):
        Tree(config).mean_std()
    assert read_extremes(tmp_path / "tree", "t2m")
