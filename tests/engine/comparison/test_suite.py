"""compare.py --suite：逐个训练、评测、比较；做过的不再做，失败的跳过，Ctrl-C 时子进程存好再停。"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.commands import compare_command, evaluate_command, train_command
from engine.comparison import suite as suite_module
from engine.comparison.suite import Member, Suite, last_line, run_script
from tests.engine.runs import ROOT, start_script, write_run
from util.strict import validate

COMMANDS = {"train.py": train_command, "evaluate.py": evaluate_command}
PERSISTENCE = ["model={name: persistence}", "train.epochs=0"]


@pytest.fixture(scope="module")
def tree(make_tree, tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree") / "tree", ("t2m",), (8, 16), "2000-01-01", "2000-02-20")


@pytest.fixture
def config(tree, tmp_path) -> Path:
    return write_run(tmp_path, tree, train={"epochs": 1}, data={"eval_stride": 2})


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """在本进程里跑根脚本，记下跑了什么；名字里有 bad 的运行失败。"""
    seen: list[str] = []

    def run_here(script: str, *arguments: str) -> None:
        name = next(a.partition("=")[2] for a in arguments if a.startswith("run.name=")) if "train" in script else ""
        seen.append(f"{script} {name}".strip())
        if "bad" in name:
            raise ValueError(f"{script} ended with status 2: it is bad")
        assert COMMANDS[script](list(arguments)) == 0

    monkeypatch.setattr(suite_module, "run_script", run_here)
    return seen


def write_suite(folder: Path, *members: Any, **options: Any) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({"members": list(members), **options}))
    return path


def test_two_members_one_failing_and_again(config, calls, tmp_path):
    """AR_pred 的成绩步长不同要另评，持续性预报的现成；坏的跳过；再来一遍什么也不重做。"""
    pers = {"config": str(config), "name": "pers", "overrides": [*PERSISTENCE, "data.eval_stride=1"]}
    bad = {"config": str(config), "name": "bad"}
    suite = write_suite(tmp_path, str(config), bad, pers)
    out = tmp_path / "out"
    assert compare_command(["--suite", str(suite), "--out", str(out)]) == 1
    assert calls == ["train.py suite-small-run", "evaluate.py", "train.py suite-small-bad", "train.py suite-small-pers"]
    table = json.loads((out / "comparison.json").read_text())
    assert list(table["scores"]) == ["run", "persistence", "climatology"]
    assert [run["name"] for run in table["runs"]] == ["run", "persistence"]
    assert table["initial_times"] == 10 * 4 - 3 and table["runs"][0]["cost"]["training_seconds"] > 0
    note = "member bad failed and is not in this comparison: train.py ended with status 2: it is bad"
    for name in ("compare.log", "comparison.txt", "comparison.md"):
        assert note in (out / name).read_text(encoding="utf-8"), name
    assert f"python compare.py --suite {suite} --out {out}" in (out / "report.html").read_text(encoding="utf-8")

    del calls[:]
    suite = write_suite(tmp_path, str(config), pers)
    assert compare_command(["--suite", str(suite), "--out", str(out)]) == 0
    assert calls == []


def test_stages_are_trained_first_and_not_compared(config, calls, tmp_path):
    first, bad = ({"config": str(config), "name": name, "overrides": PERSISTENCE} for name in ("first", "bad"))
    member = {"config": str(config), "overrides": ["data.eval_stride=1", *PERSISTENCE]}
    path, out = write_suite(tmp_path, member, stages=[first, bad]), tmp_path / "out"
    assert compare_command(["--suite", str(path), "--out", str(out)]) == 1
    assert calls == ["train.py suite-small-first", "train.py suite-small-bad", "train.py suite-small-run"]
    table = json.loads((out / "comparison.json").read_text())
    assert [run["name"] for run in table["runs"]] == ["persistence"]
    assert "member bad failed" in (out / "comparison.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("climatlogy", "--scorecard climatlogy: not among those compared; nearest: climatology"),
        ("only", "--scorecard only: no other member to compare with it; give a baseline: persistence, climatology"),
    ],
)
def test_a_scorecard_of_nobody_is_told_before_training(config, calls, tmp_path, name, message):
    path = write_suite(tmp_path, {"config": str(config), "name": "only"})
    with pytest.raises(ValueError, match=message):
        compare_command(["--suite", str(path), "--out", str(tmp_path / "out"), "--scorecard", name])
    assert calls == [] and not (tmp_path / "out").exists()


def test_changed_config_goes_to_train(config, calls, tmp_path):
    """加了轮数就接着训练并重评；改了模型，train.py 说明为什么不能接着，成员算失败。"""
    member: dict[str, Any] = {"config": str(config), "overrides": ["data.eval_stride=1"]}
    arguments = ["--suite", str(write_suite(tmp_path, member)), "--out", str(tmp_path / "out")]
    assert compare_command(arguments) == 0
    member["overrides"] += ["train.epochs=2"]
    write_suite(tmp_path, member)
    assert compare_command(arguments) == 0
    assert calls == ["train.py suite-small-run"] * 2
    assert json.loads((tmp_path / "out/comparison.json").read_text())["runs"][0]["step"] > 0
    member["overrides"] += ["model.depth=2"]
    write_suite(tmp_path, member)
    with pytest.raises(
        ValueError, match=r"member run failed: cannot resume .*model.depth = 1 in the checkpoint, 2 now"
    ):
        compare_command(arguments)


def test_shared_overrides_come_before_those_of_a_member(config, calls, tmp_path):
    shared = ["data.eval_stride=1", "train.epochs=2", "train.lr=2e-3"]
    member = {"config": str(config), "overrides": ["train.epochs=1"]}
    path = write_suite(tmp_path, member, overrides=shared)
    assert compare_command(["--suite", str(path), "--out", str(tmp_path / "out")]) == 0
    used = yaml.safe_load((tmp_path / "log/suite-small-run/config.yaml").read_text())
    assert (used["train"]["epochs"], used["train"]["lr"], used["data"]["eval_stride"]) == (1, 2e-3, 1)


def test_shared_overrides_are_written_once():
    """锚指着的列表拼在一起。"""
    written = "a: &small [model.width=8, train.lr=1e-3]\nb: [*small, train.epochs=2]"
    member = Member(config="a.yaml", overrides=yaml.safe_load(written)["b"])
    assert member.overrides == ["model.width=8", "train.lr=1e-3", "train.epochs=2"]


def test_a_list_too_deep_is_one_line():
    """摊平只摊一层；错在第几个，写着的没有那么多。"""
    values = {"members": [{"config": "a.yaml", "overrides": [["x=1", "y=2", ["z=3"]]]}]}
    with pytest.raises(
        ValueError, match=r"\Ahere: members\[0\].overrides\[2\] = \['z=3'\]: input should be a valid string\Z"
    ):
        validate(Suite, values, "here")


def test_members_can_be_those_of_another_suite(config, tmp_path):
    other = write_suite(tmp_path, str(config), {"config": str(config), "name": "again"})
    suite = Suite.model_validate({"members": str(other), "overrides": ["train.epochs=1"]})
    assert [member.label for member in suite.members] == ["run", "again"]
    with pytest.raises(ValueError, match=r"nowhere\.yaml"):
        Suite.model_validate({"members": "nowhere.yaml"})


def test_interrupted_finish_is_done_again(config, tmp_path):
    """写了 config.yaml 而没走到 metrics.json 的那一次不算训练好。"""
    from util.config import load_config

    values = load_config(config)
    folder, best = tmp_path / "log/run", tmp_path / "best.ckpt"
    folder.mkdir(parents=True)
    best.touch()
    (folder / "metrics.json").touch()
    time.sleep(0.02)
    (folder / "config.yaml").write_text(yaml.safe_dump(values.model_dump()))
    assert not suite_module.is_trained(folder, best, values)
    time.sleep(0.02)
    (folder / "metrics.json").touch()
    assert suite_module.is_trained(folder, best, values)
    before = values.model_dump()
    del before["data"]["first_hour"]  # 从前写下的没有这个键：取默认值
    (folder / "config.yaml").write_text(yaml.safe_dump(before))
    (folder / "metrics.json").touch()
    assert suite_module.is_trained(folder, best, values)
    other = load_config(config, ["train.epochs=9"])
    assert not suite_module.is_trained(folder, best, other)
    best.unlink()
    assert not suite_module.is_trained(folder, best, values)


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ({"members": []}, "members = []"),
        ({"members": ["config/a.yaml"], "step": 2}, "unknown key step = 2; nearest: steps"),
        ({"members": [{"config": "a.yaml", "overides": []}]}, r"unknown key members[0].overides"),
        ({"members": ["config/a.yaml", "other/a.yaml"]}, "two members are called a; give one of them another name"),
        ({"members": [{"config": "a.yaml", "name": "x/y"}]}, "members[0].name = 'x/y'"),
        ({"members": [{"config": "a.yaml", "run": ".."}]}, "members[0].run = '..': a name is that of one folder"),
        (
            {"members": ["config/persistense.yaml"]},
            "member persistense failed: no file config/persistense.yaml; nearest",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, suite, message):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(suite))
    with pytest.raises(ValueError) as error:  # noqa: PT011  内容在下面查
        compare_command(["--suite", str(path), "--out", str(tmp_path / "out")])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_evaluated_only_with_the_same_options(config, tmp_path):
    """另一个划分、步长、时效、成员数，或比检查点旧的评测都不算。"""
    from util.config import load_config

    values, best, folder = load_config(config), tmp_path / "best.ckpt", tmp_path / "suite"
    folder.mkdir()
    best.touch()
    found = {"checkpoint": str(best), "split": "test", "stride": 1, "members": 1, "perturb": 0.0, "smooth": 0.0}
    found |= {"run": "run", "step": 1, "steps": 1, "model": "cnn"}

    one = Member(config="a.yaml")

    def is_evaluated(change: dict[str, Any], member: Member = one, **options: Any) -> bool:
        (folder / "metrics.json").write_text(json.dumps(found | change))
        return suite_module.is_evaluated(folder, best, Suite(members=[member], **options), member, values)

    assert not suite_module.is_evaluated(folder, best, Suite(members=[one]), one, values)
    assert is_evaluated({})
    for change in (
        {"split": "val"},
        {"stride": 2},
        {"members": 4},
        {"checkpoint": "x"},
        {"steps": 2},
        {"set": "model.n=1"},
    ):
        assert not is_evaluated(change)
    assert is_evaluated({"steps": 2, "stride": 2}, steps=2, stride=2)
    assert is_evaluated({"members": 4}, Member(config="a.yaml", ensemble=4))
    os.utime(best, (time.time() + 9, time.time() + 9))
    assert not is_evaluated({})


def test_suites_in_the_repository_are_valid(monkeypatch):
    from models import build_config
    from util.config import load_config, read_mapping
    from util.strict import validate

    monkeypatch.chdir(ROOT)
    for path in sorted(Path("config/suites").glob("*.yaml")):
        suite = validate(suite_module.Suite, read_mapping(path), str(path))
        for member in suite.members:
            build_config(load_config(member.config, [*suite.overrides, *member.overrides]).model)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """写一个小脚本，当作根脚本来跑。"""
    monkeypatch.setattr(suite_module, "ROOT", tmp_path)

    def write(text: str) -> str:
        (tmp_path / "small.py").write_text(text)
        return "small.py"

    return write


def test_failures_tell_the_last_line(script, capfd):
    run_script(script("import sys; print(sys.argv[1]); print('bar', file=sys.stderr)"), "hello")
    assert capfd.readouterr() == ("hello\n", "bar\n")
    with pytest.raises(ValueError, match="small.py ended with status 2: no file x$"):
        run_script(script("import sys; sys.stderr.write('50 %\\rerror: no file x\\n\\n'); sys.exit(2)"))
    with pytest.raises(ValueError, match=r"small.py ended with status 1: ZeroDivisionError: .*zero$"):
        run_script(script("1 / 0"))
    with pytest.raises(ValueError, match=r"was killed by SIGKILL, out of memory\?: it said nothing$"):
        run_script(script("import os; os.kill(os.getpid(), 9)"))
    assert last_line("末".encode() * 5) == "末" * 5


CHILD = """
import pathlib, sys, time
here = pathlib.Path(__file__).parent
try:
    (here / "ready").touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.3)
    (here / "saved").touch()
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_waits_for_the_child(script, tmp_path, number):
    name = script(CHILD)

    def interrupt():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_script(name)
    assert (tmp_path / "saved").exists()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_ctrl_c_in_the_real_thing_and_on_again(tree, tmp_path, calls):
    """真的子进程：训练到一半 Ctrl-C，存了档；再来一遍从那里接着，走到比较。"""
    config = write_run(tmp_path, tree, train={"epochs": 500}, checkpoint={"every_minutes": 1e-6})
    suite = write_suite(tmp_path, str(config))
    started = start_script("compare.py", "--suite", str(suite), "--out", str(tmp_path / "out"))
    last = tmp_path / "checkpoints/suite-small-run/last.ckpt"
    limit = time.monotonic() + 60
    while not last.is_file() and started.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    output, _ = started.communicate(timeout=60)
    assert started.returncode == 130, output
    assert "resume with:" in output and "Traceback" not in output
    from tests.engine.runs import checkpoint

    progress = checkpoint(tmp_path, "suite-small-run")["progress"]
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("epochs: 500", f"epochs: {progress['epoch'] + 1}"), encoding="utf-8")
    assert compare_command(["--suite", str(suite), "--out", str(tmp_path / "out")]) == 0
    assert calls == ["train.py suite-small-run"]
    assert f"resumed at epoch {progress['epoch']}" in (tmp_path / "log/suite-small-run/train.log").read_text("utf-8")


KILLED = """
import os, signal, sys, threading
from pathlib import Path
from engine.comparison import suite
suite.ROOT = Path(sys.argv[1])
def kill():
    while not (suite.ROOT / "started").exists():
        pass
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill).start()
suite.run_script("child.py")
"""
SLEEPS = "import pathlib, time; pathlib.Path(__file__).with_name('started').touch(); time.sleep(600)"


def test_a_killed_suite_takes_its_training_along(tmp_path):
    """不然再来一遍会撞见它：管道关上了，输出才读得完。"""
    (tmp_path / "child.py").write_text(SLEEPS)
    killed = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(killed, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
