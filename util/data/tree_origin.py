"""目录树作为数据的来源。"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from util.calendar import moment_of, year_start
from util.config import DataConfig
from util.data.index import Index, scan, years_there
from util.data.normalize import decide_standardized
from util.data.tree_files import (
    FieldError,
    channel_fills,
    field_path,
    plain_header,
    read_field,
    read_into,
    read_mean_std,
    read_static,
    select_channels,
    static_names,
    usual_header,
)
from util.files.fills import Fills, refuse_filled
from util.variables import channel_folder

log = logging.getLogger("ar_pred")


class Tree:
    """目录树。"""

    standardized = False
    dtype = torch.float32

    def __init__(self, config: DataConfig) -> None:
        self.config, self.root, self.channels = config, config.root, select_channels(config)
        self.shape = (config.latitude.count, config.longitude.count)
        self.header = usual_header(self.shape)
        self.stems: dict[int, list[str]] = {}  # 年 → 各通道的路径，缺末尾的 NNNN.npy

    @cached_property
    def fills(self) -> list[Fills]:
        """各通道认作填充值的。"""
        return [channel_fills(self.config, channel) for channel in self.channels]

    def years(self, wanted: Sequence[int]) -> list[int]:
        return years_there(self.root, self.channels, wanted)

    def index(self, years: list[int]) -> Index:
        return scan(self.config, self.channels, years)

    def mean_std(self) -> list[tuple[float, float]]:
        found = [read_mean_std(self.root, channel) for channel in self.channels]
        for channel, (_, std) in zip(self.channels, found, strict=True):
            where = str(Path(self.root) / channel_folder(channel) / "mean_std.json")
            refuse_filled(
                where, std, "python dataset.py statistics --config CONFIG --write --overwrite computes it again"
            )
        return found

    def decide(self, index: Index, training: np.ndarray) -> bool:
        mean, std = zip(*self.mean_std(), strict=True)
        return decide_standardized(self.config, index, training, self.shape, mean, std, log)

    def load(self, hours: Sequence[int], here: np.ndarray, out: np.ndarray) -> list[tuple[int, int, FieldError]]:
        """here (n, C) 为真的场读进 out (n, C, H, W)；返回坏文件 (第几个小时, 通道, 毛病)，它们在 out 里的内容不定。"""
        bad = []
        for i, hour in enumerate(hours):
            paths = self._paths(hour)
            for c in np.flatnonzero(here[i]).tolist():
                if not read_into(paths[c], self.header, out[i, c], self.fills[c]):
                    try:
                        self._read_unusual(c, hour, out[i, c])
                    except FieldError as error:
                        bad.append((i, c, error))
        return bad

    def file(self, c: int, hour: int) -> Path:
        return field_path(self.root, self.channels[c], hour)

    def raw(self, c: int, hour: int) -> np.ndarray:
        return read_field(field_path(self.root, self.channels[c], hour), self.shape, self.fills[c])

    def static_names(self) -> list[str]:
        return static_names(self.root)

    def static(self, name: str) -> np.ndarray:
        return read_static(self.root, name, self.config.latitude, self.config.longitude).values

    def stamp(self, c: int, hour: int) -> str:
        try:
            stems, name = self._stems(hour)
            found = os.stat(stems[c] + name)
        except FileNotFoundError:
            return ""
        return f"{found.st_size} {found.st_mtime_ns}"

    def _paths(self, hour: int) -> list[str]:
        """这一小时各通道的文件。"""
        stems, name = self._stems(hour)
        return [stem + name for stem in stems]

    def _stems(self, hour: int) -> tuple[list[str], str]:
        """各通道的路径，缺末尾；这一小时的末尾。同 field_path，但一年只排一次，读一个文件才十几微秒。"""
        year = moment_of(hour).year
        if year not in self.stems:
            paths = [str(field_path(self.root, channel, year_start(year))) for channel in self.channels]
            self.stems[year] = [path.removesuffix("0000.npy") for path in paths]
        return self.stems[year], f"{hour - year_start(year):04d}.npy"

    def _read_unusual(self, c: int, hour: int, out: np.ndarray) -> None:
        """read_into 不认的文件：坏的在这里说清；好的就记住它的文件头，同样写成的下一个便认得。"""
        out[...] = self.raw(c, hour)
        self.header = plain_header(field_path(self.root, self.channels[c], hour), self.shape) or self.header
