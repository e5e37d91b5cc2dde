"""乱改的字节读得出，或是一行：套件里由 hypothesis 改，久测里由 atheris 各改十分钟（fuzz.py）。"""

from __future__ import annotations

import secrets
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from tests.fuzz import NAMES, ROOT
from tests.fuzz_targets import TARGETS, WORDS, verdict

seeds = cache(lambda name: TARGETS[name].seeds())


@st.composite
def changed(draw: Any, name: str) -> bytes:
    """一份好的，改一到五处。"""
    content = bytearray(draw(st.sampled_from(seeds(name))))
    for _ in range(draw(st.integers(1, 5))):
        first, gone = draw(st.integers(0, len(content))), draw(st.integers(0, 16))
        content[first : first + gone] = draw(st.sampled_from(WORDS) | st.binary(max_size=8))
    return bytes(content)


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
def test_changed_bytes(name: str, data: st.DataObject) -> None:
    content = data.draw(changed(name))
    note(repr(content))
    with TemporaryDirectory() as folder:
        assert verdict(TARGETS[name].read, content, Path(folder) / "x") is None


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_ten_minutes(name: str) -> None:
    words = [name, "--minutes", "10", "--seed", str(1 + secrets.randbits(30))]
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Done " in done.stderr, done.stdout[-3000:] + done.stderr[-3000:]
    print(done.stderr.strip().splitlines()[-1])


def test_the_names_are_the_targets() -> None:
    assert [*TARGETS] == [*NAMES]


@pytest.mark.parametrize(
    ("error", "said"), [(KeyError("x"), "KeyError"), (ValueError("a\nb"), "ValueError of"), (ValueError("a"), None)]
)
def test_what_is_a_failure(tmp_path: Path, error: Exception, said: str | None) -> None:
    def read(content: bytes, path: Path) -> None:
        raise error

    found = verdict(read, b"", tmp_path / "x")
    assert found is None if said is None else said in (found or "")
