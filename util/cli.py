"""命令行的共同约定：用户的错误一行说清，退出码 2，不打印 traceback。"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """运行一个命令并退出：正常为 main 的返回值（None 即 0），ValueError 打印一行、退出码 2。"""
    try:
        status = main()
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except OSError as error:  # 没有权限、磁盘满了之类
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:  # 第二次 Ctrl-C
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status or 0)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """终端里的表格：各列右对齐，列间两格。"""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]


def number(value: float | None, form: str) -> str:
    """表里的一个数；没有的写成一横。"""
    return "-" if value is None else format(value, form)
