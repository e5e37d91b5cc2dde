"""成绩的原料 statistics.nc：每个模型、起报时间、时效、通道一个可平均的数；边算边写，内存与窗口数无关。

一切成绩都由它平均而来（tabulate.py），别的运行也能与它在共同的（起报时间，时效）上相比。
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from util.atomic import replacing
from util.files.hdf5 import hdf5_sink
from util.scores.regional import BY_REGION

if TYPE_CHECKING:
    from util.batch import DataSpec

FORMAT = 1
CHUNK_BYTES = 2**18  # 一块至多；每个模型正在写的那一块都留在变量的缓存里


class StatisticsFile:
    """逐批写；正常离开时改成正式的名字，出错时不留下半个文件。

    变量 (model, time, prediction_timedelta, channel) float32，标准化单位；无效的场为 NaN。
    各区域的（名字接 BY_REGION）末尾多一维 region。
    """

    def __init__(
        self,
        path: Path,
        spec: DataSpec,
        models: Sequence[str],
        init_hours: np.ndarray,
        leads: Sequence[int],
        thresholds: np.ndarray,
        attributes: Mapping[str, Any],
        regions: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """thresholds: (C, K) 物理单位，不足 K 个的补 NaN；attributes 为普通值；regions: 名字 → (H, W) bool。"""
        import h5netcdf
        import h5py

        self.models = list(models)
        self.shape = (len(self.models), len(init_hours), len(leads), spec.num_channels)
        self.variables: dict[str, Any] = {}  # 一直开着：关上一次，HDF5 就把它缓存着的块写一遍
        hours = {"long_name": "initial time", "units": "hours since 1970-01-01", "calendar": "proleptic_gregorian"}
        with ExitStack() as stack:
            temporary = stack.enter_context(replacing(path))
            self.sink = stack.enter_context(hdf5_sink(temporary))
            cache = (len(self.models) + 1) * CHUNK_BYTES
            self.raw = stack.enter_context(h5py.File(self.sink, "w", rdcc_nbytes=cache))
            self.file = stack.enter_context(h5netcdf.File(self.raw, "a"))
            self.file.attrs.update({"format": FORMAT, **attributes})
            self.add("model", ("model",), self.models)
            self.add("time", ("time",), init_hours, hours)
            self.add("prediction_timedelta", ("prediction_timedelta",), leads, {"units": "hours"})
            self.add("channel", ("channel",), spec.channels)
            self.add("units", ("channel",), spec.units)
            self.add("std", ("channel",), spec.std)
            pressures = [math.nan if p is None else p for p in spec.pressures]
            self.add("pressure", ("channel",), pressures, {"units": "hPa"})
            self.add("threshold", ("channel", "rank"), thresholds)
            self.add("latitude", ("latitude",), spec.latitudes)
            self.add("longitude", ("longitude",), spec.longitudes)
            if regions:
                self.add("region", ("region",), [*regions])
                masks = np.stack([*regions.values()]).astype(np.int8)
                self.add("region_mask", ("region", "latitude", "longitude"), masks)
            self._closing = stack.pop_all()

    def write(self, row: int, values: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """从第 row 个起报时间写起；values: 模型 → 统计量 → (B, L, C) 或 (B, L, C, R)。"""
        for model, statistics in values.items():
            place = self.models.index(model)
            for name, array in statistics.items():
                if name not in self.variables:
                    self.variables[name] = self._create(name, array.shape[3:])
                self.variables[name][place, row : row + len(array)] = array
        self.sink.check()

    def _create(self, name: str, regions: tuple[int, ...]) -> Any:
        """regions: 区域的个数，整个网格的为空；一块只有一个区域，读的时候逐个读。"""
        _, rows, leads, channels = self.shape
        size = 4 * leads * channels * math.prod(regions)
        chunks = (1, min(rows, max(1, CHUNK_BYTES // size)), leads, channels, *(1 for _ in regions))
        dims = ("model", "time", "prediction_timedelta", "channel", *("region" for _ in regions))
        self.file.create_variable(name, dims, "f4", chunks=chunks, fillvalue=np.float32(np.nan))
        return self.raw[name]

    def add(
        self, name: str, dims: Sequence[str], values: Sequence[Any] | np.ndarray, about: Mapping[str, str] | None = None
    ) -> None:
        """坐标、常量，和与起报时间无关的结果（谱、秩直方图）；没有的维在这里建立。"""
        import h5py

        array = np.asarray(values)
        for dim, size in zip(dims, array.shape, strict=True):
            if dim not in self.file.dimensions:
                self.file.dimensions[dim] = size
        kind = h5py.string_dtype() if array.dtype.kind == "U" else array.dtype
        variable = self.file.create_variable(name, tuple(dims), kind, data=array.astype(kind))
        variable.attrs.update(about or {})

    def __enter__(self) -> StatisticsFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._closing.__exit__(*error)


class Statistics:
    """读 statistics.nc：坐标与常量在内存里，统计量按行取。用作上下文管理器。

    Raises:
        ValueError: 文件不在，或不是本程序写的。
    """

    def __init__(self, path: Path) -> None:
        import h5netcdf

        if not path.is_file():
            raise ValueError(f"no file {path}; evaluate.py writes it")
        try:
            self.file = h5netcdf.File(path, "r")
        except OSError as error:
            raise ValueError(f"{path}: damaged or not a statistics file ({type(error).__name__})") from None
        self.path = path
        self.attributes: dict[str, Any] = dict(self.file.attrs)
        if self.attributes.get("format") != FORMAT:
            self.file.close()
            raise ValueError(f"{path}: not a statistics file of format {FORMAT}")
        self.models, self.channels, self.units = (self._strings(n) for n in ("model", "channel", "units"))
        self.hours, self.leads, self.std, self.threshold, self.latitudes, self.longitudes = (
            np.asarray(self.file.variables[name][...])
            for name in ("time", "prediction_timedelta", "std", "threshold", "latitude", "longitude")
        )
        pressures = self.result("pressure")  # 从前写的文件里没有
        known = np.full(len(self.channels), np.nan) if pressures is None else pressures
        self.pressures = [None if np.isnan(p) else float(p) for p in known]
        self.regions = self._strings("region") if "region" in self.file.variables else []
        sizes = {n: len(v.dimensions) for n, v in self.file.variables.items() if v.dimensions[:2] == ("model", "time")}
        self.names = [n for n, size in sizes.items() if size == 4]
        self.regional_names = [n.removesuffix(BY_REGION) for n, size in sizes.items() if size == 5]

    def _strings(self, name: str) -> list[str]:
        return [value if isinstance(value, str) else value.decode() for value in self.file.variables[name][...]]

    def read(self, name: str, model: str, rows: slice, region: str | None = None) -> np.ndarray:
        """(n, L, C) float64；region: 哪个区域的，None 是整个网格。"""
        if region is None:
            return np.asarray(self.file.variables[name][self.models.index(model), rows], dtype=np.float64)
        values = self.file.variables[f"{name}{BY_REGION}"]
        return np.asarray(values[self.models.index(model), rows, :, :, self.regions.index(region)], dtype=np.float64)

    def same_region(self, other: Statistics, name: str) -> bool:
        """另一份里也有这个名字的区域，格点相同（网格已经相同）。"""
        masks = [
            file.file.variables["region_mask"][file.regions.index(name)]
            for file in (self, other)
            if name in file.regions
        ]
        return len(masks) == 2 and bool(np.array_equal(*masks))

    def result(self, name: str) -> np.ndarray | None:
        """谱、秩直方图；没有则 None。"""
        return np.asarray(self.file.variables[name][...]) if name in self.file.variables else None

    def __enter__(self) -> Statistics:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
