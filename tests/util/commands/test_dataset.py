"""dataset.py：列出各词；没有的词一行、退出码 2，说出最近的；没有留下别的入口。"""

from __future__ import annotations

import pytest

from tests.engine.runs import ROOT, run_script
from util.commands.dataset import WORDS, dataset_command


def test_help_lists_every_word(capsys: pytest.CaptureFixture[str]):
    assert dataset_command(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line.startswith("  ")}
    assert listed == {name: word.line for name, word in WORDS.items()}


def test_no_word_is_a_mistake():
    done = run_script("dataset.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert all(word in done.stderr for word in WORDS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("statistic", "nearest: statistics"),
        ("chekc", "nearest: check"),
        ("--workers", f"valid names: {', '.join(WORDS)}"),
        ("", f"valid names: {', '.join(WORDS)}"),
    ],
)
def test_wrong_word(given: str, said: str):
    done = run_script("dataset.py", given, "--config", "x.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: dataset.py has no word {given!r}; {said}\n"


@pytest.mark.parametrize("word", WORDS)
def test_help_of_a_word(word: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        dataset_command([word, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: dataset.py {word} [-h]")


def test_util_has_no_other_entry():
    found = [str(path) for path in (ROOT / "util").rglob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert not found
