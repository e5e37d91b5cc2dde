"""docs/scaling.md 的作业脚本：PATH 上是假的 srun、scontrol；被信号停下的存好了才再排队，出错的、走完的不排。"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engine.runs import ROOT, checkpoint, losses, write_run

BLOCK = re.search(r"```bash\n(#!/bin/bash\n.*?)```", (ROOT / "docs/scaling.md").read_text(encoding="utf-8"), re.DOTALL)
WORDS = "--kill-on-bad-exit=1 python train.py --config X.yaml --resume auto run.name=big run.devices=8"
# 收到信号才停的一步，存要一会儿；END 是自己走完的退出码
STEP = f"""#!{sys.executable}
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from util.signals import catch_signals
assert " ".join(sys.argv[1:]).startswith({WORDS!r}), sys.argv
with catch_signals() as stop:
    open("pid", "w").write(str(os.getpid()))
    while not (stop.signum or os.environ["END"]):
        time.sleep(0.01)
    time.sleep(0.2)
    open("saved", "w")
sys.exit(int(os.environ["END"] or 128 + stop.signum))
"""
# 真的训练，一个进程；排到第二次时走完
TRAIN = f"""#!/bin/sh
echo $$ > pid
cd {ROOT}
exec {sys.executable} train.py --config "$CONFIG" --resume auto run.name=big "$EPOCHS"
"""
REQUEUE = "#!/bin/sh\n[ -e saved ] && echo $* >> calls\n"


@pytest.fixture
def job(tmp_path: Path):
    """起作业脚本的函数；srun 的内容、环境变量。"""
    assert BLOCK is not None
    (tmp_path / "job.sh").write_text(BLOCK[1], encoding="utf-8")
    (tmp_path / "bin").mkdir()

    def start(srun: str, **variables: str) -> subprocess.Popen[bytes]:
        for name, text in (("srun", srun), ("scontrol", REQUEUE)):
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", "job.sh"],
            cwd=tmp_path,
            env={**os.environ, **variables, "PATH": path, "SLURM_JOB_ID": "7"},
            stderr=subprocess.PIPE,
        )

    return start


def wait_for(path: Path, lines: int = 0) -> str:
    until = time.monotonic() + 120
    while not (path.exists() and path.read_text() and path.read_text().count("\n") >= lines):
        assert time.monotonic() < until
        time.sleep(0.02)
    return path.read_text()


@pytest.mark.parametrize(
    ("to", "signals", "status"),
    [
        ("script", (signal.SIGTERM,), 143),
        ("script", (signal.SIGUSR1,), 143),
        ("script", (signal.SIGUSR1, signal.SIGTERM), 143),  # 到时之前的，接着是抢占的
        ("step", (signal.SIGUSR1,), 138),
        ("step", (signal.SIGTERM, signal.SIGUSR1), 143),
    ],
)
def test_a_stopped_job_queues_again(job, tmp_path: Path, to: str, signals: tuple[signal.Signals, ...], status: int):
    script = job(STEP, END="")
    step = int(wait_for(tmp_path / "pid"))
    for number in signals:
        os.kill(script.pid if to == "script" else step, number)
        time.sleep(0.05)
    assert script.wait(60) == status, script.communicate()
    assert (tmp_path / "calls").read_text() == "requeue 7\n"  # 存好之后，一次
    script.communicate()


@pytest.mark.parametrize("end", ["0", "1", "2"])
def test_a_job_that_ended_by_itself_does_not(job, tmp_path: Path, end: str):
    script = job(STEP, END=end)
    script.communicate(timeout=60)
    assert script.returncode == int(end) and not (tmp_path / "calls").exists()


@pytest.mark.soak
@pytest.mark.parametrize(
    ("number", "to"), [(signal.SIGUSR1, "script"), (signal.SIGTERM, "script"), (signal.SIGUSR1, "step")]
)
def test_the_queued_job_goes_on_by_itself(job, make_tree, tmp_path: Path, number: signal.Signals, to: str):
    """真的训练：停、存、再排队；同一个脚本再来一次，从停下的那一步接着走到底，步子不重不漏。"""
    tree = make_tree(tmp_path / "tree", ("t2m", "u10"), (8, 16), "2000-01-01", "2000-02-20")
    config = str(write_run(tmp_path, tree))
    script = job(TRAIN, CONFIG=config, EPOCHS="train.epochs=1000")
    wait_for(tmp_path / "log/big/metrics.csv", lines=20)
    (tmp_path / "saved").touch()
    os.kill(script.pid if to == "script" else int((tmp_path / "pid").read_text()), number)
    _, said = script.communicate(timeout=120)
    assert script.returncode == (138 if to == "step" else 143), said
    assert (tmp_path / "calls").read_text() == "requeue 7\n"
    progress = checkpoint(tmp_path, "big")["progress"]
    again = job(TRAIN, CONFIG=config, EPOCHS=f"train.epochs={progress['epoch'] + 2}")
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert f"resumed at epoch {progress['epoch']}, step {progress['step']}" in said.decode()
    steps = [step for step, _ in losses(tmp_path, "big")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > progress["step"]
    assert (tmp_path / "calls").read_text() == "requeue 7\n" and (tmp_path / "log/big/metrics.json").exists()
