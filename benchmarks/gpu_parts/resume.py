"""续训逐位相同：走两步、存、读回，再走两步，与没有中断的比每一个权重。"""

from __future__ import annotations

import torch

from benchmarks.gpu_parts.scene import Found, Scene
from benchmarks.step.arithmetic import LONG
from engine.imagined import imagined_spec, random_batch
from engine.seeds import training_seeds
from engine.training.run import make_fabric
from engine.training.snapshot import restore, snapshot
from engine.training.state import State, build_state, train_step
from util.checkpoint import load_checkpoint, save_checkpoint

STEPS = 2


def identical(scene: Scene) -> Found:
    """about: YAML 的名字，改动……"""
    name, *overrides = scene.about
    config = scene.config(name, "train.ema_decay=0.9", *overrides)
    fabric, spec = make_fabric(config), imagined_spec(config.data)
    fabric.seed_everything(config.run.seed, verbose=False)
    batch = fabric.to_device(random_batch(spec, config.train.windows))

    def walk(state: State) -> list[float]:
        losses = []
        for _ in range(STEPS):
            seeds = training_seeds(config.run.seed, 0, state.progress.step, *[list(range(len(batch.time)))] * 2)
            losses.append(train_step(fabric, state, config, [batch._replace(seeds=seeds)]).terms()["loss"])
            state.progress.step += 1
        return losses

    straight = build_state(fabric, config, spec, total_steps=LONG)
    walk(straight)
    path = scene.folder / "resume.ckpt"
    save_checkpoint(path, snapshot(fabric, straight, config, spec, "benchmark"))
    content = load_checkpoint(path)
    again = build_state(fabric, config, spec, total_steps=LONG, saved=content)
    restore(fabric, again, content)
    losses = [walk(straight), walk(again)]
    pairs = list(zip(straight.module.parameters(), again.module.parameters(), strict=True))
    return {
        "weights equal bit by bit": str(all(torch.equal(a, b) for a, b in pairs)),
        "largest difference": max(float((a - b).abs().max()) for a, b in pairs),
        "loss, straight on": losses[0][-1],
        "loss, resumed": losses[1][-1],
    }
