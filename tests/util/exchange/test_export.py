"""存档还原成目录树与 NetCDF：NetCDF → 树 → 存档 → NetCDF 一圈下来，值与坐标都在。"""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from tests.holding import held_elsewhere
from tests.trees import DAYS, config_of, standardize_files
from tests.util.exchange.test_import_fields import DATES, make_dataset
from tests.util.packing.stores import compare, pack_small
from util.commands.export import main
from util.commands.import_fields import main as import_main
from util.config import DataConfig, read_mapping
from util.data.tree_files import field_path, read_mean_std
from util.exchange.export import export
from util.strict import validate

CHANNELS = ("t2m", "z_level_00", "z_level_01")


def rounding(values: np.ndarray) -> float:
    """减均值、除标准差、再换回来，各舍入一次。"""
    return 4 * float(np.finfo(np.float32).eps) * float(np.abs(values).max())


def test_round_trip(tmp_path):
    """值、时刻、气压、经纬度与源文件按标签对得上；缺的场仍缺；统计量原样。"""
    dataset = make_dataset()
    dataset.air[7, 1, 1] = np.nan
    dataset.to_netcdf(tmp_path / "source.nc")
    tree, words = tmp_path / "tree", ["--variable", "air=air", "--variable", "wind=u"]
    out = tmp_path / "set.yaml"
    import_main(["--source", str(tmp_path / "source.nc"), "--root", str(tree), *words, *DATES, "--yaml", str(out)])
    values = read_mapping(out) | {"frames_in": 2, "cache_dir": str(tmp_path / "cache"), "max_missing": 0.5}
    config: DataConfig = validate(DataConfig, values, "set")
    pack_small(
        config.model_copy(update={"variables": {"air": "single", "u": ["level_00", "level_02"]}}), tmp_path / "store"
    )
    again, result = tmp_path / "again", tmp_path / "result.nc"
    assert main(["--store", str(tmp_path / "store"), "--root", str(again), "--netcdf", str(result)]) == 0

    with xr.open_dataset(result) as written:
        there = dataset.squeeze("number", drop=True).sel(level=[500.0, 1000.0]).sortby("lat", ascending=False)
        renamed = there.rename(lat="latitude", lon="longitude", wind="u").transpose(
            "time", "level", "latitude", "longitude"
        )
        for name in ("time", "level", "latitude", "longitude"):
            np.testing.assert_array_equal(written[name].values, renamed[name].values)
        for name, units in (("air", "K"), ("u", "m s-1")):
            assert written[name].attrs["units"] == units
            expected = renamed[name].values.astype(np.float32)
            if name == "air":
                expected[7] = np.nan  # 整个场没有导入
            assert written[name].dims == renamed[name].dims
            np.testing.assert_allclose(written[name].values, expected, rtol=0, atol=rounding(expected[8:]))
    files = sorted(p.relative_to(again) for p in again.rglob("*.npy"))
    assert files == sorted(p.relative_to(tree) for p in tree.rglob("*.npy") if "level_01" not in p.parts)
    for file in files:
        old = np.load(tree / file)
        np.testing.assert_allclose(np.load(again / file), old, rtol=0, atol=rounding(old))
    for channel in ("air", "u_level_02"):
        assert read_mean_std(again, channel) == read_mean_std(tree, channel)


def test_standardised_tree_comes_back_bit_for_bit(make_tree, tmp_path):
    """本来就标准化的目录树：树逐位还原，NetCDF 是物理单位；时刻相差 utc_offset_hours。"""
    tree = make_tree(tmp_path / "tree", channels=CHANNELS, **DAYS)
    standardize_files(tree, *CHANNELS)
    field_path(tree.root, "t2m", tree.hours[5]).unlink()
    config = config_of(tree, utc_offset_hours=8)
    pack_small(config, tmp_path / "store")
    count = export(tmp_path / "store", tmp_path / "again", tmp_path / "result.nc")
    files = sorted(p.relative_to(tree.root) for p in tree.root.rglob("*.npy"))
    assert count == len(files) == len(tree.hours) * len(CHANNELS) - 1
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*.npy"))
    assert all((tmp_path / "again" / file).read_bytes() == (tree.root / file).read_bytes() for file in files)
    compare(config, config.model_copy(update={"root": str(tmp_path / "again")}))  # 换了 root 的 YAML 读得出同样的窗口
    with xr.open_dataset(tmp_path / "result.nc") as written:
        utc = written.time.values.astype("datetime64[h]").astype(int)
        np.testing.assert_array_equal(utc, np.array(tree.hours) - 8)
        assert np.isnan(written.t2m.values[5]).all()
        z = written.z.transpose("time", "level", "latitude", "longitude").values
        expected = tree.fields[:, 1:] if config.latitude.step < 0 else tree.fields[:, 1:, ::-1]
        np.testing.assert_allclose(z, expected, rtol=0, atol=rounding(expected))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype, make_tree, tmp_path):
    """还原的是舍入之后的数：误差不超过这种存法的半个最小单位。"""
    tree = make_tree(tmp_path / "tree", channels=("t2m",), **DAYS)
    pack_small(config_of(tree), tmp_path / "store", dtype)
    export(tmp_path / "store", tmp_path / "again", None)
    mean, std = read_mean_std(tree.root, "t2m")
    for hour, field in zip(tree.hours[::9], tree.fields[::9, 0], strict=True):
        error = np.abs(np.load(field_path(tmp_path / "again", "t2m", hour)) - field)
        assert (
            0 < error.max() <= np.abs(field - mean).max() * {"float16": 2**-11, "bfloat16": 2**-8}[dtype] + 1e-4 * std
        )


def test_what_is_there_is_kept(make_tree, tmp_path):
    tree = make_tree(tmp_path / "tree", channels=("t2m",), **DAYS)
    config = config_of(tree)
    with pytest.raises(ValueError, match="is not a store"):
        export(tmp_path / "store", tmp_path / "again", None)
    pack_small(config, tmp_path / "store")
    with pytest.raises(ValueError, match="nothing to write; give --root TREE, --netcdf FILE"):
        main(["--store", str(tmp_path / "store")])
    with pytest.raises(ValueError, match=r"t2m_npy.2000 exists already; give --overwrite"):
        export(tmp_path / "store", tree.root, None)
    result = tmp_path / "result.nc"
    export(tmp_path / "store", None, result)
    with pytest.raises(ValueError, match=r"result.nc exists already; give --overwrite"):
        export(tmp_path / "store", None, result)
    export(tmp_path / "store", tree.root, result, overwrite=True)
    with held_elsewhere(tree.root / "t2m_npy"), pytest.raises(ValueError, match=r"t2m_npy is in use by process"):
        export(tmp_path / "store", tree.root, None, overwrite=True)
    chunk = tmp_path / "store/fields/0.0.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"0.0.0.0: \d+ bytes, expected"):
        export(tmp_path / "store", tmp_path / "again", None)
