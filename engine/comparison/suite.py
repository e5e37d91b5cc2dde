"""一整套运行：逐个训练（训练好的取来）、评测，再比较；各在自己的进程里，一个倒下不连累别的，中断后再来一遍就接着做。"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from engine.evaluation.metrics_file import NAMES, Provenance, read_scores
from util.atomic import reserved
from util.config import RunConfig, load_config, read_mapping
from util.logger import setup_logging
from util.report.bilingual import Bilingual
from util.signals import STOPS, die_with_parent
from util.strict import Name, PositiveInt, Strict, nearest, validate

log = logging.getLogger("ar_pred")
ROOT = Path(__file__).resolve().parents[2]
TAIL_BYTES = 4096  # 子进程标准错误的末尾，够找出最后一行


def _flat(value: object) -> object:
    """一层层列着的改动摊平：几个成员共有的用 YAML 的锚写一次，拼在一起。"""
    if not isinstance(value, list):
        return value
    return [text for item in value for text in (item if isinstance(item, list) else [item])]


Overrides = Annotated[list[str], BeforeValidator(_flat)]


class Member(Strict):
    """一个成员：config/ 下的 YAML 与对它的改动。

    name 是表上的名字，默认是文件名；run 是运行名，默认 suite-<文件>-<name>，写上别的训练用过的名字就把它取来；
    ensemble 同 evaluate.py --members。
    """

    config: str
    name: Name = ""
    run: Name = ""
    overrides: Overrides = Field(default=[])
    ensemble: PositiveInt = 1

    @property
    def label(self) -> str:
        return self.name or Path(self.config).stem


def _member(value: object) -> object:
    """只写一个路径也行。"""
    return {"config": value} if isinstance(value, str) else value


def _members(value: object) -> object:
    """members 写一个路径：与那一套相同的成员（别的数据上再来一遍）。"""
    return read_mapping(Path(value)).get("members") if isinstance(value, str) else value


Members = Annotated[list[Annotated[Member, BeforeValidator(_member)]], BeforeValidator(_members)]


class Suite(Strict):
    """config/suites/ 下的一个文件；overrides 先于各成员自己的改动；split、steps、stride 同 evaluate.py。

    stages 先训练、不比较：潜变量里的成员的阶段一，成员以 model.first_stage 指着它的 best.ckpt。
    """

    stages: Members = Field(default=[])
    members: Members = Field(min_length=1)
    overrides: Overrides = Field(default=[])
    split: Literal["train", "val", "test"] = "test"
    steps: PositiveInt | None = None
    stride: PositiveInt = 1

    @model_validator(mode="after")
    def _names_differ(self) -> Suite:
        labels = [member.label for member in (*self.stages, *self.members)]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two members are called {label}; give one of them another name")
        return self


def run_suite(
    path: Path,
    out: Path | None,
    reference: Sequence[Path] = (),
    by: Sequence[str] = (),
    scorecard: str | None = None,
) -> int:
    """compare.py --suite：reference、by、scorecard 同 compare_runs；返回 0；有成员失败时 1，其余的照样比较。

    Raises:
        ValueError: 文件不对，没有 scorecard 这一行，或没有一个成员走完。
    """
    suite: Suite = validate(Suite, read_mapping(path), str(path))
    if scorecard is not None:
        check_scorecard(scorecard, [member.label for member in suite.members])
    name = f"suite-{path.stem}"  # 不叫 <suite>-：train.py --resume auto 会把它当成同名配置的运行
    out = out or Path("log") / name
    with reserved(out):
        setup_logging(out / "compare.log")
        done: dict[str, Path] = {}
        failed: dict[str, str] = {}
        everyone = [*suite.stages, *suite.members]
        for number, member in enumerate(everyone, 1):
            log.info("suite %s, member %d of %d: %s", path.stem, number, len(everyone), member.label)
            run = member.run or f"{name}-{member.label}"
            try:
                config = train_member(suite, member, run)
                if member in suite.members:
                    done[member.label] = evaluate_member(suite, member, run, config, name)
            except ValueError as error:
                failed[member.label] = str(error)
                log.error("member %s failed, going on without it: %s", member.label, error)
        if not done:
            raise ValueError("; ".join(f"member {label} failed: {error}" for label, error in failed.items()))
        from engine.comparison.compare import compare_runs  # 训练的时候这个进程不必占着 torch 的内存

        notes = [
            Bilingual(
                f"member {label} failed and is not in this comparison: {error}",
                f"成员 {label} 失败了，不在这次比较里：{error}",
            )
            for label, error in failed.items()
        ]
        command = ["--suite", str(path), "--out", str(out)]
        compare_runs(list(done.values()), out, command, list(done), notes, reference, by, scorecard)
        return 1 if failed else 0


def check_scorecard(name: str, labels: Sequence[str]) -> None:
    """训练之前就看 --scorecard 对着的一行会不会有，有没有别的成员与它比；名字与基线相同的成员接着 (run)。

    Raises:
        ValueError: 没有。
    """
    known = [*labels, *NAMES, *(f"{label} (run)" for label in labels if label in NAMES)]
    if name not in known:
        raise ValueError(f"--scorecard {name}: not among those compared; {nearest(name, known, 'names')}")
    if [*labels] == [name]:
        raise ValueError(f"--scorecard {name}: no other member to compare with it; give a baseline: {', '.join(NAMES)}")


def train_member(suite: Suite, member: Member, run: str) -> RunConfig:
    """训练一个成员，训练过的不再训练；返回它的配置。

    Raises:
        ValueError: 配置不对，或子进程失败（它最后的一行）。
    """
    changes = [*suite.overrides, *member.overrides, f"run.name={run}"]
    config = load_config(member.config, changes)
    folder, best = places(config, run)
    if is_trained(folder, best, config):
        log.info("%s is trained already, in %s", run, folder)
    else:
        run_script("train.py", "--config", member.config, "--resume", "auto", *changes)
    return config


def places(config: RunConfig, run: str) -> tuple[Path, Path]:
    """运行的文件夹，最优的检查点。"""
    return Path(config.log.dir) / run, Path(config.checkpoint.dir) / run / "best.ckpt"


def evaluate_member(suite: Suite, member: Member, run: str, config: RunConfig, own: str) -> Path:
    """评测一个训练好的成员，评测过的不再评；返回评测的文件夹。own 是这套评测自己的文件夹名，几套互不覆盖。

    Raises:
        ValueError: 子进程失败（它最后的一行）。
    """
    folder, best = places(config, run)
    for place in (folder / "test", folder / own):  # 训练末了的成绩，或上一次在这里评的
        if is_evaluated(place, best, suite, member, config):
            log.info("%s is evaluated already, in %s", run, place)
            return place
    options = ["--split", suite.split, "--stride", str(suite.stride), "--save", "none"]
    options += ["--members", str(member.ensemble)]
    options += ["--steps", str(suite.steps)] if suite.steps else []
    run_script("evaluate.py", "--checkpoint", str(best), *options, "--out", str(folder / own))
    return folder / own


def is_trained(folder: Path, best: Path, config: RunConfig) -> bool:
    """以同样的配置走完过：train.py 开头写 config.yaml，最后才写 metrics.json。

    配置不同时交给 train.py --resume auto：能接着训练的接着训练，不能的它会说哪里不同。
    """
    written, finished = folder / "config.yaml", folder / "metrics.json"
    if not (best.is_file() and written.is_file() and finished.is_file()):
        return False
    return (
        finished.stat().st_mtime >= written.stat().st_mtime and load_config(written).model_dump() == config.model_dump()
    )


def is_evaluated(folder: Path, best: Path, suite: Suite, member: Member, config: RunConfig) -> bool:
    """有一份同样选项的评测，比检查点新；metrics.json 是评测里较晚写的，有它就有 statistics.nc。"""
    path = folder / "metrics.json"
    if not path.is_file() or path.stat().st_mtime < best.stat().st_mtime:
        return False
    try:
        found = read_scores(path, Provenance)
    except ValueError as error:  # 坏了，或是从前的版本写的
        log.warning("%s; it is evaluated again", error)
        return False
    steps = suite.steps or config.data.frames_out
    wanted = (str(best), suite.split, suite.stride, member.ensemble, 0, steps, None)
    return wanted == (found.checkpoint, found.split, found.stride, found.members, found.perturb, found.steps, found.set)


def run_script(script: str, *arguments: str) -> None:
    """在子进程里跑一个根脚本，标准错误照样显示；Ctrl-C 转给它一次，等它存好再停。

    Raises:
        ValueError: 它失败了；内容是它最后的一行。
        KeyboardInterrupt: 被中断，子进程已经停下。
    """
    # 自己的会话：终端的 Ctrl-C 只到这里，不会送到它两遍；这里被 kill -9，它也走，再来一遍才不会撞见它
    child = subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments],
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    assert child.stderr is not None
    tail = bytearray()
    reader = threading.Thread(target=show, args=(child.stderr, tail), daemon=True)
    reader.start()
    status, stopped = None, False
    before = [(s, signal.signal(s, signal.default_int_handler)) for s in STOPS]  # 都与 Ctrl-C 一样停
    while status is None:
        try:
            status = child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            stopped = True
    for number, handler in before:
        signal.signal(number, handler)
    reader.join(timeout=5)  # 它的读取进程可能还开着管道
    if stopped:
        raise KeyboardInterrupt
    if status:
        raise ValueError(f"{script} {describe_exit(status)}: {last_line(bytes(tail))}")


def show(source: IO[bytes], tail: bytearray) -> None:
    """原样转到标准错误，留下末尾。"""
    with source:
        while chunk := source.read1(TAIL_BYTES):  # type: ignore[attr-defined]
            sys.stderr.buffer.write(chunk)
            sys.stderr.buffer.flush()
            tail += chunk
            del tail[:-TAIL_BYTES]


def describe_exit(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    hint = ", out of memory?" if -status == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-status).name}{hint}"


def last_line(tail: bytes) -> str:
    """最后一个不空的行；进度条用回车换行。"""
    lines = [line.strip() for line in tail.decode(errors="replace").replace("\r", "\n").split("\n")]
    return next((line.removeprefix("error: ") for line in reversed(lines) if line), "it said nothing")
