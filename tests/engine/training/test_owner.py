"""一个运行的文件夹同时只有一个主人：名字不重，占着的说出是谁，被杀的当即让出；外面起的进程数与配置的相同。"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest

from engine.evaluation.evaluate import make_evaluation_fabric
from engine.parallel import from_main
from engine.training import resume
from engine.training.resume import claim_run
from engine.training.run import make_fabric
from tests.engine.runs import ROOT, checkpoint, losses, run_script, train_here, write_run
from tests.holding import held_elsewhere
from util.checkpoint import load_checkpoint, save_checkpoint
from util.config import load_config

# train.py，只是时钟停着
SAME_SECOND = """
import datetime
from engine.commands import train_command
from engine.training import resume
from util.cli import run_command
class Stopped(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 2, 3, 4, 5)
resume.datetime = Stopped
run_command(train_command)
"""
NAME = "run-20260102-030405"


class Stopped(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def tree(make_tree, tmp_path_factory):
    root = tmp_path_factory.mktemp("tree") / "tree"
    return make_tree(root, ("t2m", "u10"), (8, 16), "2000-01-01", "2000-02-20")


def test_names_of_one_second(tree, tmp_path, monkeypatch):
    """日志的文件夹在而检查点的不在，也算有人用了；两个写在一处也行。"""
    monkeypatch.setattr(resume, "datetime", Stopped)
    config = load_config(write_run(tmp_path, tree))
    (tmp_path / "log" / NAME).mkdir(parents=True)
    with ExitStack() as held:
        assert claim_run(config, "run", None, held) == (None, f"{NAME}-2")
        assert claim_run(config, "run", None, held) == (None, f"{NAME}-3")
    assert not (tmp_path / "checkpoints" / NAME).exists()
    one = load_config(write_run(tmp_path, tree, checkpoint={"dir": str(tmp_path / "log")}))
    with ExitStack() as held:
        assert claim_run(one, "other", None, held) == (None, "other-20260102-030405")


@pytest.mark.parametrize("name", ["..", "/etc/x", "a/../../y", ".git", "*"])
def test_a_resumed_checkpoint_does_not_say_where_to_write(tree, tmp_path, name):
    config = load_config(write_run(tmp_path, tree))
    content = load_checkpoint(ROOT / "tests/from_before/ar_pred.ckpt")
    save_checkpoint(tmp_path / "last.ckpt", {**content, "run": name})
    before = sorted(tmp_path.rglob("*"))
    with ExitStack() as held, pytest.raises(ValueError, match=r"last.ckpt: its run is called .* that of one folder"):
        claim_run(config, "run", str(tmp_path / "last.ckpt"), held)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_name_that_is_no_run_name(tree, tmp_path):
    """运行没有写名字时以配置的文件名开头；通配符不当通配符用。"""
    (tmp_path / "checkpoints/r-1").mkdir(parents=True)
    (tmp_path / "checkpoints/r-1/last.ckpt").touch()
    config = load_config(write_run(tmp_path, tree))
    for resume_from in (None, "auto"):
        with ExitStack() as held, pytest.raises(ValueError, match=r"would be called '\[r\]-.*; give run.name=NAME"):
            claim_run(config, "[r]", resume_from, held)


@pytest.fixture
def running(tree, tmp_path):
    """一个真的训练，没有名字，起在那一秒；已经存过。给出它的进程与配置。"""
    config = write_run(tmp_path, tree, checkpoint={"dir": str(tmp_path / "checkpoints"), "every_minutes": 1e-6})
    job = subprocess.Popen(
        [sys.executable, "-c", SAME_SECOND, "--config", str(config), "train.epochs=1000", "data.workers=1"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoints" / NAME / "last.ckpt").exists():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield job, config
    job.kill()
    job.communicate()


def test_a_run_has_one_owner(running, tmp_path, monkeypatch):
    """同一秒起的另一个有自己的文件夹；占着的名字不给；kill -9 之后马上就能接着跑，锁也不留下。"""
    job, config = running
    monkeypatch.setattr(resume, "datetime", Stopped)
    assert train_here(config, "run.seed=7", "train.epochs=1") == 0
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [NAME, f"{NAME}-2"]
    assert sorted(p.name for p in (tmp_path / "log").iterdir()) == [NAME, f"{NAME}-2"]
    assert [checkpoint(tmp_path, name)["config"]["run"]["seed"] for name in (NAME, f"{NAME}-2")] == [42, 7]
    for auto in (None, "auto"):
        with pytest.raises(ValueError, match=rf"log/{NAME} is in use by process {job.pid} on .*another run\.name"):
            train_here(config, f"run.name={NAME}", resume=auto)
    job.kill()
    job.wait()  # 它的读取进程此刻还活着
    epochs = checkpoint(tmp_path, NAME)["progress"]["epoch"] + 1
    assert train_here(config, f"run.name={NAME}", f"train.epochs={epochs}", resume="auto") == 0
    steps = [step for step, _ in losses(tmp_path, NAME)]
    assert steps == list(range(1, len(steps) + 1))
    assert not list(tmp_path.glob("*/run-*/.*"))


def test_what_stops_the_main_process_stops_the_others():
    """零号进程抛的，别的进程收到的是同一个。"""
    sent = []

    def fabric(main: bool, received: object = None) -> Any:
        return SimpleNamespace(
            is_global_zero=main, broadcast=lambda outcome: sent.append(outcome) or received or outcome
        )

    assert from_main(fabric(True), lambda: 3) == 3

    def taken() -> int:
        raise ValueError("taken")

    with pytest.raises(ValueError, match="taken"):
        from_main(fabric(True), taken)
    assert from_main(fabric(False, sent[0]), taken) == 3
    with pytest.raises(ValueError, match="taken"):
        from_main(fabric(False, sent[1]), lambda: 3)


@pytest.mark.soak
def test_every_process_stops_when_the_name_is_taken(tree, tmp_path):
    """零号进程占不到，另一个也停下，不等。"""
    config = write_run(tmp_path, tree)
    with held_elsewhere(tmp_path / "checkpoints/two"):
        done = run_script("train.py", "--config", str(config), "run.name=two", "run.devices=2", "run.strategy=ddp")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 2 and "Traceback" not in done.stderr
    assert "checkpoints/two is in use by process" in done.stderr


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
SRUN = {
    "SLURM_JOB_NAME": "sweep",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
}


@pytest.mark.parametrize(
    ("variables", "devices", "message"),
    [
        (TORCHRUN, 1, "torchrun started 2 .*1 x 1 = 1; .*torchrun --nnodes 1 --nproc-per-node 1, or set run.devices"),
        (SRUN, 1, "srun started 2 .*1 x 1 = 1; .*srun --nodes=1 --ntasks-per-node=1, or set run.devices"),
        (SRUN | {"SLURM_JOB_NAME": "interactive"}, 1, "srun started 2 .* 1 x 1 = 1"),  # 在 salloc 里用 srun
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 2, r"srun started 1 .* 2 x 1 = 2"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_NTASKS_PER_NODE"}, 2, "srun --nodes=1 --ntasks-per-node=2"),
    ],
)
def test_as_many_processes_as_configured(tree, tmp_path, monkeypatch, variables, devices, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = load_config(write_run(tmp_path, tree), [f"run.devices={devices}"])
    with pytest.raises(ValueError, match=message):
        make_fabric(config)


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_JOB_NAME": "job.sh", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"},  # sbatch
        SRUN | {"SLURM_JOB_NAME": "bash", "SLURM_PROCID": "0"},  # srun --pty bash
    ],
)
def test_plain_python_in_an_allocation_is_one_process(tree, tmp_path, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = load_config(write_run(tmp_path, tree))
    assert make_fabric(config).world_size == make_evaluation_fabric(config).world_size == 1
