"""report.html：一页自足的报告。数据是一份 JSON，其余都由旁边的 JavaScript 画出；不联网，从磁盘直接打开。

资产是旁边的真文件：page.html 骨架、page.css、SCRIPTS 列出的几个 .js；plotly 的 JavaScript 取自已安装的包，只嵌一次。
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from util.atomic import replacing

ASSETS = Path(__file__).parent
SCRIPTS = (  # 前面的定义后面的要用；page.js 最后，由它开始
    "words.js",
    "tools.js",
    "frame.js",
    "plots.js",
    "summary.js",
    "scores.js",
    "curves.js",
    "maps.js",
    "series.js",
    "spectra.js",
    "tables.js",
    "page.js",
)
MAX_BYTES = 10_000_000


def write_report(path: Path, content: Mapping[str, Any]) -> None:
    """写一页报告；先写临时名再改名，不会留下半页。

    Args:
        path: 目标，通常叫 report.html；所在的文件夹不存在就新建。
        content: 普通的 JSON 值与 NumPy 的数；除 title 外各段都可缺，缺的段没有标题也没有菜单项。NaN 写成 null，
            浮点数留 7 位有效数字（float32 的精度）。
            一「句」（facts 的 value、maps 的 note、comparison 的 notes）是字符串或数，照原样；或者
            {"key": words.js 里 WORDS 的键, "values": [填入的值]}，页面用两种语言写出。各段的写法：
            kind ("run" | "evaluation" | "comparison")、title、subtitle、facts [[label, value]]、reproduce [command]、
            links [[text, relative href]]、models [{name, role: "model" | "baseline"}]、
            channels [{name, long_name, unit, kind}]、lead_hours [h]、
            scores {model: {channel: {metric: [per lead]}}}、
            skill {model: {baseline: {channel: {metric: {value, low, high: [per lead]}}}}}、
            fields {channel: {scored, left_out: [per lead]}}、curves {train, val: [[step, loss]]}、
            spectra {label, lead_hours, wavenumber [K], truth: {channel: [lead][K]},
            models: {model: {channel: [lead][K]}}}、
            ranks {channel: [lead][M + 1]}、
            series {points [{name, latitude, longitude}], lead_hours, valid_times [lead][T],
            truth: {channel: [lead][point][T]}, models: {model: …}}、
            （spectra、series、maps 的 lead_hours 与通道可以少于页面的；spectra、series 不写 lead_hours 就与页面的相同）
            maps {latitudes (H,), longitudes (W,), times, lead_hours, channels,
            note: 一句、一列句子或 null，scores: {channel: [lead][time] {rmse, bias} | null}，
            fields: {channel: [lead][time] {truth, forecast, error: {data, low, high} | null}}，
            其中 data 是 H·W 个 uint8（北在上）的 base64，值 = low + byte / 255 · (high − low)，
            colors: {channel: {field, error: {scale, low, high}}}}、coast [[[lon, lat]]]、
            costs [{name, parameters, …}]、comparison {pairs, notes [句子]}、config (YAML 文本)、
            data {facts, missing [[channel, count, first, last, reason]]}、environment {name: version}。

    Raises:
        ValueError: 整页超过 MAX_BYTES；会说哪一段最大。
    """
    from plotly.offline import get_plotlyjs

    plain = {key: _plain(value) for key, value in content.items()}
    parts = {
        "title": html.escape(str(content["title"])),
        "style": _asset("page.css"),
        "content": _embed(plain),
        "plotly": get_plotlyjs(),
        "script": "\n".join(_asset(name) for name in SCRIPTS),
    }
    words = set(re.findall(r"(?m)^  (\w+): \[", _asset("words.js")))
    unknown = set(re.findall(r'"key":"(.*?)"', parts["content"])) - words
    assert not unknown, f"words.js has no words for {sorted(unknown)}"
    assert "</script" not in (parts["plotly"] + parts["script"]).lower(), "a script would end its own element"
    page = re.sub(r"@(\w+)@", lambda found: parts[found[1]], _asset("page.html")).encode()
    if len(page) > MAX_BYTES:
        sizes = {key: len(_embed(value)) for key, value in plain.items()}
        largest = max(sizes, key=lambda key: sizes[key])
        raise ValueError(
            f"{path}: the page would have {len(page) / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f} MB; "
            f"its largest part is {largest} with {sizes[largest] / 1e6:.1f} MB"
        )
    with replacing(path) as temporary:
        temporary.write_bytes(page)


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _plain(value: Any) -> Any:
    """换成 JSON 的普通值；NaN 与无穷是 null。"""
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
