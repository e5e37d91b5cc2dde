"""随机的字节：`.npy` 的文件头与数、YAML、检查点、时刻，读得出，或是我们写的一行 ValueError。

从好的例子起，一次改几处；走到新的一行代码的留下来，接着改它（覆盖率引导，只看 TARGETS 里写的那几个文件）。
`python -m tests.fuzz npy --minutes 10`；在久测里的是 test_fuzz.py。弄坏的那一份写在 tmp/fuzz-TARGET.bin。
"""

from __future__ import annotations

import argparse
import io
import logging
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch

from util.calendar import parse_time, time_text
from util.checkpoint import save_checkpoint
from util.cli import run_command
from util.files.bounded import open_regular, read_npy_header, read_npy_values
from util.files.training_checkpoint import load_training
from util.strict import dump_yaml, parse_yaml

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 2**16  # 字节
TOKENS = [b"'", b'"', b"(", b")", b"{", b"}", b"[", b"]", b",", b":", b"\n", b" ", b"-", b"+", b"0", b"9" * 20, b"\0"]
TOKENS += [b"\xff", b"\x93NUMPY", b"descr", b"<f4", b"|O", b"True", b"shape", b"&a", b"*a", b"<<", b"!!", b"? ", b"- "]
TOKENS += [
    b"---",
    b"#",
    b"1e5",
    b".inf",
    b"0x",
    b"T",
    b"Z",
    b"W01",
    b"24:00",
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"..",
    b"/",
]
TOKENS += [
    b"format",
    b"model",
    b"digests",
    b"torch._utils\n_rebuild_tensor_v2\n",
    b"builtins\neval\n",
    b"cos\nsystem\n",
]
Read = Callable[[bytes, Path], object]


class Target(NamedTuple):
    """read 读一份（必要时写进给它的文件）；seeds 是好的例子；files 是看覆盖的。"""

    read: Read
    seeds: Callable[[], list[bytes]]
    files: tuple[str, ...]


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


_CHECKPOINT_FILES = ("util/checkpoint.py", "util/files/training_checkpoint.py", "util/files/records.py")
TARGETS = {
    "npy": Target(_read_npy, _npy_seeds, ("util/files/bounded.py",)),
    "yaml": Target(_read_yaml, _yaml_seeds, ("util/strict.py",)),
    "checkpoint": Target(
        _read_checkpoint, _checkpoint_seeds, ("util/checkpoint.py", "util/files/training_checkpoint.py")
    ),
    "time": Target(_read_time, _time_seeds, ("util/calendar.py",)),
}


def changed(content: bytes, corpus: list[bytes], rng: random.Random) -> bytes:
    """改一到五处：一位、一字节、插、删、重复、截断、换成一个词、接上另一份的尾巴。"""
    made = bytearray(content)
    for _ in range(rng.randint(1, 5)):
        i, j = sorted(rng.randint(0, len(made)) for _ in range(2))
        how = rng.randrange(8)
        if how == 0 and made:
            made[i % len(made)] ^= 1 << rng.randrange(8)
        elif how == 1 and made:
            made[i % len(made)] = rng.randrange(256)
        elif how == 2:
            made[i:i] = rng.choice(TOKENS)
        elif how == 3:
            del made[i : min(j, i + 1 + rng.randrange(16))]
        elif how == 4:
            made[i:i] = made[i : min(j, i + 64)] * rng.randint(1, 3)
        elif how == 5 and rng.random() < 0.2:
            del made[i:]
        elif how == 6:
            token = rng.choice(TOKENS)
            made[i : i + len(token)] = token
        elif how == 7:
            other = rng.choice(corpus)
            made[i:] = other[rng.randint(0, len(other)) :]
    return bytes(made[:LONGEST])


class Lines:
    """走过的行，只看几个文件。"""

    def __init__(self, files: tuple[str, ...]) -> None:
        self.files, self.seen = {str(ROOT / file) for file in files}, set[tuple[str, int]]()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in self.files:
            return None
        self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self


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


def fuzz(name: str, count: int | None = None, seconds: float = 0.0, seed: int = 0) -> tuple[int, int]:
    """试 count 份，或试 seconds 秒；返回试了几份、留下几份。

    Raises:
        AssertionError: 头一份弄坏的，连同它存在哪里。
    """
    target, rng, began = TARGETS[name], random.Random(seed), time.monotonic()  # noqa: S311
    corpus, lines, tried = target.seeds(), Lines(target.files), 0
    logging.getLogger("ar_pred").setLevel(logging.ERROR)
    with TemporaryDirectory() as folder:
        while tried < count if count is not None else time.monotonic() - began < seconds:
            content = corpus[tried] if tried < len(corpus) else changed(rng.choice(corpus), corpus, rng)
            known = len(lines.seen)
            sys.settrace(lines)
            try:
                problem = verdict(target.read, content, Path(folder) / "x")
            finally:
                sys.settrace(None)
            tried += 1
            if problem:
                kept = ROOT / "tmp" / f"fuzz-{name}.bin"
                kept.write_bytes(content)
                raise AssertionError(
                    f"{name}, input {tried} of seed {seed}, kept in {kept}: {content[:200]!r}\n{problem}"
                )
            if len(lines.seen) > known and tried > len(corpus):
                corpus.append(content)
    return tried, len(corpus)


def main() -> int:
    parser = argparse.ArgumentParser(description="Feed random bytes to a reader.")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tried, kept = fuzz(args.target, seconds=60 * args.minutes, seed=args.seed)
    print(f"{args.target}: {tried} inputs in {args.minutes:g} minutes, {kept} kept for the lines they reach, all well")
    return 0


if __name__ == "__main__":
    run_command(main)
