"""config/ 里的每一份、每一种 run.strategy、精度、选项都起得来，损失与一个进程的相同：`python -m tests.combinations`。

每一种组合先走预检（走一步、存、读回、再走一步），再从同样的初值、同样的全局批走三步。大小取自 YAML 的 smoke 段，
数据是想象的；dropout、换码的随机数属于各进程，比损失时关掉。结果写进 docs/scaling.md 两个记号之间的表。
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lightning_fabric import Fabric

from engine.imagined import imagined_spec
from engine.seeds import training_seeds
from engine.training.preflight import preflight
from engine.training.run import make_fabric
from engine.training.state import build_state, train_step
from models import build_config
from models.interface import OnePass
from tests.models.small import changed, small_batch
from util.cli import one_line, run_command
from util.config import RunConfig, load_config
from util.data.batches import share_batches

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/scaling.md"
BEGIN, END = "<!-- python -m tests.combinations -->\n", "<!-- /python -m tests.combinations -->\n"
CONFIGS = sorted(path.stem for path in (ROOT / "config").glob("*.yaml"))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
STRATEGIES = {"auto": 1, "ddp": 2, "fsdp": 2}  # 各用几个进程
PRECISIONS = ("32-true", "bf16-mixed")
OPTIONS = {
    "plain": (),
    "everything": (
        "train.accumulate=2", "train.ema_decay=0.9", "train.clip_norm=1.0", "train.optimizer=adamw",
        "checkpoint.sharded=true",
    ),
}  # fmt: skip
OWN_DRAWS = ("dropout", "drop_path", "restart")  # 随机数属于各进程的选项
BATCH, STEPS = 4, 3
Found = dict[str, list[float] | str]  # 组合的名字 → 各步的损失，或错误


def names(name: str) -> list[tuple[str, str, str, str]]:
    """一份配置的各个组合。"""
    return [(name, strategy, kind, options) for strategy in STRATEGIES for kind in PRECISIONS for options in OPTIONS]


def make_config(name: str, strategy: str, precision: str, options: str, *more: str) -> RunConfig:
    where = (f"run.devices={STRATEGIES[strategy]}", f"run.strategy={strategy}", "run.device=cpu")
    training = (f"train.precision={precision}", f"train.batch_size={BATCH}")
    return load_config(ROOT / f"config/{name}.yaml", [*where, *training, *OPTIONS[options], *more], smoke=True)


def walk(combination: tuple[str, str, str, str], folder: Path) -> list[float] | str:
    """预检，再走几步的损失（没有梯度步的没有）；起不来的是错误那一行。"""
    try:
        config = make_config(*combination)
        fabric = make_fabric(config)
        preflight(fabric, config, imagined_spec(config.data), folder)
        own = build_config(config.model).model_dump().keys() & set(OWN_DRAWS)
        return losses(fabric, make_config(*combination, *(f"model.{key}=0" for key in sorted(own))))
    except (ValueError, RuntimeError, NotImplementedError) as error:  # 两个进程同样的错，接着做下一个
        return f"{type(error).__name__}: {one_line(error)}"


def losses(fabric: Fabric, config: RunConfig) -> list[float]:
    spec, parts, starts = imagined_spec(config.data), config.train.accumulate, list(range(BATCH))
    torch.manual_seed(config.run.seed)
    state = build_state(fabric, config, spec, total_steps=1_000_000)
    if isinstance(state.model, OnePass):
        state.model.accumulate(small_batch(spec, BATCH, seed=STEPS))
        state.model.solve()
    if state.optimizer is None:
        return []
    found = []
    for step in range(STEPS):
        batch, micro = small_batch(spec, BATCH, seed=step), []
        for mine in share_batches([starts], fabric.global_rank, fabric.world_size, parts):
            seeds = training_seeds(config.run.seed, 0, step, starts, mine)
            micro.append(changed(batch, itemgetter(mine))._replace(seeds=seeds))
        found.append(train_step(fabric, state, config, micro).terms()["loss"])
        state.progress.step += 1
    return found


def walk_all(wanted: list[str], processes: int, out: Path) -> Found:
    """用几个进程的那些组合；零号进程边走边存。"""
    logging.getLogger("ar_pred").setLevel(logging.ERROR)
    found: Found = {}
    for combination in [each for name in wanted for each in names(name) if STRATEGIES[each[1]] == processes]:
        print(os.environ.get("RANK"), *combination, file=sys.stderr, flush=True)
        found[" ".join(combination)] = walk(combination, out.parent)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            out.write_text(json.dumps(found), encoding="utf-8")
    return found


def find(wanted: list[str]) -> Found:
    """全部组合；两个进程的由 torchrun 另起。"""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "two.json"
        done = subprocess.run([sys.executable, *TORCHRUN, "-m", "tests.combinations", "--two", out, *wanted], cwd=ROOT)
        assert done.returncode == 0, "see above"
        return {**walk_all(wanted, 1, Path(folder) / "one.json"), **json.loads(out.read_text(encoding="utf-8"))}


def difference(found: Found, combination: tuple[str, str, str, str]) -> float | str:
    """各步的损失与一个进程的至多相差几成；起不来的是错误。"""
    name, _, *rest = combination
    made, expected = found[" ".join(combination)], found[" ".join((name, "auto", *rest))]
    if isinstance(made, str):
        return made
    if isinstance(expected, str):
        return expected
    return max((abs(a - b) / abs(b) for a, b in zip(made, expected, strict=True)), default=0.0)


def cell(found: Found, name: str, strategy: str, precision: str) -> str:
    both = (difference(found, (name, strategy, precision, options)) for options in OPTIONS)
    return " / ".join(value if isinstance(value, str) else f"{value:.0e}" if value else "0" for value in both)


def table(found: Found, wanted: list[str]) -> str:
    columns = [(strategy, kind) for strategy in list(STRATEGIES)[1:] for kind in PRECISIONS]
    rows = [["config", *(f"{strategy}, {kind}" for strategy, kind in columns)], ["---"] * (1 + len(columns))]
    rows += [[name, *(cell(found, name, *column) for column in columns)] for name in wanted]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> int:
    if sys.argv[1:2] == ["--two"]:
        walk_all(sys.argv[3:], 2, Path(sys.argv[2]))
        return 0
    wanted = sys.argv[1:] or CONFIGS
    made = table(find(wanted), wanted)
    print(made)
    if wanted == CONFIGS:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(before + BEGIN + made + END + rest.split(END)[1], encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_command(main)
