"""这份代码的提交，有没有改过；不是仓库的没有。"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from engine.versions import commit_of


def git(folder: Path, *words: str) -> str:
    who = {f"GIT_{role}_{what}": "a@b" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **who}).stdout


def test_the_commit_and_whether_the_code_has_changed_since(tmp_path: Path) -> None:
    assert commit_of(tmp_path) == {}
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    (tmp_path / "notes.txt").write_text("no code")
    clean = {"commit": git(tmp_path, "rev-parse", "HEAD").strip(), "dirty": "no"}
    assert commit_of(tmp_path) == clean
    (tmp_path / "b.yaml").write_text("")
    assert commit_of(tmp_path) == {**clean, "dirty": "yes"}
    (tmp_path / "b.yaml").unlink()
    (tmp_path / "a.py").write_text("x = 1\n")
    assert commit_of(tmp_path) == {**clean, "dirty": "yes"}
