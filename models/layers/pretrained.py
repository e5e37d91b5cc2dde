"""读 Hugging Face 的预训练权重（diffusers、transformers）：先看本地文件夹，再看缓存与网络；从不悄悄地随机初始化。"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn

RANDOM = "random"  # YAML 里写明不读权重；由各模型自己处理
CONFIG = "config.json"
# 各库的权重文件（分片的另有 .index.json），与读的时候多给的选项
LIBRARIES: dict[str, tuple[str, dict[str, Any]]] = {
    "diffusers": ("diffusion_pytorch_model.safetensors", {"low_cpu_mem_usage": False}),  # 省内存的读法要 accelerate
    "transformers": ("model.safetensors", {}),
}


def load_pretrained(cls: type[Any], weights: str, key: str = "model.weights", **options: Any) -> nn.Module:
    """config.json 定结构，.safetensors 给权重；float32，eval。

    Args:
        cls: diffusers 或 transformers 的模型类。
        weights: 本地文件夹，或 Hugging Face 的 id（OWNER/NAME）。
        key: 报错里用的键。
        options: 交给 from_pretrained 的其余选项。

    Raises:
        ValueError: 文件夹里缺文件、文件坏了、缺了或形状不同的张量；没有这个 id，或没有网络。
    """
    library = cls.__module__.partition(".")[0]
    file, extra = LIBRARIES[library]
    folder = find_folder(weights, file, key)
    try:
        with _quiet(library):
            # 形状不同的不在里面抛，与缺的一起由下面报
            model, found = cls.from_pretrained(
                folder, output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True, **extra, **options
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{key} = {weights}: {cls.__name__} cannot be read ({_first_line(error)})") from None
    for what, names in (("are missing", found["missing_keys"]), ("have other shapes", found["mismatched_keys"])):
        if names:
            raise ValueError(
                f"{key} = {weights}: {len(names)} of the weights of {cls.__name__} {what} in {file}, e.g. "
                f"{min(map(str, names))}; the file belongs to another {CONFIG} or another kind of model"
            )
    return model.float()


def find_folder(weights: str, file: str, key: str) -> Path:
    """本地文件夹原样；id 则是 Hugging Face 缓存里的文件夹，缺的文件从网络取来。

    Raises:
        ValueError: 没有这个文件夹或 id，没有网络，文件夹里没有 config.json 或权重；写明要哪些文件、怎样放。
    """
    folder = Path(weights)
    if not folder.is_dir():
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", weights):  # 不会是 id，不必去问网络
            raise ValueError(f"{key} = {weights}: no such folder; wanted there: {CONFIG} and {file}")
        if folder.parent.is_dir():  # 写成 weights/NAME 的本地文件夹，名字错了
            beside = ", ".join(sorted(path.name for path in folder.parent.iterdir())) or "nothing"
            raise ValueError(
                f"{key} = {weights}: no such folder; in {folder.parent}: {beside}; Hugging Face is not asked while "
                f"{folder.parent} is a folder here"
            )
        try:
            folder = Path(snapshot_download(weights, allow_patterns=[CONFIG, file, *_shards(file)]))
        except (OSError, ValueError) as error:  # 它自己的几种都是这两种；有 id 却不许看的也在内
            raise ValueError(
                f"{key} = {weights}: no such folder, and Hugging Face did not give it ({_first_line(error)}); "
                f"wanted: {CONFIG} and {file}. On a machine with network: hf download {weights} {CONFIG} {file} "
                f"--local-dir FOLDER; bring FOLDER here and give {key}=FOLDER"
            ) from None
    there = sorted(path.name for path in folder.iterdir())
    lacking = [] if CONFIG in there else [CONFIG]
    lacking += [] if {file, f"{file}.index.json"} & {*there} else [file]
    if lacking:
        raise ValueError(f"{key} = {weights}: no {' and no '.join(lacking)}; there: {', '.join(there) or 'nothing'}")
    return folder


def _shards(file: str) -> list[str]:
    stem, suffix = file.rsplit(".", 1)
    return [f"{file}.index.json", f"{stem}-*-of-*.{suffix}"]


def _first_line(error: Exception) -> str:
    """库的报错常有好几行。"""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    """库自己的警告由上面的检查代替：只有编码器的类读整个模型的文件，多出来的权重是寻常的。"""
    log = logging.getLogger(library)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
