"""坏了的 Zarr：块为 0、怪的 fill_value、嵌套太深的属性，都是一行，说出是哪个。"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from util.files.zarr_metadata import small_array, write_metadata
from util.source.opening import open_source

Change = Callable[[dict[str, Any]], object]


def write_zarr(folder: Path, array: Change = lambda _: None, attributes: str | None = None) -> Path:
    """第 2 版的 Zarr，int16 的 t2m (x: 6)；array 改它的 .zarray，attributes 换掉它的 .zattrs。"""
    made, raw = small_array(np.arange(6, dtype="<i2"), ["x"], {"units": "K"})
    write_metadata(folder, {"t2m": made}, {})
    (folder / "t2m/0").write_bytes(raw)
    (folder / ".zmetadata").unlink()
    about = json.loads((folder / "t2m/.zarray").read_text())
    array(about)
    (folder / "t2m/.zarray").write_text(json.dumps(about))
    if attributes is not None:
        (folder / "t2m/.zattrs").write_text(attributes)
    return folder


@pytest.mark.parametrize(
    ("change", "attributes"),
    [
        (lambda about: about.update(chunks=[0]), None),
        (lambda about: about.update(chunks=[-2]), None),
        (lambda about: about.update(chunks=["6"]), None),
        (lambda about: about.update(chunks=[6, 6]), None),
        (lambda about: about.update(chunks=None), None),
        (lambda about: about.update(shape=[-6]), None),
        (lambda about: about.update(shape=[10**30]), None),
        (lambda about: about.update(dtype="<q9"), None),
        (lambda about: about.update(dtype=[["a", "<i2"]] * 3), None),
        (lambda about: about.update(compressor={"id": "none such"}), None),
        (lambda about: about.update(fill_value={"a": 1}), None),
        (lambda about: about.pop("fill_value"), None),
        (lambda _: None, "[" * 100_000),
        (lambda _: None, '{"a": ' + "[" * 5000 + "]" * 5000 + "}"),
        (lambda _: None, '{"_ARRAY_DIMENSIONS": ["x", "y"]}'),
        (lambda _: None, "[1]"),
        (lambda _: None, '{"a": "\\ud800'),
    ],
)
def test_broken_metadata_is_one_line(tmp_path: Path, change: Change, attributes: str | None):
    path = write_zarr(tmp_path / "x.zarr", change, attributes)
    with pytest.raises(ValueError, match=r"\A[^\n]*x\.zarr: cannot be opened \([^\n]+\)\Z"):
        open_source(path)


@pytest.mark.parametrize("fill", [1e300, -40000, 0.5, "NaN", "Infinity", 10**400, None])
def test_a_fill_value_that_the_type_cannot_hold_marks_nothing(tmp_path: Path, fill: Any):
    path = write_zarr(tmp_path / "x.zarr", attributes=json.dumps({"_ARRAY_DIMENSIONS": ["x"], "_FillValue": fill}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(open_source(path)["t2m"].values, np.arange(6))
