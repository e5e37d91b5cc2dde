"""命令怎样退出：两个进程一起跑的，归约还没收尾就走，也不 abort；一个出了错，哪个也不等。"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.engine.runs import ROOT

PAIR = """
import os, sys
import torch
import torch.distributed as dist
from util.cli import run_command

fails = sys.argv[2] == "fails"
children = []
for rank in (0, 1):
    child = os.fork()
    if not child:
        break
    children.append(child)

def main():
    dist.init_process_group("gloo", f"file://{sys.argv[1]}", rank=rank, world_size=2)
    if not (fails and rank):  # 出错的那个等得到自己，等不到别的
        for _ in range(400):
            dist.all_reduce(torch.ones(200_000), async_op=True)
    if fails:
        if rank == 0:
            raise ValueError("rank 0 is wrong")
        dist.recv(torch.ones(1), 0)

if child:
    for one in children:
        print(os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]))
else:
    run_command(main)
"""


def exits(folder: Path, how: str) -> tuple[list[str], str]:
    """零号、一号进程的退出码，和它们说的话。"""
    command = [sys.executable, "-c", PAIR, str(folder / how), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.stdout.split(), done.stderr


def test_two_processes_end_before_their_threads(tmp_path: Path) -> None:
    assert exits(tmp_path, "works") == (["0", "0"], "")


def test_an_error_in_one_process_waits_for_nobody(tmp_path: Path) -> None:
    codes, said = exits(tmp_path, "fails")
    assert codes[0] == "2" and codes[1] not in ("0", "-6") and "error: rank 0 is wrong" in said
