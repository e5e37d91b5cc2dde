"""远处的源文件：从会断的服务器导入与从本机导入逐位相同；失败的请求绝不当作没有写过的块；只取要的。"""

from __future__ import annotations

import sys
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import xarray as xr
import zarr

from tests.util.exchange.test_import_fields import DATES, make_dataset
from tests.util.exchange.test_import_zarr import LAYOUTS, RAIN, write
from tests.util.source.loopback import Loopback
from util.cli import run_command
from util.commands.import_fields import main
from util.source import remote
from util.source.collection import Source, file_stamps, find_sources
from util.source.opening import open_source
from util.source.zarr_chunks import settle_absent

WORDS = ("--variable", "air=air", "--variable", "wind=wind")
TP = ("--variable", "tp=tp")
NEW = int(zarr.__version__.split(".")[0]) >= 3
NEEDS_ZARR_3 = pytest.mark.skipif(not NEW, reason="these stores are written with zarr 3")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0.01,) * 5)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def save(path: Path, version: int = 2, consolidated: bool = True) -> Path:
    """每四个时刻一块。"""
    dataset = make_dataset()[["air", "wind"]]
    encoding = {
        name: {"chunks": tuple(4 if d == "time" else dataset.sizes[d] for d in dataset[name].dims)} for name in dataset
    }
    options: dict[str, Any] = {"zarr_format": version} if NEW else {}
    dataset.to_zarr(path, consolidated=consolidated, encoding=encoding, **options)
    return path


def store(path: Path, fill: float) -> Path:
    """一个变量 tp，0 是数据，九块都写过。"""
    dataset = xr.Dataset({"tp": (make_dataset().air.dims, RAIN, {"units": "m"})}, make_dataset().air.coords)
    encoding = {"tp": {"chunks": (4, 5, 8), "_FillValue": fill}}
    options: dict[str, Any] = {"zarr_format": 2} if NEW else {}
    dataset.to_zarr(path, consolidated=True, encoding=encoding, **options)
    return path


def run(source: object, root: Path, *words: str) -> dict[str, bytes]:
    """导入成树；树里的每个文件。"""
    main(["--source", str(source), "--root", str(root), *words, *DATES])
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def refused(capsys, *words: str) -> str:
    """退出码 2，一行。"""
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: main(words))
    assert stopped.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    return said


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part:UserWarning")
@pytest.mark.parametrize("consolidated", [True, False])
@pytest.mark.parametrize("version", [2, pytest.param(3, marks=NEEDS_ZARR_3)])
def test_zarr_through_a_server_that_drops_every_tenth_request(version, consolidated, tmp_path):
    path = save(tmp_path / "a.zarr", version, consolidated)
    here = run(path, tmp_path / "here", *WORDS)
    with Loopback(tmp_path, drop=10) as server:
        there = run(f"{server.address}/a.zarr", tmp_path / "there", *WORDS)
    assert len(server.paths) > 20
    assert there == here
    assert len(here) == 36 * 4 + 8


@pytest.mark.parametrize("kind", ["NETCDF4", "NETCDF3_64BIT"])
def test_a_file_is_downloaded(kind, tmp_path, monkeypatch):
    """会断的服务器，也不认 Range；用完了临时文件夹里什么也不留。"""
    make_dataset()[["air", "wind"]].to_netcdf(tmp_path / "a.nc", format=kind)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    here = run(tmp_path / "a.nc", tmp_path / "here", *WORDS)
    with Loopback(tmp_path, drop=1, fails=5, ranges=False) as server:
        assert run(f"{server.address}/a.nc", tmp_path / "there", *WORDS) == here
    assert len(server.paths) == 6
    assert not list((tmp_path / "temporary").iterdir())


def test_a_zip_is_unpacked(tmp_path, monkeypatch, capfd):
    """ZIP（名字是 .nc）里一个变量一个文件：与从本机导入逐位相同，只下载一次；写存档时再来一次也认得。"""
    with zipfile.ZipFile(tmp_path / "cds.nc", "w") as file:
        for name in ("air", "wind"):
            make_dataset()[[name]].to_netcdf(tmp_path / f"{name}.nc")
            file.write(tmp_path / f"{name}.nc", f"{name}.nc")
    here = run(tmp_path / "cds.nc", tmp_path / "here", *WORDS)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with Loopback(tmp_path) as server:
        assert run(f"{server.address}/cds.nc", tmp_path / "there", *WORDS) == here
        assert server.paths == ["cds.nc"]
        for _ in range(2):
            main(["--source", f"{server.address}/cds.nc", "--store", str(tmp_path / "store"), *WORDS, *DATES])
    assert "blocks of the source are known already" in capfd.readouterr().err
    assert not list((tmp_path / "temporary").iterdir())


def test_folders_and_patterns(tmp_path):
    (tmp_path / "multi").mkdir()
    said = "folders and patterns are not expanded at addresses; list the files$"
    with Loopback(tmp_path) as server, ExitStack() as stack:
        for name in ("multi/", "multi", "t2m_*.nc"):
            with pytest.raises(ValueError, match=said):
                find_sources([f"{server.address}/{name}"], stack)


@pytest.mark.parametrize("name", ["a.zarr", "a.nc"])
def test_into_a_store(name, tmp_path, capfd):
    """再跑一次接着做：第一遍的结果不重来。"""
    save(tmp_path / "a.zarr")
    make_dataset()[["air", "wind"]].to_netcdf(tmp_path / "a.nc")
    stores = tmp_path / "here", tmp_path / "there"
    with Loopback(tmp_path, drop=10) as server:
        for source, store in zip((tmp_path / name, f"{server.address}/{name}"), stores, strict=True):
            main(["--source", str(source), "--store", str(store), *WORDS, *DATES])
        main(["--source", f"{server.address}/{name}", "--store", str(stores[1]), *WORDS, *DATES])
    assert "blocks of the source are known already" in capfd.readouterr().err
    here, there = ({p.relative_to(s): p.read_bytes() for p in (s / "fields").iterdir()} for s in stores)
    assert here == there


def test_stamps_say_what_changed(tmp_path):
    path, file = save(tmp_path / "a.zarr"), tmp_path / "a.nc"
    file.write_bytes(b"abc")
    with Loopback(tmp_path) as server:
        sources = [Source(f"{server.address}/{name}", name) for name in ("a.zarr", "a.nc")]
        before = [file_stamps(source) for source in sources]
        assert [file_stamps(source) for source in sources] == before
        file.write_bytes(b"abcd")
        (path / ".zmetadata").write_text((path / ".zmetadata").read_text().replace("degK", "K"))
        after = [file_stamps(source) for source in sources]
    assert all(a != b for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("status", [403, 500, 503])
@pytest.mark.parametrize("fill", [0.0, np.nan])
def test_a_failed_request_is_never_an_absent_chunk(fill, status, tmp_path, capsys):
    """块的请求失败：一行，退出码 2，不写统计量；不论 fill_value 是什么，也不论 --absent-chunks。"""
    store(tmp_path / "a.zarr", fill)
    with Loopback(tmp_path, status={"a.zarr/tp/5.0.0": status}) as server:
        for choice in ("data", "missing"):
            words = ["--root", str(tmp_path / choice), *TP, *DATES, "--absent-chunks", choice]
            said = refused(capsys, "--source", f"{server.address}/a.zarr", *words)
            assert f"{server.address}/a.zarr/tp/5.0.0: {'no answer after 6 tries (' * (status > 499)}{status}" in said
            assert not list((tmp_path / choice).rglob("mean_std.json"))
    asked = server.paths.count("a.zarr/tp/5.0.0")
    assert asked == (2 if status == 403 else 12)


def test_a_chunk_that_was_there_and_is_not_found_is_not_absent(tmp_path):
    """看的时候有，读的时候 404：不是没有写过。"""
    store(tmp_path / "a.zarr", 0.0)
    with Loopback(tmp_path) as server, open_source(f"{server.address}/a.zarr") as dataset:
        array = dataset["tp"]
        settle_absent(array, None)
        (tmp_path / "a.zarr" / "tp" / "3.0.0").unlink()
        with pytest.raises(ValueError, match=r"tp/3\.0\.0: was there before and is not found now"):
            array.values  # noqa: B018


@pytest.mark.parametrize("out", ["--root", "--store"])
def test_a_server_that_dies_half_way(out, tmp_path, capsys):
    """一行，退出码 2；写了一半的树没有统计量，存档没有完成的标志。"""
    save(tmp_path / "a.zarr")
    with Loopback(tmp_path, dies_after=16) as server:
        words = [out, str(tmp_path / "out"), *WORDS, *DATES]
        said = refused(capsys, "--source", f"{server.address}/a.zarr", *words)
    assert f"{server.address}/a.zarr/" in said
    assert "no answer after 6 tries" in said
    files = {p.name for p in (tmp_path / "out").rglob("*")}
    assert not files & {"mean_std.json", "min_max.json", "store.json", ".zgroup"}


@pytest.mark.parametrize("name", ["none.zarr", "none.nc"])
def test_not_found(name, tmp_path):
    said = f"/{name}: not found, "
    with Loopback(tmp_path) as server, pytest.raises(ValueError, match=said):
        run(f"{server.address}/{name}", tmp_path / "tree", *WORDS)
    assert len(server.paths) == (1 if name.endswith("nc") else 3)


def test_forbidden(tmp_path):
    """不让读的立刻说；没有的也答 403 的服务器，有一样元数据就行。"""
    save(tmp_path / "a.zarr", consolidated=False)
    roots = [f"a.zarr/{name}" for name in (".zmetadata", "zarr.json", ".zgroup")]
    said = r"/a\.zarr/\.zgroup: 403 Forbidden$"
    with Loopback(tmp_path, status=dict.fromkeys(roots, 403)) as server, pytest.raises(ValueError, match=said):
        open_source(f"{server.address}/a.zarr")
    assert server.paths == roots
    with Loopback(tmp_path, status=dict.fromkeys(roots[:2], 403)) as server:
        assert set(open_source(f"{server.address}/a.zarr").data_vars) == {"air", "wind"}


def test_nobody_answers():
    with pytest.raises(
        ValueError, match=r"^http://127\.0\.0\.1:9/a\.zarr/\.zmetadata: no answer after 6 tries \(.+\)$"
    ):
        open_source("http://127.0.0.1:9/a.zarr")


def test_not_consolidated_and_no_listing(tmp_path):
    save(tmp_path / "a.zarr", consolidated=False)
    said = "without consolidated metadata, and the server lists no folders"
    with Loopback(tmp_path, listing=False) as server, pytest.raises(ValueError, match=said):
        open_source(f"{server.address}/a.zarr")


def test_only_what_is_wanted_is_read(tmp_path):
    """一个变量、一层，别的块一个也不碰；写存档也只下载一次。"""
    dataset = make_dataset()[["air", "wind"]].squeeze("number", drop=True).transpose("time", "level", "lat", "lon")
    sizes = {"air": (4, 5, 8), "wind": (4, 1, 5, 8)}
    options: dict[str, Any] = {"zarr_format": 2} if NEW else {}
    encoding = {name: {"chunks": size} for name, size in sizes.items()}
    dataset.to_zarr(tmp_path / "a.zarr", encoding=encoding, consolidated=True, **options)
    (tmp_path / "map.yaml").write_text("variables: {wind: {}}\npressure_hpa: [500]\n")
    with Loopback(tmp_path) as server:
        run(f"{server.address}/a.zarr", tmp_path / "tree", "--map", str(tmp_path / "map.yaml"))
        tree = server.paths.copy()
        server.paths.clear()
        words = ["--map", str(tmp_path / "map.yaml"), *DATES, "--store", str(tmp_path / "store")]
        main(["--source", f"{server.address}/a.zarr", *words])
    chunks = sorted(f"a.zarr/wind/{i}.1.0.0" for i in range(9))
    for paths in (tree, server.paths):
        assert sorted(path for path in paths if path.startswith(("a.zarr/air", "a.zarr/wind"))) == chunks
    assert tree[0] == "a.zarr/.zmetadata"
    assert len(tree) == 1 + 4 + 9  # 元数据、四条坐标、九块


def test_where_the_file_system_lists(tmp_path):
    """列得出的（s3、gs；这里用内存里的）：列一遍就知道哪些块没有写过。"""
    path = store(tmp_path / "a.zarr", 0.0)
    (path / "tp" / "3.0.0").unlink()
    files = fsspec.filesystem("memory")
    files.put(str(path), "/bucket/a.zarr", recursive=True)
    with pytest.raises(ValueError, match="1 of 9 chunks were never written"):
        run("memory://bucket/a.zarr", tmp_path / "none", *TP)
    words = (*TP, "--absent-chunks", "missing")
    assert run("memory://bucket/a.zarr", tmp_path / "there", *words) == run(path, tmp_path / "here", *words)
    files.rm("/bucket", recursive=True)


@pytest.mark.parametrize(("protocol", "library"), [("s3", "s3fs"), ("gs", "gcsfs"), ("https", "aiohttp")])
def test_a_library_that_is_not_installed(protocol, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf"{library}.*pip install -r requirements-remote\.txt$"):
        open_source(f"{protocol}://bucket/a.zarr")
    with pytest.raises(ValueError, match="nonsense://bucket/a.zarr: .*addresses start with https://, s3:// or gs://"):
        open_source("nonsense://bucket/a.zarr")


@pytest.mark.parametrize("layout", [pytest.param(name, marks=NEEDS_ZARR_3) for name in LAYOUTS])
def test_chunks_never_written(layout, tmp_path):
    """与本机的同样地拒绝、同样地由 --absent-chunks 定；服务器不认 Range，给的是整个文件。"""
    version, options = LAYOUTS[layout]
    path = write(tmp_path / "a.zarr", version, 0.0, slice(12, 16), **options)
    with Loopback(tmp_path, drop=10, ranges=layout == "3") as server:
        address = f"{server.address}/a.zarr"
        with pytest.raises(
            ValueError, match="variable tp: 2 of 18 chunks were never written and read as fill_value 0.0"
        ):
            run(address, tmp_path / "none", *TP)
        assert not (tmp_path / "none").exists()
        for choice in ("data", "missing"):
            words = (*TP, "--absent-chunks", choice)
            assert run(address, tmp_path / f"{choice} there", *words) == run(path, tmp_path / f"{choice} here", *words)
