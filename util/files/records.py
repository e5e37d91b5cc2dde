"""记录（frozen dataclass）与 JSON 的普通值之间：写成什么样、读回来缺了什么，都在这里。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

Record = TypeVar("Record")


def as_json(value: Any) -> Any:
    """记录写成字典，键按各栏的次序；默认是 None 而没有填的一栏不写（别的 None 写成 null）。"""
    if is_dataclass(value) and not isinstance(value, type):
        held = ((field, getattr(value, field.name)) for field in fields(value))
        return {field.name: as_json(one) for field, one in held if not (one is None and field.default is None)}
    if isinstance(value, Mapping):
        return {key: as_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    return value


def read_record(kind: type[Record], values: object, where: str) -> Record:
    """as_json 的逆：各栏的类型都查过；多出来的键不看（新版本写的文件，旧的也读得）。

    Raises:
        ValueError: 缺一栏，或类型不对；一行，指明是哪一栏。
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "top level"
        raise ValueError(f"{where}: {place}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
