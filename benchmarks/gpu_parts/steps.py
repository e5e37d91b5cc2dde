"""训练的一步：AR_pred 各种精度、批的大小，编译的、写开的；别的模型各一次。"""

from __future__ import annotations

from benchmarks.gpu_parts.scene import Found, Scene
from benchmarks.train import OURS, REFERENCE, measure

STEPS, ROUNDS = 6, 3


def ours(scene: Scene) -> Found:
    """about: YAML 的名字，改动……"""
    return _measured(scene, against=False)


def briefly(scene: Scene) -> Found:
    """同上，只留四项。"""
    found = ours(scene)
    return {quantity: found[quantity] for quantity in ("windows/s", "step, ms", "utilisation", "memory, MiB")}


def against_reference(scene: Scene) -> Found:
    """AR_pred 与写开的注意力轮流走；末了两项是我们的比参照的。"""
    return _measured(scene, against=True)


def _measured(scene: Scene, against: bool) -> Found:
    name, *overrides = scene.about
    steps, rounds = (1, 1) if scene.small else (STEPS, ROUNDS)
    sides = measure(scene.config(name, *overrides), against, True, steps, rounds)["sides"]
    found: Found = dict(sides[OURS])
    if against:
        for quantity in ("step, ms", "memory, MiB"):
            found[f"{REFERENCE}: {quantity}"] = sides[REFERENCE][quantity]
            found[f"{OURS} / {REFERENCE}: {quantity}"] = sides[OURS][quantity] / sides[REFERENCE][quantity]
    return found
