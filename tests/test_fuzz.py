"""随机的字节读得出，或是一行（fuzz.py）；套件里各一百份，久测里各十分钟。"""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from tests.fuzz import TARGETS, fuzz, verdict


@pytest.mark.parametrize("name", TARGETS)
def test_a_hundred(name: str) -> None:
    assert fuzz(name, count=100)[0] == 100


@pytest.mark.soak
@pytest.mark.parametrize("name", TARGETS)
def test_ten_minutes(name: str) -> None:
    fuzz(name, seconds=600, seed=secrets.randbits(32))


@pytest.mark.parametrize(
    ("error", "said"), [(KeyError("x"), "KeyError"), (ValueError("a\nb"), "ValueError of"), (ValueError("a"), None)]
)
def test_what_is_a_failure(tmp_path: Path, error: Exception, said: str | None) -> None:
    def read(content: bytes, path: Path) -> None:
        raise error

    found = verdict(read, b"", tmp_path / "x")
    assert found is None if said is None else said in (found or "")
