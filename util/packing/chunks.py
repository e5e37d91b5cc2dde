"""存档的一块：读出它的各个时刻，写下块、插值的邻居和一份记录。各块互不相干，哪个进程先做都一样。"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from util.atomic import replacing
from util.data.origin import DataError
from util.data.reader import FieldReader
from util.files.store_files import FILLS_KNOWN, StorePlan, bytes_digest, torch_type
from util.files.zarr_metadata import chunk_name, write_json


class PackJob(NamedTuple):
    """打包各进程共有的。hours: (N,) 各行的小时；first、last: (C,) 各通道最早、最晚的文件在 reader.present 里的位置。"""

    store: Path
    plan: StorePlan
    hours: np.ndarray
    reader: FieldReader
    first: np.ndarray
    last: np.ndarray

    @property
    def chunks(self) -> int:
        """块数。"""
        return -(-self.hours.size // self.plan.chunk_rows)

    def rows(self, number: int) -> np.ndarray:
        return self.hours[number * self.plan.chunk_rows : (number + 1) * self.plan.chunk_rows]


def make_job(store: Path, plan: StorePlan, hours: np.ndarray, reader: FieldReader) -> PackJob:
    present = reader.present.numpy()
    first = np.where(present.any(axis=1), present.argmax(axis=1), present.shape[1])
    last = np.where(present.any(axis=1), present.shape[1] - 1 - present[:, ::-1].argmax(axis=1), -1)
    return PackJob(store.absolute(), plan, hours, reader, first, last)  # 别处的工人不在这个文件夹里


def chunk_path(store: Path, number: int) -> Path:
    return store / "fields" / chunk_name(number, 4)


def record_path(store: Path, number: int) -> Path:
    return store / "pack" / f"{number:06d}.json"


def raw_path(store: Path, number: int) -> Path:
    return record_path(store, number).with_suffix(".raw")


def read_chunk_record(job: PackJob, number: int) -> dict[str, Any] | None:
    """这一块做完时的记录；没有做、没有做完，或要读的文件已经不同（补了、删了、往后加了年份）就是 None。"""
    path, chunk = record_path(job.store, number), chunk_path(job.store, number)
    if not path.is_file() or not chunk.is_file() or chunk.stat().st_size != job.plan.chunk_bytes:
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        whole = not record["raws"] or raw_path(job.store, number).is_file()
        same = record["inputs"] == inputs_digest(job, number)
        return record if whole and same and record["raw_stamps"] == stamps_digest(job, record["raws"]) else None
    except (ValueError, KeyError, TypeError):  # 记录坏了，重做这一块
        return None


def inputs_digest(job: PackJob, number: int) -> str:
    """决定这一块内容的：各行的小时、文件（换过没有），前后 max_gap_hours 以内按名字存在的，更远处还有没有。"""
    hours, gap = job.rows(number), job.plan.max_gap_hours
    low = max(0, int(hours[0]) - gap - job.reader.start)
    high = int(hours[-1]) + gap + 1 - job.reader.start
    digest = hashlib.blake2b(FILLS_KNOWN.encode(), digest_size=16)  # 没有认过填充值的块重做
    for part in (hours, job.reader.present.numpy()[:, low:high], job.first < low, job.last >= high):
        digest.update(np.ascontiguousarray(part).tobytes())
    here = job.reader.present.numpy()[:, hours - job.reader.start]  # (C, n)
    digest.update(stamps_digest(job, [(c, int(hours[i])) for c, i in np.argwhere(here).tolist()]).encode())
    return digest.hexdigest()


def stamps_digest(job: PackJob, fields: Iterable[Sequence[int]]) -> str:
    """这些 (通道, 小时) 的文件换过没有：大小与修改时间。"""
    digest = hashlib.blake2b(digest_size=16)
    for c, hour in fields:
        digest.update(f"{job.reader.origin.stamp(c, hour)}\n".encode())
    return digest.hexdigest()


def pack_chunk(job: PackJob, number: int) -> int:
    """读出、写下第 number 块，返回它的字节数；记录最后写，有它这一块就算做完。

    Raises:
        ValueError: 半精度装不下的值。
        OSError: 磁盘满之类。
    """
    hours, plan, reader = job.rows(number), job.plan, fresh(job.reader)
    inputs = inputs_digest(job, number)  # 在读之前：读的途中换了文件，下一次就会重做
    block = np.full(plan.shape, np.nan, dtype=np.float32)  # 最后一块不满的部分、补不上的空缺是 NaN
    raws: dict[tuple[int, int], np.ndarray] = {}
    gaps: list[list[Any]] = []
    for i, c in reader.load(hours.tolist(), block[: hours.size]):
        hour = int(hours[i])
        raws.update({(c, h): field for h, field in reader.near(c, hour, plan.max_gap_hours).items()})
        try:
            gaps.append([c, hour, reader.interpolate(c, hour, None, block[i, c])])
        except DataError:  # 空缺太长：训练的窗口也不会用到它，用到时同样报错
            block[i, c] = np.nan
            gaps.append([c, hour, []])
    if not raws:
        raw_path(job.store, number).unlink(missing_ok=True)  # 上一次有空缺，这一次补上了
    faults = [[c, h, error.fault, error.detail] for (c, h), error in reader.faults.items()]
    stored = torch.from_numpy(block).to(torch_type(plan))
    record = {
        "inputs": inputs,
        "raw_stamps": stamps_digest(job, raws),
        "digest": write_bytes(chunk_path(job.store, number), stored.view(torch.uint8).numpy().data.cast("B")),
        "raws": [[c, h] for c, h in raws],
        "raw_digest": write_bytes(raw_path(job.store, number), np.stack([*raws.values()]).tobytes()) if raws else None,
        "faults": faults,
        "gaps": gaps,
        "rounding": rounding(plan, block[: hours.size], stored[: hours.size]),
    }
    write_json(record_path(job.store, number), record)
    return plan.chunk_bytes


def fresh(reader: FieldReader) -> FieldReader:
    """每一块都从「按名字」开始、自己记坏文件：记录才与哪个进程（线程）、什么次序无关。"""
    reader = copy(reader)
    reader.present, reader.faults = reader.present.clone(), {}
    return reader


def rounding(plan: StorePlan, block: np.ndarray, stored: torch.Tensor) -> list[list[float]]:
    """各通道存成 dtype 的误差（标准差为单位）：[最大, 平方和, 个数]；float32 没有误差，是空表。

    Raises:
        ValueError: 变成了无穷。
    """
    if plan.dtype == "float32":
        return []
    result = []
    for c, channel in enumerate(plan.channels):
        exact = block[:, c].astype(np.float64)  # (n, H, W)
        good = np.isfinite(exact)
        error = np.abs(stored[:, c].double().numpy()[good] - exact[good])
        if not np.isfinite(error).all():
            raise ValueError(
                f"{channel}: a standardised value of {np.abs(exact[good]).max():.4g} does not fit into {plan.dtype}; "
                "pack with --dtype float32 or bfloat16"
            )
        result.append([float(error.max(initial=0.0)), float((error**2).sum()), int(good.sum())])
    return result


def write_bytes(path: Path, data: bytes | memoryview) -> str:
    """原子地写，落盘才改名；返回校验和。不用内存映射：磁盘满时那是 SIGBUS，这里是 OSError。"""
    with ThreadPoolExecutor(1) as pool, replacing(path) as temporary, temporary.open("wb") as file:
        digest = pool.submit(bytes_digest, data)  # 等盘的时候算
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return digest.result()
