"""续训：接哪个检查点，占下哪个运行的文件夹，哪些配置可以与它不同，窗口还是不是那些窗口。"""

from __future__ import annotations

import glob
import hashlib
import logging
from contextlib import ExitStack
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from engine.loading import DATA_MAY_CHANGE, Content, run_name
from engine.parallel import from_main
from models import build_config
from util.atomic import reserved
from util.batch import DataSpec
from util.config import RunConfig
from util.data.batches import all_starts
from util.data.dataset import WeatherData
from util.files.training_checkpoint import load_training
from util.strict import brief, folder_name, validate

log = logging.getLogger("ar_pred")

# 续训时可以与检查点不同的键；None 表示整段。其余的一变，就不再是同一次训练
# fmt: off
MAY_CHANGE: dict[str, set[str] | None] = {
    "run": {"name", "device", "devices", "num_nodes", "strategy"},
    "data": DATA_MAY_CHANGE,
    "train": {
        "epochs", "early_stop_epochs", "validate_every_epochs", "preflight", "compile", "activation_checkpointing",
        "skip_nonfinite",
    },
    "checkpoint": None,
    "log": None,
    "smoke": None,
}
# fmt: on


def find_resume(
    fabric: Fabric, config: RunConfig, config_path: str, resume: str | None, held: ExitStack, verify: bool = True
) -> tuple[Content | None, str]:
    """--resume → (检查点内容或 None, 运行名)；运行的文件夹已经占下，held 关上时放开。

    由零号进程挑选、占下，各进程一致：时钟与文件时间在各处可能不同。

    Raises:
        ValueError: 检查点不在、坏了、配置对不上；从头开始而这个名字已有检查点；别的进程正在跑它。
    """
    path, name = from_main(fabric, lambda: claim_run(config, Path(config_path).stem, resume, held, verify))
    if path is None:
        return None, name
    content = load_training(path, gather=False, verify=verify)  # 占下之后再读：在那之前它可能还在存
    check_same_run(content["config"], config, path)
    return content, name


def claim_run(
    config: RunConfig, stem: str, resume: str | None, held: ExitStack, verify: bool = True
) -> tuple[str | None, str]:
    """(接着训练的检查点或 None, 运行名)，占下它的文件夹；auto 是这份配置最近一次存过的运行，没有就从头开始。

    Raises:
        ValueError: 见 find_resume。
    """
    if resume == "auto":
        pattern = f"{config.run.name or glob.escape(stem) + '-*'}/last.ckpt"
        found = sorted(Path(config.checkpoint.dir).glob(pattern), key=lambda p: p.stat().st_mtime)
        resume = str(found[-1]) if found else None
    if resume and Path(resume).is_dir():
        raise ValueError(
            f"--resume {resume}: a folder; name a checkpoint in it, or train.init={resume} if inference.py --package "
            "wrote it: it holds weights and no state of a training"
        )
    if resume:
        name = run_name(load_training(resume, gather=False, verify=verify), resume)
    else:
        name = config.run.name or make_name(config, stem)
    for folder in run_folders(config, name):
        held.enter_context(reserved(folder, "wait for it to end, or give another run.name"))
    if resume is None and (Path(config.checkpoint.dir) / name / "last.ckpt").exists():
        raise ValueError(f"run {name} has checkpoints already; use --resume auto, or another run.name")
    return resume, name


def run_folders(config: RunConfig, name: str) -> list[Path]:
    """运行的文件夹：日志的、检查点的；写在一处的只有一个。"""
    folders = (Path(config.log.dir) / name, Path(config.checkpoint.dir) / name)
    return list({folder.resolve(): folder for folder in folders}.values())


def make_name(config: RunConfig, stem: str) -> str:
    """没有名字的新运行以时刻为名，文件夹当场建立；同一秒里已有人用了，就添上 -2、-3。

    Raises:
        ValueError: 配置的文件名里有不能作名字的。
    """
    first = f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        folder_name(f"{first}-999")
    except ValueError as error:
        raise ValueError(f"the run would be called {brief(first)}: {error}; give run.name=NAME") from None
    names = chain([first], (f"{first}-{number}" for number in count(2)))
    return next(name for name in names if make_folders(run_folders(config, name)))


def make_folders(folders: list[Path]) -> bool:
    """建立这几个新的文件夹；有一个已经在了就一个也不要。"""
    for done, folder in enumerate(folders):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            for made in folders[:done]:
                made.rmdir()
            return False
    return True


def check_same_run(saved: dict[str, Any], config: RunConfig, path: str) -> None:
    """除了 MAY_CHANGE 里的键，配置必须与检查点一致；模型比较补全默认值之后的选项。

    Raises:
        ValueError: 列出每一处不同；onecycle 的曲线按总步数画好，轮数也不能改。
    """
    now = config.model_dump()
    saved = validate(RunConfig, saved, f"{path}: its config").model_dump()  # 从前的检查点没有的键，取默认值
    saved["model"] = _full_options(saved["model"])
    now["model"] = _full_options(now["model"])
    if now["train"]["batch_size"] == "auto":
        now["train"]["batch_size"] = saved["train"]["batch_size"]
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


def windows_fingerprint(config: RunConfig, data: WeatherData) -> str:
    """训练窗口的指纹：补了或删了文件，段就可能变，一轮中间的位置就不再指向同一批窗口。"""
    return hashlib.sha256(all_starts(data.segments["train"], reach(config, data.spec)).tobytes()).hexdigest()


def reach(config: RunConfig, spec: DataSpec) -> int:
    """滚得最长的一次、最远的时效要几帧，历史在内。"""
    return spec.frames_in + spec.ahead(config.train.objective.rollout.longest)


def _full_options(options: dict[str, Any]) -> dict[str, Any]:
    return {"name": options["name"], **build_config(options).model_dump()}
