"""直接导入成存档：与先导入成树、再打包的逐字节相同；一圈回到 NetCDF 值与坐标都在；kill -9 之后接着做。"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from tests.engine.runs import ROOT
from tests.util.exchange.test_export import rounding
from tests.util.exchange.test_import_fields import DATES, make_dataset
from tests.util.packing.stores import compare, contents
from util.commands.import_fields import main
from util.config import DataConfig, read_mapping
from util.exchange import plan as importing
from util.exchange.export import export
from util.packing import pack as pack_module
from util.packing.pack import pack
from util.strict import validate

WORDS = ["--variable", "air=air", "--variable", "wind=u", *DATES]
RECORD = re.compile(r"pack/\d+\.json")  # 里面有来源文件的大小与修改时间
ABOUT = {"store.json", "pack/plan.json", "pack/survey.json", ".zattrs", ".zmetadata"}  # 里面写着命令与来源
CHUNK = 5 * 4 * 5 * 8 * 4  # 每块 5 行


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importing, "BLOCK_BYTES", 7 * 5 * 8 * 8)  # 源文件的块与存档的块错开
    monkeypatch.setattr(pack_module, "CHUNK_BYTES", CHUNK)


@pytest.fixture
def source(tmp_path: Path) -> xr.Dataset:
    """三个场含缺测（其中两个相邻、一个在最后），时刻乱序，两个文件。"""
    dataset = make_dataset()
    for time_, where in ((7, 1), (8, 0), (35, 2)):
        dataset.air[time_, where, where] = np.nan
    order = np.r_[10:20, 0:10]
    dataset.isel(time=order).to_netcdf(tmp_path / "a.nc")
    dataset.isel(time=slice(20, None)).to_netcdf(tmp_path / "b.nc")
    return dataset


def options(tmp_path: Path) -> list[str]:
    return ["--source", str(tmp_path / "a.nc"), str(tmp_path / "b.nc"), *WORDS]


def read_config(path: Path, **changes: object) -> DataConfig:
    values = {"frames_in": 2, "cache_dir": str(path.parent / "cache"), "max_missing": 0.5, **changes}
    return validate(DataConfig, read_mapping(path) | values, "set")


def test_same_as_through_a_tree_and_back(source: xr.Dataset, tmp_path: Path):
    main([*options(tmp_path), "--root", str(tmp_path / "tree"), "--yaml", str(tmp_path / "tree.yaml")])
    tree = read_config(tmp_path / "tree.yaml")
    pack(tree, tmp_path / "packed", "float32", 1, "c")
    main([*options(tmp_path), "--store", str(tmp_path / "store"), "--yaml", str(tmp_path / "store.yaml")])
    config = read_config(tmp_path / "store.yaml")
    assert (config.source, config.store) == ("store", str(tmp_path / "store"))
    mine, other = contents(tmp_path / "store"), contents(tmp_path / "packed")
    assert {name for name in mine if mine[name] != other.get(name) and not RECORD.fullmatch(name)} <= ABOUT
    assert mine.keys() - other.keys() == {"pack/survey.json"}
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"tree", "packed", "store", "cache"}
    compare(tree, config)

    export(tmp_path / "store", tmp_path / "again", tmp_path / "again.nc")
    for folder in ("air_npy", "u_npy/level_01"):
        for name in ("mean_std.json", "min_max.json"):
            old, new = (json.loads((tmp_path / root / folder / name).read_text()) for root in ("tree", "again"))
            assert old == new
    with xr.open_dataset(tmp_path / "again.nc") as written:
        there = source.squeeze("number", drop=True).sortby("lat", ascending=False).sortby("level")
        there = there.rename(lat="latitude", lon="longitude", wind="u")
        for name in ("time", "level", "latitude", "longitude"):
            np.testing.assert_array_equal(written[name].values, there[name].values)
        for name in ("air", "u"):
            expected = there[name].transpose(*written[name].dims).values.astype(np.float32)
            expected[np.isnan(expected).any(axis=(-2, -1))] = np.nan  # 整个场没有导入
            bound = rounding(expected[np.isfinite(expected)])
            np.testing.assert_allclose(written[name].values, expected, rtol=0, atol=bound)


def test_killed_and_run_again(source: xr.Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """打到一半 kill -9：没有完成的标志；再跑一次不重过一遍，与一气呵成的相同。"""
    code = (
        f"import time\nfrom util.commands.dataset import dataset_command\nfrom util.exchange import plan\n"
        f"from util.packing import chunks, pack\npack.CHUNK_BYTES = {CHUNK}\n"
        f"plan.BLOCK_BYTES = {7 * 5 * 8 * 8}\nreal = chunks.write_bytes\n"
        "chunks.write_bytes = lambda path, data: (time.sleep(0.1), real(path, data))[1]\ndataset_command()"
    )
    store, words = tmp_path / "store", [*options(tmp_path), "--store", str(tmp_path / "store")]
    killed = subprocess.Popen(
        [sys.executable, "-c", code, "import", *words], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while len(done := list(store.glob("pack/0*.json"))) < 2:
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    assert not (store / "store.json").exists()
    stamps = {path: path.stat().st_mtime_ns for path in (*done, store / "pack" / "survey.json")}
    capfd.readouterr()
    main(words)
    assert "statistics and missing fields are known already" in capfd.readouterr().err
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    main([*options(tmp_path), "--store", str(tmp_path / "whole")])
    mine, other = contents(store), contents(tmp_path / "whole")
    assert {name for name in mine if mine[name] != other[name]} <= ABOUT - {"pack/survey.json"}


def test_half_precision_and_what_is_refused(source: xr.Dataset, tmp_path: Path):
    words = options(tmp_path)
    main([*words, "--store", str(tmp_path / "half"), "--dtype", "float16"])
    with xr.open_zarr(tmp_path / "half", chunks=None) as half:
        assert half.fields.dtype == np.float16
    with pytest.raises(ValueError, match="--dtype float16 is for --store"):
        main([*words, "--root", str(tmp_path / "tree"), "--dtype", "float16"])
    with pytest.raises(ValueError, match="is a folder with other things in it"):
        main([*words, "--store", str(tmp_path)])
    with pytest.raises(ValueError, match="was packed with dtype = float16"):
        main([*words, "--store", str(tmp_path / "half")])
    flat = make_dataset()
    flat["air"] = flat.air * 0 + 3
    flat.to_netcdf(tmp_path / "flat.nc")
    with pytest.raises(ValueError, match="air: 3 everywhere in the training dates"):
        main(["--source", str(tmp_path / "flat.nc"), "--variable", "air=air", *DATES, "--store", str(tmp_path / "s")])
    assert not (tmp_path / "s" / "store.json").exists()


def test_a_changed_source_is_packed_again(source: xr.Dataset, tmp_path: Path):
    """训练日期之外改了数，统计量不变：那个文件的块重做，与从头打的相同。"""
    words = [*options(tmp_path), "--store", str(tmp_path / "store")]
    main(words)
    later = source.isel(time=slice(20, None)).copy(deep=True)
    later.air[-5:] += 50
    later.to_netcdf(tmp_path / "b.nc")
    main(words)
    main([*options(tmp_path), "--store", str(tmp_path / "whole")])
    mine, other = contents(tmp_path / "store"), contents(tmp_path / "whole")
    assert {name for name in mine if mine[name] != other[name]} <= ABOUT
