"""导入：填充值有限，却是缺测；干的降水整场是 0，却是数据。合理范围之外的点照样写，摘要里说；

没有人写过单位、多半的点在之外的，不导入。
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from tests.util.exchange.test_import_fields import DATES, make_dataset
from tests.util.exchange.test_import_layouts import TIMES, import_all, load
from util.commands.import_fields import main
from util.data.tree_files import field_path, read_extremes, read_mean_std
from util.data.tree_origin import Tree
from util.files.store_files import StorePlan, read_mark

T2M = ("--variable", "air=t2m")


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


def save(folder: Path, air: np.ndarray, units: str | None = "K") -> Path:
    dataset = make_dataset()[["air"]]
    attrs = {"units": units} if units else {}
    xr.Dataset({"air": (dataset.air.dims, air, attrs)}, dataset.coords).to_netcdf(folder / "a.nc")
    return folder / "a.nc"


def outside(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("outside")]


@pytest.mark.parametrize("block_bytes", [2**26, 4 * 5 * 8 * 8])
def test_points_outside_the_range_are_told_and_kept(block_bytes, tmp_path, capsys, monkeypatch):
    """几块合起来数；缺测的场没有写，不算。"""
    monkeypatch.setattr("util.exchange.plan.BLOCK_BYTES", block_bytes)
    air = make_dataset().air.values
    air[[30, 4], 1, 2], air[4, 3, 3], air[9, 0, 0], air[9, 1, 1] = -9999, 400, -9999, np.nan
    source = save(tmp_path, air)
    import_all([source], tmp_path / "tree", *T2M)
    (line,) = outside(capsys.readouterr().out)
    far = "t2m: 3 points in 2 fields are outside 150 to 350 (lowest -9999, highest 400, first 2000-01-02T00); kept"
    assert line.startswith(f"outside   {far}")
    np.testing.assert_array_equal(load(tmp_path / "tree", "t2m", TIMES[4]), air[4].astype(np.float32))
    for _ in range(2):  # 第二次时这些是上一次记下的
        main(["--source", str(source), "--store", str(tmp_path / "store"), *T2M, *DATES])
        assert outside(capsys.readouterr().out) == [line]


def test_nothing_to_tell(tmp_path, capsys):
    """都在之内；或范围不知道（名字、单位不在表里）。"""
    import_all([save(tmp_path, make_dataset().air.values)], tmp_path / "a", *T2M)
    import_all([save(tmp_path, make_dataset().air.values - 273.15, "degC")], tmp_path / "b", *T2M)
    import_all([save(tmp_path, make_dataset().air.values * 1e4, None)], tmp_path / "c", "--variable", "air=air")
    assert not outside(capsys.readouterr().out)


def test_units_that_nobody_stated(tmp_path, capsys):
    """摄氏度当作 K：写之前就停，什么也不写；写明了单位的照样导入，只是说一声。"""
    celsius = make_dataset().air.values - 273.15
    source = save(tmp_path, celsius, None)
    with pytest.raises(ValueError, match=r"t2m: 100% of .* outside 150 to 350, .* no units \(K assumed\); .*--map"):
        import_all([source], tmp_path / "tree", *T2M)
    assert not (tmp_path / "tree").exists()
    with pytest.raises(ValueError, match="t2m: 100% of the points"):
        main(["--source", str(source), "--store", str(tmp_path / "store"), *T2M, *DATES])
    with pytest.raises(ValueError, match=r"msl: 100% of .* outside 80000 to 115000, and the file has no units; "):
        import_all([source], tmp_path / "tree", "--variable", "air=msl")
    for number, (words, told) in enumerate([("units: K, offset: 273.15", 0), ("units: degC", 0), ("units: K", 1)]):
        (tmp_path / "map.yaml").write_text(f"variables: {{t2m: {{source: air, {words}}}}}\n")
        capsys.readouterr()
        import_all([source], tmp_path / f"tree{number}", "--map", str(tmp_path / "map.yaml"))
        assert len(outside(capsys.readouterr().out)) == told
    half = np.where(np.arange(36)[:, None, None] % 2, celsius, celsius + 273.15)
    import_all([save(tmp_path, half, None)], tmp_path / "half", *T2M)  # 一半，没有过半
    assert outside(capsys.readouterr().out)
