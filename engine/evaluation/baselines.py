"""基线：持续性预报、气候态，以及训练过的线性回归；和别的模型一样造、一样用、在同样的窗口上计分。"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from lightning_fabric import Fabric

from engine.evaluation.metrics_file import BASELINES, FITTED
from engine.evaluation.metrics_file import CLIMATOLOGY as CLIMATOLOGY
from engine.evaluation.metrics_file import NAMES as NAMES
from engine.evaluation.metrics_file import PERSISTENCE as PERSISTENCE
from engine.loading import load_forecaster, load_weights
from engine.one_pass import Check, fit_cache, fit_one_pass, load_fit
from engine.parallel import from_main
from models import build_model
from models.interface import ForecastModel, Network, OnePass, can_forecast
from util.atomic import making
from util.batch import DataSpec
from util.checkpoint import load_checkpoint, save_checkpoint
from util.config import RunConfig, read_mapping
from util.data.dataset import WeatherData
from util.files.training_checkpoint import load_training

log = logging.getLogger("ar_pred")
VARIANT = "ridge"  # FITTED 只认一种，表上的名字才只有一个意思


def fit_baselines(
    data: WeatherData, config: RunConfig, batch_size: int, fabric: Fabric, check: Check = lambda: None
) -> dict[str, ForecastModel]:
    """持续性预报与气候态，有训练好的线性回归时加上它。拟合由零号进程做，别的进程读它存下的。"""
    models: dict[str, ForecastModel] = {}
    for name in BASELINES:
        model = build_model({"name": name}, data.spec.bare)
        assert can_forecast(model)
        if isinstance(model, OnePass):
            cache = from_main(fabric, partial(fitted_cache, name, model, data, batch_size, check))
            load_weights(model, load_checkpoint(cache)["model"])
        models[name] = model.to(fabric.device).eval()
    fitted = find_fitted(config, data.spec)
    if fitted is not None and config.model["name"] != FITTED:
        model, _ = load_forecaster(load_training(fitted), fabric.device)
        assert can_forecast(model)
        models[FITTED] = model
        log.info("baseline %s: %s", FITTED, fitted)
    return models


def fitted_cache(name: str, model: Network, data: WeatherData, batch_size: int, check: Check) -> Path:
    """这份数据上的拟合存在哪里；还没有的由一个进程拟合，同时起的别的命令等它。"""
    assert isinstance(model, OnePass)
    cache = fit_cache(name, data)
    if not load_fit(model, cache):
        with making(cache, check):
            if not load_fit(model, cache):
                fit_one_pass(model, data, batch_size, check)
                save_checkpoint(cache, {"model": model.state_dict()})
    return cache


def find_fitted(config: RunConfig, spec: DataSpec) -> Path | None:
    """最近一个在同样的数据上训练好的线性回归的 best.ckpt；先看 log/<run>/config.yaml，不必打开每个检查点。"""
    found = []
    for path in Path(config.checkpoint.dir).glob("*/best.ckpt"):
        written = Path(config.log.dir) / path.parent.name / "config.yaml"
        model = read_mapping(written).get("model", {}) if written.is_file() else {}
        if model.get("name") == FITTED and model.get("variant", VARIANT) == VARIANT:
            found.append(path)
    for path in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True):
        if DataSpec.from_dict(load_training(path)["spec"]) == spec.bare:
            return path
    return None
