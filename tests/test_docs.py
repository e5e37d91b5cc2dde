"""说明里的每个链接、说明与注释里写着的每个路径都有那个文件，没有留下占位的字样。"""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

from engine.versions import versions
from util import VERSION
from util.strict import read_mapping

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), ROOT / "config" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = ("engine", "models", "util", "tests", "benchmarks")
PATH = re.compile(rf"(?<![\w/.<}}-])((?:{'|'.join(CODE)}|layers|config|docs)/[\w./-]*\w)")
MODULE = re.compile(rf"python -m ((?:{'|'.join(CODE)})\.[\w.]*\w)")
TO_FILL_IN = re.compile(r"\b(NAME|X|my_set)\b")
MADE = set(
    re.findall(r"<!-- file: (\S+) -->", "".join(page.read_text(encoding="utf-8") for page in PAGES))
)  # 教程里自己写的


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    broken = [link for link in links if link and "://" not in link and not (page.parent / link).exists()]
    assert not broken
    assert not re.findall(r"@[A-Z_]+@", text)


def prose(path: Path) -> str:
    """一个文件里给人看的话：Python 与 YAML 只算注释和三个引号里的，其余是全文。"""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return "\n".join(line.partition("#")[2] for line in text.splitlines())
    if path.suffix != ".py":
        return text
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join(t.string for t in tokens if t.type == tokenize.COMMENT or t.string.startswith('"""'))


def missing(text: str) -> list[str]:
    """写着而没有的文件与模块；layers/ 从 models/ 数起，要人填的名字不算。"""
    paths = [path for path in PATH.findall(text) if not TO_FILL_IN.search(path) and path not in MADE]
    paths += [f"{module.replace('.', '/')}.py" for module in MODULE.findall(text)]
    return [path for path in paths if not any((root / path).exists() for root in (ROOT, ROOT / "models"))]


def test_named_paths_are_there() -> None:
    files = [*PAGES, ROOT / "Makefile", *(ROOT / "config").rglob("*.yaml"), *ROOT.glob("*.py")]
    files += [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix(): missing(prose(path)) for path in files}
    assert not {path: names for path, names in found.items() if names}


def test_a_made_up_path_is_found(tmp_path: Path) -> None:
    page, yaml, code = (tmp_path / f"a{suffix}" for suffix in (".md", ".yaml", ".py"))
    page.write_text("见 `util/old.py`、util/config.py、docs/data.md；`python -m util.old --out F`；config/NAME.yaml。")
    yaml.write_text("# 命令见 tests/test_old.py\nset: config/old.yaml  # layers/losses.py，layers/old.py\n")
    code.write_text('"""见 models/old.py。"""\nx = "engine/old.py"  # engine/older.py\n')
    assert missing(prose(page)) == ["util/old.py", "util/old.py"]
    assert missing(prose(yaml)) == ["tests/test_old.py", "layers/old.py"]
    assert missing(prose(code)) == ["models/old.py", "engine/older.py"]


def test_one_version() -> None:
    """写在 util/__init__.py；引用的一页、改动的第一节、检查点与报告里的都是它。"""
    citation = read_mapping(ROOT / "CITATION.cff")
    heading = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation["version"] == VERSION == versions()["ar_pred"]
    assert heading and heading.groups() == (VERSION, citation["date-released"])
