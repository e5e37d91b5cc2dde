"""基线：持续性预报、气候态，以及训练过的线性回归；和别的模型一样造、一样用、在同样的窗口上计分。"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from lightning_fabric import Fabric

from engine.loading import load_forecaster, load_weights
from engine.one_pass import Check, fit_one_pass
from models import build_model
from models.interface import ForecastModel, Network, OnePass, can_forecast
from util.batch import DataSpec
from util.checkpoint import load_checkpoint, save_checkpoint
from util.config import RunConfig, read_mapping
from util.data.batches import all_starts
from util.data.dataset import WeatherData

log = logging.getLogger("ar_pred")
PERSISTENCE, CLIMATOLOGY = "persistence", "climatology"  # 前者查真值是不是同一份，距平相对后者；都少不了
BASELINES = (PERSISTENCE, CLIMATOLOGY)  # models/ 里的名字，加一个基线就是在这里加一个
FITTED, VARIANT = "linear_regression", "ridge"  # 训练过就算一个基线；只认一种，表上的名字才只有一个意思
NAMES = (*BASELINES, FITTED)  # 成绩表上可以作基线的
THREADS, FILES_AT_ONCE = 16, 4096  # 网络盘上查大小与时刻是等待，不是计算


def fit_baselines(
    data: WeatherData, config: RunConfig, batch_size: int, fabric: Fabric, check: Check = lambda: None
) -> dict[str, ForecastModel]:
    """持续性预报与气候态，有训练好的线性回归时加上它。拟合由零号进程做，别的进程读它存下的。"""
    models: dict[str, ForecastModel] = {}
    for name in BASELINES:
        model = build_model({"name": name}, data.spec)
        assert can_forecast(model)
        if isinstance(model, OnePass):
            cache = Path(data.config.cache_dir) / f"{name}-{training_fingerprint(data)}.ckpt"
            if fabric.is_global_zero and not load_fit(model, cache):
                fit_one_pass(model, data, batch_size, check)
                save_checkpoint(cache, {"model": model.state_dict()})
            fabric.barrier()
            load_weights(model, load_checkpoint(cache)["model"])
        models[name] = model.to(fabric.device).eval()
    fitted = find_fitted(config, data.spec)
    if fitted is not None and config.model["name"] != FITTED:
        model, _ = load_forecaster(load_checkpoint(fitted), fabric.device)
        assert can_forecast(model)
        models[FITTED] = model
        log.info("baseline %s: %s", FITTED, fitted)
    return models


def load_fit(model: Network, cache: Path) -> bool:
    """存着的拟合装进模型；没有、读不出、形状不符都是假：随时可以重新拟合。"""
    if not cache.is_file():
        return False
    try:
        load_weights(model, load_checkpoint(cache)["model"])
    except (ValueError, LookupError) as error:
        log.warning("cache %s cannot be used, fitted again: %s", cache, error)
        return False
    return True


def training_fingerprint(data: WeatherData) -> str:
    """训练数据的指纹：说明、训练窗口，和读它们用得到的每个文件的大小与修改时间（存档的是校验和）；改了一个就要重新拟合。"""
    began, reader = time.monotonic(), data.windows.reader
    starts = all_starts(data.segments["train"], data.spec.window)
    digest = hashlib.sha256(json.dumps([data.config.root, data.spec.to_dict()]).encode())
    digest.update(starts.tobytes())
    files = np.argwhere(reader.files_of(np.concatenate(data.segments["train"])))  # (n, 2) 通道、位置
    files[:, 1] += reader.start

    def stamps(part: np.ndarray) -> bytes:
        return "\n".join(reader.origin.stamp(c, hour) for c, hour in part.tolist()).encode()

    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(stamps, np.array_split(files, -(-len(files) // FILES_AT_ONCE))):
            digest.update(found)
    log.info("training files unchanged since the last fit? %d checked in %.1f s", len(files), time.monotonic() - began)
    return digest.hexdigest()[:16]


def find_fitted(config: RunConfig, spec: DataSpec) -> Path | None:
    """最近一个在同样的数据上训练好的线性回归的 best.ckpt；先看 log/<run>/config.yaml，不必打开每个检查点。"""
    found = []
    for path in Path(config.checkpoint.dir).glob("*/best.ckpt"):
        written = Path(config.log.dir) / path.parent.name / "config.yaml"
        model = read_mapping(written).get("model", {}) if written.is_file() else {}
        if model.get("name") == FITTED and model.get("variant", VARIANT) == VARIANT:
            found.append(path)
    for path in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True):
        if DataSpec.from_dict(load_checkpoint(path)["spec"]) == spec:
            return path
    return None
