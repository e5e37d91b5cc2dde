"""配置的每一个键：在终端上是 `train.py --explain`，`python -m engine.reference.write` 印成 docs/config.md。

一个键的意思写在 schema 里、它的下面，几处共用的写在类型上，没有第二份；印给命令行的人看，所以是英文。
要印时才去读源代码，别的命令不必等。
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from models import config_class, model_names
from util.config import RunConfig
from util.strict import Strict, closest, section_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "config.md"
INTRO = """# 配置的键

由 `python -m engine.reference.write` 从 schema 印出；终端上是 `python train.py --explain [KEY]`，所以是英文。
每份 YAML 里的键旁另有一句中文注释；有哪些 YAML 见 [config/README.md](../config/README.md)。
"""
SET = "a YAML in config/data/, or a list of them, whose keys these are; the run's own keys beat them"
REQUIRED = "required"
KINDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "true | false", "null": "null"}
LIMITS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
    "multipleOf": "multiple of",
}


class Key(NamedTuple):
    """model 为空的是人人都有的键，否则是那个模型的。"""

    name: str
    model: str
    values: str
    default: str
    text: str


def config_keys() -> Iterator[Key]:
    """各段的键，模型的选项除外；data.set、model.name 在 schema 之前就读掉了。"""
    for key in schema_keys(RunConfig):
        yield key
        if key.name == "data":
            yield Key("data.set", "", "text | list of text", "null", SET)
        if key.name == "model":
            yield Key("model.name", "", " | ".join(model_names()), REQUIRED, "a file in models/; its options are below")


def model_keys() -> Iterator[Key]:
    """各模型的选项；引入全部模型要几秒。"""
    for name in model_names():
        yield from schema_keys(config_class(name), "model.", name)


def schema_keys(schema: type[Strict], prefix: str = "", model: str = "") -> Iterator[Key]:
    """一段的键，连同它下面各段的。"""
    texts, properties = described(schema), schema.model_json_schema().get("properties", {})
    try:
        found = dict(schema.model_validate({}))  # 有的默认值由别的键定
    except ValidationError:
        fields = schema.model_fields.items()
        found = {name: f.get_default(call_default_factory=True) for name, f in fields if not f.is_required()}
    for name, field in schema.model_fields.items():
        below, key = section_of(field.annotation), prefix + name
        default = plain(found[name]) if name in found else REQUIRED
        default = "" if below and default not in (REQUIRED, "null") else default
        yield Key(key, model, allowed(properties[name]), default, texts[name])
        if below and issubclass(below, Strict):
            many = "additionalProperties" in properties[name]  # 名字 → 一段
            yield from schema_keys(below, f"{key}.NAME." if many else f"{key}.", model)


def described(schema: type[Strict]) -> dict[str, str]:
    """键 → 写在它下面的话；没有写的，是类型上的。"""
    texts = {name: field.description or "" for name, field in schema.model_fields.items()}
    for part in reversed(schema.__mro__[: schema.__mro__.index(Strict)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in pairwise(definition.body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                texts[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return texts


def allowed(node: Mapping[str, Any]) -> str:
    """JSON Schema 的一个值 → 写得出哪些。"""
    if "anyOf" in node:
        return " | ".join(dict.fromkeys(map(allowed, node["anyOf"])))
    if "enum" in node or "const" in node:
        return " | ".join(map(plain, node.get("enum", [node.get("const")])))
    if "$ref" in node:
        return "the keys below"
    if node["type"] == "array":
        least, most, item = node.get("minItems"), node.get("maxItems"), grouped(node["items"])
        return f"[{', '.join([item] * most)}]" if most and least == most else f"list of {item}"
    if node["type"] == "object":
        inner = node.get("additionalProperties")
        return f"name -> {grouped(inner)}" if isinstance(inner, dict) else "mapping"
    limits = [f"{sign} {node[limit]:g}" for limit, sign in LIMITS.items() if limit in node]
    return " ".join([KINDS[node["type"]], ", ".join(limits)]).strip()


def grouped(node: Mapping[str, Any]) -> str:
    text = allowed(node)
    return f"({text})" if " | " in text else text


def plain(value: object) -> str:
    """一个值，照 YAML 的写法。"""
    value = value.model_dump() if isinstance(value, BaseModel) else value
    return value if isinstance(value, str) else json.dumps(value)


def explain(wanted: str) -> int:
    """印出一个键、一段、一个模型的，或（空的）全部。

    Raises:
        ValueError: 没有这个键。
    """
    keys = list(config_keys())
    if wanted.partition(".")[0] not in RunConfig.model_fields.keys() - {"model"}:
        keys += model_keys()
    found = [key for key in keys if not wanted or f"{key.name}.".startswith(f"{wanted}.") or key.model == wanted]
    if not found:
        last = {key.name.rpartition(".")[2]: key.name for key in reversed(keys)}
        names = {name for key in keys for name in key[:2]}
        near = wanted if wanted in last else closest(wanted, names) or closest(wanted, last)
        hint = f"nearest: {last.get(near, near)}" if near else "python train.py --explain lists all"
        raise ValueError(f"--explain {wanted}: no such key; {hint}")
    print("\n".join(text_of(key) for key in found))
    return 0


def text_of(key: Key) -> str:
    owner, default = f" ({key.model})" if key.model else "", f"default {key.default}" if key.default else ""
    said = REQUIRED if key.default == REQUIRED else default
    return f"{key.name}{owner}: {key.values}{said and f'; {said}'}\n    {key.text}"


def page(keys: Iterable[Key]) -> str:
    """docs/config.md。"""
    lines = [INTRO]
    groups: dict[str, list[Key]] = {}
    for key in keys:
        groups.setdefault(f"model: {key.model}" if key.model else key.name.partition(".")[0], []).append(key)
    for title in sorted(groups, key=lambda title: (list(RunConfig.model_fields).index(title.partition(":")[0]), title)):
        lines += [f"## {title}", "", "| 键 | 值 | 默认 | 意思 |", "|---|---|---|---|"]
        lines += [f"| `{key.name}` | {' | '.join(map(escaped, key[2:]))} |" for key in groups[title]] + [""]
    return "\n".join(lines)


def escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("<", "&lt;")
