"""久测的走法：接着走、按时停、换了提交从头来、表里一个提交与一个 Python 一行。"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import soak
from tests.soak import BEGIN, END, left, load, row, with_row

TESTS = ["a.py::one", "a.py::two", "b.py::three"]


class Clock:
    """假的钟与假的测试：每个测试走 minutes 里写的分钟数，时间不够就只走到头。"""

    def __init__(self, minutes: dict[str, float], bad: str = "") -> None:
        self.time, self.minutes, self.bad, self.ran = 0.0, minutes, bad, []

    def now(self) -> float:
        return self.time

    def run(self, test: str, seconds: float) -> str:
        self.ran.append(test)
        needed = self.minutes[test] * 60
        self.time += min(needed, seconds)
        return "out of time" if needed > seconds else "failed" if test == self.bad else "passed"


@pytest.fixture(autouse=True)
def record_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(soak, "RECORD", tmp_path / "soak.json")
    return tmp_path / "soak.json"


def part(clock: Clock, path: Path, commit: str = "abc") -> soak.Record:
    record = load(path, commit)
    soak.soak(TESTS, record, 55 * 60, clock.run, clock.now)
    return record


def test_goes_on_where_it_stopped(record_here: Path):
    clock = Clock({TESTS[0]: 30, TESTS[1]: 40, TESTS[2]: 10}, bad=TESTS[2])
    assert left(TESTS, part(clock, record_here)) == TESTS[1:]  # 第二个只剩 25 分钟，留到下一次的开头
    assert clock.time == 55 * 60
    record = part(clock, record_here)
    assert clock.ran == [TESTS[0], TESTS[1], TESTS[1], TESTS[2]]
    assert [record["tests"][test]["outcome"] for test in TESTS] == ["passed", "passed", "failed"]
    part(clock, record_here)
    assert len(clock.ran) == 4  # 都做过了
    assert json.loads(record_here.read_text()) == record
    assert left(TESTS, load(record_here, "abd")) == TESTS  # 换了提交


def test_a_test_longer_than_a_part_is_not_tried_for_ever(record_here: Path):
    clock = Clock({TESTS[0]: 90, TESTS[1]: 1, TESTS[2]: 1})
    assert part(clock, record_here)["tests"][TESTS[0]]["outcome"] == "out of time"
    assert not left(TESTS, part(clock, record_here))


def test_one_that_needs_longer_than_a_part_waits_for_a_longer_part(record_here: Path):
    long, clock = "b.py::slow[120-minutes]", Clock({TESTS[0]: 1, "b.py::slow[120-minutes]": 120})
    record = load(record_here, "abc")
    for minutes in (55, 150):
        soak.soak([TESTS[0], long], record, minutes * 60, clock.run, clock.now)
        assert left([TESTS[0], long], record) == ([long] if minutes == 55 else [])
    assert record["tests"][long]["outcome"] == "passed"


def test_one_row_for_a_commit_and_a_python():
    record = {"commit": "abc", "tests": {TESTS[0]: {"outcome": "passed", "seconds": 90}}}
    page = with_row(f"说明\n{BEGIN}| 日期 |\n{END}其余\n", row(TESTS, record))
    record["tests"][TESTS[1]] = {"outcome": "failed", "seconds": 90}
    page = with_row(page, row(TESTS, record))
    page = with_row(page, row(TESTS, {"commit": "abd", "tests": {}}))
    page = with_row(page, f"| 2026-01-01 | `abc` | {soak.PYTHON}0 | 3 | 0 | 0 | 9 |\n")
    lines = page.splitlines()
    assert [line.split(" | ")[1:3] for line in lines[3:-2]] == [
        ["`abc`", soak.PYTHON], ["`abd`", soak.PYTHON], ["`abc`", f"{soak.PYTHON}0"],
    ]  # fmt: skip
    assert lines[3].endswith("| 1 | 1 | 1 | 3 |")
    assert lines[-1] == "其余"


def test_the_page_has_a_place_for_the_rows():
    text = soak.PAGE.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
