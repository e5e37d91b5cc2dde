"""训练的检查点：各项在不在、是什么类型，只在这里查；缺的、错的、别的种类（缓存的基线）都是一行。"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict
from torch import Tensor

from util.batch import DataSpec
from util.checkpoint import gather_shards, load_checkpoint
from util.files.package import read_package
from util.files.records import read_record

TENSORS = ConfigDict(arbitrary_types_allowed=True)


@dataclass(frozen=True)
class _Config:
    """其余的段由 RunConfig 查。"""

    model: dict[str, Any]
    train: dict[str, Any]
    data: dict[str, Any]


@dataclass(frozen=True)
class _Progress:
    """不可少的；其余的由 engine/progress.py 查。"""

    epoch: int
    step: int
    batches: int


@dataclass(frozen=True)
class _Optimizer:
    __pydantic_config__: ClassVar[ConfigDict] = TENSORS

    state: dict[str, dict[str, Tensor]]
    param_groups: list[dict[str, Any]]


@dataclass(frozen=True)
class _Random:
    """一个进程的，见 util/checkpoint.py 的 random_state。"""

    __pydantic_config__: ClassVar[ConfigDict] = TENSORS

    python: tuple[int, list[int], float | None]
    numpy: tuple[list[int], int, int, float]
    torch: Tensor
    cuda: list[Tensor]


@dataclass(frozen=True)
class Described:
    """说得出自己是什么的：检查点、torch.export 的程序都有。"""

    __pydantic_config__: ClassVar[ConfigDict] = TENSORS

    run: str
    config: _Config
    spec: DataSpec
    progress: _Progress


@dataclass(frozen=True)
class _Training(Described):
    """后四样从前的检查点没有。"""

    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: _Optimizer | None
    scheduler: dict[str, Any] | None
    random: list[_Random]
    init: str = ""
    first_stage: dict[str, str] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)
    windows: str = ""


def load_training(path: str | Path, gather: bool = True, verify: bool = True) -> dict[str, Any]:
    """load_checkpoint，或分享的文件夹（util/files/package.py），再查各项；返回的是原样的内容。

    Raises:
        ValueError: 见 load_checkpoint；不是训练的；缺一项，或类型不对，说出是哪一项。
    """
    read = read_package(Path(path), verify) if Path(path).is_dir() else None
    content = read or load_checkpoint(path, gather=False, verify=verify)
    if content.keys() <= {"format", "model"}:  # 如 tmp/ 里缓存的气候态
        raise ValueError(f"{path} holds a baseline, not a training; name a checkpoints/RUN/best.ckpt")
    check_described(_Training, content, str(path))
    if gather and "shards" in content:
        gather_shards(content)
    return content


def check_described(kind: type[Described], content: object, where: str) -> None:
    """content 有 kind 的各项。

    Raises:
        ValueError: 缺一项，或类型不对；spec 里有不认识的。
    """
    read_record(kind, content, where)
    assert isinstance(content, dict)
    for key in content["spec"].keys() - {item.name for item in fields(DataSpec)}:
        raise ValueError(f"{where}: spec.{key} is unknown here; a newer version wrote it")
