"""变异测试：`python -m tests.mutation [--count 300] [--minutes 55]`：代码改一处，看它的测试发觉不发觉。

一次取 TARGETS 各文件全部变异里的 count 个（种子写死，与文件大小成比例），逐个只跑那个文件的测试。
变异是进程里的：引入钩子把那个模块换成改过的，磁盘上的不动；各个变异从引入好第三方库的进程 fork 出来，不必各等 torch。
做过的记在 tmp/mutation.json（只认同样的源文件与测试），再来一次接着做；结果写进 docs/reliability.md 的表。
活下来的要么添测试，要么在 docs/reliability.md 里写为什么没有差别。
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from util.atomic import replacing
from util.cli import run_command

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "tmp" / "mutation.json", ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- python -m tests.mutation -->\n", "<!-- /python -m tests.mutation -->\n"
TARGETS = {  # 文件 → 它的测试
    "util/calendar.py": ("tests/util/test_calendar.py", "tests/util/data/test_index.py"),
    "util/data/reader.py": (
        "tests/util/data/test_reader.py",
        "tests/util/data/test_read_into.py",
        "tests/util/data/test_store.py",
        "tests/util/data/test_windows.py",
    ),
    "util/data/windows.py": ("tests/util/data/test_windows.py", "tests/util/data/test_starts_every.py"),
    "util/data/normalize.py": ("tests/util/data/test_normalize.py", "tests/util/data/test_dataset.py"),
    "util/scores/metrics.py": ("tests/util/scores/test_metrics.py", "tests/util/scores/test_metrics_ensemble.py"),
    "util/checkpoint.py": ("tests/util/test_checkpoint.py", "tests/util/files/test_training_checkpoint.py"),
    "models/ar_pred_video_vanilla.py": (
        "tests/models/test_ar_pred.py",
        "tests/models/test_ar_pred_forward.py",
        "tests/models/test_ar_pred_config.py",
    ),
}
SEED = 2026
SLOWEST = 240  # 秒；走不完的也算发觉了
COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Add,
    ast.Mod: ast.Add, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
QUIET = ("log", "warnings")  # 少一句话不算
CHECKED = "strict"  # zip(strict=True) 与断言一样：长短总是相同的，少了它没有测试看得出


Record = dict[str, dict[str, Any]]


class Mutation(NamedTuple):
    """在 file 的第 place 个节点上（ast.walk 的次序）的第 which 种改法；line、what 给人看。"""

    file: str
    place: int
    which: int
    line: int
    what: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line} {self.what} [{self.place}.{self.which}]"


Change = tuple[str, Callable[[], None]]


def changes_of(node: ast.AST) -> Iterator[Change]:
    """一个节点可以怎样改：说法，与就地改它的函数。"""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
        other = COMPARED[type(node.ops[0])]
        yield f"{_word(node.ops[0])} -> {other.__name__}", lambda: node.ops.__setitem__(0, other())
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in COMPUTED:
        done = COMPUTED[type(node.op)]
        yield f"{_word(node.op)} -> {done.__name__}", lambda: setattr(node, "op", done())
    elif isinstance(node, ast.BoolOp):
        swapped = ast.And if isinstance(node.op, ast.Or) else ast.Or
        yield f"{_word(node.op)} -> {swapped.__name__}", lambda: setattr(node, "op", swapped())
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield f"{node.value} -> {value}", lambda: setattr(node, "value", value)
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        test = node.test
        yield "condition negated", lambda: setattr(node, "test", ast.UnaryOp(ast.Not(), test))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        kept = ast.UAdd() if isinstance(node.op, ast.USub) else None
        if kept is not None and not isinstance(node.operand, ast.Constant):
            yield "minus left out", lambda: setattr(node, "op", kept)
    elif isinstance(node, ast.Call) and _root(node.func) not in QUIET:
        for keyword in [one for one in node.keywords if one.arg != CHECKED][-1:]:
            yield f"argument {keyword.arg} left out", lambda one=keyword: node.keywords.remove(one)
    elif isinstance(node, ast.Return) and node.value is not None:
        yield "returns None", lambda: setattr(node, "value", ast.Constant(None))
    body = getattr(node, "body", None)
    if isinstance(body, list):
        for i, statement in enumerate(body):
            left_out = isinstance(statement, ast.AugAssign | ast.Raise | ast.Break | ast.Continue) or (
                isinstance(statement, ast.Expr)
                and isinstance(statement.value, ast.Call | ast.Yield)
                and _root(getattr(statement.value, "func", None)) not in QUIET
            )
            if left_out:
                yield f"line {statement.lineno} left out", lambda i=i: body.__setitem__(i, ast.Pass())


def _word(operator: ast.AST) -> str:
    return type(operator).__name__


def _root(node: ast.AST | None) -> str:
    """a.b.c() 的 a。"""
    while isinstance(node, ast.Attribute | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def nodes(tree: ast.Module) -> list[ast.AST]:
    """可以改的节点；注解、报错的话不算。"""
    found: list[ast.AST] = []

    def visit(node: ast.AST) -> None:
        found.append(node)
        for name, value in ast.iter_fields(node):
            skipped = name in ("annotation", "returns", "decorator_list") or isinstance(node, ast.Raise | ast.JoinedStr)
            for child in [] if skipped else value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and getattr(child, "arg", None) != CHECKED:
                    visit(child)

    visit(tree)
    return found


def mutations(file: str) -> list[Mutation]:
    """一个文件的全部变异。"""
    found = []
    for place, node in enumerate(nodes(ast.parse((ROOT / file).read_text(encoding="utf-8")))):
        for which, (what, _) in enumerate(changes_of(node)):
            found.append(Mutation(file, place, which, getattr(node, "lineno", 0), what))
    return found


def mutated(mutation: Mutation) -> ast.Module:
    """改过的语法树。"""
    tree = ast.parse((ROOT / mutation.file).read_text(encoding="utf-8"))
    list(changes_of(nodes(tree)[mutation.place]))[mutation.which][1]()
    return ast.fix_missing_locations(tree)


def chosen(count: int) -> list[Mutation]:
    everything = [mutation for file in TARGETS for mutation in mutations(file)]
    picked = random.Random(SEED).sample(everything, min(count, len(everything)))  # noqa: S311
    return sorted(picked, key=lambda m: (list(TARGETS).index(m.file), m.place, m.which))


class Replaced(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """引入 name 时给改过的。"""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        self.name, self.path, self.tree = name, path, tree

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        exec(compile(self.tree, str(self.path), "exec"), module.__dict__)  # noqa: S102

    def get_filename(self, fullname: str) -> str:
        return str(self.path)


def run_tests(file: str, tree: ast.Module | None) -> int:
    """在 fork 出来的进程里；pytest 的退出码。"""
    import pytest

    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    if tree is not None:
        sys.meta_path.insert(0, Replaced(file.removesuffix(".py").replace("/", "."), ROOT / file, tree))
    imported = "ignore::pytest.PytestAssertRewriteWarning"  # 第三方的插件在 fork 之前引入过了
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", imported]
    return int(pytest.main([*options, *TARGETS[file]]))


def outcome(file: str, tree: ast.Module | None) -> str:
    """killed（测试发觉了）、survived、out of time。"""
    child = os.fork()
    if not child:
        os.setsid()
        status = 70
        try:
            status = run_tests(file, tree)
        finally:
            os._exit(status)
    until = time.monotonic() + SLOWEST
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "out of time"
        time.sleep(0.05)


def fingerprint(file: str) -> str:
    """一个文件与它的测试的校验和：改了就从头来。"""
    return hashlib.sha256(b"".join((ROOT / path).read_bytes() for path in (file, *TARGETS[file]))).hexdigest()[:16]


def load() -> Record:
    """文件 → 它的变异的下场；源文件或测试改过的是空的。"""
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    keys = {file: fingerprint(file) for file in TARGETS}
    known = {file for file, key in keys.items() if record.get(file, {}).get("key") == key}
    return {file: record[file] if file in known else {"key": key, "outcomes": {}} for file, key in keys.items()}


def save(record: Record) -> None:
    RECORD.parent.mkdir(exist_ok=True)
    with replacing(RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")


def table(wanted: Sequence[Mutation], record: Record) -> str:
    rows = ["| 文件 | 全部变异 | 试了 | 发觉 | 活下来 |\n|---|---|---|---|---|\n"]
    counts = []
    for file in TARGETS:
        outcomes = record[file]["outcomes"]
        found = [outcomes[m.name] for m in wanted if m.file == file and m.name in outcomes]
        alive = found.count("survived")
        counts.append((len(mutations(file)), len(found), len(found) - alive, alive))
        rows.append(f"| `{file}` | {' | '.join(map(str, counts[-1]))} |\n")
    total = [sum(column) for column in zip(*counts, strict=True)]
    share = f"（{total[2] / total[1]:.0%}）" if total[1] else ""
    return "".join(rows) + f"| 合计 | {total[0]} | {total[1]} | {total[2]}{share} | {total[3]} |\n"


def with_table(page: str, text: str) -> str:
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, "docs/reliability.md has lost its two markers"
    return before + begin + text + end + after


def main() -> int:
    parser = argparse.ArgumentParser(description="Change the code in one place, see whether its tests notice.")
    parser.add_argument("--count", type=int, default=300, help="changes drawn from all (default: 300)")
    parser.add_argument("--minutes", type=float, default=55, help="stop after this long (default: 55)")
    parser.add_argument("--only", choices=TARGETS, nargs="+", default=list(TARGETS), help="of these files alone")
    args = parser.parse_args()
    until, record, wanted = time.monotonic() + 60 * args.minutes, load(), chosen(args.count)
    import hypothesis, matplotlib.figure, netCDF4, pydantic, pytest, scores, torch, xarray, yaml  # noqa: E401, F401, I001

    for file in args.only:
        outcomes = record[file]["outcomes"]
        left = [m for m in wanted if m.file == file and m.name not in outcomes]
        if left and outcome(file, None) != "survived":
            raise ValueError(f"{file}: its tests {', '.join(TARGETS[file])} fail without a change")
        for mutation in left:
            if time.monotonic() > until:
                break
            outcomes[mutation.name] = found = outcome(file, mutated(mutation))
            save(record)
            print(found, mutation.name, flush=True)
    made = table(wanted, record)
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
    print(made)
    return 0


if __name__ == "__main__":
    run_command(main)
