"""导入不随时间变的场（地形、海陆分布、土壤类型）：只有经纬两维；带着时间、成员之类的维时，长度只能是 1。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from util.config import Axis
from util.data.tree_files import StaticField, owned, write_static
from util.exchange.into_tree import refuse_static
from util.exchange.joining import FileVariable, find_units
from util.exchange.plan import choose_region, find_grid, read_values
from util.exchange.regrid import Target
from util.files.bounded import open_regular, read_npy_header
from util.source.axes import Dims, horizontal_dims, listed
from util.source.collection import Source
from util.source.request import Request
from util.source.wanted import Held, open_wanted, take_selected
from util.source.zarr_chunks import settle_absent
from util.variables import plausible_range


class Cut(NamedTuple):
    """命令行上的裁剪与换网格，同各变量的。"""

    crop: str | None
    rows: str | None
    cols: str | None
    target: Target | None


class Placed(NamedTuple):
    """读好的一个场，它的网格、来源；averaged: 本来全是整数，换网格平均过了。"""

    field: StaticField
    latitude: Axis
    longitude: Axis
    source: Source
    averaged: bool


def read_static_fields(sources: Sequence[Source], request: Request, cut: Cut, stack: ExitStack) -> dict[str, Placed]:
    """从各来源里读出 request.static；几个来源都有的须相同。

    Raises:
        ValueError: 哪里都没有；还有别的维；有缺测的点；互相不同，或网格不同。
    """
    if not request.static:
        return {}
    wanted = request.model_copy(update={"variables": request.static, "select": {}})  # 各变量的 select 它不一定有
    held, _ = open_wanted(sources, wanted, stack)
    found: dict[str, Placed] = {}
    for name, several in held.items():
        found[name], *others = (_read(one, name, request, cut) for one in several)
        for other in others:
            if not np.array_equal(other.field.values, found[name].field.values):
                raise ValueError(f"--static {name}: {other.source.name} and {found[name].source.name} differ")
    first = next(iter(found.values()))
    refuse_other_grid(found, first.latitude, first.longitude)
    return found


def _read(held: Held, name: str, request: Request, cut: Cut) -> Placed:
    """一个来源里的一个场，裁剪、换单位、换网格之后。"""
    wanted = request.static[name]
    array = take_selected(held, request.select)[wanted.source or name]
    where = f"{held.source.name}: variable {array.name}"
    dims = horizontal_dims(array)
    extra = [f"{dim} ({size})" for dim, size in array.sizes.items() if dim not in dims and size > 1]
    if extra:
        raise ValueError(f"{where}: dimension {listed(extra)}; a static field has latitude and longitude only")
    region = choose_region((array.sizes[dims[0]], array.sizes[dims[1]]), cut.crop, cut.rows, cut.cols)
    place = Dims(None, None, *dims)
    (latitude, longitude), regrid = find_grid(array, place, region, cut.target)
    array = array.squeeze([dim for dim in array.dims if dim not in dims])
    file = FileVariable(held.source, array.isel(dict(zip(dims, region, strict=True))), place, np.empty(0), [])
    units = find_units([file], name, wanted)
    settle_absent(file.array, request.absent_chunks)
    limits = plausible_range(name, {name: units}, {name: wanted.valid_range} if wanted.valid_range else {})
    values = read_values(file, slice(None), wanted, limits)[0][0, 0]  # (H, W)
    averaged = regrid is not None and bool((values == np.round(values)).all())
    values = regrid(values) if regrid else values
    if missing := int((~np.isfinite(values)).sum()):
        row, column = np.argwhere(~np.isfinite(values))[0].tolist()
        raise ValueError(
            f"{where}: {missing} of {values.size} points are missing (first: row {row}, column {column}); "
            "a static field is used everywhere, so fill them first"
        )
    return Placed(
        StaticField(np.ascontiguousarray(values, dtype=np.float32), units), latitude, longitude, held.source, averaged
    )


def refuse_other_grid(found: Mapping[str, Placed], latitude: Axis, longitude: Axis) -> None:
    for name, place in found.items():
        for axis, wanted in ((place.latitude, latitude), (place.longitude, longitude)):
            if not axis.same_as(wanted):
                raise ValueError(
                    f"--static {name}: {axis.text()}, the other fields have {wanted.text()}; import it apart, with "
                    "--rows, --cols or --regrid onto their grid"
                )


def refuse_misplaced(root: str | Path, found: Mapping[str, Placed], overwrite: bool) -> None:
    """写进这棵树之前：名字没有被占，形状与树里的场相同（目录树不带坐标，坐标由读的一方对照 YAML 查）。"""
    if not overwrite:
        refuse_static(root, found)
    held = next((path for pattern in ("*_npy/*/*.npy", "*_npy/*/*/*.npy") for path in Path(root).glob(pattern)), None)
    there = None
    if held:
        with open_regular(held) as file:
            there = read_npy_header(file).shape
    for name, place in found.items():
        if (Path(root) / f"{name}_npy").exists():
            raise ValueError(f"--static {name}: {root} has a variable of this name; choose another name")
        if there and there != (shape := place.field.values.shape):
            raise ValueError(
                f"--static {name}: {shape[0]} x {shape[1]} points, the fields of {root} have {there[0]} x {there[1]}; "
                "give --rows, --cols or --regrid as for those"
            )


def write_static_fields(root: str | Path, found: Mapping[str, Placed], overwrite: bool) -> None:
    """写进 `<root>/static/`；Raises 见 owned、refuse_static（别的导入也许刚写好）。"""
    with owned(root, (), static=bool(found)):
        if not overwrite:
            refuse_static(root, found)
        for name, place in found.items():
            write_static(root, name, *place[:3])


def describe_static(found: Mapping[str, Placed]) -> list[str]:
    """一个场一行。"""
    lines = []
    for name, place in found.items():
        values, units = place.field.values, place.field.units or "units unknown"
        averaged = "; whole numbers were averaged: if they are classes, import them on that grid without --regrid"
        lines.append(f"static    {name}: {units}, {values.min():g} to {values.max():g}{averaged * place.averaged}")
    return lines
