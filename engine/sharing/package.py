"""inference.py --package：检查点 → 别人拿了就能用的文件夹：权重、config.json、卡片、导得出时的程序。"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from engine.forecasting.program import traced, why_not, write_program
from engine.loading import load_forecaster
from engine.sharing.card import front_matter, make_card, written_on
from util.atomic import flush, replacing
from util.files.package import described, write_package
from util.files.training_checkpoint import load_training

log = logging.getLogger("ar_pred")
PROGRAM, README = "model.pt2", "README.md"


def write_folder(checkpoint: str, folder: Path) -> int:
    """写好了才改名，中断不会留下半个。

    Raises:
        ValueError: folder 里已经有东西；检查点不对。
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"--package {folder}: there already, and not an empty folder; give another name")
    content = load_training(checkpoint)
    date = written_on(content, checkpoint)
    model, spec = load_forecaster(content, torch.device("cpu"))
    name = content["config"]["model"]["name"]
    reason = why_not(model, name)
    with replacing(folder.absolute()) as temporary:
        temporary.mkdir()
        write_package(temporary, content, date)
        if reason is None:
            program, facts = traced(model, spec, name)
            kept = {key: described(content, date)[key] for key in ("run", "config", "spec", "progress")}
            write_program(temporary / PROGRAM, program, {**kept, **facts})
        file = PROGRAM if reason is None else None
        card = make_card(content, model, folder.absolute().name, date, file)
        (temporary / README).write_text(front_matter(content) + card, encoding="utf-8")
        for file in temporary.iterdir():
            flush(file)
    log.info("package: %s%s", folder, "" if reason is None else f"; without a program: {reason}")
    return 0
