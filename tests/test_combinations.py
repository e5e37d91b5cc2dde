"""tests/combinations.py 的组合：每一种都起得来，损失与一个进程的相同。"""

from __future__ import annotations

import pytest

from tests.combinations import (
    COMMAND,
    CONFIGS,
    OPTIONS,
    PAGE,
    SUBSETS,
    SWITCHED,
    combined,
    difference,
    find,
    marks,
    table,
)

CLOSE = {"32-true": 1e-4, "bf16-mixed": 2e-2}


@pytest.mark.soak
@pytest.mark.parametrize(("name", "groups"), [*((name, OPTIONS) for name in CONFIGS), (SWITCHED, SUBSETS)])
def test_every_combination_starts_and_equals_one_process(name: str, groups) -> None:
    wanted = combined([name], groups)
    found = find(wanted)
    for combination in wanted:
        apart = difference(found, combination)
        assert isinstance(apart, float) and apart <= CLOSE[combination.precision], (combination, apart)


def test_the_table_compares_with_one_process() -> None:
    loss = {"auto": 2.0, "ddp": 2.5, "fsdp": 2.0}
    wanted = combined(["a"], OPTIONS)
    found: dict[str, list[float] | str] = {each.name: [1.0, loss[each.strategy]] for each in wanted}
    found[wanted[-1].name] = "ValueError: no"
    header, _, row = table(found, ["a"], OPTIONS).splitlines()
    assert header == "| config | ddp, 32-true | ddp, bf16-mixed | fsdp, 32-true | fsdp, bf16-mixed |"
    assert row == "| a | 2e-01 / 2e-01 | 2e-01 / 2e-01 | 0 / 0 | 0 / ValueError: no |"


@pytest.mark.parametrize("command", [COMMAND, f"{COMMAND} --switches"])
def test_the_page_has_a_place_for_the_table(command: str) -> None:
    begin, end = marks(command)
    text = PAGE.read_text(encoding="utf-8")
    assert text.count(begin) == text.count(end) == 1 and text.index(begin) < text.index(end)
