"""机器路径、空壳函数、未完成的记号；--help 是否轻快。引用的方向在 tests/test_house.py。"""

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

from util.commands.dataset import WORDS

ROOT = Path(__file__).resolve().parent.parent
CODE = ("engine", "models", "util", "tests", "benchmarks")
TEXT = (*CODE, "config", "docs", ".ci")
SCRIPTS = sorted(ROOT.glob("*.py"))


def python_files() -> list[Path]:
    return [*SCRIPTS, *(p for folder in CODE for p in sorted((ROOT / folder).rglob("*.py")))]


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
    sys.argv = [*sys.argv[1:], "--help"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        slow = {"torch", "lightning_fabric", "xarray", "matplotlib", "scipy", "wandb", "distributed"}
        heavy = sorted(slow & set(sys.modules))
        print("heavy:", *heavy)
        raise stop
""")


def commands() -> dict[str, list[str | Path]]:
    """每个命令怎样叫 → 文件与它的词：根目录的脚本，dataset.py 的各个词，engine 里能单独跑的。"""
    alone = (p for p in sorted((ROOT / "engine").rglob("*.py")) if "__main__" in p.read_text(encoding="utf-8"))
    return {
        **{script.name: [script] for script in SCRIPTS},
        **{f"dataset.py {word}": [ROOT / "dataset.py", word] for word in WORDS},
        **{f"python -m {'.'.join(path.relative_to(ROOT).with_suffix('').parts)}": [path] for path in alone},
    }


@pytest.mark.parametrize(("name", "command"), commands().items())
def test_help_is_light(name: str, command: list[str | Path]):
    """--help 不该先花几秒导入 torch；从别的文件夹调用也一样。"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HELP, *command],
        cwd=ROOT.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    usage, _, heavy = done.stdout.rpartition("heavy:")
    assert usage.startswith(f"usage: {name} "), done.stdout
    assert not heavy.strip(), f"{name} --help imports {heavy}"
    assert seconds < 3, f"{name} --help took {seconds:.1f} s"
