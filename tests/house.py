"""房子的图，由代码印出来：`make house` 写进 docs/architecture.md；`python -m tests.house [FOLDER]` 印在终端上。

这里的房子就是 {相对路径: 正文}：一个文件是一间，一个文件夹是一翼，一个文件引用另一个是一个箭头。
tests/test_house.py 用同样的眼睛看规矩。只用标准库（`make house` 不等环境），不引入被看的代码。
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- make house -->\n", "<!-- /make house -->\n"
PRODUCT = ("engine", "models", "util")
House = Mapping[str, str]


class Import(NamedTuple):
    """一处引用：写着的名字；它在仓库里的文件（第三方与标准库为 None）；行号；是否在函数里。"""

    name: str
    room: str | None
    line: int
    late: bool


def read_house(root: Path, folders: tuple[str, ...] = PRODUCT) -> House:
    """根目录的脚本与 folders 里的全部 Python 文件。"""
    paths = [*root.glob("*.py"), *(path for folder in folders for path in (root / folder).rglob("*.py"))]
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


@cache
def tracked(root: Path) -> list[str]:
    """仓库里的全部文件，还没提交的也算、忽略的不算；不是 git 的仓库时，是磁盘上有代码的文件夹里的。"""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    if (root / ".git").exists():
        listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.split("\0")
    else:
        found = (path for folder in (*PRODUCT, "tests", "benchmarks") for path in (root / folder).rglob("*"))
        listed = [path.relative_to(root).as_posix() for path in found if "__pycache__" not in path.parts]
    return sorted({path for path in listed if (root / path).is_file()})


@cache
def parse(text: str) -> ast.Module:
    return ast.parse(text)


def wing_of(path: str) -> str:
    """文件所在的文件夹；根目录的脚本为空。"""
    return path.rpartition("/")[0]


def functions(text: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """全部函数，方法与函数里的函数也在内。"""
    yield from (node for node in ast.walk(parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def imports(house: House, path: str) -> list[Import]:
    """文件里的每处引用：函数内的、TYPE_CHECKING 之下的、相对的、交给 import_module 的，连同写成字符串的模块名。

    一张表里的模块名总有人拿去引入；import_module(f"models.{name}") 引用那个文件夹里的每一个文件。
    """
    found = []
    for name, line, late, written in _imports(path, house[path]):
        if name.endswith("/"):
            rooms = [room for room in house if wing_of(room) == name[:-1]]
        elif written:
            rooms = [f"{name}.py"] if f"{name}.py" in house else []
        else:
            rooms = [_room(house, name)]
        found += [Import(name.strip("/").replace("/", "."), room, line, late) for room in rooms if room != path]
    return found


def _room(house: House, name: str) -> str | None:
    """名字（以 / 分开）所在的文件：最长的那一段是文件，其余是文件里的名字。"""
    parts = name.split("/")
    heads = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((room for head in heads for room in (f"{head}.py", f"{head}/__init__.py") if room in house), None)


@cache
def _imports(path: str, text: str) -> list[tuple[str, int, bool, bool]]:
    """正文里的引用：名字（以 / 分开）、行号、是否在函数里、是否只是写着的字符串。"""
    late = {id(node) for function in functions(text) for node in ast.walk(function)}
    return [
        (name.replace(".", "/"), getattr(node, "lineno", 0), id(node) in late, isinstance(node, ast.Constant))
        for node in ast.walk(parse(text))
        for name in _names(node, wing_of(path).split("/"))
    ]


def _names(node: ast.AST, package: list[str]) -> list[str]:
    """一个节点引用的名字；from models import simvp 是 models.simvp。字符串像模块名的也给出来，有没有那个文件另看。"""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in {"import_module", "__import__"}:
        argument = [*node.args, *(keyword.value for keyword in node.keywords)][0]
        argument = argument.values[0] if isinstance(argument, ast.JoinedStr) else argument
        return [str(argument.value)] if isinstance(argument, ast.Constant) else []
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\w+(\.\w+)+", node.value):
        return [node.value]
    return []


def bound(text: str) -> set[str]:
    """正文里定义、赋值、引入的全部名字。"""
    nodes = list(ast.walk(parse(text)))
    made = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    names = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return made | names | {n.asname or n.name for n in nodes if isinstance(n, ast.alias)}


def arrows(house: House) -> dict[str, set[str]]:
    """每个文件 → 它引用的文件。"""
    return {path: {i.room for i in imports(house, path) if i.room} for path in house}


def unit_of(path: str) -> str:
    """engine/、util/ 与 models/ 里的一翼是一体；底层的文件各是一体。"""
    return wing_of(path) if path.count("/") > 1 else path


def between_units(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """文件的图 → 一翼算一间的图。"""
    units: dict[str, set[str]] = {}
    for path, targets in graph.items():
        units.setdefault(unit_of(path), set()).update({unit_of(t) for t in targets} - {unit_of(path)})
    return units


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """互相到得了的每一组。"""
    reach = {node: _reachable(graph, node) for node in graph}
    groups = {frozenset(o for o in seen if node in reach.get(o, ())) for node, seen in reach.items() if node in seen}
    return sorted(map(sorted, groups))


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            ahead += graph.get(node, ())
    return seen


def picture(house: House) -> str:
    """docs/architecture.md 里的一节。行数取到百位：改几行不必重印。"""
    graph = arrows(house)
    rooms = [path for path in house if not path.endswith("__init__.py") or path == "util/report/__init__.py"]
    between = Counter((wing_of(a), wing_of(b)) for a in graph for b in graph[a] if wing_of(a) != wing_of(b))
    rows = ["| 翼 | 间 | 行 | 里面 | 站在谁上（箭头数） |", "|---|---|---|---|---|"]
    for wing in sorted({wing_of(path) for path in rooms}):
        inside = [path for path in rooms if wing_of(path) == wing]
        size = sum(house[path].count("\n") for path in inside)
        names = " ".join(Path(path).stem for path in inside).replace("__init__", "（一个文件的包）")
        below = "、".join(f"`{b}` {n}" for (a, b), n in sorted(between.items()) if a == wing) or "无"
        rows.append(f"| {f'`{wing}`' if wing else '根目录'} | {len(inside)} | {_round(size)} | {names} | {below} |")
    return "\n".join([*rows, "", *facts(house)]) + "\n"


def _round(lines: int) -> str:
    return f"{max(100, round(lines, -2)):,}"


def facts(house: House) -> list[str]:
    """几个数：环、箭头、最长的、Any。"""
    graph = arrows(house)
    file, size = max(((path, text.count("\n")) for path, text in house.items()), key=lambda found: found[1])
    sizes = ((path, f.name, length(f)) for path, text in house.items() for f in functions(text))
    where, name, most = max(sizes, key=lambda found: found[2])
    loose = sum(len(vague(house[path])) for path in house if path.startswith(("engine/", "models/")))
    units = between_units(graph)
    return [
        f"* 环：文件之间 {len(circles(graph))} 个，翼之间 {len(circles(units))} 个。",
        f"* 箭头：engine/ 之内 {_inside(graph, 'engine')}，一翼算一间则 {_inside(units, 'engine')}。",
        f"* 箭头：util/data/ 之内 {_inside(graph, 'util/data')}。",
        f"* 最长的文件 {size} 行（{file}），最长的函数 {most} 行（{where} 的 `{name}`）。",
        f"* engine/ 与 models/ 里写着 `Any` 的行：{loose}（不算 import）。",
    ]


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """从 def 到最后一行，装饰器不算。"""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def vague(text: str) -> list[str]:
    """写着 Any 的行，引入它的那一行不算。"""
    return [line for line in text.splitlines() if re.search(r"\bAny\b", line) and not line.startswith("from ")]


def _inside(graph: Mapping[str, set[str]], folder: str) -> str:
    """一个文件夹之内的间数与箭头数；空的 __init__.py 不算一间。"""
    rooms = {room for room in graph if room.startswith(f"{folder}/") and not room.endswith("__init__.py")}
    return f"{len(rooms)} 间 {sum(len(graph[room] & rooms) for room in rooms)} 个"


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the house: wings, rooms, lines, arrows.", allow_abbrev=False)
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="another checkout (default: this one)")
    parser.add_argument("--write", action="store_true", help="write it into docs/architecture.md")
    args = parser.parse_args()
    text = picture(read_house(args.root))
    if args.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + text + END + rest.partition(END)[2], encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
