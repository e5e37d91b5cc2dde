"""评测的速度：全部统计量都算，与只做预报相比。"""

from __future__ import annotations

import time

from benchmarks.gpu_parts.scene import Found, Scene
from benchmarks.step.imagined import imagined_data
from engine.evaluation.baselines import fit_baselines
from engine.evaluation.glimpse import choose_glimpse, parse_points
from engine.evaluation.scoring import score
from engine.evaluation.task import Options, Task, find_starts, threshold_tensor
from engine.training.run import make_fabric
from models.interface import can_forecast
from util.config import eval_batch_size
from util.data.dataset import open_data

REPEATS = 4  # 想象的树只有几个窗口；头一遍热身


def throughput(scene: Scene) -> Found:
    """about: YAML 的名字；窗口/秒，用时是预报的几倍。"""
    config = scene.config(*scene.about)
    model, _ = scene.model(config)
    assert can_forecast(model)
    fabric, name, size = make_fabric(config), config.model["name"], eval_batch_size(config)
    with imagined_data(config.data) as tree:
        data = open_data(tree.model_copy(update={"residency": "disk"}))
        spec, options = data.spec, Options()
        starts, thresholds = find_starts(data, "test", spec.frames_out, 1), threshold_tensor(None, spec)
        glimpse = choose_glimpse(spec, len(starts), spec.frames_out, parse_points([], spec))
        models = {**fit_baselines(data, config, size, fabric, lambda: None), name: model}
        seed = config.run.seed
        task = Task(models, name, data, options, spec.frames_out, starts, size, seed, glimpse, thresholds, {})
        total = forecasts = 0.0
        for turn in range(2 if scene.small else REPEATS):
            begin = time.perf_counter()
            seconds = sum(scored.seconds[name] for scored in score(task, fabric))
            if turn:
                total, forecasts = total + time.perf_counter() - begin, forecasts + seconds
    windows = len(starts) * (1 if scene.small else REPEATS - 1)
    return {"windows/s": windows / total, "time / forecasts alone": total / forecasts}
