"""直接导入成存档：与先导入成树、再打包的逐字节相同；一圈回到 NetCDF 值与坐标都在；kill -9 之后接着做。"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
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
from util.exchange import kept
from util.exchange import plan as importing
from util.exchange.export import export
from util.packing import chunks
from util.packing import pack as pack_module
from util.packing.pack import pack
from util.strict import validate

WORDS = ["--variable", "air=air", "--variable", "wind=u", *DATES]
RECORD = re.compile(r"pack/(\d+|source/\w+)\.json")  # 里面有来源文件的大小与修改时间
ABOUT = {"store.json", "pack/plan.json", ".zattrs", ".zmetadata"}  # 里面写着命令与来源
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
    assert all(name.startswith("pack/source/") and RECORD.fullmatch(name) for name in mine.keys() - other.keys())
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
    stamps = {path: path.stat().st_mtime_ns for path in (*done, *store.glob("pack/source/*.json"))}
    capfd.readouterr()
    main(words)
    assert "blocks of the source are known already" in capfd.readouterr().err
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    main([*options(tmp_path), "--store", str(tmp_path / "whole")])
    mine, other = contents(store), contents(tmp_path / "whole")
    assert {name for name in mine if mine[name] != other[name]} <= ABOUT


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
    assert mine.keys() == other.keys()  # 从前的文件的记录没有留下
    assert {name for name in mine if mine[name] != other[name]} <= ABOUT


# ---- 换算好的块留在盘上


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """读过的：哪个变量、从哪个小时起的一块；读一次记一个。"""
    read, found = importing.read_block, list[tuple[str, int]]()

    def noting(plan: importing.ImportPlan, block: importing.Block):
        found.append((block.name, int(block.hours[0])))
        return read(plan, block)

    for module in (importing, kept):
        monkeypatch.setattr(module, "read_block", noting)
    return found


def fail_at(monkeypatch: pytest.MonkeyPatch, module: object, name: str, count: int) -> None:
    """module.name 从第 count 次调用起磁盘满了。"""
    real, left = getattr(module, name), [count]

    def failing(path: Path, *rest: object):
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *rest)

    monkeypatch.setattr(module, name, failing)


def test_no_block_is_read_twice(
    source: xr.Dataset, tmp_path: Path, decoded: list[tuple[str, int]], monkeypatch, capsys
) -> None:
    """第一遍、打包各满一次磁盘：记下的块不再读，打包时一块也不读；存档、摘要与一气呵成的相同。"""
    source.air[15] = 1e20  # 填充值的摘要也要接得上
    source.isel(time=np.r_[10:20, 0:10]).to_netcdf(tmp_path / "a.nc")
    store, words = tmp_path / "store", [*options(tmp_path), "--store", str(tmp_path / "store")]
    full = re.escape(f"{store}: No space left on device; the store is not complete, make room and run the same")
    with monkeypatch.context() as patch:
        fail_at(patch, kept, "_write", 3)
        with pytest.raises(ValueError, match=full):
            main(words)
    records = len(list(store.glob("pack/source/*.json")))
    assert records == 2
    first = decoded.copy()
    decoded.clear()
    with monkeypatch.context() as patch:
        fail_at(patch, chunks, "write_bytes", 6)
        with pytest.raises(ValueError, match=full):
            main(words)
    assert not set(first[:records]) & set(decoded)
    assert len(set(decoded)) == len(decoded)
    total = records + len(decoded)
    left = len(list(store.glob("pack/source/*.raw")))
    assert 0 < left < total  # 用完的已经删去
    decoded.clear()
    capsys.readouterr()
    main(words)
    said = capsys.readouterr().out
    assert not decoded
    main([*options(tmp_path), "--store", str(tmp_path / "whole")])
    assert len(decoded) == total
    assert "fills     air: 1e+20 in 1 fields" in said
    assert said == capsys.readouterr().out.replace(str(tmp_path / "whole"), str(store))
    mine, other = contents(store), contents(tmp_path / "whole")
    assert mine.keys() == other.keys()
    assert {name for name in mine if mine[name] != other[name]} <= ABOUT


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: ["--regrid", "conservative"],
        lambda folder: ["--map", str(folder / "map.yaml")],
        lambda folder: ["--train", "2000-01-01", "2000-01-04"],
    ],
)
def test_blocks_made_otherwise_are_not_used(change, source: xr.Dataset, tmp_path: Path, monkeypatch) -> None:
    """换了做法、换了单位、换了训练日期，中断留下的块都不算数。"""
    grid = ["--latitude", "-15", "10", "4", "--longitude", "5", "10", "6", "--regrid", "bilinear"]
    (tmp_path / "map.yaml").write_text("variables: {air: {offset: -273.15, units: degC}, u: {source: wind}}")
    common = ["--source", str(tmp_path / "b.nc"), str(tmp_path / "a.nc"), *DATES, *grid]
    named = ["--variable", "air=air", "--variable", "wind=u"]
    with monkeypatch.context() as patch:
        fail_at(patch, chunks, "write_bytes", 1)
        with pytest.raises(ValueError, match="No space left"):
            main([*common, *named, "--store", str(tmp_path / "store")])
    changed = change(tmp_path)
    words = [*common, *([] if "--map" in changed else named), *changed]
    (tmp_path / "store" / "pack" / "plan.json").unlink()  # 统计量、单位不同的，本来不让接着写
    for name in ("store", "whole"):
        main([*words, "--store", str(tmp_path / name)])
    mine, other = contents(tmp_path / "store"), contents(tmp_path / "whole")
    assert mine.keys() == other.keys()
    assert {name for name in mine if mine[name] != other[name]} <= ABOUT


def test_a_block_cut_short_is_read_again(
    source: xr.Dataset, tmp_path: Path, decoded: list[tuple[str, int]], monkeypatch
) -> None:
    """断电之后可能只剩一截；一份记录坏了，那一块也重来。"""
    words = [*options(tmp_path), "--store", str(tmp_path / "store")]
    with monkeypatch.context() as patch:
        fail_at(patch, chunks, "write_bytes", 1)
        with pytest.raises(ValueError, match="No space left"):
            main(words)
    folder = tmp_path / "store" / "pack" / "source"
    for path in [*folder.glob("*.raw"), next(folder.glob("*.json"))]:
        os.truncate(path, path.stat().st_size // 2)
    decoded.clear()
    main(words)
    again = sorted(decoded)
    decoded.clear()
    main([*options(tmp_path), "--store", str(tmp_path / "whole")])
    assert again == sorted(decoded)
    mine, other = contents(tmp_path / "store"), contents(tmp_path / "whole")
    assert {name for name in mine if mine[name] != other[name]} <= ABOUT


def test_no_room_for_the_blocks(source: xr.Dataset, tmp_path: Path, decoded: list[tuple[str, int]], monkeypatch):
    """一块也没有读就说要多少；打包时块让位给存档，不要两份的地方。"""
    needed = 4 * 36 * 4 * 5 * 8  # 36 个时刻，4 个通道
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(ValueError, match=r"store needs 0.00 GB more, its disk has 0.00 GB free"):
        main([*options(tmp_path), "--store", str(tmp_path / "store")])
    assert not decoded
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=needed))
    main([*options(tmp_path), "--store", str(tmp_path / "store")])
