"""命令行的共同约定：用户的错、机器的毛病、别的库的异常都是一行，不打印 traceback；几个进程一起跑的怎样退出。"""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import logging
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

# 读写文件的库：它们抛的 RuntimeError 与自己的错，是文件或盘的毛病；TypeError、KeyError 之类仍是我们叫错了
FILE_LIBRARIES = {
    *("netCDF4", "h5py", "h5netcdf", "zarr", "numcodecs", "zlib", "lzma", "zipfile", "cfgrib", "gribapi", "PIL"),
    *("safetensors", "huggingface_hub", "pydantic", "pydantic_core", "yaml", "wandb"),
}
NO_MEMORY = r"out of memory|OutOfMemory|can't allocate memory|^MemoryError|Storage size calculation overflowed"
MACHINE = (  # torch 的 RuntimeError 里，是机器的毛病的那几种，各该怎么办
    (
        NO_MEMORY,
        "lower train.batch_size or raise train.accumulate, take a smaller model, or fewer --members",
    ),
    (r"shared memory\(shm\)|torch_shm|file </torch_", "make /dev/shm larger, e.g. docker run --shm-size=1g"),
    (
        r"^Dist\w+Error|closed by peer|reset by peer",
        "another process of this run has ended: killed, or see its own message",
    ),
    (r"does not have a deterministic implementation|deterministic behavior was enabled", "leave out --deterministic"),
    (r"CUDA|cuDNN|CUBLAS|NVML|NCCL|^AcceleratorError", "the device failed; look at nvidia-smi, then run it again"),
)
TRANSPORTED = "Original Traceback (most recent call last):"  # DataLoader 转述读取进程的异常时，整段都在消息里
LONGEST = 400  # 一行错误至多几个字符
log = logging.getLogger("ar_pred")
PIPE_CLOSED = 128 + signal.SIGPIPE


class Parser(argparse.ArgumentParser):
    """不认写了一半的选项；错误总是一行：认不得的参数照抄在里面，也许有换行。"""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        super().error(" ".join(message.split()))


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """运行一个命令并退出：正常为 main 的返回值（None 即 0）；出错时一行，程序自己的毛病才在屏幕上有 traceback。"""
    try:
        status = main() or 0
    except KeyboardInterrupt:  # 第二次 Ctrl-C
        close_bars()
        print("interrupted", file=sys.stderr)
        status = 130
    except Exception as error:  # noqa: BLE001  命令到此为止，哪一种都要给人一个交代
        status = PIPE_CLOSED if isinstance(error, BrokenPipeError) and reader_left() else report_error(error)
    leave(status)


def reader_left() -> bool:
    """标准输出那头（head 之类）走了：照 Unix 的规矩不作声，往后写的也不要了。"""
    output = sys.__stdout__
    if output is None or not hasattr(select, "poll"):
        return False
    watching = select.poll()
    watching.register(output, 0)  # 只问 POLLERR：没有人读了
    if not watching.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
    return True


@contextmanager
def loading() -> Iterator[None]:
    """`with loading(): from engine import …`：引入重的库时不回收垃圾，快两三成：引入的都要留着，回收只是一遍遍白看。"""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """里面回收垃圾只看新来的：引入过的百万个对象看一遍要一百多毫秒，会落在训练的某一步里。"""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def report_error(error: Exception) -> int:
    """说出错误，返回退出码：用户的错（ValueError，太长的文件名）2，其余的 1；traceback 总在日志文件里（有的话）。"""
    log.debug("stopped:", exc_info=error)
    close_bars()
    line = one_line(error) if isinstance(error, ValueError | OSError) else describe(error)
    if line is None:
        sys.excepthook(type(error), error, error.__traceback__)
    else:
        error.__traceback__ = None  # 还拿在手里的都放下：读取进程、写到一半的文件
        print(f"{beginning()}{line}", file=sys.stderr)
    too_long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
    return 2 if too_long or isinstance(error, ValueError) else 1


def close_bars() -> None:
    """收起还画着的进度条：错误自成一行。"""
    tqdm = sys.modules.get("tqdm")
    for bar in list(tqdm.tqdm._instances) if tqdm else ():
        bar.close()


def beginning() -> str:
    """错误那一行的开头；几个进程一起跑的说出是第几个，另起一行：零号的进度条还画着。"""
    distributed = _process_group()
    if distributed is None or distributed.get_world_size() == 1:
        return "error: "
    return f"\nerror: rank {distributed.get_rank()}: "


def describe(error: Exception) -> str | None:
    """别人的异常一行说清，加上怎么办；None：不认得，多半是程序的毛病。"""
    named = f"{type(error).__name__}: {one_line(error)}"
    if isinstance(error, RuntimeError | MemoryError):
        for pattern, remedy in MACHINE:
            if re.search(pattern, named):
                return f"{named}; {remedy}"
    if FILE_LIBRARIES & {type(error).__module__.partition(".")[0], *raised_by(error)}:
        return named
    return None


def out_of_memory(error: Exception) -> bool:
    """内存或显存用尽了：CUDA 的、torch 在处理器上的、numpy 的。"""
    return re.search(NO_MEMORY, f"{type(error).__name__}: {error}") is not None


def raised_by(error: Exception) -> tuple[str, ...]:
    """RuntimeError 是谁抛的：最里一层的文件在 site-packages 里的路径（编译的库写的是相对的）；我们自己的为空。"""
    if type(error) is not RuntimeError or error.__traceback__ is None:
        return ()
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    path = Path(frame.f_code.co_filename.rpartition("site-packages/")[2])
    return () if path.is_absolute() else path.parts


def one_line(error: BaseException) -> str:
    """异常的话压成一行：只留读取进程里的末一句，不要 torch 附上的 C++ 调用栈。"""
    text = str(error)
    if TRANSPORTED in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    text = " ".join(text.partition("Exception raised from")[0].split())
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def leave(status: int) -> NoReturn:
    """退出。几个进程一起跑的，先拆掉进程组：它的线程若在解释器收场之后才放下张量，进程就 abort。

    出错时不拆：拆要等发出去的归约做完，而别的进程不会再来。直接退出，连接一断，别的进程也就停了。
    """
    distributed = _process_group()
    if distributed is not None:
        if status:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        distributed.destroy_process_group()
    atexit.register(gc.freeze)  # 解释器收场时还要把引入过的都看一遍，半秒，没有用处
    sys.exit(status)


def _process_group() -> Any:
    """torch.distributed，进程组已经建立；没有用到的不为这一句引入，是 None。"""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed and distributed.is_available() and distributed.is_initialized() else None


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """终端里的表格：各列右对齐，列间两格。"""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]


def number(value: float | None, form: str) -> str:
    """表里的一个数；没有的写成一横。"""
    return "-" if value is None else format(value, form)
