"""一个文件夹同时只由一个进程写：真的进程；被杀的当即放开；盘上没有锁的只警告。"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.holding import ROOT, held_elsewhere, two_at_once
from util.atomic import LOCK, making, remove_leftovers, replacing, reserved, temporary_name


def test_the_second_is_told_who_holds_it(tmp_path: Path):
    folder = tmp_path / "runs/one"
    with held_elsewhere(folder) as child:
        with pytest.raises(ValueError, match="in use") as refused, reserved(folder, "wait or go"):
            pass
        assert str(refused.value).startswith(f"{folder} is in use by process {child.pid} on {socket.gethostname()}")
        assert str(refused.value).endswith("; wait or go")
        assert (folder / LOCK).exists()
    with reserved(folder):
        (folder / "kept").touch()
    assert [p.name for p in folder.iterdir()] == ["kept"]


def test_a_file_in_the_place_of_the_folder(tmp_path: Path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match="out is a file; give a folder"), reserved(tmp_path / "out"):
        pass


def test_a_killed_owner_is_free_at_once_though_its_workers_live(tmp_path: Path):
    """读取进程由 fork 而来，会比被杀的主人多活几秒。"""
    owner = """
import os, sys, time
from pathlib import Path
from util.atomic import reserved
with reserved(Path(sys.argv[1])):
    worker = os.fork()
    if worker:
        print(worker, flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", owner, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert child.stdout is not None
    worker = int(child.stdout.readline())
    child.kill()
    child.wait()
    try:
        with reserved(tmp_path):
            assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()
    finally:
        os.kill(worker, 9)
        child.stdout.close()


def test_a_disk_without_locks_only_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    def missing(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", missing)
    with reserved(tmp_path / "out"):
        pass
    assert "out: its disk has no file locks (No locks available), nothing keeps a second command out" in caplog.text


def test_of_many_at_once_only_one_is_in(tmp_path: Path):
    """四个进程抢一个文件夹，各进去三十次：里面总是只有一个，名字刚被前一个删去也不算数。"""
    enter = """
import sys, time
from pathlib import Path
from util.atomic import reserved
folder, inside, done = Path(sys.argv[1]), Path(sys.argv[2]), 0
while done < 30:
    try:
        with reserved(folder):
            inside.touch(exist_ok=False)
            inside.unlink()
            done += 1
    except ValueError:
        time.sleep(0.001)
"""
    arguments = [sys.executable, "-c", enter, str(tmp_path / "out"), str(tmp_path / "inside")]
    children = [subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [child.communicate()[1] for child in children]
    assert [child.returncode for child in children] == [0] * 4, said


def test_only_our_own_leftovers_are_removed(tmp_path: Path):
    """被杀时留下的文件、文件夹，在哪一层都算；别人的点文件、别人的 .tmp 都不动。"""
    with replacing(tmp_path / "shards") as temporary:
        temporary.mkdir()
        (temporary / "part").touch()
        left = tmp_path / "deep" / temporary.name
        left.parent.mkdir()
        os.rename(temporary, left)
        temporary.mkdir()
    with replacing(tmp_path / "last.ckpt") as temporary:
        temporary.touch()
        (tmp_path / f"{temporary.name[:-20]}{'0' * 16}.tmp").touch()
    theirs = {".notes.tmp", ".env", f".{'0' * 16}.tmp", ".x.0123456789abcdeg.tmp", "a.0123456789abcdef.tmp"}
    for name in theirs:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {"shards", "deep", "last.ckpt", *theirs}


def test_the_next_owner_sweeps_but_not_where_another_owns(tmp_path: Path):
    """评测到一半被杀，场那么大的临时文件由下一次清掉；里面另有主人的一层（运行的文件夹里的一次评测）不动。"""
    folder, left, theirs = tmp_path / "out", temporary_name("forecast.nc"), temporary_name("truth.nc")
    for place in ("", "figures", "evaluation", "evaluation/figures"):
        (folder / place).mkdir(exist_ok=True)
        (folder / place / left).touch()
    (folder / left).unlink()
    (folder / left).mkdir()
    (folder / left / "part").touch()
    with held_elsewhere(folder / "evaluation"):
        (folder / "evaluation" / theirs).touch()
        with reserved(folder, sweep=False):
            assert (folder / left).exists()
        with reserved(folder):
            pass
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    assert found == {f"evaluation/{theirs}"}
    with reserved(folder):
        assert {path.name for path in folder.rglob("*")} == {LOCK, "figures", "evaluation"}


def test_a_cache_is_made_once(tmp_path: Path):
    """两个进程同时要同一份：一个造，一个等着用。"""
    cache, made = tmp_path / "caches/a", tmp_path / "made"

    def use() -> None:
        with making(cache):
            if not cache.exists():
                time.sleep(0.2)
                cache.write_text("whole")
                with made.open("a") as file:
                    file.write("x")
        assert cache.read_text() == "whole"

    two_at_once(use)
    assert made.read_text() == "x" and list(cache.parent.iterdir()) == [cache]


def test_who_waits_for_a_cache_can_be_stopped_and_follows_a_killed_maker(tmp_path: Path):
    maker = """
import sys, time
from pathlib import Path
from util.atomic import making
with making(Path(sys.argv[1])):
    print("making", flush=True)
    time.sleep(60)
"""
    cache, asked = tmp_path / "a", []
    command = [sys.executable, "-c", maker, str(cache)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout is not None and child.stdout.readline() == b"making\n"

    def stop() -> None:
        raise KeyboardInterrupt

    def end_it() -> None:
        asked.append(child.poll())
        child.kill()

    with pytest.raises(KeyboardInterrupt), making(cache, stop):
        pass
    with making(cache, end_it):
        pass
    assert asked and asked[0] is None and child.wait() == -9
    child.stdout.close()
