"""各配置、run.strategy、精度、开关的组合都起得来，损失与一个进程的相同：`python -m tests.combinations [CONFIG ...]`。

每一种组合先走预检（走一步、存、读回、再走一步），再从同样的初值、同样的全局批走三步。大小取自 YAML 的 smoke 段，
数据是想象的；dropout、换码的随机数属于各进程，比损失时关掉。`--switches` 只走 AR_pred 一份，各个开关的全部子集。
结果写进 docs/scaling.md 记号之间的表。
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from lightning_fabric import Fabric

from engine.imagined import imagined_spec
from engine.reference.configs import listed
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
COMMAND = "python -m tests.combinations"
CONFIGS = [path.stem for path in listed(".")]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
STRATEGIES = {"auto": 1, "ddp": 2, "fsdp": 2}  # 各用几个进程
PRECISIONS = ("32-true", "bf16-mixed")
SWITCHES = (
    "train.accumulate=2", "train.ema_decay=0.9", "train.clip_norm=1.0", "checkpoint.sharded=true",
    "train.activation_checkpointing=blocks",
)  # fmt: skip
COMPILE = "train.compile=true"
OPTIONS = {"plain": [()], "everything": [(*SWITCHES[:4], "train.optimizer=adamw")]}
SUBSETS = {
    "without compile": [subset for size in range(len(SWITCHES) + 1) for subset in combinations(SWITCHES, size)],
    "with compile": [(COMPILE,), (COMPILE, SWITCHES[-1]), (COMPILE, *SWITCHES)],
}
SWITCHED = "ar_pred_video_vanilla"
OWN_DRAWS = ("dropout", "drop_path", "restart")  # 随机数属于各进程的选项
BATCH, STEPS = 4, 3
Groups = Mapping[str, Sequence[tuple[str, ...]]]  # 表的一格里的几组 → 各组的改动
Found = dict[str, list[float] | str]  # 组合的名字 → 各步的损失，或错误


class Combination(NamedTuple):
    config: str
    strategy: str
    precision: str
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        return " ".join((*self[:3], *self.options))


def combined(configs: Iterable[str], groups: Groups) -> list[Combination]:
    """几份配置的全部组合。"""
    options = [one for group in groups.values() for one in group]
    return [Combination(*each) for each in product(configs, STRATEGIES, PRECISIONS, options)]


def make_config(combination: Combination, *more: str) -> RunConfig:
    name, strategy, precision, options = combination
    where = (f"run.devices={STRATEGIES[strategy]}", f"run.strategy={strategy}", "run.device=cpu")
    training = (f"train.precision={precision}", f"train.batch_size={BATCH}")
    return load_config(ROOT / f"config/{name}.yaml", [*where, *training, *options, *more], smoke=True)


def walk(combination: Combination, folder: Path) -> list[float] | str:
    """预检，再走几步的损失（没有梯度步的没有）；起不来的是错误那一行。"""
    torch.compiler.reset()  # 一块至多编译几份，从前的组合不算
    try:
        config = make_config(combination)
        fabric = make_fabric(config)
        own = build_config(config.model).model_dump().keys() & set(OWN_DRAWS)
        quiet = make_config(combination, *(f"model.{key}=0" for key in sorted(own)))
        with torch.compiler.set_stance(force_backend="aot_eager"):  # 编译到图为止：核要编译几分钟
            preflight(fabric, config, imagined_spec(config.data), folder)
            return losses(fabric, quiet)
    except (ValueError, RuntimeError) as error:  # 两个进程同样的错，接着做下一个
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


def walk_all(wanted: Sequence[Combination], processes: int, out: Path) -> Found:
    """用几个进程的那些组合；零号进程边走边存。"""
    logging.getLogger("ar_pred").setLevel(logging.ERROR)
    found: Found = {}
    for combination in [each for each in wanted if STRATEGIES[each.strategy] == processes]:
        print(os.environ.get("RANK", 0), combination.name, file=sys.stderr, flush=True)
        found[combination.name] = walk(combination, out.parent)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            out.write_text(json.dumps(found), encoding="utf-8")
    return found


def find(wanted: Sequence[Combination]) -> Found:
    """全部组合；两个进程的由 torchrun 另起。"""
    with TemporaryDirectory() as folder:
        out, asked = Path(folder) / "two.json", Path(folder) / "asked.json"
        asked.write_text(json.dumps(wanted), encoding="utf-8")
        command = [sys.executable, *TORCHRUN, "-m", "tests.combinations", "--two", str(asked), str(out)]
        assert subprocess.run(command, cwd=ROOT).returncode == 0, "see above"
        return {**walk_all(wanted, 1, Path(folder) / "one.json"), **json.loads(out.read_text(encoding="utf-8"))}


def difference(found: Found, combination: Combination) -> float | str:
    """各步的损失与一个进程的至多相差几成；起不来的是错误。"""
    made, expected = found[combination.name], found[combination._replace(strategy="auto").name]
    if isinstance(made, str):
        return made
    if isinstance(expected, str):
        return expected
    return max((abs(a - b) / abs(b) for a, b in zip(made, expected, strict=True)), default=0.0)


def worst(differences: Iterable[float | str]) -> str:
    """一组里最大的；有起不来的，就是它的错误。"""
    found = list(differences)
    failed = [value for value in found if isinstance(value, str)]
    largest = max((value for value in found if not isinstance(value, str)), default=0.0)
    return failed[0] if failed else f"{largest:.0e}" if largest else "0"


def table(found: Found, configs: Iterable[str], groups: Groups) -> str:
    columns = [(strategy, kind) for strategy in list(STRATEGIES)[1:] for kind in PRECISIONS]
    rows = [["config", *(f"{strategy}, {kind}" for strategy, kind in columns)], ["---"] * (1 + len(columns))]
    for name in configs:
        cells = [
            [worst(difference(found, Combination(name, *column, one)) for one in group) for group in groups.values()]
            for column in columns
        ]
        rows.append([name, *map(" / ".join, cells)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def marks(command: str) -> tuple[str, str]:
    return f"<!-- {command} -->\n", f"<!-- /{command} -->\n"


def main() -> int:
    if sys.argv[1:2] == ["--two"]:
        asked, out = map(Path, sys.argv[2:])
        read = json.loads(asked.read_text(encoding="utf-8"))
        wanted = [Combination(name, strategy, kind, tuple(options)) for name, strategy, kind, options in read]
        walk_all(wanted, 2, out)
        return 0
    switches = sys.argv[1:] == ["--switches"]
    configs, groups = ([SWITCHED], SUBSETS) if switches else (sys.argv[1:] or CONFIGS, OPTIONS)
    made = table(find(combined(configs, groups)), configs, groups)
    print(made)
    if switches or configs == CONFIGS:
        begin, end = marks(f"{COMMAND} --switches" if switches else COMMAND)
        before, rest = PAGE.read_text(encoding="utf-8").split(begin)
        PAGE.write_text(before + begin + made + end + rest.split(end)[1], encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_command(main)
