"""分享用的文件夹，Hugging Face 的布局：预报用的那份权重（safetensors），与检查点里其余说得清它是什么的（config.json）。

别人读得到它，所以里面没有哪台机器的路径：只留名字；写到哪里的几段不在里面。
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from util.checkpoint import FORMAT, Digests, check_digests, digests, forecast_weights
from util.files.bounded import read_json

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MODEL_TYPE = "ar_pred"
KEPT = ("run", "spec", "progress", "init", "first_stage", "model_options", "versions")
SECTIONS = ("run", "data", "model", "train")  # checkpoint、log 两段说的是写在哪里
MACHINE = re.compile(r"[/~]|\.\.?[/\\]|file:|\\\\|[A-Za-z]:[/\\]")  # 别的机器上没有意义的路径这样开头


def described(content: dict[str, Any], date: str) -> dict[str, Any]:
    """检查点 → config.json 的内容；date: 检查点是哪天写的。"""
    config = {key: nameless(content["config"][key]) for key in SECTIONS if key in content["config"]}
    config["data"].pop("cache_dir", None)
    about = {key: content[key] if key == "spec" else nameless(content[key]) for key in KEPT if key in content}
    return {"model_type": MODEL_TYPE, "format": FORMAT, "date": date, **about, "config": config}


def nameless(value: Any) -> Any:
    """其中像路径的文字只留最末的名字；单位不是路径，不看。"""
    if isinstance(value, dict):
        return {key: one if key == "units" else nameless(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [nameless(one) for one in value]
    if isinstance(value, str) and MACHINE.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def write_package(folder: Path, content: dict[str, Any], date: str) -> None:
    """权重（有 EMA 用 EMA）与 config.json 写进 folder。"""
    from safetensors.torch import save_file

    weights = forecast_weights(content)
    apart = {key: value.clone(memory_format=torch.contiguous_format) for key, value in weights.items()}
    save_file(apart, folder / WEIGHTS, {"format": "pt"})  # 各自一份：它不收共用存储的
    about = {**described(content, date), "digests": weight_digests(apart)}
    text = json.dumps(about, indent=1, ensure_ascii=False)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # 它写的只有自己读得


def read_package(folder: Path, verify: bool = True) -> dict[str, Any]:
    """与检查点同样的各项；没有优化器与随机状态，续不了训。verify: 核对权重的校验和。

    Raises:
        ValueError: 不是 write_package 写的，或坏了。
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / CONFIG).is_file():
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{folder}: a folder without {CONFIG}, so no package; there: {there}; name a checkpoint in it")
    try:
        about = read_json(folder / CONFIG)
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: damaged package ({error})") from None
    if not isinstance(about, dict) or (about.get("model_type"), about.get("format")) != (MODEL_TYPE, FORMAT):
        raise ValueError(f"{folder / CONFIG}: not written by inference.py --package (format {FORMAT})")
    wanted = about.pop("digests", None)
    if verify:
        check_digests(weight_digests(weights), wanted, str(folder / WEIGHTS))
    return {**about, "model": weights, "ema": None, "optimizer": None, "scheduler": None, "random": []}


def weight_digests(weights: dict[str, torch.Tensor]) -> Digests:
    """safetensors 读出来的次序是它自己的，所以先排好。"""
    return digests({"model": dict(sorted(weights.items()))})


def weights_file(path: str) -> str:
    """检查点，或分享的文件夹里的权重：它的 sha256 说权重从哪里来。"""
    return str(Path(path) / WEIGHTS) if Path(path).is_dir() else path
