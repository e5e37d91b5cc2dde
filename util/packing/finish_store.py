"""存档各块做完之后：坐标、统计量、出处写成 Zarr，合并各块的记录，最后写完成的标志。"""

from __future__ import annotations

import io
import logging
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from util.data.tree_files import StaticField
from util.files.store_files import FILLS_KNOWN, PRESENT, StorePlan, file_digest, static_array, write_mark
from util.files.zarr_metadata import FILE_TYPES, Array, chunk_name, small_array, write_metadata
from util.packing.chunks import PackJob, chunk_path, raw_path, read_chunk_record, write_bytes
from util.variables import variable_info

DIMS = ("time", "channel", "latitude", "longitude")
log = logging.getLogger("ar_pred")


def finish_store(job: PackJob, static: Mapping[str, StaticField]) -> None:
    """各块都做完之后：坐标与元数据，校验和，最后是完成的标志。"""
    store = job.store
    files: dict[str, str] = {}
    gaps: list[list[Any]] = []
    faults: dict[tuple[int, int], list[Any]] = {}
    neighbours: dict[tuple[int, int], list[Any]] = {}
    rounding = []
    for number in range(job.chunks):
        record = read_chunk_record(job, number)
        assert record is not None, f"chunk {number} was never packed"
        files[_name(store, chunk_path(store, number))] = record["digest"]
        if record["raws"]:
            files[raw := _name(store, raw_path(store, number))] = record["raw_digest"]
            for i, (c, h) in enumerate(record["raws"]):
                neighbours.setdefault((c, h), [c, h, raw, i])
        gaps += record["gaps"]
        faults.update({(c, h): [c, h, *rest] for c, h, *rest in record["faults"]})
        rounding.append(record["rounding"])
    errors = rounding_errors(job.plan, np.array(rounding))
    files |= write_zarr(job, gaps, errors, static)
    buffer = io.BytesIO()
    np.save(buffer, np.packbits(job.reader.present.numpy(), axis=1))
    files[PRESENT] = write_bytes(store / PRESENT, buffer.getvalue())
    content = {"plan": asdict(job.plan), "files": files, "gaps": gaps, FILLS_KNOWN: True}
    write_mark(store, content | {"faults": [*faults.values()], "neighbours": [*neighbours.values()]})
    report(job.plan, gaps, [*faults.values()], errors)


def write_zarr(
    job: PackJob, gaps: list[list[Any]], errors: dict[str, list[float]], static: Mapping[str, StaticField]
) -> dict[str, str]:
    """fields 之外的一切；返回各文件的校验和。"""
    plan, utc = job.plan, job.hours - job.plan.utc_offset_hours
    valid = np.ones((job.hours.size, len(plan.channels)), dtype=bool)  # (N, C)
    for c, hour, _ in gaps:
        valid[np.searchsorted(job.hours, hour), c] = False
    pressure = np.array([np.nan if p is None else p for p in plan.pressures])
    hours = {"units": "hours since 1970-01-01", "calendar": "proleptic_gregorian", "standard_name": "time", "axis": "T"}
    names = {"long_name": "channel", "comment": "; ".join(f"{c}: {variable_info(c).long_name}" for c in plan.channels)}
    north = {"standard_name": "latitude", "units": "degrees_north", "axis": "Y"}
    east = {"standard_name": "longitude", "units": "degrees_east", "axis": "X"}
    small = {
        "time": small_array(utc.astype("<i8"), ("time",), hours),
        "channel": small_array(np.array(plan.channels).astype("<U"), ("channel",), names),
        "latitude": small_array(np.array(plan.latitudes), ("latitude",), north),
        "longitude": small_array(np.array(plan.longitudes), ("longitude",), east),
        "units": small_array(np.array(plan.units).astype("<U"), ("channel",), {"long_name": "units of mean and std"}),
        "mean": small_array(np.array(plan.mean), ("channel",), {"long_name": "mean of the training dates"}),
        "std": small_array(np.array(plan.std), ("channel",), {"long_name": "standard deviation, training dates"}),
        "pressure": small_array(pressure, ("channel",), {"standard_name": "air_pressure", "units": "hPa"}),
        "valid": small_array(
            valid, ("time", "channel"), {"long_name": "read from a file (false: interpolated, or NaN)"}
        ),
    }
    if any(plan.tendencies):
        held = [pair or [np.nan, 0] for pair in plan.tendencies]
        about = {"long_name": "standard deviation of the change over tendency_hours, training dates"}
        hours = {"tendency_hours": [int(hour) for _, hour in held]}
        small["tendency_std"] = small_array(np.array([std for std, _ in held]), ("channel",), about | hours)
    for name, field in static.items():
        about = {"long_name": f"{name}, constant in time", **field.about()}
        small[static_array(name)] = small_array(field.values, DIMS[2:], about)
    for old in {path.parent.name for path in job.store.glob("*/.zarray")} - {*small, "fields"}:
        shutil.rmtree(job.store / old)  # 上一次打包有、现在没有了的
    files = {}
    for name, (array, data) in small.items():
        path = job.store / name / chunk_name(0, len(array.shape))
        files[_name(job.store, path)] = write_bytes(path, data)
    arrays = {name: array for name, (array, _) in small.items()} | {"fields": fields_array(job, errors)}
    for name in write_metadata(job.store, arrays, provenance(plan)):
        files[name] = file_digest(job.store / name)
    return files


def fields_array(job: PackJob, errors: dict[str, list[float]]) -> Array:
    plan = job.plan
    attributes: dict[str, Any] = {
        "long_name": "standardised fields, (x - mean) / std",
        "units": "1",
        "coordinates": "units mean std pressure",
        **{f"rounding_error_{kind}": values for kind, values in errors.items()},
    }
    if plan.dtype == "bfloat16":
        attributes["stored_as"] = "bit patterns of bfloat16: float32 bits = uint16 bits << 16"
    dtype = FILE_TYPES[plan.dtype]
    fill = "NaN" if dtype.kind == "f" else None
    return Array((job.hours.size, *plan.shape[1:]), plan.shape, dtype, DIMS, attributes, fill)


def provenance(plan: StorePlan) -> dict[str, Any]:
    """全局属性：从哪里、用什么命令、以什么版本打的。不写时刻：中断过的与一气呵成的应当逐字节相同。"""
    return {
        "Conventions": "CF-1.8",
        "title": "packed fields of ar_pred",
        "source": plan.root,
        "history": "\n".join(plan.commands),
        "versions": f"python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}",
        "standardisation": f"fields are standardised; the files were {'so already' if plan.standardized else 'raw'} "
        f"(data.standardize = {plan.standardize})",
        "dtype": plan.dtype,
        "interval_hours": plan.interval_hours,
        "first_hour": plan.first_hour,
        "utc_offset_hours": plan.utc_offset_hours,
        "max_gap_hours": plan.max_gap_hours,
        "gaps": "fields without a file are interpolated in time between the nearest files of the same channel where "
        "these are at most max_gap_hours apart, else NaN; valid is false there; sources in store.json",
    }


def rounding_errors(plan: StorePlan, parts: np.ndarray) -> dict[str, list[float]]:
    """parts (块, C, 3) → 各通道的最大、均方根误差；float32 没有。"""
    if plan.dtype == "float32":
        return {}
    count = np.maximum(parts[..., 2].sum(axis=0), 1)
    return {"max": parts[..., 0].max(axis=0).tolist(), "rms": np.sqrt(parts[..., 1].sum(axis=0) / count).tolist()}


def report(plan: StorePlan, gaps: list[list[Any]], faults: list[list[Any]], errors: dict[str, list[float]]) -> None:
    """打完之后给人看的：各通道补了多少、坏了多少，舍入误差多大。"""
    for c, channel in enumerate(plan.channels):
        bridged, repeated = (sum(1 for g in gaps if g[0] == c and len(g[2]) == sides) for sides in (2, 1))
        left, bad = sum(1 for g in gaps if g[0] == c and not g[2]), sum(1 for f in faults if f[0] == c)
        if bridged or repeated or left or bad:
            log.warning(
                "%s: %d fields interpolated, %d repeated beyond the ends, %d left out (gaps above %d h), "
                "%d files unreadable",
                channel, bridged, repeated, left, plan.max_gap_hours, bad,
            )  # fmt: skip
        if errors:
            largest, rms = errors["max"][c], errors["rms"][c]
            log.info("%s: rounding to %s, max %.3g, rms %.3g standard deviations", channel, plan.dtype, largest, rms)


def _name(store: Path, path: Path) -> str:
    return path.relative_to(store).as_posix()
