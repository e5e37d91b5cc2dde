"""导入时把填充值换成缺测：在换单位、换网格之前，认文件里的数。"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from util.files.fills import Fills, fills_of, find_fill, surely_data

if TYPE_CHECKING:
    import xarray as xr

NEVER_WRITTEN = {"int8": -127, "uint8": 255, "int16": -32767, "uint16": 65535, "int32": -2147483647}  # netcdf.h
Filled = dict[tuple[int, int], float]  # (行, 通道) → 那个场里的填充值，文件里的数


def source_fills(array: xr.DataArray, limits: tuple[float, float] | None, scale: float, offset: float) -> Fills:
    """源文件里的数认作填充值的；limits 是换单位之后的合理范围。

    打包成整数的变量，没有写过的场是整型的默认填充值解出来的样子；范围不知道就不认：打包的最小值也可能正是它。
    """
    fills = fills_of(limits, scale, offset)
    packing = array.encoding
    raw = NEVER_WRITTEN.get(str(packing.get("dtype")))
    if limits is None or raw is None or not {"scale_factor", "add_offset"} & set(packing):
        return fills
    decoded = float(raw * packing.get("scale_factor", 1.0) + packing.get("add_offset", 0.0))
    inside = limits[0] <= scale * decoded + offset <= limits[1]
    return fills if inside else fills._replace(codes=(*fills.codes, decoded))


def mask_fills(block: np.ndarray, fills: Fills) -> tuple[np.ndarray, Filled]:
    """(n, C, H, W) 里的填充值换成 NaN；另给是哪几个场、哪个值。没有填充值的原样还回。"""
    fields = block if block.dtype.kind == "f" else block.astype(np.float32)  # 整数的平方会绕回来
    found: Filled = {}
    for place in np.ndindex(block.shape[:2]):
        if surely_data(fields[place], fills) or not (hit := find_fill(fields[place], fills)):
            continue
        found[place], where = hit
        block = block.astype(np.float64) if block.dtype.kind != "f" else block
        block = block if block.flags.writeable else block.copy()
        block[place][where] = np.nan
    return block, found
