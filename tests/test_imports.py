"""导入只往一个方向走：根目录脚本 → engine → models → models/layers → util。

顺带查：机器路径、空壳函数、--help 是否轻快。
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = ("engine", "models", "util", "tests", "benchmarks")
TEXT = (*CODE, "config", "docs", ".ci")
SCRIPTS = sorted(ROOT.glob("*.py"))
MAY_IMPORT = {  # 楼层 → 它能看见的楼层；模型之间另有规定
    "util": {"util"},
    "layers": {"util", "layers"},
    "model": {"util", "layers", "models"},
    "models": {"util", "layers", "models"},
    "engine": {"util", "layers", "models", "model", "engine"},
    "script": {"util", "layers", "models", "model", "engine"},
}


def floor_of(module: str) -> str | None:
    """模块在哪一层；第三方与标准库为 None。models 本身与 models.interface 是约定，其余每个文件是一个模型。"""
    top, _, rest = module.partition(".")
    if top == "models":
        first = rest.partition(".")[0]
        return {"": "models", "interface": "models", "layers": "layers"}.get(first, "model")
    if top in ("engine", "util", "tests", "benchmarks"):
        return top
    return "script" if (ROOT / f"{top}.py").is_file() else None


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """文件里出现的每个模块名：各处的 import（含函数内的、相对的），以及 import_module 的字面部分。"""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            # from models import simvp 也是导入 models.simvp；导入的若只是函数，多出的名字由调用处略去
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in {
            "import_module",
            "__import__",
        }:
            argument = node.args[0]
            if isinstance(argument, ast.JoinedStr):
                argument = argument.values[0]
            if isinstance(argument, ast.Constant):
                yield str(argument.value).rstrip(".")


def is_module(name: str) -> bool:
    """name 是仓库里的一个文件或文件夹（而不是模块里的函数）。"""
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def violations(source: str, module: str, known=is_module) -> list[str]:
    """module 的源码里不该有的导入。tests 与 benchmarks 可以导入一切，但谁也不能导入它们。"""
    own = floor_of(module)
    package = module if (ROOT / Path(*module.split("."))).is_dir() else module.rpartition(".")[0]
    found = []
    for name in imported(ast.parse(source), package):
        other = floor_of(name)
        if other is None or name == module or not known(name):
            continue
        if own in ("tests", "benchmarks"):
            allowed = other in {*MAY_IMPORT["script"], own, "script"}
        else:
            allowed = other in MAY_IMPORT[own or "script"]
        if not allowed:
            found.append(f"{module} imports {name}")
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_files() -> list[Path]:
    return [*SCRIPTS, *(p for folder in CODE for p in sorted((ROOT / folder).rglob("*.py")))]


def test_imports_go_one_way():
    found = [v for path in python_files() for v in violations(path.read_text(encoding="utf-8"), module_name(path))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("util.scores.metrics", "import models.interface"),
        ("util.scores.metrics", "def f():\n    from engine import train"),
        ("util.config", "from ..models import interface"),
        ("util.scores.metrics", "import importlib\nimportlib.import_module(f'models.{name}')"),
        ("models.layers.attention", "from models.simvp import Block"),
        ("models.layers.attention", "from models import interface"),
        ("models.simvp", "from models.ar_pred_video_vanilla import Model"),
        ("models.simvp", "from models import ar_pred_video_vanilla"),
        ("models.simvp", "from .ar_pred_video_vanilla import Model"),
        ("models.simvp", "from engine.train import main"),
        ("models.interface", "from models.simvp import Model"),
        ("engine.training.loop", "import train"),
        ("engine.training.loop", "from tests import conftest"),
        ("train", "from tests.conftest import CLIMATE"),
        ("benchmarks.speed", "import tests.conftest"),
    ],
)
def test_checker_catches_violations(module: str, source: str):
    assert violations(source, module, known=lambda name: True)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("train", "from engine.train import main\nfrom util.cli import run_command"),
        (
            "engine.training.loop",
            "import torch, models\nfrom engine import evaluate\nfrom models.interface import OnePass",
        ),
        ("models", "import importlib\nimportlib.import_module(f'models.{name}')\nfrom models.interface import OnePass"),
        ("models.simvp", "from models.layers.attention import Attention\nfrom util.batch import Batch"),
        ("models.layers.attention", "from models.layers import mlp\nimport torch.nn as nn"),
        ("tests.engine.training.test_train", "import models.simvp, engine.train, tests.conftest, train"),
    ],
)
def test_checker_allows_the_way_down(module: str, source: str):
    assert not violations(source, module, known=lambda name: True)


# 拼接着写，这个文件自己才不会被查出来
MACHINE_PATH = re.compile("(?<![\\w.$}])/(" + "|".join(["work", "tmp", "root", "home", "opt"]) + ")/[\\w.]")
UNFINISHED = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error"]) + r")\b")


def complaints(text: str) -> list[str]:
    """逐行查机器路径与未完成的记号。"""
    lines = enumerate(text.splitlines(), start=1)
    return [
        f"line {n}: {m.group()}" for n, line in lines for m in (MACHINE_PATH.search(line), UNFINISHED.search(line)) if m
    ]


def stubs(source: str) -> list[str]:
    """只有说明、没有内容的函数；Protocol 里的不算。"""
    tree = ast.parse(source)
    protocols = [
        c for c in ast.walk(tree) if isinstance(c, ast.ClassDef) and any("Protocol" in ast.unparse(b) for b in c.bases)
    ]
    declared = {id(node) for c in protocols for node in c.body}
    return [
        f"line {node.lineno}: {node.name} has no body"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and id(node) not in declared
        and all(
            isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
            for s in node.body
        )
    ]


def text_files() -> Iterator[Path]:
    yield from (
        p for p in ROOT.iterdir() if p.name == "Makefile" or p.suffix in {".py", ".md", ".txt", ".toml", ".yml"}
    )
    for folder in TEXT:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in {"", ".py", ".md", ".yaml", ".txt", ".sh"}:
                yield path


def test_no_machine_paths_and_nothing_unfinished():
    found = [f"{p.relative_to(ROOT)} {c}" for p in text_files() for c in complaints(p.read_text(encoding="utf-8"))]
    found += [f"{p.relative_to(ROOT)} {s}" for p in python_files() for s in stubs(p.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_text_checks_catch_what_they_should():
    slash = chr(47)
    for bad in (
        f"root: {slash}work/main",
        f"open('{slash}tmp/x.npy')",
        "# TO" + "DO: later",
        "raise NotImplemented" + "Error",
    ):
        assert complaints(bad), bad
    for good in ("rm -rf ./tmp/x", "checkpoints/work/last.ckpt", "root: /data/era5", 'tmp = Path(cache) / "tmp"'):
        assert not complaints(good), good
    assert stubs('def f():\n    """说明。"""\n') == ["line 1: f has no body"]
    assert stubs("class A:\n    def f(self): ...\n    async def g(self): pass\n") != []
    assert not stubs("class P(Protocol):\n    def f(self): ...\n\ndef g():\n    return 1\n")


HELP = textwrap.dedent("""
    import runpy, sys
    sys.argv = [sys.argv[1], "--help"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        heavy = sorted({"torch", "lightning", "xarray", "matplotlib", "scipy", "wandb"} & set(sys.modules))
        print("heavy:", *heavy)
        raise stop
""")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_help_is_light(script: Path):
    """--help 不该先花几秒导入 torch；从别的文件夹调用也一样。"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HELP, script],
        cwd=ROOT.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    usage, _, heavy = done.stdout.rpartition("heavy:")
    assert usage.lstrip().startswith("usage:"), done.stdout
    assert not heavy.strip(), f"{script.name} --help imports {heavy}"
    assert seconds < 3, f"{script.name} --help took {seconds:.1f} s"
