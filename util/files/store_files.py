"""存档在盘上的样子：plan.json、store.json、各文件的校验和；读取（store_origin）与打包共用。"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from xxhash import xxh3_128, xxh3_128_hexdigest

from util.calendar import years_text
from util.files.bounded import read_json
from util.files.zarr_metadata import FILE_TYPES, chunk_name, json_digest, write_json

FORMAT, BLAKE2B = 3, 2  # BLAKE2B：从前的，校验和全是 blake2b
XXH3 = "xxh3:"  # 校验和前的这一截；没有的是 blake2b，慢十几倍，训练时就不能边读边核对
MARK = "store.json"
FILLS_KNOWN = "fills_known"  # store.json 里有它，就是打包时认过填充值的
PLAN = "pack/plan.json"
LIST_DAMAGE = "python dataset.py verify --out"
MAY_GROW = (
    "years",
    "root",
    "commands",
    "standardize",
    "extremes",
    "tendencies",
    "static",
)  # 再次打包时可以与从前不同的
TIMES, PRESENT = "time/0", "present.npy"
DECISIVE = (TIMES, PRESENT)  # 小，却定着每个窗口：打开时就核对


@dataclass(frozen=True)
class StorePlan:
    """存档是什么：MAY_GROW 之外的，打包开始之后就不能再变。

    气压 hPa，单层变量为 None；extremes 是各通道 min_max.json 里的最小、最大，没有就是 None；
    tendencies 是各通道变化的标准差与隔几小时（tree_files.Tendency），没有就是 None；
    static 是不随时间变的场（数组 static_NAME）各自的单位、统计量与校验和；其余见 DataSpec。
    """

    channels: list[str]
    units: list[str]
    pressures: list[float | None]
    latitudes: list[float]
    longitudes: list[float]
    mean: list[float]
    std: list[float]
    standardized: bool
    standardize: str
    utc_offset_hours: int
    interval_hours: int
    max_gap_hours: int
    dtype: str
    chunk_rows: int
    years: list[int]
    root: str
    commands: list[str]
    extremes: list[list[float] | None]
    first_hour: int = 0  # 从前的存档没有这一项
    tendencies: list[list[float] | None] = field(default_factory=list)  # 这一项也没有
    static: dict[str, dict[str, Any]] = field(default_factory=dict)  # 这一项也没有

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """一块的形状 (n, C, H, W)。"""
        return self.chunk_rows, len(self.channels), len(self.latitudes), len(self.longitudes)

    @property
    def chunk_bytes(self) -> int:
        return int(np.prod(self.shape)) * FILE_TYPES[self.dtype].itemsize

    @property
    def years_text(self) -> str:
        return years_text(self.years)


def torch_type(plan: StorePlan) -> torch.dtype:
    return getattr(torch, plan.dtype)


def read_mark(path: Path) -> dict[str, Any]:
    """store.json 的内容：plan、files（相对路径 → 校验和）、faults、neighbours、gaps。

    Raises:
        ValueError: 不是存档、没有打包完、坏了。
    """
    command = "python dataset.py pack --config CONFIG --out"
    if not (path / MARK).is_file():
        if (path / PLAN).is_file():
            raise ValueError(f"the store {path} is not complete; run {command} {path} again, it goes on from there")
        raise ValueError(f"{path} is not a store (no {MARK} in it); write one with {command} {path}")
    try:
        content = read_json(path / MARK)
        digest = content.pop("digest")
    except (ValueError, KeyError, AttributeError):
        content, digest = {}, None
    if digest is None or digest != json_digest(content):
        raise ValueError(f"{path / MARK} is damaged; remove it and run {command} {path} again")
    if content["format"] not in (FORMAT, BLAKE2B):
        raise ValueError(f"the store {path} has format {content['format']}, this program reads {FORMAT}")
    return content


def write_mark(path: Path, content: dict[str, Any]) -> None:
    content = {"format": FORMAT, **content}
    write_json(path / MARK, {**content, "digest": json_digest(content)})


def read_plan(path: Path) -> StorePlan | None:
    """打包开始时写下的 plan；没有就是 None。

    Raises:
        ValueError: 坏了，或不是这一版写的。
    """
    if not (path / PLAN).is_file():
        return None
    try:
        values = dict(read_json(path / PLAN))
    except (ValueError, TypeError):
        raise ValueError(
            f"{path / PLAN}: damaged; remove it and run the same command again, the chunks already packed are kept"
        ) from None
    try:
        return StorePlan(**values)
    except TypeError:  # 少了键，或有不认识的
        raise ValueError(f"{path / PLAN}: written by another version; remove {path} and pack again") from None


def write_plan(path: Path, plan: StorePlan) -> None:
    write_json(path / PLAN, asdict(plan))


def read_hours(path: Path, plan: StorePlan) -> np.ndarray:
    """(N,) int64 各行的小时，文件名的历法（坐标 time 是 UTC）。"""
    return np.fromfile(path / TIMES, "<i8") + plan.utc_offset_hours


def static_array(name: str) -> str:
    """不随时间变的场在存档里的数组名；冠以 static_，才不与坐标、统计量重名。"""
    return f"static_{name}"


def bytes_digest(data: bytes | memoryview) -> str:
    """写下的文件的校验和。"""
    return XXH3 + xxh3_128_hexdigest(data)


def file_digest(path: Path, like: str = XXH3) -> str:
    """文件的校验和，与 like 同一种：旧的存档里是 blake2b，追加的块不是。"""
    digest = xxh3_128() if like.startswith(XXH3) else hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return (XXH3 if like.startswith(XXH3) else "") + digest.hexdigest()


def find_damage(path: Path, digest: str) -> str | None:
    """一个文件哪里不对；没有不对是 None。"""
    if not path.is_file():
        return "missing"
    try:
        return None if file_digest(path, digest) == digest else "checksum differs"
    except OSError as error:
        return f"unreadable ({error.strerror})"


def check_digests(path: Path, files: Mapping[str, str]) -> None:
    """DECISIVE 各文件与 files 里的校验和相同。

    Raises:
        ValueError: 头一个不对的。
    """
    for name in DECISIVE:
        if found := find_damage(path / name, files[name]):
            raise ValueError(f"{path / name}: {found}; {LIST_DAMAGE} {path} lists what is damaged")


def check_sizes(path: Path, plan: StorePlan, count: int) -> None:
    """count 块都在，大小都对。

    Raises:
        ValueError: 头一个不对的。
    """
    for number in range(count):
        chunk = path / "fields" / chunk_name(number, 4)
        size = chunk.stat().st_size if chunk.is_file() else None
        if size != plan.chunk_bytes:
            found = "missing" if size is None else f"{size} bytes, expected {plan.chunk_bytes}"
            raise ValueError(f"{chunk}: {found}; {LIST_DAMAGE} {path} lists what is damaged")
