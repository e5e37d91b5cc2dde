"""新的运行从哪里起步：train.init 的检查点抄来什么；学不动的参数不能是随机的。"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from models import first_stage_file
from models.interface import Network, PartlyPretrained, StartsAnew
from util.batch import DataSpec
from util.checkpoint import file_sha256, forecast_weights
from util.files.package import weights_file
from util.files.training_checkpoint import load_training

log = logging.getLogger("ar_pred")

FIRST_STAGE = "first_stage."  # 阶段一在阶段二里的名字


class Initial(NamedTuple):
    """train.init 的检查点：路径、文件的 sha256、拿去预报的那份权重、它的数据、它的阶段一从哪里来。"""

    path: str
    sha256: str
    weights: dict[str, torch.Tensor]
    spec: DataSpec
    first_stage: dict[str, str]


def first_stage_origin(options: Mapping[str, Any]) -> dict[str, str]:
    """阶段一从哪个检查点来；不是检查点时为空。"""
    path = first_stage_file(options)
    return {"path": path, "sha256": file_sha256(weights_file(path))} if path else {}


def check_start(
    model: Network, first_stage: Mapping[str, str], options: Mapping[str, Any], initial: Initial | None
) -> None:
    """新的运行里，学不动的参数不能是随机的。

    Raises:
        ValueError: 阶段一不是检查点；冻结的参数没有来处。
    """
    source = options.get("first_stage")
    if source is not None and not first_stage:
        written = source if isinstance(source, str) else "{...}"
        raise ValueError(
            f"model.first_stage = {written}: random weights, for --smoke and tests only; train the first stage and "
            "give its checkpoints/RUN/best.ckpt"
        )
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    from_files = first_stage or (isinstance(model, PartlyPretrained) and model.frozen_are_trained)
    if frozen and initial is None and not from_files:
        raise ValueError(
            f"{frozen} parameters of {options['name']} are frozen at their random start; "
            "give train.init=checkpoints/RUN/best.ckpt that holds them, or do not freeze them"
        )


def read_initial(path: str) -> Initial:
    """读 train.init 的检查点；有 EMA 就用 EMA，与预报时相同。

    Raises:
        ValueError: 文件不在、坏了、不是本程序的检查点。
    """
    content = load_training(path)
    spec = DataSpec.from_dict(content["spec"])
    return Initial(
        path, file_sha256(weights_file(path)), forecast_weights(content), spec, content.get("first_stage", {})
    )


def start_from(model: Network, initial: Initial, spec: DataSpec, first_stage: dict[str, str]) -> None:
    """名字相同的张量抄进模型，并在日志里说抄了几个；数据不同（可以是有意的）时警告。

    不抄的：模型说要从头来的（StartsAnew）；阶段一不是同一个文件时，阶段一的权重。

    Raises:
        ValueError: 同名的张量形状不同；没有一个同名。
    """
    own = model.state_dict()
    anew = model.starts_anew if isinstance(model, StartsAnew) else ()
    if first_stage.get("sha256") != initial.first_stage.get("sha256"):
        anew += (FIRST_STAGE,)
    taken = {name: value for name, value in initial.weights.items() if name in own and not name.startswith(anew)}
    for name, value in taken.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"train.init = {initial.path}: {name} is {tuple(value.shape)} there, {tuple(own[name].shape)} here"
            )
    if not taken:
        raise ValueError(f"train.init = {initial.path}: none of its {len(initial.weights)} tensors is in this model")
    model.load_state_dict(taken, strict=False)
    theirs, ours = initial.spec.to_dict(), spec.to_dict()
    for key in ("channels", "latitudes", "longitudes", "interval_hours", "mean", "std"):
        if theirs[key] != ours[key]:
            log.warning(
                "train.init %s was trained with other %s: %s, here %s", initial.path, key, theirs[key], ours[key]
            )
    log.info(
        "train.init %s (sha256 %s): %d tensors taken, %d of the model start anew",
        initial.path, initial.sha256, len(taken), len(own) - len(taken),
    )  # fmt: skip
