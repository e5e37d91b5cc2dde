"""在 Python 里预报（docs/python.md）：`load_forecaster(path).forecast(dataset)`，与 inference.py 逐位相同。"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import xarray as xr

from engine.forecasting.datasets import forecast_dataset, read_history
from engine.forecasting.forecast import Options, open_forecaster, predict
from engine.forecasting.members import Ensemble, check_members
from models.interface import Forecaster
from util.batch import DataSpec
from util.config import RunConfig, eval_batch_size


@dataclass(frozen=True)
class LoadedForecaster:
    """打开了的检查点或程序；spec 说它要什么：通道、单位、气压、网格、几帧、隔几小时。"""

    spec: DataSpec
    config: RunConfig
    model: Forecaster
    device: torch.device
    source: str

    def forecast(
        self, dataset: xr.Dataset, steps: int | None = None, members: int = 1, perturb: float = 0.0, smooth: float = 0.0
    ) -> xr.Dataset:
        """历史（物理单位）→ 从它的末一个时刻起的预报，样子与 forecast.nc 的相同；参数与命令行同名。

        Raises:
            ValueError: 变量、单位、气压、网格、时刻哪一样不合；成员与扰动说不通；预报不是有限值。
        """
        spec, config = self.spec, self.config
        steps = spec.frames_out if steps is None else steps
        for name, count in (("steps", steps), ("members", members)):
            if count < 1:
                raise ValueError(f"{name} = {count}: give a whole number of 1 or more")
        check_members(self.model, config.model["name"], members, perturb, smooth)
        history, init = read_history(dataset, spec)
        wanted = Ensemble(members, perturb, smooth, config.run.seed)
        limit = eval_batch_size(config)
        made = predict(self.model, spec, history.to(self.device), init, steps, wanted, limit)
        about = {"title": "ar_pred forecast", "source": self.source}
        return forecast_dataset(spec, spec.to_physical(made).numpy(), init, about)


def load_forecaster(path: str | Path) -> LoadedForecaster:
    """检查点，或 `inference.py --export` 写的 .pt2。

    Raises:
        ValueError: 读不了；只能重建，不能预报。
    """
    options = Options(program=Path(path).suffix == ".pt2")
    content, config, device, model = open_forecaster(str(path), options)
    return LoadedForecaster(DataSpec.from_dict(content["spec"]), config, model, device, str(path))
