"""改坏的配置与命令行：hypothesis 从仓库里的 YAML、走得通的命令行出发，各改几处。

改的是：类型、键、值、大小、嵌套、YAML 的写法；命令行上的词、选项、覆盖。test_mutants.py 查每一个的下场。
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from util.strict import dump_yaml, parse_yaml

ROOT = Path(__file__).resolve().parents[1]
YAMLS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "config").rglob("*.yaml"))
Draw = Any  # hypothesis 的 draw
ODD: list[Any] = [  # 哪一处都可能写成的值
    None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 2**62, -(2**62), 0.0, -0.5, 0.5, 1.5, 1e-300, 1e300, float("nan"),
    float("inf"), "", " ", "x", "yes", "auto", "all", "single", "level_00", "level_99", "1979", "1979-02-30",
    "9999-12-31", "0000", "运行", "a/b", "..", "*", "a\nb", "\x7f", "x" * 300, "1e5", "cosine", "sample.yaml",
    [], {}, [[]], [None], [1], [1, 2], [1, 2, 3], [0, 0], [-4, 4], [1e9, 1], ["x"], {"x": 1}, {"name": "x"},
    {"name": "cnn"}, {"": 0}, {"first": 0.0, "step": 0.0, "count": 1}, [{"x": [1]}],
]  # fmt: skip
SYNTAX = ["{", "}", "[", "]", ":", ": ", "-", "- ", ",", "#", "&a ", "*a", "!!", "!!str ", "|", ">", "%", "@", "`", "'"]
SYNTAX += ['"', "\t", "\n", " ", "?", "<<: ", "---\n", "...\n", "~", "\ufeff", "\u2028", "é", "0x", ".", "=", "\\"]


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """嵌套的值里每一处的路径；最外一层不算。"""
    inside = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, one in inside for place in ((*here, key), *places(one, (*here, key)))]


def _at(value: Any, place: Sequence[Any]) -> Any:
    for key in place:
        value = value[key]
    return value


def misspelt(draw: Draw, text: str) -> str:
    """一个词写错一处。"""
    i = draw(st.integers(0, max(0, len(text) - 1)))
    other = draw(st.sampled_from("aeno_-.0Z é"))
    how = draw(st.sampled_from(("drop", "double", "insert", "upper", "swap")))
    done = {"drop": "", "double": text[i : i + 1] * 2, "insert": text[i : i + 1] + other}
    done |= {"upper": text[i : i + 1].swapcase(), "swap": text[i : i + 2][::-1]}
    return text[:i] + done[how] + text[i + (2 if how == "swap" else 1) :]


def _resized(draw: Draw, value: Any) -> Any:
    """同样的类型，别的大小；不是数的换成一个怪的值。"""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return draw(st.sampled_from(ODD))
    return draw(
        st.sampled_from((-value, value + 1, value - 1, 2 * value, 1000 * value, value / 3, str(value), [value]))
    )


def changed_values(draw: Draw, values: Any) -> Any:
    """改一处：键、值、类型、大小、嵌套、次序。"""
    values = copy.deepcopy(values)
    there = places(values)
    if not there:
        return draw(st.sampled_from(ODD))
    place = draw(st.sampled_from(there))
    parent, key = _at(values, place[:-1]), place[-1]
    how = draw(st.sampled_from(("replace", "resize", "remove", "rename", "add", "wrap", "repeat", "move", "name")))
    if how == "replace":
        parent[key] = draw(st.sampled_from(ODD))
    elif how == "resize":
        parent[key] = _resized(draw, parent[key])
    elif how == "remove":
        del parent[key]
    elif how in ("rename", "name") and isinstance(parent, dict):
        value = parent.pop(key)
        parent[misspelt(draw, str(key)) if how == "rename" else draw(st.sampled_from((0, None, True, 1.5, "")))] = value
    elif how == "add" and isinstance(parent, dict):
        parent[str(draw(st.sampled_from(there))[-1])] = draw(st.sampled_from(ODD))
    elif how == "wrap":
        parent[key] = draw(st.sampled_from(([parent[key]], {"x": parent[key]}, [parent[key]] * 3)))
    elif how == "repeat" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    else:  # 别处的值
        parent[key] = copy.deepcopy(_at(values, draw(st.sampled_from(there))))
    return values


def changed_text(draw: Draw, text: str) -> str:
    """正文里改一处：字、行、缩进、截断。"""
    i = draw(st.integers(0, max(0, len(text) - 1)))
    lines = text.splitlines(keepends=True) or [""]
    n = draw(st.integers(0, len(lines) - 1))
    how = draw(st.sampled_from(("insert", "drop", "cut", "repeat", "remove", "indent", "join")))
    if how in ("insert", "drop", "cut"):
        tails = {"insert": draw(st.sampled_from(SYNTAX)) + text[i:], "drop": text[i + 1 :], "cut": ""}
        return text[:i] + tails[how]
    changes = {"repeat": lines[n] * 2, "remove": "", "indent": f" {lines[n]}", "join": lines[n].rstrip("\n")}
    return "".join((*lines[:n], changes[how], *lines[n + 1 :]))


class Mutant(NamedTuple):
    """of: 哪一份 YAML；text: 改过的正文；smoke: 缩小了再看；deep: 一直走到假的一步。"""

    of: str
    text: bytes
    smoke: bool
    deep: bool


@st.composite
def yaml_mutants(draw: Draw, names: Sequence[str] = tuple(YAMLS)) -> Mutant:
    name = draw(st.sampled_from(names))
    text = (ROOT / name).read_text(encoding="utf-8")
    if draw(st.integers(0, 3)):  # 四份里三份改的是值
        values = parse_yaml(text, name)
        for _ in range(draw(st.integers(1, 3))):
            values = changed_values(draw, values)
        text = dump_yaml(values)
    else:
        for _ in range(draw(st.integers(1, 4))):
            text = changed_text(draw, text)
    content = text.encode()
    if not draw(st.integers(0, 30)):
        content = content[: len(content) // 2] + b"\xff\xfe" + content[len(content) // 2 :]
    return Mutant(name, content, draw(st.booleans()), not draw(st.integers(0, 199)))


# ---- 命令行

VALUES = ["", " ", "0", "1", "2", "-1", "3.5", "nan", "inf", "1e9", "9" * 30, "x", "=", "a=b", "none", "auto", "all"]
VALUES += ["2000-02-01T00", "2000-02-30T00", "1979", "9999-12-31T23", "8x16", "9999x9999", "0:4", "4:0", "t2m=t2m"]
VALUES += ["t2m=273.15", "90N,200E", "run.yaml", "nowhere.yaml", "tree", "store", "source.nc", "best.ckpt"]
VALUES += [
    "broken.ckpt",
    "program.pt2",
    "empty",
    "file",
    "a\nb",
    "运行",
    "\udcff",
    "x" * 300,
    "--",
    "-",
    "--help",
    "-h",
]
NOT_HERE = re.compile(r"^run\.(devices|num_nodes|strategy)|accumulate.*\d{3}|workers=\d{2}")  # 另起进程的不在本进程里试
OUTSIDE = re.compile(r"(^|=)[/~]|\.\.|://")  # 写到外面去的不试


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    return [action.option_strings[-1] for action in parser._actions if action.option_strings]


def changed_words(draw: Draw, words: list[str], flags: Sequence[str], keys: Sequence[str]) -> list[str]:
    """命令行改一处。"""
    words, value = list(words), draw(st.sampled_from(VALUES))
    i = draw(st.integers(0, max(0, len(words) - 1)))
    how = draw(st.sampled_from(("drop", "value", "misspell", "swap", "repeat", "flag", "override", "join", "insert")))
    if how == "drop":
        del words[i : i + 1]
    elif how == "value":
        words[i : i + 1] = [value]
    elif how == "misspell":
        words[i : i + 1] = [misspelt(draw, word) for word in words[i : i + 1]]
    elif how == "swap":
        words[i : i + 2] = words[i : i + 2][::-1]
    elif how == "repeat":
        words[i:i] = words[i : i + 2]
    elif how == "flag":
        words[i:i] = [draw(st.sampled_from(flags)), *([value] if draw(st.booleans()) else [])]
    elif how == "override":
        odd = draw(st.sampled_from(ODD))
        words.append(f"{draw(st.sampled_from(keys))}={dump_yaml(odd).removesuffix('...' + chr(10)).strip()}")
    elif how == "join" and i + 1 < len(words):
        words[i : i + 2] = ["=".join(words[i : i + 2])]
    else:
        words.insert(i, value)
    return words


def is_safe(words: Sequence[str], alone: bool) -> bool:
    """只在眼前的文件夹里写；alone: 在自己的进程里，可以再起几个。"""
    return not any(OUTSIDE.search(word) or (not alone and NOT_HERE.search(word)) for word in words)
