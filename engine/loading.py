"""检查点 → 能用的模型：造模型、装权重、核对数据；训练、预报、评测都从这里打开。"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from engine.blocks import compile_blocks
from models import build_model, change_options, check_weights
from models.interface import Learner, Network
from util.batch import DataSpec
from util.checkpoint import forecast_weights
from util.config import DataConfig, RunConfig, apply_overrides
from util.strict import brief, folder_name, validate

# 数据在哪里、怎样读：与训练时不同，还是同一次训练、同一个模型
DATA_MAY_CHANGE = {"root", "source", "store", "residency", "workers", "pin_memory", "cache_dir", "max_missing"}
DATA_MAY_CHANGE |= {"verify", "retry_seconds"}
DATA_MAY_CHANGE |= {"parts", "statistics"}  # 几个数据集合成一个时，各自在哪里
# 检查点的配置里要往那里写的：不跟着走，检查点可能是别人给的
NOT_FOLLOWED = ("run.name=null", f"data.cache_dir={DataConfig.model_fields['cache_dir'].default}")
Content = dict[str, Any]
log = logging.getLogger("ar_pred")


def checkpoint_config(content: Content, path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """检查点里的配置，`data.KEY=VALUE` 盖在上面：换了机器，数据在别处。缓存写在默认的地方，或命令行说的地方。

    Raises:
        ValueError: 不是 DATA_MAY_CHANGE 里的键；值不对。
    """
    for text in overrides:
        if not says_where(text):
            free = sorted(f"data.{name}" for name in DATA_MAY_CHANGE)
            raise ValueError(
                f"override {text!r}: a checkpoint carries its own config; only {', '.join(free)} may change"
            )
    config: RunConfig = validate(RunConfig, apply_overrides(content["config"], (*NOT_FOLLOWED, *overrides)), path)
    theirs = content["config"]["data"].get("cache_dir", config.data.cache_dir)
    if theirs != config.data.cache_dir and not any(text.startswith("data.cache_dir=") for text in overrides):
        log.warning(
            "%s: caches go to %s, not to the %s of its training; give data.cache_dir=%s to use those",
            path, config.data.cache_dir, theirs, theirs,
        )  # fmt: skip
    return config


def run_name(content: Content, path: str) -> str:
    """检查点说的运行名，要作文件夹、文件的名字时用：与配置里的守同样的规矩。

    Raises:
        ValueError: 见 folder_name。
    """
    try:
        return folder_name(content["run"])
    except ValueError as error:
        raise ValueError(
            f"{path}: its run is called {brief(content['run'])}: {error}; train.init={path} starts a new run from it"
        ) from None


def says_where(override: str) -> bool:
    """只说数据在哪里、怎样读的 `data.KEY=VALUE`。"""
    part, _, key = override.partition("=")[0].strip().partition(".")
    return part == "data" and key.partition(".")[0] in DATA_MAY_CHANGE


def check_same_data(saved: DataSpec, found: DataSpec, path: str) -> None:
    """检查点与数据必须是同一组通道、网格、间隔和统计量。

    Raises:
        ValueError: 第一处不同，两边的值都给出。
    """
    one, two = saved.to_dict(), found.to_dict()
    for key in dict.fromkeys([*one, *two]):
        value, other = one.get(key), two.get(key)
        if value != other:
            raise ValueError(f"{path} was trained with {key} = {_brief(value)}, the data set has {_brief(other)}")


def _brief(value: object) -> str:
    return (
        str(value)
        if not isinstance(value, list) or len(value) <= 12
        else f"{len(value)} values from {value[0]} to {value[-1]}"
    )


def model_options(content: Content) -> dict[str, Any]:
    """检查点 → 造模型的选项，不必再读别的文件；从前的检查点只有配置。"""
    return content.get("model_options") or content["config"]["model"]


def load_weights(model: Network, weights: dict[str, Any]) -> None:
    """把检查点的权重装进模型。

    Raises:
        ValueError: 名字或形状不符（检查点属于另一个网格、通道组或另一种大小的模型）。
    """
    check_weights(model, weights, "checkpoint does not fit this model")
    assert isinstance(model, nn.Module)
    model.load_state_dict(weights)


def load_forecaster(
    content: Content, device: torch.device, changes: Sequence[str] = (), compiled: bool = False
) -> tuple[Learner, DataSpec]:
    """检查点 → 可以预报的模型（eval，训练时有 EMA 就用 EMA）和它的 DataSpec；changes 见 change_options。

    compiled: 逐块编译。

    Raises:
        ValueError: 选项不对；要编译而没有块、没有编译器。
    """
    spec = DataSpec.from_dict(content["spec"])
    model = build_model(change_options(model_options(content), changes), spec)
    load_weights(model, forecast_weights(content))
    model = model.to(device).eval()
    if compiled:
        compile_blocks(model, "--compile")
    return model, spec
