"""扫描的命令：只看文件名，存着的索引何时用、何时不用。"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.engine.runs import write_run
from util.commands.scan import main
from util.data.tree_files import field_path


def test_scan_command(make_tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """文件数、缺的、空缺与写开的数一致；修改时间没有变的改动，--rebuild 才看得见，之后也存下了。"""
    tree = make_tree(tmp_path / "tree", ("t2m", "z_level_00"), (4, 8), "2000-01-01", "2000-01-12")
    for hour in tree.hours[10:16]:
        field_path(tree.root, "t2m", hour).unlink()
    words = ["--config", str(write_run(tmp_path, tree)), "data.splits.train=[2000-01-01,2000-01-08]"]
    words += ["data.splits.val=[2000-01-09,2000-01-10]", "data.splits.test=[2000-01-11,2000-01-12]"]

    def lines(*more: str) -> list[str]:
        assert main([*words, *more]) == 0
        return capsys.readouterr().out.splitlines()

    first = lines()
    assert [line.split() for line in first[1:3]] == [
        ["t2m", "42", "48", "6", "2000-01-01T00", "2000-01-12T18"],
        ["z_level_00", "48", "48", "0", "2000-01-01T00", "2000-01-12T18"],
    ]
    assert first[3:5] == [
        "1 gaps longer than data.max_gap_hours = 24",
        "  train: 2000-01-03T12 to 2000-01-04T18 (6 samples), no file of t2m",
    ]
    assert re.fullmatch(r"90 files of 2 channels in 2000: \d+\.\d\d s", first[5])
    folder = tree.root / "t2m_npy" / "2000"
    stamp = folder.stat().st_mtime_ns
    field_path(tree.root, "t2m", tree.hours[0]).unlink()
    os.utime(folder, ns=(stamp, stamp))
    assert lines()[1] == first[1]
    assert lines("--rebuild")[1].split()[1:4] == ["41", "48", "7"]
    assert lines()[1].split()[1:4] == ["41", "48", "7"]
