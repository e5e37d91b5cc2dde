"""许多互不相干的事分给几个进程做：本机的进程池，或 dask（--scheduler）；结果总按原来的次序交回。

dask 的工人各自读写文件，所以要与这里看得见同样的路径（共享的文件系统），也引得到这个仓库（PYTHONPATH 指它的根）。
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import pickle
import shlex
import signal
import socket
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Client

LOCAL = "local"  # --scheduler 没有写地址
CONNECT_SECONDS = 5
JOIN_SECONDS = 30  # 调度器刚起来，工人还在路上
TIMEOUTS = (TimeoutError, asyncio.TimeoutError)  # Python 3.11 起是同一个
Work = Callable[[Any, Any], Any]  # (各进程共有的, 一件事) → 结果
Runner = Callable[[Work, Sequence[Any]], Iterable[Any]]


def add_workers_option(parser: argparse.ArgumentParser, kind: str = "processes") -> None:
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help=f"{kind} (%(default)s)")


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    add_workers_option(parser)
    parser.add_argument(
        "--scheduler",
        nargs="?",
        const=LOCAL,
        metavar="ADDRESS",
        help="let dask spread the work: over the workers of the scheduler at ADDRESS, e.g. tcp://node1:8786 (they "
        "need this repository and the same file system), or, without ADDRESS, over --workers processes started here",
    )


def check_worker_options(workers: int, scheduler: str | None = None) -> None:
    """
    Raises:
        ValueError: --workers 小于 1；--scheduler 把后面的 key=value 当成了地址。
    """
    if workers < 1:
        raise ValueError(f"--workers {workers}: must be at least 1")
    if scheduler and "=" in scheduler:
        raise ValueError(f"--scheduler {scheduler}: not an address; write key=value before --scheduler")


def recorded_command(word: str, argv: Sequence[str]) -> str:
    """记进存档的 dataset.py 命令，不含 --workers、--scheduler：怎样分工、接着做时换了分工，写出的字节都相同。"""
    parser = argparse.ArgumentParser(add_help=False)
    add_worker_options(parser)
    _, rest = parser.parse_known_args(argv)  # 余下的照原来的次序
    return shlex.join(["python", "dataset.py", word, *rest])


@contextmanager
def distribute(workers: int, scheduler: str | None, shared: Any, paths: Sequence[Path] = ()) -> Iterator[Runner]:
    """`with distribute(...) as run: for result in run(work, items)`，result 是 work(shared, item)；出错时不再做余下的。

    Args:
        shared: 各进程共有的，每个进程只送一次；work 与 items 按件送，要小。
        paths: dask 的工人必须看得见的路径，绝对的。

    Raises:
        ValueError: 进程被杀；调度器连不上、没有工人、中途走了；工人看不见 paths、引不到仓库。work 的异常照原样。
    """
    if scheduler is not None:
        with _client(scheduler, workers) as client, _explained(scheduler):
            client.run_on_scheduler(exec, f"import {__name__}")  # 引不到仓库的工人收到任务就退出，一句话也不说
            client.run(exec, f"import {__name__}")
            yield partial(_run_on, client, shared, paths)
    elif workers == 1:
        yield lambda work, items: (work(shared, item) for item in items)
    else:
        pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(shared,))
        try:
            yield lambda work, items: pool.map(partial(_work_in_pool, work), items)
        except BrokenProcessPool:
            raise ValueError("a process was killed (out of memory?); run the same command again") from None
        finally:
            pool.shutdown(cancel_futures=True)


# ---- 进程池

_SHARED: Any = None  # 子进程里的那一份


def _start_worker(shared: Any) -> None:
    """子进程开头：Ctrl-C 由主进程管；主进程被 kill -9 时跟着退出，不留下还在写盘的孤儿。"""
    global _SHARED
    _SHARED = shared
    if "torch" in sys.modules:  # 没有用到的，不为这一句引入
        sys.modules["torch"].set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _work_in_pool(work: Work, item: Any) -> Any:
    return work(_SHARED, item)


# ---- dask


@contextmanager
def _client(scheduler: str, workers: int) -> Iterator[Client]:
    """连上调度器；没有地址就在本机起一个，只在回环地址上听，各一个线程。"""
    from distributed import Client, LocalCluster

    if scheduler == LOCAL:
        # 调度器总要开一个 HTTP 端口（None 是 8787，常被占着），让它自己挑一个
        options: dict[str, Any] = {"threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "memory_limit": 0}
        with LocalCluster(n_workers=workers, **options) as cluster, Client(cluster) as client:
            yield client
        return
    try:
        asyncio.run(_greet(scheduler))
    except (OSError, ValueError, MemoryError, *TIMEOUTS) as error:  # MemoryError：别的服务应答的话当成了长度
        reason = " ".join(str(error).split()) or f"no greeting within {CONNECT_SECONDS} s"
        raise ValueError(f"--scheduler {scheduler}: no dask scheduler answers there ({reason})") from None
    with Client(scheduler) as client:
        try:
            client.wait_for_workers(1, timeout=JOIN_SECONDS)
        except TIMEOUTS:
            raise ValueError(f"--scheduler {scheduler}: it has no workers (waited {JOIN_SECONDS} s)") from None
        yield client


async def _greet(address: str) -> None:
    """握一次手；Client 自己等握手没有时限，那里若有不作声的服务就一直等下去。"""
    from distributed.comm.core import connect

    comm = await asyncio.wait_for(connect(address, timeout=CONNECT_SECONDS), 1.1 * CONNECT_SECONDS)
    await comm.close()


@contextmanager
def _explained(scheduler: str) -> Iterator[None]:
    """dask 自己的几种失败，各一行。"""
    from distributed.scheduler import KilledWorker

    try:
        yield
    except KilledWorker as error:
        raise ValueError(
            f"dask workers kept dying at the same task, last on {error.last_worker.address} (out of memory?); "
            "run the same command again, it goes on from there"
        ) from None
    except CancelledError:
        raise ValueError(f"--scheduler {scheduler}: it went away; run the same command again") from None
    except ImportError as error:
        raise ValueError(
            f"--scheduler {scheduler}: it or a worker of it lacks something ({error}); start the scheduler and "
            "its workers in the same environment, with PYTHONPATH set to the root of this repository"
        ) from None


def _run_on(client: Client, shared: Any, paths: Sequence[Path], work: Work, items: Sequence[Any]) -> Iterator[Any]:
    """shared 是图里的一个节点：一个工人解开，其余的各取一次；拿着它的工人死了，调度器再解一次（scatter 的就丢了）。"""
    from distributed import wait as wait_for

    there = client.submit(_unpack, zlib.compress(pickle.dumps(shared), 1), pure=False)
    for future in client.map(_work_on, items, shared=there, work=work, paths=paths, pure=False):
        while not future.done():
            try:
                wait_for([future], timeout=JOIN_SECONDS)
            except TIMEOUTS:
                if not client.nthreads():
                    raise ValueError("the dask scheduler has no workers left; run the same command again") from None
        yield future.result()


def _unpack(data: bytes) -> Any:
    return pickle.loads(zlib.decompress(data))  # noqa: S301  自己刚打的包


def _work_on(item: Any, shared: Any, work: Work, paths: Sequence[Path]) -> Any:
    _look(paths)  # 后来的工人也要查：看不见的树里每个文件都「缺」，会打出一个全是空缺的存档
    return work(shared, item)


def _look(paths: Sequence[Path]) -> None:
    for path in paths:
        if not path.exists():
            raise ValueError(
                f"{path} is not there for the dask worker on {socket.gethostname()}; every worker needs the same files"
            )
