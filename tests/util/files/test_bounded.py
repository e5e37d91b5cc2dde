"""别人的小文件：`.npy` 的文件头与 NumPy 认的一样，怪的都是一行；管道不等；字节不够就不要内存；JSON 太深是一行。"""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from util.data.tree_files import FieldError, read_field, read_into, read_mean_std, usual_header
from util.files.bounded import open_regular, parse_json, read_json, read_npy_header, read_npy_values


def read(path: Path) -> np.ndarray:
    with open_regular(path) as file:
        return read_npy_values(file, read_npy_header(file))


def with_header(text: str, values: bytes = b"", version: int = 1) -> bytes:
    raw = text.encode("latin1")
    return b"\x93NUMPY" + bytes([version, 0]) + len(raw).to_bytes(2 if version == 1 else 4, "little") + raw + values


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 3), (1, 2, 3, 4)])
@pytest.mark.parametrize("kind", ["<f4", ">f8", "<i2", "|u1", "|b1", "<c8", "<U3"])
def test_what_numpy_writes_is_read_alike(tmp_path: Path, shape: tuple[int, ...], kind: str):
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(kind)
    for array in (values, np.asfortranarray(values)):
        np.save(tmp_path / "x.npy", array)
        found = read(tmp_path / "x.npy")
        assert found.dtype == array.dtype and found.shape == array.shape
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(
    "text",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 3L)}   \n",  # Python 2
        '{"shape": (2,3), "descr": "<f4", "fortran_order": False}',
        "{'descr':'<f4','shape':(2,3,),'fortran_order':False,}\n",
    ],
)
@pytest.mark.parametrize("version", [1, 2, 3])
def test_what_others_write_is_read(tmp_path: Path, text: str, version: int):
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    (tmp_path / "x.npy").write_bytes(with_header(text, values.tobytes(), version))
    np.testing.assert_array_equal(read(tmp_path / "x.npy"), values)


PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s), }"
HOSTILE = {
    "digits": (with_header(PLAIN % ("9" * 4000 + ", 2")), "a shape that is not a few whole numbers"),
    "large": (
        with_header(PLAIN % "1000000000000, 1000000", b"1234"),
        "cut off: 4 bytes of values, 4000000000000000000 ",
    ),
    "dimensions": (with_header(PLAIN % ("1, " * 100)), "a shape that is not a few whole numbers"),
    "brackets": (with_header("(" * 9000), "a header that is not"),
    "nested": (with_header(PLAIN % ("(" * 5000)), "a header that is not"),
    "negative": (with_header(PLAIN % "-2, 3"), "a header that is not"),
    "commas": (with_header(PLAIN % ",,"), "a shape that is not a few whole numbers"),
    "code": (with_header("{'descr': '<f4', 'fortran_order': print(), 'shape': (2,)}"), "a header that is not"),
    "no order": (with_header("{'descr': '<f4', 'fortran_order': 'x', 'shape': (2,)}"), "without fortran_order"),
    "twice": (with_header("{'descr': '<f4', 'descr': '<f4', 'shape': (2,)}"), "a header that is not"),
    "pickle": (with_header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"), "objects (pickle) are not read"),
    "type": (with_header("{'descr': '<f3', 'fortran_order': False, 'shape': (1,)}"), "values of type '<f3'"),
    "two lines": (with_header("{'descr': 'os\n<f8', 'fortran_order': False, 'shape': (1,)}"), r"of type 'os\n<f8'"),
    "long": (b"\x93NUMPY\x02\x00" + b"\xff" * 40, "a header of 4294967295 bytes"),
    "short": (b"\x93NUMPY\x01\x00\xff\x00 {", "cut off in the header"),
    "version": (b"\x93NUMPY\x09\x00" + b" " * 99, "not a .npy file"),
    "zip": (b"PK\x03\x04" + b"x" * 100, "not a .npy file"),
    "empty": (b"", "not a .npy file"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_files_are_one_line_and_take_no_memory(tmp_path: Path, how: str):
    content, said = HOSTILE[how]
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(FieldError, match=r"\A[^\n]+\Z") as caught:
        read_field(path, (10**12, 10**6) if how == "large" else (2, 3))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.fault == "unreadable" and said in str(caught.value)
    assert peak < 1e6


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    pipe = tmp_path / "x.npy"
    os.mkfifo(pipe)
    with pytest.raises(FieldError, match="unreadable .*not a regular file"):
        read_field(pipe, (2, 3))
    assert not read_into(str(pipe), usual_header((2, 3)), np.empty((2, 3), np.float32))
    with pytest.raises(OSError, match="not a regular file"):
        read_json(pipe)
    (tmp_path / "t2m_npy").mkdir()
    os.mkfifo(tmp_path / "t2m_npy" / "mean_std.json")
    with pytest.raises(ValueError, match=r"mean_std.json: missing"):
        read_mean_std(tmp_path, "t2m")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000])
def test_deep_json_is_one_line(tmp_path: Path, text: str):
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json(text)
    (tmp_path / "t2m_npy").mkdir()
    (tmp_path / "t2m_npy" / "mean_std.json").write_text(f'{{"mean": {text}')
    with pytest.raises(ValueError, match=r"mean_std.json: malformed \(ValueError: nested too deep\)"):
        read_mean_std(tmp_path, "t2m")


def test_a_huge_json_is_not_read(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": [1, 2.5, "文"]}), encoding="utf-8")
    assert read_json(path) == {"a": [1, 2.5, "文"]}
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="1099511627776 bytes of JSON, at most"):
        read_json(path)
