"""变异测试的工具（mutation.py）：改得动、改得对，发觉得了、活得下来，同样的种子同样的一组。"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import mutation
from tests.mutation import TARGETS, chosen, mutated, mutations, outcome, table, with_table

CODE = '''
def clip(value, low=0):
    """不低于 low。"""
    if value < low and not low is None:
        value = low
    print(*zip([value], strict=True))
    return value + 1
'''
TESTS = "from room import clip\n\ndef test():\n    assert clip(-2) == 1 and clip(3) == 4\n"


@pytest.fixture
def one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "room.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "test_room.py").write_text(TESTS, encoding="utf-8")
    monkeypatch.setattr(mutation, "ROOT", tmp_path)
    monkeypatch.setattr(mutation, "TARGETS", {"room.py": ("test_room.py",)})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return "room.py"


def test_every_change_is_one_place(one_file: str) -> None:
    found = mutations(one_file)
    texts = [ast.unparse(mutated(each)) for each in found]
    assert len(set(texts)) == len(texts) and ast.unparse(ast.parse(CODE)) not in texts
    assert sorted(each.what for each in found) == sorted(
        ["0 -> 1", "condition negated", "And -> Or", "Lt -> LtE", "Is -> IsNot", "returns None", "Add -> Sub", "1 -> 2",
         "line 6 left out"]
    )  # fmt: skip


def test_what_is_noticed(one_file: str) -> None:
    assert outcome(one_file, None) == "survived"
    found = {each.what: outcome(one_file, mutated(each)) for each in mutations(one_file) if each.line != 4}
    assert found.pop("line 6 left out") == "survived"
    assert set(found.values()) == {"killed"}


def test_the_same_ones_every_time() -> None:
    assert chosen(50) == chosen(50) and len(chosen(50)) == 50
    assert {each.file for each in chosen(300)} == set(TARGETS)
    assert set(chosen(20)) <= {each for file in TARGETS for each in mutations(file)}


def test_the_table_has_a_place() -> None:
    record = {file: {"outcomes": {}} for file in TARGETS}
    one = chosen(300)[0]
    record[one.file]["outcomes"][one.name] = "survived"
    made = table(chosen(300), record)
    assert made.splitlines()[-1].endswith("| 1 | 0（0%） | 1 |")
    page = mutation.PAGE.read_text(encoding="utf-8")
    assert made in with_table(page, made)
