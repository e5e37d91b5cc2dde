"""检查点写不下：一行错误，从前的那一个还读得出，不留下临时文件。"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from util.checkpoint import copy_checkpoint, load_checkpoint, save_checkpoint


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """文件只许写到 size 字节，如同磁盘满了。"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1_000, 100_000, 400_000])
def test_a_full_disk_is_one_line_and_keeps_the_old_one(tmp_path: Path, size: int) -> None:
    old, big = tmp_path / "last.ckpt", tmp_path / "big.ckpt"
    save_checkpoint(old, {"step": 1})
    content = {"step": 2, "model": {str(i): torch.randn(10_000) for i in range(10)}}
    save_checkpoint(big, content)
    with largest_file(size):
        with pytest.raises(
            OSError, match=r"checkpoint .*last.ckpt: File too large \(.* MB free\); the one from before"
        ):
            save_checkpoint(old, content)
        with pytest.raises(OSError, match=r"checkpoint .*best.ckpt: File too large .*; nothing was written; make room"):
            copy_checkpoint(big, tmp_path / "best.ckpt")
    assert load_checkpoint(old)["step"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.ckpt", "last.ckpt"]


def test_what_cannot_be_saved_is_our_mistake(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        save_checkpoint(tmp_path / "last.ckpt", {"function": lambda: None})
    assert list(tmp_path.iterdir()) == []
