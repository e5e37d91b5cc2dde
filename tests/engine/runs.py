"""各引擎测试共用的小运行：写一份 YAML，在本进程或子进程里训练。"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
SMALL_MODEL = {
    "name": "ar_pred_video_vanilla",
    "token_size": [4, 4],
    "dim": 16,
    "depth": 1,
    "heads": 2,
    "decoder_depth": 1,
    "decoder_width": 16,
    "decoder_heads": 2,
}


def write_run(folder: Path, tree: Any, **changes: Any) -> Path:
    """在 folder 里写 run.yaml：一月训练、二月前后各十天验证和测试；changes 里的段盖在上面。"""
    values: dict[str, Any] = {
        "run": {"device": "cpu"},
        "data": {
            **tree.data,
            "frames_in": 3,
            "splits": {
                "train": ["2000-01-01", "2000-01-31"],
                "val": ["2000-02-01", "2000-02-10"],
                "test": ["2000-02-11", "2000-02-20"],
            },
        },
        "model": dict(SMALL_MODEL),
        "train": {"epochs": 2, "batch_size": 4, "lr": 1e-3, "preflight": False},
        "checkpoint": {"dir": str(folder / "checkpoints")},
        "log": {"dir": str(folder / "log"), "every_steps": 1, "figures": 0, "wandb": {"mode": "disabled"}},
    }
    for section, keys in changes.items():
        values[section] = {**values.get(section, {}), **keys}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def run_script(script: str, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """在仓库根目录跑一个根脚本。"""
    return subprocess.run(command(script, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, script, *arguments]


def start_script(script: str, *arguments: str) -> subprocess.Popen[str]:
    """同上，但不等它结束（要发信号的测试用）。"""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(script, *arguments), cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def train_here(config: Path, *overrides: str, resume: str | None = None, **flags: bool) -> int:
    """在本进程里训练一次，返回退出码。"""
    from engine.training.loop import train
    from util.config import load_config

    return train(load_config(config, overrides), str(config), resume, **flags)


def train_small(folder: Path, tree: Any, **changes: Any) -> Path:
    """在 folder 里训练一轮，返回 best.ckpt；changes 同 write_run。"""
    train_here(write_run(folder, tree, **{"train": {"epochs": 1}, **changes}), "run.name=small")
    return folder / "checkpoints/small/best.ckpt"


def losses(folder: Path, run: str, split: str = "train", name: str = "loss") -> list[tuple[int, float]]:
    """metrics.csv 里的 (步, 值)。"""
    from util.logger import read_metrics

    rows = read_metrics(folder / "log" / run / "metrics.csv")
    return [(r.step, r.value) for r in rows if r.split == split and r.name == name]


def checkpoint(folder: Path, run: str, name: str = "last") -> dict[str, Any]:
    from util.checkpoint import load_checkpoint

    return load_checkpoint(folder / "checkpoints" / run / f"{name}.ckpt")


def state_digests(content: dict[str, Any]) -> dict[str, str]:
    """训练的检查点里，续训要逐位相同的：权重、优化器、随机数、走到哪里。"""
    from util.checkpoint import digests

    progress = {key: content["progress"][key] for key in ("epoch", "step", "batches", "best")}
    moments = content["optimizer"] and content["optimizer"]["state"]  # 其余的是选项，读回来 betas 由一对成了一列
    return digests({**{key: content[key] for key in ("model", "ema", "random")}, "optimizer": moments, **progress})


def sentences(text: str | Sequence[str]) -> str:
    """错误行便于匹配：空白压成一个空格。"""
    return " ".join((text if isinstance(text, str) else " ".join(text)).split())
