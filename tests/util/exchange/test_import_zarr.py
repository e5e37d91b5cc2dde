"""导入 Zarr：fill_value 的 0 是数据；没有写过的块，说得准的当缺测，说不准的要人定。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

from tests.util.exchange.test_import_fields import DATES, make_dataset
from tests.util.exchange.test_import_layouts import TIMES, import_all, load
from util.commands.import_fields import main
from util.data.tree_files import field_path
from util.source.opening import open_source

RAIN = np.maximum(np.random.default_rng(0).normal(0, 1e-3, (36, 5, 8)), 0).astype(np.float32)
CHUNKS = (4, 5, 4)  # 9 x 1 x 2 块
pytestmark = pytest.mark.skipif(int(zarr.__version__.split(".")[0]) < 3, reason="these stores are written with zarr 3")


def write(path: Path, version: Any, fill: Any, skip: slice = slice(0, 0), **options: Any) -> Path:
    """tp 由 zarr 直接写；skip 里的时刻不写。time 从 0 起，fill_value 也是 0。"""
    group = zarr.open_group(path, mode="w", zarr_format=version)
    axes = {"time": np.arange(36) * 6, "lat": np.linspace(-20, 20, 5), "lon": np.linspace(0, 70, 8)}
    for name, values in axes.items():
        attributes = {"units": "hours since 2000-01-01"} if name == "time" else {}
        _array(group, name, values, [name], version, attributes, fill_value=0)[...] = values
    array = _array(
        group, "tp", RAIN, list(axes), version, {"units": "m"}, **{"chunks": CHUNKS, **options}, fill_value=fill
    )
    for i in sorted(set(range(36)) - set(range(36)[skip])):
        array[i] = RAIN[i]
    return path


def _array(group, name, values, dims, version, attributes, **options):
    named = {"dimension_names": dims} if version == 3 else {"attributes": {"_ARRAY_DIMENSIONS": dims}}
    array = group.create_array(
        name, shape=values.shape, dtype=values.dtype, config={"write_empty_chunks": True}, **named, **options
    )
    array.attrs.update(attributes)
    return array


def written(root: Path) -> set[int]:
    return {i for i, hour in enumerate(TIMES) if field_path(root, "tp", hour).is_file()}


@pytest.mark.parametrize("version", [2, 3])
def test_zeros_are_data(version, tmp_path):
    path = write(tmp_path / "a.zarr", version, 0.0)
    import_all([path], tmp_path / "tree", "--variable", "tp=tp")
    for i in range(36):
        np.testing.assert_array_equal(load(tmp_path / "tree", "tp", TIMES[i]), RAIN[i])


LAYOUTS = {
    "2": (2, {}),
    "2, folders": (2, {"chunk_key_encoding": {"name": "v2", "separator": "/"}}),
    "3": (3, {}),
    "3, flat": (3, {"chunk_key_encoding": {"name": "default", "separator": "."}}),
    "3, shards": (3, {"shards": (12, 5, 8)}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_never_written(layout, tmp_path):
    """12—15 时刻的两块没有写过：fill_value 是 0 的要人定；NaN 与认得的填充值就是缺测。"""
    version, options = LAYOUTS[layout]
    path, words = write(tmp_path / "a.zarr", version, 0.0, slice(12, 16), **options), ("--variable", "tp=tp")
    said = "variable tp: 2 of 18 chunks were never written and read as fill_value 0.0: data or missing.*--absent-chunks"
    with pytest.raises(ValueError, match=said):
        main(["--source", str(path), "--root", str(tmp_path / "none"), *words, *DATES])
    assert not (tmp_path / "none").exists()
    import_all([path], tmp_path / "data", *words, "--absent-chunks", "data")
    assert written(tmp_path / "data") == set(range(36))
    assert not load(tmp_path / "data", "tp", TIMES[12]).any()
    import_all([path], tmp_path / "missing", *words, "--absent-chunks", "missing")
    assert written(tmp_path / "missing") == set(range(36)) - {12, 13, 14, 15}
    for fill in (np.nan, -9999.0):
        known = write(tmp_path / f"{fill}.zarr", version, fill, slice(12, 16), **options)
        import_all([known], tmp_path / f"tree{fill}", *words)
        assert written(tmp_path / f"tree{fill}") == set(range(36)) - {12, 13, 14, 15}


def test_chunks_outside_of_what_is_imported_do_not_matter(tmp_path):
    """没有写过的一块只在东半边：裁在西边就不问；裁到它，只缺那几个时刻。"""
    path = write(tmp_path / "a.zarr", 2, 0.0)
    (path / "tp" / "3.0.1").unlink()
    import_all([path], tmp_path / "west", "--variable", "tp=tp", "--cols", "0:4")
    assert written(tmp_path / "west") == set(range(36))
    words = ("--variable", "tp=tp", "--cols", "2:6")
    with pytest.raises(ValueError, match="1 of 18 chunks"):
        import_all([path], tmp_path / "middle", *words)
    import_all([path], tmp_path / "middle", *words, "--absent-chunks", "missing")
    assert written(tmp_path / "middle") == set(range(36)) - {12, 13, 14, 15}
    np.testing.assert_array_equal(load(tmp_path / "middle", "tp", TIMES[16]), RAIN[16, :, 2:6])


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    "encoding",
    [
        {"dtype": "int16", "scale_factor": 0.01, "add_offset": 280.0, "_FillValue": -32000},
        {"dtype": "float32", "_FillValue": -9999.0},
        {"dtype": "float64", "_FillValue": np.nan},
    ],
)
def test_what_xarray_wrote_reads_as_xarray_reads_it(version, encoding, tmp_path):
    """声明了的缺测：第 2 版只记在 fill_value，第 3 版是 base64 的属性。"""
    dataset = make_dataset()[["air"]]
    dataset["air"][5, 2, 3] = np.nan
    dataset.to_zarr(tmp_path / "a.zarr", zarr_format=version, consolidated=False, encoding={"air": encoding})
    with xr.open_zarr(tmp_path / "a.zarr", consolidated=False) as theirs, open_source(tmp_path / "a.zarr") as ours:
        assert np.isnan(theirs.air.values[5, 2, 3])
        np.testing.assert_array_equal(ours.air.values, theirs.air.values)
        np.testing.assert_array_equal(ours.time.values, theirs.time.values)
