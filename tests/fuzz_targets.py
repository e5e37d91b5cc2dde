"""乱改的字节由谁读：`.npy`、YAML、检查点、时刻；读得出，或是我们写的一行 ValueError。改的是 fuzz.py、test_fuzz.py。"""

from __future__ import annotations

import io
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch

from util.calendar import parse_time, time_text
from util.checkpoint import save_checkpoint
from util.files.bounded import open_regular, read_npy_header, read_npy_values
from util.files.training_checkpoint import load_training
from util.strict import dump_yaml, parse_yaml

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 2**16  # 字节
WORDS = [b"'", b'"', b"(", b")", b"{", b"}", b"[", b"]", b",", b":", b"\n", b" ", b"-", b"+", b"0", b"9" * 20, b"\0"]
WORDS += [b"\xff", b"\x93NUMPY", b"descr", b"<f4", b"|O", b"True", b"shape", b"&a", b"*a", b"<<", b"!!", b"? ", b"- "]
WORDS += [b"---", b"#", b"1e5", b".inf", b"0x", b"T", b"Z", b"W01", b"24:00", b"PK\x03\x04", b"PK\x05\x06", b"..", b"/"]
WORDS += [b"format", b"model", b"digests", b"torch._utils\n_rebuild_tensor_v2\n", b"builtins\neval\n", b"cos\nsystem\n"]
Read = Callable[[bytes, Path], object]


class Target(NamedTuple):
    """read 读一份（必要时写进给它的文件）；seeds 是好的例子。"""

    read: Read
    seeds: Callable[[], list[bytes]]


def _read_npy(content: bytes, path: Path) -> object:
    path.write_bytes(content)
    with open_regular(path) as file:
        return read_npy_values(file, read_npy_header(file))


def _npy_seeds() -> list[bytes]:
    found = []
    for array in (
        np.zeros((2, 3), "<f4"),
        np.zeros((), ">f8"),
        np.asfortranarray(np.ones((2, 3, 4), "|u1")),
        np.zeros(0),
    ):
        file = io.BytesIO()
        np.save(file, array)
        found.append(file.getvalue())
    return found


def _read_yaml(content: bytes, _path: Path) -> object:
    value = parse_yaml(content.decode("utf-8", "replace"), "x.yaml")
    assert _same(parse_yaml(dump_yaml(value), "x.yaml"), value), value  # 读出来的写得回去
    return value


def _same(one: Any, other: Any) -> bool:
    """NaN 与自己相同。"""
    return repr(one) == repr(other)


def _yaml_seeds() -> list[bytes]:
    return [path.read_bytes()[:2000] for path in sorted((ROOT / "config").glob("*.yaml"))[::8]] + [b"a: &a {b: *a}\n"]


def _read_checkpoint(content: bytes, path: Path) -> object:
    path.write_bytes(content)
    return load_training(path, verify=len(content) % 2 == 0)


def _checkpoint_seeds() -> list[bytes]:
    small = {"run": "x", "config": {}, "model": {"w": torch.ones(3)}, "ema": None, "progress": {"step": 1}}
    with TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "x.ckpt", small)
        whole = (Path(folder) / "x.ckpt").read_bytes()
    before = sorted((ROOT / "tests/from_before").glob("v*.ckpt"), key=lambda path: path.stat().st_size)
    return [whole, before[0].read_bytes()[:LONGEST]]


def _read_time(content: bytes, _path: Path) -> object:
    hour = parse_time(content.decode("utf-8", "replace"))
    assert parse_time(time_text(hour)) == hour
    return hour


def _time_seeds() -> list[bytes]:
    return [b"2015-06-01T00", b"2015-06-01 00:00", b"2015-06-01T00:00:00.000+01:00", b"1000-01-01Z", b"9000-12-31"]


TARGETS = {
    "npy": Target(_read_npy, _npy_seeds),
    "yaml": Target(_read_yaml, _yaml_seeds),
    "checkpoint": Target(_read_checkpoint, _checkpoint_seeds),
    "time": Target(_read_time, _time_seeds),
}


def verdict(read: Read, content: bytes, path: Path) -> str | None:
    """None：读得出，或是我们写的一行 ValueError；不然是什么毛病。"""
    try:
        read(content, path)
    except ValueError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if "\n" in str(error) or not Path(frame.f_code.co_filename).is_relative_to(ROOT):
            return f"{type(error).__name__} of {frame.f_code.co_filename}: {error}"
    except Exception:  # noqa: BLE001  正是要找的
        return traceback.format_exc()
    return None
