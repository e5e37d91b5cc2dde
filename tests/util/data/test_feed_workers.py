"""读取进程死了、送不出、放不进共享内存：半分钟之内一行说清，不会一直等；要多少共享内存开始之前就算。"""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.queues
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch.utils.data import Dataset

from tests.trees import DAYS, config_of
from tests.util.packing.stores import pack_small
from util.batch import Wire
from util.data.dataset import open_data
from util.data.feed import batch_bytes, check_shared_memory, feed, make_loader
from util.data.origin import DataError
from util.data.reader import SHARED

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # 核少的机器上
NEW_MOUNTS = 0x20000  # CLONE_NEWNS
BATCHES = [[i] for i in range(20)]


class Numbers(Dataset[Wire]):
    """第 i 批全是 i；到了 at 这一批就出 fault 这种事。"""

    def __init__(self, fault: str = "", at: int = 5, size: int = 100) -> None:
        self.fault, self.at, self.size = fault, at, size

    def __getitems__(self, starts: Sequence[int]) -> Wire:
        (start,) = starts
        if start == self.at and self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if start == self.at and self.fault == "exits":
            os._exit(3)
        if start == self.at and self.fault == "cannot read":
            raise OSError(5, "Input/output error")
        return Wire(torch.full((self.size,), float(start)), torch.tensor([start]), torch.tensor([True]))


class Room(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch):
    """共享内存还有这么多字节。"""

    def set_free(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Room(free, 0, free))

    return set_free


def test_batches_come_through_shared_memory() -> None:
    found = list(make_loader(Numbers(), BATCHES, 2, pin=False))
    assert [float(wire.fields[0]) for wire in found] == list(range(20))
    assert all(part.is_shared() for wire in found for part in wire)
    assert not any(part.is_shared() for wire in make_loader(Numbers(), BATCHES, 0, pin=False) for part in wire)


class InReadingProcess(NamedTuple):
    """冒充读取进程里的那一句话。"""

    id: int = 0


def test_a_batch_is_read_into_shared_memory(make_tree, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data(config_of(make_tree(tmp_path / "tree", **{**DAYS, "shape": (4, 8)}), frames_in=2))
    start = int(data.segments["train"][0][0])
    here = data.windows.wire([start, start + 6])
    monkeypatch.setattr("util.data.reader.get_worker_info", InReadingProcess)
    there = data.windows.wire([start, start + 6])
    assert there.fields.is_shared() and not here.fields.is_shared()
    assert torch.equal(there.fields, here.fields)

    def full(_: int) -> torch.UntypedStorage:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    with pytest.raises(DataError, match=r"^a batch of 0.0 MB does not fit into shared memory \(unable .*shm-size=2m$"):
        data.windows.wire([start])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("killed", r"^reading process \d+ was killed by SIGKILL, out of memory\?; lower data.workers or train.batch_"),
        ("exits", r"^reading process \d+ ended with status 3, what it said is above; lower data.workers"),
    ],
)
def test_a_dead_reading_process_is_one_line(fault: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(make_loader(Numbers(fault), BATCHES, 2, pin=False))
    assert not multiprocessing.active_children()


def test_a_death_does_not_interrupt_the_step() -> None:
    """死讯在要下一批时才来，不在更新权重的半途；从前的 SIGCHLD 的处理还在。"""
    before = signal.getsignal(signal.SIGCHLD)
    loader = make_loader(Numbers("killed", at=1), BATCHES, 2, pin=False)
    assert float(next(loader).fields[0]) == 0
    signal.sigtimedwait([], 0.5)  # 正在走一步
    assert signal.getsignal(signal.SIGCHLD) == before
    with pytest.raises(DataError, match="SIGKILL"):
        list(loader)


def test_an_error_of_the_reading_stays_itself() -> None:
    with pytest.raises(OSError, match="Input/output error"):
        list(make_loader(Numbers("cannot read"), BATCHES, 2, pin=False))
    assert not multiprocessing.active_children()


def test_what_does_not_fit_into_shared_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Room(0, 0, 64_000_000))
    message = (
        r"^a batch of 0.4 MB does not fit into shared memory \(unable .*\); 64.0 MB are free in /dev/shm; lower "
        r"data.workers or train.batch_size \(data.workers=0 needs none\), .*docker run --shm-size=2m$"
    )
    with pytest.raises(DataError, match=message):
        list(make_loader(Numbers(size=100_000), BATCHES, 2, pin=False))


def test_what_cannot_be_sent_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def no_more(_: int) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("multiprocessing.reduction.DupFd", no_more)
    with pytest.raises(DataError, match="ended with status 1, what it said is above"):
        list(make_loader(Numbers(), BATCHES, 1, pin=False))
    assert "a reading process cannot send a batch: OSError: [Errno 24] Too many open files" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("batch", "workers", "batches", "processes", "needed"),
    [  # 写开的：每个读取进程两批，用着的一批
        (3_110_400, 2, None, 1, 15_552_000),
        (3_110_400, 2, 100, 2, 31_104_000),
        (3_110_400, 2, 3, 1, 9_331_200),
        (1_000_000, 8, None, 4, 68_000_000),
    ],
)
def test_shared_memory_is_worked_out(room, batch: int, workers: int, batches: int | None, processes: int, needed: int):
    room(needed)
    check_shared_memory(batch, workers, batches, processes)
    room(needed - 1)
    numbers = [f"{value / 1e6:.1f}" for value in (needed, batch, needed - 1)]
    message = "data.workers = {} keeps {} MB of batches in shared memory ({} MB a batch), {} MB are free in /dev/shm;"
    with pytest.raises(ValueError, match="^" + re.escape(message.format(workers, *numbers))):
        check_shared_memory(batch, workers, batches, processes)
    room(0)
    check_shared_memory(batch, 0, batches, processes)  # 没有读取进程，不用它


def test_the_bytes_of_a_batch(make_tree, tmp_path, room) -> None:
    """8 × 16 的格点、两个通道、3 + 1 帧、一批 5 个；半精度的存档送到显卡的是一半。"""
    days = {**DAYS, "shape": (8, 16)}
    config = config_of(make_tree(tmp_path / "tree", ("t2m", "z_level_00"), **days), workers=2, frames_in=3)
    data = open_data(config)
    half = open_data(pack_small(config, tmp_path / "store", "float16"))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    floats = 5 * 4 * 2 * 8 * 16 * 4
    found = [batch_bytes(one.windows, 5, device) for one in (data, half) for device in (cpu, cuda)]
    assert found == [floats, floats, floats, floats // 2]
    starts = [[int(hour)] for hour in data.segments["train"][0][:3]]
    room(3 * floats // 5 - 1)
    with pytest.raises(ValueError, match="of batches in shared memory"):
        feed(data, starts, cpu)


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="no private mounts here",
)
def test_a_really_small_shared_memory(capfd: pytest.CaptureFixture[str]) -> None:
    """在一个另有自己的 /dev/shm 的分支里：引入过的都现成，不必另起一个 Python。"""
    child = os.fork()
    if not child:
        try:
            assert not ctypes.CDLL(None).unshare(NEW_MOUNTS)
            for mount in (("--make-rprivate", "/"), ("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(SHARED))):
                subprocess.run(["mount", *mount], check=True)
            list(make_loader(Numbers(size=200_000), BATCHES, 2, pin=False))
        except BaseException as error:  # noqa: BLE001  什么都要说出来
            print(error, file=sys.stderr, flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    said = capfd.readouterr().err.splitlines()[-1]
    assert "a batch of 0.8 MB does not fit into shared memory" in said and str(SHARED) in said
