"""逐层形状：顺序、嵌套容器、重复调用、出错后钩子取净。"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from engine.training.shapes import record_shapes, shape_table


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Split(nn.Module):
    def forward(self, x: Tensor, scale: float, *, parts: dict[str, Tensor]) -> tuple[Pair, list[Tensor], str]:
        return Pair(x[:, :1], x[:, 1:]), [parts["a"] * scale], "not a tensor"


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.split = Split()
        self.block = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.head = nn.Linear(4, 4)
        self.broken = Broken()
        self.unused = nn.Linear(1, 1)

    def loss(self, x: Tensor, fail: bool = False) -> Tensor:
        _, (scaled,), _ = self.split(x, 2.0, parts={"a": x[..., None], "b": x})
        hidden = self.block(scaled.squeeze(-1))
        hidden = self.head(self.head(hidden))
        return self.broken(hidden) if fail else hidden.sum()


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_rows_in_execution_order():
    model = Net()
    with record_shapes(model) as rows:
        model.loss(torch.ones(2, 3))
    assert rows == [
        ("split", "Split", ((2, 3), (2, 3, 1), (2, 3)), ((2, 1), (2, 2), (2, 3, 1))),
        ("block", "Sequential", ((2, 3),), ((2, 4),)),
        ("block.0", "Linear", ((2, 3),), ((2, 4),)),
        ("block.1", "ReLU", ((2, 4),), ((2, 4),)),
        ("head", "Linear", ((2, 4),), ((2, 4),)),
        ("head", "Linear", ((2, 4),), ((2, 4),)),
    ]
    assert hooks(model) == 0
    model.loss(torch.ones(2, 3))
    assert len(rows) == 6


def test_the_root_module_is_listed_too():
    model = nn.Sequential(nn.Linear(3, 4))
    with record_shapes(model) as rows:
        model(torch.ones(5, 3))
    assert [row.name for row in rows] == ["(model)", "0"]


def test_hooks_are_removed_after_an_error():
    model = Net()
    with pytest.raises(RuntimeError, match="broken"), record_shapes(model) as rows:
        model.loss(torch.ones(2, 3), fail=True)
    assert hooks(model) == 0
    assert rows[-1] == ("broken", "Broken", ((2, 4),), ())  # 看得出死在哪一层


def test_an_error_that_the_model_catches_does_not_shift_the_rows():
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(Broken())
            self.after = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            try:
                self.inner(x)
            except RuntimeError:
                return self.after(x)
            raise AssertionError

    with record_shapes(model := Tries()) as rows:
        model(torch.ones(2, 3))
    assert [(row.name, row.outputs) for row in rows] == [
        ("(model)", ((2, 4),)),
        ("inner", ()),
        ("inner.0", ()),
        ("after", ((2, 4),)),
    ]


def test_table_is_aligned():
    model = Net()
    with record_shapes(model) as rows:
        model.loss(torch.ones(2, 3))
    lines = shape_table(rows).splitlines()
    assert lines[0].split() == ["name", "layer", "input", "output"]
    assert len(lines) == 2 + len(rows)
    start = lines[0].index("output")
    assert lines[2][start:] == "(2, 1) (2, 2) (2, 3, 1)"
    assert all(line[start - 2 : start] == "  " and line[start] in "(-" for line in lines[1:])
    assert shape_table([]).splitlines()[0].split() == ["name", "layer", "input", "output"]
