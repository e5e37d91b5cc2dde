"""严格的配置：YAML 里写错的、多余的键、错误的类型在读入时就停，并说出最近的合法名字。"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Schema = TypeVar("Schema", bound=BaseModel)


def _day_text(value: object) -> object:
    """日期可写年份（1979）或日子（1979-01-01）；统一存成文本，检查点里才是普通值。"""
    if isinstance(value, bool) or not isinstance(value, (str, int, date)):
        return value  # 类型不对，由 pydantic 报
    text = str(value)
    if re.fullmatch(r"[1-9]\d{3}", text):
        return text
    try:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", text):  # fromisoformat 在 3.11 起还认别的写法，3.10 不认
            raise ValueError("neither YYYY nor YYYY-MM-DD")
        date.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"not a date ({error}); write a year like 1979 or a day like 1979-01-31") from None
    return text


Day = Annotated[str, BeforeValidator(_day_text)]
NAME_BYTES = 120  # 名字前后还要接上时刻、后缀，一个文件名至多 255 字节


def folder_name(text: str) -> str:
    """运行、套件成员的名字：要成为路径的一段、通配的一段，所以只能是一个文件夹的名字。

    Raises:
        ValueError: 有分隔符、通配符之类；以点开头；太长。
    """
    plain = all(letter in "-_. " or unicodedata.category(letter)[0] in "LMN" for letter in text)  # M: 天城文的元音
    if not plain or not text.strip() or text.startswith(".") or len(text.encode()) > NAME_BYTES:
        raise ValueError(
            "a name is that of one folder: letters, digits, -, _, . and spaces, not starting with a dot, "
            f"at most {NAME_BYTES} bytes"
        )
    return text


Name = Annotated[str, AfterValidator(folder_name)]


class Strict(BaseModel):
    """所有配置段的基类：不许多余的键，不做类型转换，读入后不可改。"""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


NUMBERS = (  # YAML 1.2 core：012 是 12，1:30、1_000 是文本，1e-4 是浮点数；int 在前
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
)
TAG = "tag:yaml.org,2002:"
MOST_CHARACTERS, MOST_NODES, DEEPEST = 2**18, 20_000, 50  # 最大的配置：几千字、几百个值、七层


class _Loader(yaml.SafeLoader):
    """数照 YAML 1.2 core；yes、no 仍是布尔，日期留作文本，由 Day 检查，报得出键名；键不许写两次。

    值的个数与深度（别名展开之后的）在造出任何对象之前就数好：几行别名可以展开成几个 GB。
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML 的写法
        first: [(tag, pattern) for tag, pattern in rules if tag.removeprefix(TAG) in ("bool", "null", "merge")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.nodes = self.depth = self.lowest = 0  # 到此处的个数；这里的深度；这一支到过的最深处
        self.whole: dict[yaml.Node, tuple[int, int]] = {}  # 走完了的 → 个数、高

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if node not in self.whole:
                raise _mistake(f"*{event.anchor} stands inside itself", event.start_mark)
            self._reach(*self.whole[node], event.start_mark)
            return node
        if event.tag not in (None, TAG + "str"):
            raise _mistake(f"tag {event.tag}: tags other than !!str are not read", event.start_mark)
        before, around, self.lowest = self.nodes, self.lowest, self.depth
        self._reach(1, 1, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        assert node is not None
        self.whole[node] = self.nodes - before, self.lowest - self.depth
        self.lowest = max(self.lowest, around)
        return node

    def _reach(self, nodes: int, height: int, mark: yaml.Mark) -> None:
        self.nodes += nodes
        self.lowest = max(self.lowest, self.depth + height)
        if self.nodes > MOST_NODES or self.lowest > DEEPEST:
            raise _mistake(f"more than {MOST_NODES} values, aliases counted in full, or {DEEPEST} levels", mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _mistake("a key must be plain text", key.start_mark)
            if key.value in seen:
                raise _mistake(f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > 20:
            raise _mistake("an integer beyond 64 bits", node.start_mark)
        value = int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))
        if abs(value) >= 2**63:
            raise _mistake("an integer beyond 64 bits", node.start_mark)
        return value


class _Dumper(yaml.SafeDumper):
    """_Loader 会读成数的文本加引号。"""


def _mistake(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


for _kind, _pattern in NUMBERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), list("-+.0123456789"))
_Loader.add_constructor(f"{TAG}int", _Loader.construct_yaml_int)


def parse_yaml(text: str, where: str) -> Any:
    """读 YAML 文本；出错时给出文件与行列。

    Raises:
        ValueError: 不是合法的 YAML；太长、太深、值太多，见 _Loader。
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{where}: {len(text)} characters of YAML, at most {MOST_CHARACTERS} are read")
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  _Loader 是 SafeLoader 的子类
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{where}{place}: not valid YAML ({error.problem})") from None
    except yaml.reader.ReaderError as error:
        line, column = text.count("\n", 0, error.position), error.position - text.rfind("\n", 0, error.position)
        raise ValueError(f"{where} line {line + 1}, column {column}: not valid YAML ({error.reason})") from None


def dump_yaml(values: Any) -> str:
    """parse_yaml 的逆。"""
    return yaml.dump(values, Dumper=_Dumper, allow_unicode=True, sort_keys=False)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """读一个顶层为映射的 YAML 文件。

    Raises:
        ValueError: 文件不在（列出旁边有什么），或顶层不是映射。
    """
    path = Path(path)
    if not path.is_file():
        found = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ValueError(f"no file {path}; {nearest(path.name, found, 'files there')}")
    if path.stat().st_size > 4 * MOST_CHARACTERS:
        raise ValueError(f"{path}: {path.stat().st_size} bytes of YAML, at most {MOST_CHARACTERS} characters are read")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8 (byte {error.start})") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping at the top, found {type(values).__name__}")
    return values


def overlaid(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """top 盖过 base；映射逐键合并，只有 variables 整个替换（选了哪些变量不该与数据集的列表混在一起）。"""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "variables"
        merged[key] = overlaid(merged[key], value) if both else value
    return merged


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """把 `a.b=值` 写进嵌套映射的副本；键是否存在由随后的严格检查决定。

    Raises:
        ValueError: 不是 key=value 的写法，或路径穿过了一个不是映射的值。
    """
    result = _copy(values)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"override {text!r} is not key=value, e.g. train.epochs=10")
        *path, last = key.strip().split(".")
        node = result
        for i, part in enumerate(path):
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"override {text!r}: {'.'.join(path[: i + 1])} has no keys below it")
        node[last] = parse_yaml(value, f"override {text!r}")
    return result


def _copy(values: Any) -> Any:
    return {key: _copy(v) for key, v in values.items()} if isinstance(values, dict) else values


def nearest(word: str, options: Iterable[str], what: str = "valid names") -> str:
    """报错的后半句：最近的名字，没有相近的就列出全部。"""
    options = list(options)
    if not options:
        return f"{what}: none"
    close = closest(word, options)
    return f"nearest: {close}" if close else f"{what}: {', '.join(options)}"


def closest(word: str, options: Iterable[str]) -> str | None:
    """最近的名字；没有相近的是 None。"""
    return next(iter(difflib.get_close_matches(word, options, n=1, cutoff=0.6)), None)


def brief(value: object) -> str:
    """报错里写出找到的值，至多 60 个字符。"""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def validate(schema: type[Schema], values: Mapping[str, Any], where: str, prefix: str = "") -> Schema:
    """按 schema 检查一段配置；第一个错误变成一行 ValueError。prefix 是这一段在整份配置里的位置。"""
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError(f"{where}: {_explain(schema, values, error, prefix)}") from None


def _explain(schema: type[BaseModel], values: Mapping[str, Any], error: ValidationError, prefix: str) -> str:
    errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # 拼错的键常连带「缺键」，先说拼错
    key, parent = _locate(schema, values, errors[0]["loc"], prefix)
    kind, value = errors[0]["type"], errors[0].get("input")
    if kind == "extra_forbidden":
        return f"unknown key {key} = {brief(value)}; {_suggest(schema, parent, key, prefix)}"
    if kind == "missing":
        return f"missing key {key}"
    if kind in ("model_type", "dict_type"):
        return f"{key} = {brief(value)}: must be a mapping, {{key: value, ...}}"
    same = [e["msg"] for e in errors if _locate(schema, values, e["loc"], prefix)[0] == key]  # 联合类型每支一条
    messages = [text[:1].lower() + text[1:] for text in (m.removeprefix("Value error, ") for m in same)]
    message = " or ".join(dict.fromkeys(messages))
    if isinstance(value, Mapping | BaseModel):  # 整段的规矩：打印整段没有用处
        return f"{key}: {message}"
    close = closest(value, re.findall(r"'(.+?)'", message)) if isinstance(value, str) and "literal" in kind else None
    return f"{key} = {brief(value)}: {message}" + (f"; nearest: {close}" if close else "")


def _locate(
    schema: type[BaseModel], values: Mapping[str, Any], loc: tuple[int | str, ...], prefix: str
) -> tuple[str, type[BaseModel] | None]:
    """pydantic 的 loc → 带点的键名，与键所在那一段的 schema；loc 里夹着联合类型的分支名，值里没有的就不是键。"""
    key, here, parent = prefix, values, None
    below: type[BaseModel] | None = schema
    for part in loc:
        if isinstance(here, Mapping) and isinstance(part, str):
            fields = below.model_fields if below else {}
            if part not in here and part not in fields and part != loc[-1]:
                continue
            key, parent = f"{key}.{part}" if key else str(part), below
            below = section_of(fields[part].annotation) if part in fields else None
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int):
            # 摊平过的（套件的 overrides）比写着的长
            key, here = f"{key}[{part}]", here[part] if part < len(here) else None
    return key or "top level", parent


def section_of(annotation: Any) -> type[BaseModel] | None:
    """类型注解里的配置段：Schedule、Schedule | None、list[Schedule] 都是 Schedule。"""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := section_of(inner))), None)


def _suggest(schema: type[BaseModel], parent: type[BaseModel] | None, key: str, prefix: str) -> str:
    """不认识的键应当是哪一个：写对了名字放错了段的、同段里相近的、别段里相近的；都没有就列出同段的键。"""
    section, _, word = key.rpartition(".")
    everywhere = list(_all_keys(schema, prefix))
    siblings = [f"{section}.{name}" if section else name for name in (parent.model_fields if parent else {})]
    for options in ([k for k in everywhere if k.rpartition(".")[2] == word], siblings, everywhere):
        names = {k.rpartition(".")[2]: k for k in reversed(options)}  # 同名的取先出现的
        if close := closest(word, names):
            return f"nearest: {names[close]}"
    return f"valid keys: {', '.join(siblings) or 'none'}"


def _all_keys(schema: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        yield key
        if below := section_of(field.annotation):
            yield from _all_keys(below, key)
