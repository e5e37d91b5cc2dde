"""一步的内存：估计的与量到的。"""

from __future__ import annotations

from benchmarks.gpu_parts.scene import Found, Scene
from benchmarks.memory import comparable, measured
from engine.memory.estimate import estimate, this_machine


def against_estimate(scene: Scene) -> Found:
    """about: YAML 的名字，改动……"""
    name, *overrides = scene.about
    config = scene.config(name, *overrides)
    machine = this_machine(scene.device)
    expected = comparable(estimate(config, machine), machine)  # 先算：CPU 上这时的驻留内存就是起初的
    found = measured(config, scene.device)
    return {"estimated, MB": expected / 1e6, "measured, MB": found / 1e6, "estimated / measured": expected / found}
