"""模型的名字就是文件名：models/<name>.py 里的 Config 与 Model；加一个模型不必改任何已有文件。"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from util.batch import DataSpec
from util.config import nearest, validate

NOT_MODELS = {"__init__", "interface"}


def model_names() -> list[str]:
    """models/ 下全部可用的名字。"""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in NOT_MODELS)


def build_config(options: Mapping[str, Any], where: str = "model") -> Any:
    """YAML 的 model 段 → 该模型的 Config（严格）。

    Raises:
        ValueError: 没有 name、没有这个模型、键或类型不对。
    """
    name = options.get("name")
    if name not in model_names():
        raise ValueError(
            f"{where}: model.name = {name!r}: no such model; {nearest(str(name), model_names(), 'models')}"
        )
    module = importlib.import_module(f"models.{name}")
    return validate(module.Config, {k: v for k, v in options.items() if k != "name"}, where, "model")


def build_model(options: Mapping[str, Any], spec: DataSpec) -> Any:
    """造出模型（随机数取自全局发生器）。

    Raises:
        ValueError: 配置不对，或这个模型做不到 spec 要求的事（由构造函数说明）。
    """
    config = build_config(options)
    return importlib.import_module(f"models.{options['name']}").Model(config, spec)
