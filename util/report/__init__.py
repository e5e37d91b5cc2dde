"""report.html：一页自足的报告。数据是一份 JSON，其余都由旁边的 JavaScript 画出；不联网，从磁盘直接打开。

资产是旁边的真文件：page.html 骨架、page.css、各个 .js（一节一个，也有一个文件登记几节的）；plotly 的 JavaScript
取自已安装的包，只嵌一次。
"""

from __future__ import annotations

import html
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from util.atomic import replacing
from util.report.bilingual import Bilingual
from util.scores.final import METRICS
from util.variables import variable_info

ASSETS = Path(__file__).parent
FIRST = ("words.js", "tools.js", "frame.js", "plots.js", "brush.js")  # 各节都要用的，前面的定义后面的要用
PANELS = (
    "summary.js",
    "pictures.js",
    "scores.js",
    "cards.js",
    "curves.js",
    "maps.js",
    "series.js",
    "spectra.js",
)  # 要排定先后的；别的跟在后面
LAST = ("tables.js", "page.js")  # 没有图的几节；page.js 最后，由它开始
MAX_BYTES = 10_000_000
SPARE = ("sphere", "spectra", "series", "events", "cells", "roll", "maps")  # 放不下时舍去的次序，页面会说舍了哪些

log = logging.getLogger("ar_pred")


def write_report(path: Path, content: Mapping[str, Any]) -> None:
    """写一页报告；先写临时名再改名，不会留下半页。

    Args:
        path: 目标，通常叫 report.html；所在的文件夹不存在就新建。
        content: 普通的 JSON 值与 NumPy 的数，一键一节；除 title 外都可缺，缺的节没有标题也没有菜单项。NaN 写成 null，
            浮点数留 7 位有效数字（float32 的精度）。各节的写法是 engine/evaluation/page.py 里 Page 的各栏；
            其中的一「句」（title、facts、说明）是字符串或数，照原样，或者 Bilingual，页面按语言写出。

    Raises:
        ValueError: 舍去 SPARE 的各节，整页仍超过 MAX_BYTES；会说哪一段最大。
    """
    from plotly.offline import get_plotlyjs

    plain = {key: _plain(value) for key, value in content.items()}
    parts = {
        "title": html.escape(str(content["title"])),
        "style": _asset("page.css"),
        "content": "",
        "plotly": get_plotlyjs(),
        "metrics": _embed([[m.name, m.english, m.chinese, m.unit, m.best] for m in METRICS]),
        "script": "\n".join(map(_asset, scripts())),
    }
    assert "</script" not in (parts["plotly"] + parts["script"]).lower(), "a script would end its own element"
    spare = iter([key for key in SPARE if plain.get(key) is not None])
    while len(page := _assemble(parts | {"content": _embed(plain)})) > MAX_BYTES:
        key = next(spare, None)
        if key is None:
            break
        plain = {name: value for name, value in plain.items() if name != key}
        plain["left_out"] = [*plain.get("left_out", []), key]
        log.warning("%s: %s left out, to stay below %.0f MB", path, key, MAX_BYTES / 1e6)
    if len(page) > MAX_BYTES:
        sizes = {key: len(_embed(value)) for key, value in plain.items()}
        largest = max(sizes, key=lambda key: sizes[key])
        raise ValueError(
            f"{path}: the page would have {len(page) / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f} MB; "
            f"its largest part is {largest} with {sizes[largest] / 1e6:.1f} MB"
        )
    with replacing(path) as temporary:
        temporary.write_bytes(page)


def channel_line(name: str, unit: str) -> dict[str, str]:
    """channels 的一行；kind 是配色。"""
    info = variable_info(name)
    return {"name": name, "long_name": info.long_name, "unit": unit, "kind": info.kind}


def scripts() -> list[str]:
    """页面的 .js，次序就是各节的次序；放进这个文件夹就在页面里，新的一节不必再改别处。"""
    more = {path.name for path in ASSETS.glob("*.js")} - {*FIRST, *PANELS, *LAST}
    return [*FIRST, *PANELS, *sorted(more), *LAST]


def _assemble(parts: Mapping[str, str]) -> bytes:
    return re.sub(r"@(\w+)@", lambda found: parts[found[1]], _asset("page.html")).encode()


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _plain(value: Any) -> Any:
    """换成 JSON 的普通值；NaN 与无穷是 null。"""
    if isinstance(value, Bilingual):
        return {"en": str(value), "zh": value.chinese}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def _embed(value: Any) -> str:
    """嵌进 <script> 的 JSON：不留一个 "<"，文字里的 </script>、<!-- 就都不起作用。"""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
