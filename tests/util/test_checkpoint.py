"""检查点写不下：一行错误，从前的那一个还读得出，不留下临时文件。坏了一位的：读出的逐位相同，或是一行。"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.full_disk import largest_file
from util.checkpoint import copy_checkpoint, load_checkpoint, read_shards, save_checkpoint, write_shards

BEFORE = Path(__file__).resolve().parents[1] / "from_before"
SMALL = {
    "run": "small",
    "model": {"head.weight": torch.randn(64, 16), "head.bias": torch.randn(16).bfloat16(), "seen": torch.tensor(3)},
    "optimizer": {"state": {"head.bias": {"exp_avg": torch.randn(16)}}, "param_groups": [{"betas": (0.9, 0.999)}]},
    "random": [{"python": [3, list(range(50)), None], "torch": torch.get_rng_state()[:64]}],
}


@pytest.mark.parametrize("size", [1_000, 100_000, 400_000])
def test_a_full_disk_is_one_line_and_keeps_the_old_one(tmp_path: Path, size: int) -> None:
    old, big = tmp_path / "last.ckpt", tmp_path / "big.ckpt"
    save_checkpoint(old, {"step": 1})
    content = {"step": 2, "model": {str(i): torch.randn(10_000) for i in range(10)}}
    save_checkpoint(big, content)
    with largest_file(size):
        with pytest.raises(
            OSError, match=r"checkpoint .*last.ckpt: File too large, 0.4 MB needed, .* MB free; \S+/big.ckpt is whole"
        ):
            save_checkpoint(old, content)
        with pytest.raises(OSError, match=r"checkpoint .*best.ckpt: File too large, 0.4 MB needed, .* \S+/big.ckpt is"):
            copy_checkpoint(big, tmp_path / "best.ckpt")
    assert load_checkpoint(old)["step"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.ckpt", "last.ckpt"]


def test_what_cannot_be_saved_is_our_mistake(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        save_checkpoint(tmp_path / "last.ckpt", {"function": lambda: None})
    assert list(tmp_path.iterdir()) == []


def same(one: Any, two: Any) -> bool:
    """逐位，类型也相同。"""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        bits = [t.contiguous().flatten().view(torch.uint8) for t in (one, two)]
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*bits)
    if isinstance(one, dict) and isinstance(two, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple) and type(one) is type(two):
        return len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and one == two


@pytest.mark.parametrize(
    ("source", "flips"), [(None, 60), *(pytest.param(n, 1000, marks=pytest.mark.soak) for n in ("ar_pred", "vqvae"))]
)
def test_one_flipped_bit_is_one_line_or_nothing(tmp_path: Path, source: str | None, flips: int) -> None:
    good, bad = tmp_path / "good.ckpt", tmp_path / "bad.ckpt"
    save_checkpoint(good, SMALL if source is None else load_checkpoint(BEFORE / f"{source}.ckpt"))
    content, whole, named = good.read_bytes(), load_checkpoint(good), 0
    for place in np.random.default_rng(flips).integers(8 * len(content), size=flips).tolist():
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        bad.write_bytes(flipped)
        try:
            loaded, said = load_checkpoint(bad), None
        except ValueError as error:
            loaded, said = None, str(error)
        if said is None:
            assert same(loaded, whole), f"bit {place} changes it silently"
        else:
            assert str(bad) in said and "\n" not in said
            named += "is damaged, it is not what was saved" in said
    assert named > flips // 4


def test_damage_names_the_tensor_or_the_record(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    save_checkpoint(path, SMALL)
    assert same(load_checkpoint(path), {**SMALL, "format": 2})
    content, weight = path.read_bytes(), SMALL["model"]["head.weight"].numpy().tobytes()
    for old, new, what in (
        (weight, weight[:-1] + bytes([weight[-1] ^ 1]), "model.head.weight"),
        (b"small", b"smalk", r"the record \(all that is not a tensor\)"),
        (b"head.bias", b"head.bais", "model.head.bias"),
    ):
        path.write_bytes(content.replace(old, new, 1))
        with pytest.raises(ValueError, match=rf"x.ckpt: {what} is damaged, it is not what was saved; take another"):
            load_checkpoint(path)
        load_checkpoint(path, verify=False)


def test_what_was_never_saved_is_one_line(tmp_path: Path) -> None:
    path, tensor = tmp_path / "x.ckpt", torch.zeros(2)
    circle: dict[str, Any] = {}
    circle["model"] = circle
    twice = {"model.a": tensor, "model": {"a": tensor}}
    for content, said in (
        ({"model": circle}, "RecursionError"),
        (twice, "AssertionError"),
        ({"digests": {"a\nb": "0"}}, r"'a\\nb' is damaged"),
    ):
        torch.save({"format": 2, "digests": {}, **content}, path)
        with pytest.raises(ValueError, match=rf"\A[^\n]*x.ckpt: [^\n]*{said}[^\n]*\Z"):
            load_checkpoint(path)


def test_too_little_memory_is_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "x.ckpt", SMALL)

    def no_room(content: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr("util.checkpoint.digests", no_room)
    with pytest.raises(ValueError, match="x.ckpt: needs more memory than there is, or is truncated, damaged or"):
        load_checkpoint(tmp_path / "x.ckpt")


def test_one_from_before_says_that_it_cannot_be_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "old.ckpt"
    torch.save({"format": 1, **SMALL}, path)
    with caplog.at_level(logging.WARNING):
        assert same(load_checkpoint(path, verify=False), {"format": 1, **SMALL}) and not caplog.messages
        for _ in range(2):
            load_checkpoint(path)
    assert caplog.messages == [
        f"{path} was written before checkpoints carried digests: damage in its values goes unnoticed"
    ]
    torch.save({"format": 2, **SMALL}, path)
    with pytest.raises(ValueError, match=r"old.ckpt: .* is damaged"):
        load_checkpoint(path)


@pytest.fixture
def alone_in_a_group(tmp_path: Path) -> Iterator[None]:
    """一个进程的进程组：写分片要有。"""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone_in_a_group")
def test_damage_in_a_shard_names_the_file_and_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    content = {**SMALL, "ema": None}
    save_checkpoint(path, write_shards(tmp_path / "last-0123abcd.shards", content))
    assert load_checkpoint(path)["model"].keys() == SMALL["model"].keys()
    (shard,) = (tmp_path / "last-0123abcd.shards").iterdir()
    whole = shard.read_bytes()
    weight = whole.index(SMALL["model"]["head.weight"].numpy().tobytes())
    for place, what in (
        (weight, "model.head.weight"),
        (whole.index(b"[64,16]") + 1, r"the record \(all that is not a tensor\)"),
        (3, r"the record \(all that is not a tensor\)"),
    ):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        for gather in (True, False):  # 续训的读法
            with pytest.raises(ValueError, match=rf"{shard}: {what} is damaged, it is not what was saved"):
                read_shards(load_checkpoint(path, gather=gather), {})
    load_checkpoint(path, gather=False, verify=False)
    shard.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{shard}: .* is damaged"):
        load_checkpoint(path)
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        load_checkpoint(path)
