"""记录与 JSON：写了再读还是它；没有填的一栏不写，别的 None 是 null；读错了一行说清。"""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from util.files.records import as_json, read_record


@dataclass(frozen=True)
class Inner:
    values: list[float | None]
    low: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    rate: float | None
    inner: dict[str, Inner]
    note: str | None = None


def test_there_and_back():
    record = Outer(name="a", rate=None, inner={"t2m": Inner([1.5, None]), "u10": Inner([2.0], [0.5])})
    written = as_json(record)
    assert written == {
        "name": "a",
        "rate": None,
        "inner": {"t2m": {"values": [1.5, None]}, "u10": as_json(Inner([2.0], [0.5]))},
    }
    assert list(written) == ["name", "rate", "inner"]
    assert read_record(Outer, {**json.loads(json.dumps(written)), "newer": 1}, "x.json") == record


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 1.0, "inner": {}}, r"^x\.json: name: "),
        ({"name": "a", "rate": "fast", "inner": {}}, r"^x\.json: rate: input should be a valid number"),
        ({"name": "a", "rate": 1.0, "inner": {"t2m": {"values": 3}}}, r"^x\.json: inner\.t2m\.values: "),
        ([1], r"^x\.json: top level: "),
    ],
)
def test_mistakes_are_one_line(values, message):
    with pytest.raises(ValueError, match=message) as error:
        read_record(Outer, values, "x.json")
    assert "\n" not in str(error.value)
