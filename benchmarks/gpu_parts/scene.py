"""各部分共用的：在哪个设备上，大的还是小的；配置，造好的模型，计时。"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.step.arithmetic import wait_for
from benchmarks.step.reference import AR_PRED
from engine.imagined import imagined_spec, random_batch
from models import build_model
from models.interface import Learner, OnePass
from util.batch import DataSpec
from util.config import RunConfig, load_config

CONFIG = Path(__file__).parent.parent.parent / "config"
TINY = ("data.variables={t2m: single}", "data.latitude.count=8", "data.longitude.count=16", "model.token_size=[4, 4]")
Found = dict[str, float | str]


class Scene(NamedTuple):
    """small: 没有显卡，只看各部分走得通。about: 这一部分的对象，如哪一份 YAML。folder: 可以写的地方。"""

    device: torch.device
    small: bool
    about: tuple[str, ...]
    folder: Path

    def config(self, name: str, *overrides: str) -> RunConfig:
        """config/ 下的一份；small 时用它的 smoke 段，不编译（CPU 上要半分钟），AR_pred 再缩小网格。"""
        device = [f"run.device={self.device.type}", "run.devices=1", "train.preflight=false", "data.workers=0"]
        if self.small:
            overrides = (*overrides, "train.batch_size=2", "train.compile=false", *(TINY if name == AR_PRED else ()))
        return load_config(CONFIG / f"{name}.yaml", [*device, *overrides], smoke=self.small)

    def batch_size(self, wanted: int) -> int:
        return 2 if self.small else wanted

    def model(self, config: RunConfig) -> tuple[Learner, DataSpec]:
        """随机的权重，eval。"""
        torch.manual_seed(config.run.seed)
        spec = imagined_spec(config.data)
        model = build_model(config.model, spec)
        if isinstance(model, OnePass) and model.needs_pass:
            model.accumulate(random_batch(spec, 2))
            model.solve()
        return model.to(self.device).eval(), spec

    def seconds(self, function: Callable[[], object]) -> float:
        """热身一次之后，三次（small 时一次）的中位数。"""
        found = []
        for _ in range(2 if self.small else 4):
            wait_for(self.device)
            begin = time.perf_counter()
            function()
            wait_for(self.device)
            found.append(time.perf_counter() - begin)
        return statistics.median(found[1:])
