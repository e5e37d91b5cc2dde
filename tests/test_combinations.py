"""tests/combinations.py 的组合：每一种都起得来，损失与一个进程的相同。"""

from __future__ import annotations

import pytest

from tests.combinations import (
    BEGIN,
    CONFIGS,
    END,
    OPTIONS,
    PAGE,
    PRECISIONS,
    STRATEGIES,
    difference,
    find,
    names,
    table,
)

CLOSE = {"32-true": 1e-4, "bf16-mixed": 2e-2}


@pytest.mark.soak
@pytest.mark.parametrize("name", CONFIGS)
def test_every_combination_starts_and_equals_one_process(name: str) -> None:
    found = find([name])
    for combination in names(name):
        apart = difference(found, combination)
        assert isinstance(apart, float) and apart <= CLOSE[combination[2]], (combination, apart)


def test_the_table_compares_with_one_process() -> None:
    found = {}
    for strategy, loss in zip(STRATEGIES, (2.0, 2.5, 2.0), strict=True):
        for kind in PRECISIONS:
            found |= {f"a {strategy} {kind} {options}": [1.0, loss] for options in OPTIONS}
    found["a fsdp bf16-mixed everything"] = "ValueError: no"
    header, _, row = table(found, ["a"]).splitlines()
    assert header == "| config | ddp, 32-true | ddp, bf16-mixed | fsdp, 32-true | fsdp, bf16-mixed |"
    assert row == "| a | 2e-01 / 2e-01 | 2e-01 / 2e-01 | 0 / 0 | 0 / ValueError: no |"


def test_the_page_has_a_place_for_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)
