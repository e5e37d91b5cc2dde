"""续训：找哪个检查点，哪些配置可以与它不同，窗口还是不是那些窗口。"""

from __future__ import annotations

import hashlib
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from engine.loading import DATA_MAY_CHANGE, Content
from models import build_config
from util.checkpoint import load_checkpoint
from util.config import RunConfig
from util.data.batches import all_starts
from util.data.dataset import WeatherData

log = logging.getLogger("ar_pred")

# 续训时可以与检查点不同的键；None 表示整段。其余的一变，就不再是同一次训练
MAY_CHANGE: dict[str, set[str] | None] = {
    "run": {"name", "device", "devices", "num_nodes", "strategy"},
    "data": DATA_MAY_CHANGE,
    "train": {"epochs", "early_stop_epochs", "validate_every_epochs", "preflight"},
    "checkpoint": None,
    "log": None,
    "smoke": None,
}


def find_resume(fabric: Fabric, config: RunConfig, config_path: str, resume: str | None) -> tuple[Content | None, str]:
    """--resume → (检查点内容或 None, 运行名)。auto：这份配置最近一次存过的运行；没有就从头开始。

    由零号进程挑选，各进程一致：时钟与文件时间在各处可能不同。

    Raises:
        ValueError: 检查点不在、坏了、配置对不上；从头开始而这个名字已有检查点。
    """
    stem = Path(config_path).stem
    if resume == "auto":
        pattern = f"{config.run.name or stem + '-*'}/last.ckpt"
        found = sorted(Path(config.checkpoint.dir).glob(pattern), key=lambda p: p.stat().st_mtime)
        resume = str(found[-1]) if found else None
    fresh_name = config.run.name or f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
    resume, fresh_name = fabric.broadcast((resume, fresh_name))
    if resume is None:
        if (Path(config.checkpoint.dir) / fresh_name / "last.ckpt").exists():
            raise ValueError(f"run {fresh_name} has checkpoints already; use --resume auto, or another run.name")
        return None, fresh_name
    content = load_checkpoint(resume)
    check_same_run(content["config"], config, resume)
    return content, content["run"]


def check_same_run(saved: dict[str, Any], config: RunConfig, path: str) -> None:
    """除了 MAY_CHANGE 里的键，配置必须与检查点一致；模型比较补全默认值之后的选项。

    Raises:
        ValueError: 列出每一处不同；onecycle 的曲线按总步数画好，轮数也不能改。
    """
    now = config.model_dump()
    saved = RunConfig(**saved).model_dump()  # 从前的检查点没有的键，取默认值
    saved["model"] = _full_options(saved["model"])
    now["model"] = _full_options(now["model"])
    changed = []
    for part, values in now.items():
        free = MAY_CHANGE.get(part, set())
        if free is None:
            continue
        if config.train.schedule.name == "onecycle":
            free = free - {"epochs"}
        for key in sorted((values.keys() | saved[part].keys()) - free):
            if values.get(key) != saved[part].get(key):
                changed.append(f"{part}.{key} = {saved[part].get(key)!r} in the checkpoint, {values.get(key)!r} now")
    if changed:
        raise ValueError(f"cannot resume {path}: {'; '.join(changed)}; start a new run instead")


def windows_fingerprint(data: WeatherData) -> str:
    """训练窗口的指纹：补了或删了文件，段就可能变，一轮中间的位置就不再指向同一批窗口。"""
    return hashlib.sha256(all_starts(data.segments["train"], data.spec.window).tobytes()).hexdigest()


def _full_options(options: dict[str, Any]) -> dict[str, Any]:
    return {"name": options["name"], **build_config(options).model_dump()}
