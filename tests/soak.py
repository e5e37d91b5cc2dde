"""久测：放不进测试套件的那些。`make soak` 一次至多走一小时，停在两个测试之间；再来一次，从没做完的接着走。

做过的记在 tmp/soak-PYTHON.json（只认这个提交；换了提交从头来），结果写进 docs/reliability.md 的表：
一个提交、一个 Python 一行。
久测是有 soak 标记的（长的那一种参数，短的留在套件里），加上 hypothesis 的全部测试：例子多一百倍，每次换种子。
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from util.atomic import replacing
from util.cli import run_command

ROOT = Path(__file__).resolve().parent.parent
PYTHON = platform.python_version()
RECORD, PAGE = ROOT / "tmp" / f"soak-{PYTHON}.json", ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- make soak -->\n", "<!-- /make soak -->\n"
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=soak")
GRACE = 30  # 秒
Record = dict[str, Any]


def commit() -> str:
    """被测的提交：最近一个改了 docs/ 以外的东西的，所以把结果提交进来不算换了代码。

    Raises:
        ValueError: 有没提交的改动，结果就不知道是谁的。
    """
    code = ["--", ".", ":!docs"]
    if _git("status", "--porcelain", *code):
        raise ValueError(
            "there are uncommitted changes: the results belong to a commit (one test: pytest -m soak -k …)"
        )
    return _git("log", "-1", "--format=%h", *code).strip()


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def find_tests() -> list[str]:
    """久测的全部节点，按收集的次序。"""
    done = subprocess.run(
        [*PYTEST, "--collect-only", "-m", "soak or hypothesis"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"pytest cannot collect the tests: {done.stdout.strip().splitlines()[-1]}")
    return [line for line in done.stdout.splitlines() if "::" in line]


def run_test(test: str, seconds: float) -> str:
    """passed、failed，或 out of time；到时先打断，它起的进程由它自己收走。"""
    process = subprocess.Popen([*PYTEST, "-m", "", test], cwd=ROOT)
    try:
        return "failed" if process.wait(seconds) else "passed"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
        return "out of time"


def soak(tests: Sequence[str], record: Record, seconds: float, run=run_test, now=time.monotonic) -> None:
    """逐个做还没有结果的；record["tests"] 里每个一项，做完一个就能存。

    时间只够做完一部分的测试这次不算，留到下一次的开头；一次的开头也做不完的，记作 out of time。
    """
    begin = now()
    fitting = [test for test in left(tests, record) if needed(test) <= seconds]
    for place, test in enumerate(fitting):
        before = now()
        outcome = run(test, begin + seconds - before)
        if outcome == "out of time" and place:
            return
        record["tests"][test] = {"outcome": outcome, "seconds": round(now() - before, 1)}
        save(record)
        if now() - begin >= seconds:
            return


def needed(test: str) -> float:
    """秒；名字里写着 N-minutes 的至少要这么久，一次走不了那么久就不开头。"""
    return 60.0 * sum(map(int, re.findall(r"(\d+)-minutes", test)))


def left(tests: Sequence[str], record: Record) -> list[str]:
    return [test for test in tests if test not in record["tests"]]


def load(path: Path, commit: str) -> Record:
    """这个提交做过的；没有就是空的。"""
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return record if record.get("commit") == commit else {"commit": commit, "tests": {}}


def save(record: Record) -> None:
    RECORD.parent.mkdir(exist_ok=True)
    with replacing(RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")


def row(tests: Sequence[str], record: Record) -> str:
    """表里的一行。"""
    found = [record["tests"][test] for test in tests if test in record["tests"]]
    bad = sum(one["outcome"] != "passed" for one in found)
    minutes = round(sum(one["seconds"] for one in found) / 60)
    day, rest = datetime.now(timezone.utc).date(), len(left(tests, record))
    cells = (day, f"`{record['commit']}`", PYTHON, len(found) - bad, bad, rest, minutes)
    return f"| {' | '.join(map(str, cells))} |\n"


def with_row(page: str, row: str) -> str:
    """说明里的表，同一个提交、同一个 Python 的那一行换成新的，没有就添在最后。"""
    before, begin, rest = page.partition(BEGIN)
    table, end, after = rest.partition(END)
    assert begin and end, "docs/reliability.md has lost its two markers"
    kept = [line for line in table.splitlines(keepends=True) if line.split(" | ")[1:3] != row.split(" | ")[1:3]]
    return before + begin + "".join(kept) + row + end + after


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tests that are too long for the suite.", allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=55, help="stop after this long, between tests (default: 55)")
    args = parser.parse_args()
    record = load(RECORD, commit())
    tests = find_tests()
    soak(tests, record, args.minutes * 60)
    PAGE.write_text(with_row(PAGE.read_text(encoding="utf-8"), row(tests, record)), encoding="utf-8")
    bad = [test for test in tests if record["tests"].get(test, {"outcome": "passed"})["outcome"] != "passed"]
    print(f"{len(tests) - len(left(tests, record))} of {len(tests)} done", *bad, sep="\n  not passed: ")
    if left(tests, record):
        longest = max(map(needed, left(tests, record))) / 60
        more = f'; the longest need ARGS="--minutes {longest + 30:.0f}"' if longest > args.minutes else ""
        print(f"make soak again goes on where it stopped{more}")
    return 1 if bad else 0


if __name__ == "__main__":
    run_command(main)
