"""导入之后：写给 config/data/ 的数据集 YAML，给人看的几行。"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from util.calendar import time_text
from util.data.index import check_splits, check_windows, planned_index, too_many_missing
from util.exchange.plan import ImportPlan
from util.exchange.survey import Survey, undeclared
from util.source.axes import SHOWN, listed
from util.source.lead_time import added_lead, time_name


def data_yaml(plan: ImportPlan, store: Path | None = None) -> str:
    """数据集 YAML 的文本，每个键带一句说明；store 是写成的存档，没有写就是目录树。"""
    import yaml

    comments = {
        "root": "目录树所在，或存档导自哪里",
        "source": "读存档，不读目录树",
        "variables": "single 单层，all 全部层",
        "units": "取自源文件，或导入时写明",
        "valid_range": "合理范围：之内的都是数据，之外的填充值才算缺测",
        "pressure_hpa": "依次为 level_00、level_01……",
        "latitude": "step 为负是由北向南",
        "longitude": "单位为度",
        "interval_hours": "源文件的最小步长",
        "first_hour": "从 1970-01-01T00 数起的头一个；步长整除 24 时是每天的第一个钟点",
        "splits": "起止两端都含；统计量只用 train",
        "standardize": "源文件为物理单位，要标准化",
    }
    kind = {"source": "store", "store": str(store)} if store else {}
    values = kind | {key: value for key, value in plan.values.items() if value}
    text = yaml.safe_dump(values, default_flow_style=None, sort_keys=False, width=1000, allow_unicode=True)
    rows, cols = plan.region
    names = list(plan.sources)
    origin = listed(names[:SHOWN]) + (f" 等 {len(names)} 个文件" if len(names) > SHOWN else "")
    origin += f"，行 {rows.start}:{rows.stop}，列 {cols.start}:{cols.stop}"
    if assumed := assumed_units(plan):
        comments["units"] += f"；源文件没有写 {listed(assumed)} 的单位，是假定的，请核对"
    lines = [f"# 由 dataset.py import 导入：{origin}{f'，换网格 {plan.regrid.method}' if plan.regrid else ''}"]
    for line in text.splitlines():
        comment = comments.get(line.partition(":")[0])
        lines.append(f"{line}  # {comment}" if comment else line)
    return "\n".join(lines) + "\n"


def summarize(plan: ImportPlan, found: Survey, unused: Sequence[str] = ()) -> list[str]:
    """导入之后给人看的几行；unused 是所要的变量一个也没有的来源。"""
    hours, config, step = plan.hours, plan.config, plan.config.interval_hours
    latitude, longitude = (f"{axis.first:g} to {axis.values()[-1]:g}" for axis in (config.latitude, config.longitude))
    lines = [f"sources   {len(plan.sources)} with the variables wanted"]
    lines += _shown([f"          {name}: {listed(held)}" for name, held in plan.sources.items()])
    lines += (
        [f"unused    {len(unused)} hold none of them", *_shown([f"          {name}" for name in unused])]
        if unused
        else []
    )
    lines += [
        f"times     {hours.size}, {time_text(hours[0])} to {time_text(hours[-1])}, every {step} h",
        f"channels  {len(plan.names)}: {listed(plan.names)}",
        f"grid      {config.latitude.count} x {config.longitude.count}, latitude {latitude}, longitude {longitude}",
    ]
    if mixed := [
        held.source.name for files in plan.files.values() for held in files if (np.diff(held.hours) < 0).any()
    ]:
        lines.append(f"order     the times in {mixed[0]} are not sorted; each field is in the file of its own time")
    lines += _lead(plan)
    if config.pressure_hpa:
        pairs = [f"level_{i:02d} = {pressure:g} hPa" for i, pressure in enumerate(config.pressure_hpa)]
        lines.append(f"levels    {listed(pairs)}")
    lines.append(f"gaps      {len(plan.gaps)} longer than {step} h (data.max_gap_hours says which are bridged)")
    lines += _shown([f"          {time_text(a)} to {time_text(b)}, {b - a} h" for a, b in plan.gaps])
    lines.append(f"left out  {len(found.holes)} fields with missing values (not finite, or a fill value)")
    lines += _shown([f"          {name} {time_text(hour)}" for name, hour in found.holes])
    lines += _fills(found) + _outside(plan, found)
    missing = [name for name in config.variables if name not in config.units]
    lines += [f"units     none for {listed(missing)} in the file; add them to units"] if missing else []
    lines += [f"training  would refuse this: {text}" for text in objections(plan, found.holes)]
    return lines + [f"assumed   {text}" for text in assumptions(plan)]


def objections(plan: ImportPlan, holes: list[tuple[str, int]]) -> list[str]:
    """训练打开这些数据时会不会停：略去的场在内，窗口取最短的两帧，max_missing 取默认的。"""
    index = planned_index(plan.config, plan.names, plan.hours)
    for name, hour in holes:
        if index.start <= hour < index.stop:
            index.present[plan.names.index(name), hour - index.start] = False
    try:
        check_windows(plan.config, segments := check_splits(plan.config, index))
    except ValueError as error:
        return [str(error)]
    used = np.concatenate([piece for pieces in segments.values() for piece in pieces]) - index.start
    gone = used.size - index.present[:, used].sum(axis=1)  # (C,)
    found = {name: too_many_missing(plan.config, int(n), used.size) for name, n in zip(plan.names, gone, strict=True)}
    return [f"{name}: {text}" for name, text in found.items() if text]


def assumptions(plan: ImportPlan) -> list[str]:
    """源文件没有写、导入时当作如此的：单位、气压的单位、历法；一样一行。"""
    texts = []
    for name in assumed_units(plan):
        held = plan.files[name][0]
        texts.append(
            f"units of {name}: {plan.config.units[name]}, as is usual; variable {held.array.name} has none in the "
            "file. State them in a --map file (units), or correct units in the data-set YAML"
        )
    for held in {id(held): held for files in plan.files.values() for held in files[:1]}.values():
        level, time = held.dims.level, time_name(held.array)
        if held.ranks and "units" not in held.array[str(level)].attrs:
            texts.append(f"units of {level}: hPa; the file has none")
        if "units" in held.array[time].encoding and "calendar" not in held.array[time].encoding:
            texts.append(f"calendar of {time}: standard; the file has none")
    return list(dict.fromkeys(texts))


def assumed_units(plan: ImportPlan) -> list[str]:
    """单位取自变量表的变量：没有人写过。"""
    return [name for name in undeclared(plan) if name in plan.config.units]


def _fills(found: Survey) -> list[str]:
    """填充值：每个通道每种一行，有几个场、头几个在哪里。"""
    groups: dict[tuple[str, float], list[int]] = {}
    for name, hour, value in sorted(found.filled):
        groups.setdefault((name, value), []).append(hour)
    return [
        f"fills     {name}: {value:g} in {len(hours)} fields is a fill value, so they count as missing "
        f"({listed(map(time_text, hours[:SHOWN]))}{', ...' if len(hours) > SHOWN else ''})"
        for (name, value), hours in groups.items()
    ]


def _outside(plan: ImportPlan, found: Survey) -> list[str]:
    """在合理范围之外、照样写了的点：每个通道一行。"""
    lines = []
    for name, far in found.outside.items():
        low, high = plan.config.limits(name) or (-np.inf, np.inf)
        lines.append(
            f"outside   {name}: {far.points} points in {far.fields} fields are outside {low:g} to {high:g} "
            f"(lowest {far.low:.6g}, highest {far.high:.6g}, first {time_text(far.first)}); kept as data: correct the "
            "source, or its units, or state valid_range in a --map file"
        )
    return lines


def _lead(plan: ImportPlan) -> list[str]:
    """预报：各变量的有效时刻是起报时刻加多少。"""
    found = {name: [added_lead(held.array) for held in files] for name, files in plan.files.items()}
    leads = {
        name: np.unique(np.concatenate([np.ravel(h) for h in hours if h is not None] or [[]]))
        for name, hours in found.items()
    }
    text = "the time of a field is the valid time, the initial time"
    return [
        f"lead      {name}: {text} + {listed(f'{h:g}' for h in hours)} h" for name, hours in leads.items() if hours.size
    ]


def _shown(lines: list[str]) -> list[str]:
    return lines[:SHOWN] + ([f"          and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])
