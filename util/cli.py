"""命令行的共同约定：用户的错误一行说清，退出码 2，不打印 traceback。"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """运行一个命令并退出：正常为 main 的返回值（None 即 0），ValueError 打印一行、退出码 2；程序的毛病有 traceback。"""
    try:
        status = main() or 0
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except OSError as error:  # 没有权限、磁盘满了之类
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:  # 第二次 Ctrl-C
        print("interrupted", file=sys.stderr)
        status = 130
    except Exception as error:  # noqa: BLE001  与解释器自己的做法相同，只是还要照管进程组
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    leave(status)


def leave(status: int) -> NoReturn:
    """退出。几个进程一起跑的，先拆掉进程组：它的线程若在解释器收场之后才放下张量，进程就 abort。

    出错时不拆：拆要等发出去的归约做完，而别的进程不会再来。直接退出，连接一断，别的进程也就停了。
    """
    distributed = sys.modules.get("torch.distributed")  # 没有用到的，不为这一句引入
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        if status:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        distributed.destroy_process_group()
    sys.exit(status)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """终端里的表格：各列右对齐，列间两格。"""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]


def number(value: float | None, form: str) -> str:
    """表里的一个数；没有的写成一横。"""
    return "-" if value is None else format(value, form)
