"""说明里的每个相对链接都有那个文件，没有留下占位的字样。"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("README*.md"), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    broken = [link for link in links if link and "://" not in link and not (page.parent / link).exists()]
    assert not broken
    assert not re.findall(r"@[A-Z_]+@", text)


@pytest.mark.parametrize("name", ["architecture.md", "reliability.md"])
def test_paths_are_there(name: str) -> None:
    """说房子的两页：反引号里的路径都在；NAME 是要人填的。"""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    named = re.findall(r"`((?:engine|models|util|tests|config|benchmarks|docs)/[\w./-]*)`", text)
    assert named
    assert not [path for path in named if "NAME" not in path and not (ROOT / path).exists()]
