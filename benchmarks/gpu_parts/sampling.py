"""采样：VAR 有没有键值缓存，扩散的一个样本。"""

from __future__ import annotations

import statistics

import torch

from benchmarks.gpu_parts.scene import Found, Scene
from benchmarks.var import forecast, published, times, tokens
from engine.imagined import random_batch
from models.interface import can_forecast
from util.batch import window_time


def var(scene: Scene) -> Found:
    """原版的结构与 config/var.yaml 的。"""
    torch.manual_seed(0)
    if scene.small:
        tiny = ("model.width=32", "model.depth=1", "model.heads=2")
        cases = [forecast(1, "var, small", *tiny)]
    else:
        cases = [published(8, depth=16), forecast(32, "var, context", "model.history.context=true")]
    found: Found = {}
    for case in cases:
        kept, redone = tokens(case)
        seconds = times(case, 1 if scene.small else 3, scene.device)
        found[f"{case.name}: samples/s"] = case.samples / statistics.median(fast for fast, _ in seconds)
        found[f"{case.name}: speed-up by the cache"] = statistics.median(slow / fast for fast, slow in seconds)
        found[f"{case.name}: allowed by tokens"] = redone / kept
    return found


def diffusion(scene: Scene) -> Found:
    """about: YAML 的名字。"""
    config = scene.config(*scene.about)
    model, spec = scene.model(config)
    assert can_forecast(model)
    batch, members = random_batch(spec, scene.batch_size(4)), scene.batch_size(8)
    history, time = batch.history.to(scene.device), window_time(batch.time[:, : spec.frames_in], spec)
    moment = None if time is None else time.to(scene.device)
    with torch.inference_mode():
        seconds = scene.seconds(lambda: model.forecast(history, moment, members, torch.Generator().manual_seed(0)))
    return {
        "samples/s": len(history) * members / seconds,
        "grid": f"{spec.num_channels} x {spec.height} x {spec.width}",
    }
