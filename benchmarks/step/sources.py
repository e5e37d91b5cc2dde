"""训练等不等数据：`python -m benchmarks.train --sources --config config/X.yaml data.store=STORE`。

同一个模型、同样的训练窗口，各种来源轮流走几十步，与一批造好的数据反复走（synthetic）比：

    tree       data.source = tree
    store      data.source = store，data.residency = disk
    memory     data.residency = memory
    device     data.residency = device
    synthetic  同一批，已在设备上：没有数据可等

每种的第一步（读取进程起步、热身）不计，另列在 start 一栏。waiting 是等下一批的时间占的份额，与训练日志里的同一定义。
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from benchmarks.step.arithmetic import LONG
from benchmarks.step.training import just
from engine.training.run import epoch_batches, make_fabric
from engine.training.state import State, build_state, train_step
from util.batch import Batch
from util.config import RunConfig
from util.data.dataset import WeatherData, open_data
from util.data.feed import feed

SOURCES = {
    "tree": {"source": "tree", "residency": "disk"},
    "store": {"source": "store", "residency": "disk"},
    "memory": {"source": "store", "residency": "memory"},
    "device": {"source": "store", "residency": "device"},
}


class Round(NamedTuple):
    """一种来源的一轮：第一步的秒数，其余各步合计的秒数、其中等数据的秒数。"""

    start: float
    seconds: float
    waited: float


def compare_steps(config: RunConfig, steps: int, rounds: int) -> dict[str, list[Round]]:
    """各种来源轮流走 steps 步，rounds 轮。

    Raises:
        ValueError: 没有存档。
    """
    if config.data.store is None:
        raise ValueError("data.store is needed, a packed copy of data.root: python dataset.py pack --help")
    fabric = make_fabric(config)
    sources: dict[str, WeatherData] = {}
    for name, keys in SOURCES.items():
        sources[name] = open_data(config.data.model_copy(update=keys), device=fabric.device)
    tree = sources["tree"]
    state = build_state(fabric, config, tree.spec, total_steps=LONG)
    segments = {**tree.segments, "train": just(tree, (steps + 1) * config.train.windows)}  # 第一步不计
    batches = epoch_batches(config, replace(tree, segments=segments), fabric, 0)
    fixed = next(feed(tree, batches[:1], fabric.device))
    ways: dict[str, Callable[[], Iterator[Batch]]] = {
        name: lambda data=data: feed(data, batches, fabric.device) for name, data in sources.items()
    }
    ways["synthetic"] = lambda: itertools.repeat(fixed, len(batches))
    found: dict[str, list[Round]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, make in ways.items():
            found[name].append(walk(fabric, state, config, make()))
    return found


def walk(fabric, state: State, config: RunConfig, batches: Iterator[Batch]) -> Round:
    """走完 batches。"""
    begin = time.perf_counter()
    step = train_step(fabric, state, config, [next(batches)])
    step.terms()
    first = time.perf_counter()
    waited, asked = 0.0, first
    for batch in batches:
        waited += time.perf_counter() - asked
        launched = train_step(fabric, state, config, [batch])
        step.terms()  # 与训练的循环一样，晚一步读
        step = launched
        asked = time.perf_counter()
    step.terms()
    return Round(first - begin, time.perf_counter() - first, waited)


def show(found: dict[str, list[Round]], steps: int, config: RunConfig) -> None:
    rounds = len(found["synthetic"])
    size, name = config.train.windows, config.model["name"]
    print(f"{name}: {steps} steps of {size} windows in each of {rounds} rounds, medians")
    print(f"{'':>10} {'steps/s':>8} {'/ synthetic':>12} {'waiting':>8} {'start, s':>9}   slowest to fastest round")
    rates = {name: [steps / r.seconds for r in several] for name, several in found.items()}
    for name, several in found.items():
        ratios = [mine / other for mine, other in zip(rates[name], rates["synthetic"], strict=True)]
        waiting = statistics.median(r.waited / r.seconds for r in several)
        print(
            f"{name:>10} {statistics.median(rates[name]):>8.3f} {statistics.median(ratios):>12.3f} {waiting:>8.2%} "
            f"{statistics.median(r.start for r in several):>9.2f}   {min(rates[name]):.3f} to {max(rates[name]):.3f}"
        )
