"""检查点文件：只有张量和普通值；先写临时名、落盘、再改名，任何时刻被杀都不会留下坏文件。

分片的检查点（checkpoint.sharded）：张量在旁边的一个文件夹里，各进程写各自的一片（safetensors），文件里是其余的与文件夹的名字。
每次存都用新的文件夹，改名的仍只是文件，所以被杀了，从前的那一个还在。

带着每个张量与其余一切（记录）的校验和，读的时候核对：zip 自己的 CRC，torch 读时不看。
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import random
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from xxhash import xxh3_128_hexdigest

from util.atomic import DISK_FULL, flush, no_room, replacing
from util.cli import out_of_memory

FORMAT, UNCHECKED = 2, 1  # UNCHECKED：从前的，没有校验和
RECORD = "the record (all that is not a tensor)"
DAMAGED = "truncated, damaged or not a checkpoint; nothing in it was executed"
INSTEAD = "take another checkpoint beside it, or --no-verify to take it as it is"
SHARDS = ".shards"  # 分片的文件夹，名字是 last-8 位十六进制.shards
PIECE = 2**24  # 算 sha256 时一次读多少字节
Digests = dict[str, str]
log = logging.getLogger("ar_pred")


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """原子地写一个检查点；写不下时从前的那一个还在。

    Raises:
        OSError: 磁盘满了、没有权限之类；说出是哪个文件，那里还有多少地方。
    """
    content = {**content, "format": FORMAT}
    size = sum(tensor.nbytes for tensor in _tensors(content))
    with written(path, size), replacing(path) as temporary:
        with temporary.open("wb") as file:
            torch.save({**content, "digests": digests(content)}, file)
        flush(temporary)


def copy_checkpoint(source: Path, target: Path) -> None:
    """原子地复制（best、epoch-NNNN 由 last 复制而来，不重写一遍）；Raises 同 save_checkpoint。"""
    with written(target, source.stat().st_size), replacing(target) as temporary:
        shutil.copyfile(source, temporary)
        flush(temporary)


@contextmanager
def written(path: Path, needed: int) -> Iterator[None]:
    """写检查点（needed 字节）时的错换成一行 OSError，说出还有哪一个是好的。

    写到一半磁盘满了，torch 收尾时报的是它自己的 RuntimeError，原因在它的上文里。
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        reason = no_room(path, cause, needed).strerror if cause.errno in DISK_FULL else cause.strerror or cause
        raise OSError(f"checkpoint {path}: {reason}; {kept(path)}") from None


def kept(path: Path) -> str:
    """path 没有写成：还有哪一个是好的，怎么办。"""
    whole = max(path.parent.glob("[!.]*.ckpt"), key=lambda found: found.stat().st_mtime_ns, default=None)
    if whole is None:
        return "there is no checkpoint yet; make room, then start again"
    return f"{whole} is whole; make room, then go on with --resume {whole}"


def write_shards(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """content 的张量各进程写各自的一片到 folder；返回余下的与各片的校验和，给 save_checkpoint。各进程都要来。

    Raises:
        OSError: 有的进程写不下，各进程都抛。
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors = flat(content)
    try:
        with together(f"checkpoint {folder}", OSError):
            save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)  # 各进程都会来删
        free = shutil.disk_usage(folder.parent).free
        raise OSError(f"{error}, {free / 1e6:.1f} MB free; {kept(folder)}") from None
    own = folder.glob(f"shard-{torch.distributed.get_rank() + 1:05d}-*")
    pieces = gathered({path.name: piece_digests(path) for path in own})
    rest = {part: None if content[part] is None else {} for part in ("model", "ema", "optimizer")}
    if content["optimizer"] is not None:
        rest["optimizer"] = {"state": {}, "param_groups": content["optimizer"]["param_groups"]}
    return {**content, **rest, "shards": folder.name, "pieces": {k: v for part in pieces for k, v in part.items()}}


def remove_shards(path: Path, kept: str | None = None) -> None:
    """path 从前的、写到一半被杀的分片。"""
    own = re.compile(rf"{re.escape(path.stem)}-[0-9a-f]{{8}}{re.escape(SHARDS)}")
    for folder in path.parent.glob(f"*{SHARDS}"):
        if own.fullmatch(folder.name) and folder.name != kept:
            shutil.rmtree(folder)


def read_shards(content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """content 的分片填进 tensors（flat 的样子，分片的只读自己的一片），与存的时候有几个进程无关。各进程都要来。

    Raises:
        ValueError: 文件不在、坏了，或形状不同。
    """
    alone = not torch.distributed.is_initialized()
    check_pieces(content, alone)
    _load(content["shards"], tensors, alone)


def flat(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """检查点里的张量，名字是 model.…、ema.…、optimizer.参数.哪一种。"""
    weights = [(part, name, value) for part in ("model", "ema") for name, value in (content[part] or {}).items()]
    states = (content["optimizer"] or {"state": {}})["state"].items()
    moments = [("optimizer", f"{name}.{kind}", value) for name, kinds in states for kind, value in kinds.items()]
    return {f"{part}.{name}": value for part, name, value in weights + moments}


def gather_shards(content: dict[str, Any]) -> None:
    """分片的检查点的张量，完整地读进 content；一个进程就够。"""
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    check_pieces(content, alone=True)
    try:
        known = HuggingFaceStorageReader(content["shards"]).read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise ValueError(f"{content['shards']}: truncated or damaged ({error})") from None
    tensors = {
        name: torch.empty(held.size, dtype=held.properties.dtype)
        for name, held in known.items()
        if isinstance(held, TensorStorageMetadata)
    }
    _load(content["shards"], tensors, alone=True)
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        if part not in ("model", "ema", "optimizer") or content[part] is None:
            raise ValueError(f"{content['shards']}: {key} belongs to no part of the checkpoint")
        if part == "optimizer":
            parameter, _, kind = name.rpartition(".")
            content[part]["state"].setdefault(parameter, {})[kind] = value
        else:
            content[part][name] = value


def _load(folder: str, tensors: dict[str, torch.Tensor], alone: bool) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with together(folder, ValueError), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # alone 正是这个意思
        load(tensors, storage_reader=HuggingFaceStorageReader(folder), no_dist=alone)


@contextmanager
def together(where: str, kind: type[Exception]) -> Iterator[None]:
    """各进程一起做的存取，谁做不成都在这里成为一行。"""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise kind(f"{where}: rank {rank}: {cause}") from None


def load_checkpoint(path: str | Path, gather: bool = True, verify: bool = True) -> dict[str, Any]:
    """读检查点到 CPU；不执行文件里的任何代码。

    Args:
        gather: 分片的也读成完整的；续训不必，各进程只读自己的一片（read_shards）。
        verify: 核对校验和，分片的在读它们的时候；从前的没有，说一声。

    Raises:
        ValueError: 文件不在、被截断、不是本程序的检查点、内含普通值以外的对象；哪一项坏了；分片不在旁边。
    """
    path = Path(path)
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        raise ValueError(f"no checkpoint {path}; there: {', '.join(beside) or 'none'}")
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # torch.save 写的是 zip；裸的 pickle 连试都不试
            raise ValueError(f"{path}: {DAMAGED}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: refused, it holds objects other than tensors and plain values (code?); nothing was executed"
        ) from None
    except Exception as error:  # noqa: BLE001  改过的文件，torch 抛哪一种的都有
        raise unreadable(path, error) from None
    if not isinstance(content, dict) or content.get("format") not in (FORMAT, UNCHECKED):
        raise ValueError(f"{path}: not an ar_pred checkpoint of format {UNCHECKED} or {FORMAT}")
    wanted = content.pop("digests", None)
    if verify and content["format"] == UNCHECKED:
        say_unchecked(path)
    elif verify:
        try:
            found = digests(content)
        except Exception as error:  # noqa: BLE001  成环的、太深的、两个张量同名的、没有数的张量
            raise unreadable(path, error) from None
        check_digests(found, wanted, str(path))
    else:
        content.pop("pieces", None)
    if "shards" in content:
        if not re.fullmatch(rf"[^/]+-[0-9a-f]{{8}}{re.escape(SHARDS)}", str(content["shards"])):
            raise ValueError(f"{path}: shards = {str(content['shards'])[:60]!r}: not the name of a folder beside it")
        folder = path.parent / content["shards"]
        if not folder.is_dir():
            raise ValueError(f"{path}: its tensors are in the folder {folder.name}, which is not beside it")
        content["shards"] = str(folder)
        if gather:
            gather_shards(content)
    return content


def unreadable(path: Path, error: Exception) -> ValueError:
    """读的时候出的错怎样说；内存不够未必是文件坏了。"""
    what = f"needs more memory than there is, or is {DAMAGED}" if out_of_memory(error) else DAMAGED
    return ValueError(f"{path}: {what} ({type(error).__name__})")


@cache
def say_unchecked(path: Path) -> None:
    """一个文件只说一次：续训、阶段一要读它几遍。"""
    log.warning("%s was written before checkpoints carried digests: damage in its values goes unnoticed", path)


def _tensors(content: Mapping[str, Any]) -> Iterable[torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    _without_tensors(content, "", found)
    return found.values()


def digests(content: Mapping[str, Any]) -> Digests:
    """content 里每个张量（名字是路径，如 model.head.weight）的校验和，连同 RECORD 的：其余一切，与张量的类型、形状。"""
    tensors: dict[str, torch.Tensor] = {}
    record = repr(_without_tensors(content, "", tensors))
    found = {name: xxh3_128_hexdigest(as_bytes(tensor).data) for name, tensor in tensors.items()}
    return {**found, RECORD: xxh3_128_hexdigest(record.encode())}


def _without_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """value 里的张量挪到 tensors，原处留下类型与形状。"""
    if isinstance(value, torch.Tensor):
        assert path not in tensors, f"two tensors called {path}"
        tensors[path] = value
        return torch.Tensor, value.dtype, tuple(value.shape)
    if isinstance(value, Mapping):
        return {k: _without_tensors(v, f"{path}.{k}" if path else str(k), tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        kept = [_without_tensors(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]
        return kept if isinstance(value, list) else tuple(kept)
    return value


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """(n,) uint8。"""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def check_digests(found: Digests, wanted: object, where: str) -> None:
    """
    Raises:
        ValueError: 头一个不同的。
    """
    held = wanted if isinstance(wanted, dict) else {}
    for name in [*held, *found]:
        if found.get(name) != held.get(name):
            said = name if str(name).isprintable() else repr(name)  # 名字是文件里的，也许坏得换了行
            raise ValueError(f"{where}: {said} is damaged, it is not what was saved; {INSTEAD}")


def check_pieces(content: Mapping[str, Any], alone: bool) -> None:
    """各片与 content["pieces"] 相同；没有的（从前的、不核对的）不看。alone 为假时各进程都要来，各看几个文件。

    Raises:
        ValueError: 头一个不同的，各进程同样。
    """
    pieces, folder = content.get("pieces"), Path(content["shards"])
    if pieces is None:
        return
    rank, world = (0, 1) if alone else (torch.distributed.get_rank(), torch.distributed.get_world_size())
    problem = None
    try:
        for name in sorted(pieces)[rank::world]:
            check_digests(piece_digests(folder / name), pieces[name], str(folder / name))
    except (ValueError, OSError) as error:
        problem = str(error)
    for said in [problem] if alone else gathered(problem):
        if said is not None:
            raise ValueError(said)


def piece_digests(path: Path) -> Digests:
    """一个 safetensors 文件的 RECORD（文件头）与每个张量的校验和；文件头读不懂时只有前者。"""
    stored = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    start = 8 + int.from_bytes(stored[:8].tobytes(), "little")
    header = stored[:start].tobytes()
    found = {RECORD: xxh3_128_hexdigest(header)}
    try:
        spans = {
            name: about["data_offsets"] for name, about in json.loads(header[8:]).items() if name != "__metadata__"
        }
        return found | {name: xxh3_128_hexdigest(stored[start + a : start + b].data) for name, (a, b) in spans.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return found


def gathered(own: Any) -> list[Any]:
    """各进程的 own。"""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return found


def file_sha256(path: str | Path) -> str:
    """文件内容的 sha256：权重从哪个文件来，记的是它。"""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def forecast_weights(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """检查点里拿去预报的那份权重：有 EMA 用 EMA。"""
    if content["ema"] is None:
        return content["model"]
    return {k.removeprefix("module."): v for k, v in content["ema"].items() if k.startswith("module.")}


def random_state() -> dict[str, Any]:
    """全部全局随机发生器的状态，换成普通值。"""
    _, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  存的正是全局状态
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """random_state 的逆；显卡数不同时显卡的状态不动。"""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
