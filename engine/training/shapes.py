"""记下一次前向里每一层的输入与输出形状。"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

Shapes = tuple[tuple[int, ...], ...]


class LayerRow(NamedTuple):
    """一次调用：模块的点分名字、类名、全部输入与输出张量的形状；中途抛错的调用没有输出。"""

    name: str
    type: str
    inputs: Shapes
    outputs: Shapes


@contextmanager
def record_shapes(model: nn.Module) -> Iterator[list[LayerRow]]:
    """`with record_shapes(model) as rows: model.loss(batch)`；行按进入的先后排列，外层在内层之前。

    同一个模块调用几次就有几行；离开时（包括出错）钩子全部取下。
    """
    rows: list[LayerRow] = []
    stack: list[int] = []  # 尚未返回的调用在 rows 里的位置
    names = {module: name or "(model)" for name, module in model.named_modules()}

    def enter(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        stack.append(len(rows))
        rows.append(LayerRow(names[module], type(module).__name__, _shapes((args, kwargs)), ()))

    def leave(module: nn.Module, _args: object, output: object) -> None:
        while rows[stack[-1]].name != names[module]:  # 内层抛错又被外层接住：那些调用不会再返回
            stack.pop()
        place = stack.pop()
        rows[place] = rows[place]._replace(outputs=_shapes(output))

    handles = []
    try:
        for module in names:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def shape_table(rows: Sequence[LayerRow]) -> str:
    """对齐的文本表：层、类型、输入、输出。"""
    cells = [("name", "layer", "input", "output")]
    cells += [(row.name, row.type, _text(row.inputs), _text(row.outputs)) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    cells.insert(1, ("-" * widths[0], "-" * widths[1], "-" * widths[2], "-" * widths[3]))
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _text(shapes: Shapes) -> str:
    return " ".join("(" + ", ".join(map(str, shape)) + ")" for shape in shapes) or "-"


def _shapes(value: object) -> Shapes:
    """张量、以及元组、列表、NamedTuple、字典里的张量；其余跳过。"""
    if isinstance(value, Tensor):
        return (tuple(value.shape),)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return tuple(shape for item in value for shape in _shapes(item))
    return ()
