"""扫描目录树：恰好找到那些文件；缓存何时作废、坏了怎样；路径、变量、层、年份不在时的报错。"""

from __future__ import annotations

import io
import os
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.holding import two_at_once
from tests.util.data.test_index import make_config
from util.calendar import year_start
from util.config import DataConfig
from util.data.index import scan
from util.data.tree_files import field_path, select_channels

# ---- 扫描与缓存


@pytest.fixture
def touched(tmp_path: Path) -> Path:
    """只有文件名的小树：两个通道、两年，每年头 48 小时，z 缺 1999-0006。"""
    root = tmp_path / "tree"
    for channel in ("t2m", "z_level_00"):
        for year in (1999, 2000):
            for number in range(48):
                path = field_path(root, channel, year_start(year) + number)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    (root / "z_npy/level_00/1999/1999-0006.npy").unlink()
    for name in ("notes.txt", "1999-abcd.npy", "1999-8900.npy", "2000-0001.npy", "1999-0001.npy.tmp", "1999-00001.npy"):
        (root / "t2m_npy/1999" / name).touch()  # 不合名字的，以及 1999 年没有的小时
    return root


CHANNELS = ["t2m", "z_level_00"]


def test_scan_finds_exactly_the_files(touched: Path):
    index = scan(make_config(touched), CHANNELS, [1999, 2000])
    assert index.channels == ("t2m", "z_level_00")
    assert (index.start, index.stop) == (year_start(1999), year_start(2001))
    expected = {(c, year_start(y) + n) for c in range(2) for y in (1999, 2000) for n in range(48)}
    expected.remove((1, year_start(1999) + 6))
    found = {(int(c), int(h) + index.start) for c, h in np.argwhere(index.present)}
    assert found == expected


def test_second_scan_lists_no_directory(touched: Path, monkeypatch: pytest.MonkeyPatch):
    first = scan(make_config(touched), CHANNELS, [1999, 2000])
    listed = []
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or [])
    second = scan(make_config(touched), CHANNELS, [1999, 2000])
    assert not listed
    assert second.start == first.start
    assert np.array_equal(second.present, first.present)


def test_two_scan_at_once(touched: Path):
    """两个进程同时存同一份索引，也同时读：读到的总是完整的一份。"""
    config, years = make_config(touched), [1999, 2000]
    alone = scan(config, CHANNELS, years).present

    def scan_again() -> None:
        for i in range(40):
            assert np.array_equal(scan(config, CHANNELS, years, rebuild=i % 2 == 0).present, alone)

    two_at_once(scan_again)
    assert len(list(Path(config.cache_dir).iterdir())) == 1


@pytest.mark.parametrize("change", ["new file", "removed file", "other channels", "other years", "other root"])
def test_what_invalidates_the_cache(touched: Path, tmp_path: Path, change: str):
    config, channels, years = make_config(touched), CHANNELS, [1999, 2000]
    count = int(scan(config, channels, years).present.sum())
    if change == "new file":
        (touched / "t2m_npy/2000/2000-0100.npy").touch()
        expected = count + 1
    elif change == "removed file":
        (touched / "z_npy/level_00/2000/2000-0003.npy").unlink()
        expected = count - 1
    elif change == "other channels":
        channels, expected = ["z_level_00"], count - 96
    elif change == "other years":
        years, expected = [2000], 96
    else:
        shutil.copytree(touched, tmp_path / "tree2")
        year = tmp_path / "tree2/t2m_npy/1999"
        (year / "1999-0000.npy").unlink()
        stamp = (touched / "t2m_npy/1999").stat().st_mtime_ns
        os.utime(year, ns=(stamp, stamp))  # 修改时间全同，只有根目录不同
        config, expected = make_config(tmp_path / "tree2"), count - 1
    assert int(scan(config, channels, years).present.sum()) == expected


ENTRY = re.compile(rb"PK\x01\x02.{5}", re.S)  # zip 目录的一项，到旗标的低位
BAD_CACHES: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.write_bytes(b""),
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-30]),
    "cut at the front": lambda p: p.write_bytes(p.read_bytes()[:10]),
    "a flipped bit": lambda p: p.write_bytes(p.read_bytes()[:300] + b"?" + p.read_bytes()[301:]),
    "marked as encrypted": lambda p: p.write_bytes(ENTRY.sub(lambda m: m[0][:-1] + b"\x01", p.read_bytes())),
    "text": lambda p: p.write_text("not an archive"),
    "an array": lambda p: p.write_bytes(npy(np.zeros(3))),
    "half a header": lambda p: p.write_bytes(npy(np.zeros(3)).replace(b"(3,)", b"(((3")),
    "another name": lambda p: np.savez(p, other=np.zeros((2, 2193), np.uint8)),
    "another shape": lambda p: np.savez(p, present=np.zeros((2, 2192), np.uint8)),
    "another dtype": lambda p: np.savez(p, present=np.zeros((2, 2193))),
}


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@pytest.mark.parametrize("spoil", BAD_CACHES.values(), ids=BAD_CACHES)
def test_a_bad_cache_is_scanned_and_written_anew(touched: Path, spoil: Callable[[Path], object]):
    config = make_config(touched)
    first = scan(config, CHANNELS, [1999, 2000]).present
    (cache,) = Path(config.cache_dir).iterdir()
    assert first.shape == (2, 8 * 2193)
    whole = cache.read_bytes()
    spoil(cache)
    assert cache.read_bytes() != whole
    assert np.array_equal(scan(config, CHANNELS, [1999, 2000]).present, first)
    with np.load(cache) as stored:
        assert np.array_equal(stored["present"], np.packbits(first, axis=1))
    assert [*Path(config.cache_dir).iterdir()] == [cache]


def test_the_cache_is_on_the_disk_before_it_has_its_name(touched: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("fsync"), fsync(file))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), replace(*paths))[1])
    scan(make_config(touched), CHANNELS, [1999, 2000])
    assert events == ["fsync", "replace"]


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """数得出全部文件，造的树随后删掉。"""
    monkeypatch.setattr("sys.argv", ["index", "--channels", "1", "--years", "1", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("benchmarks.index", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8760 files in 1 folders"
    assert [line.split()[0] for line in lines[1:]] == ["scan", "cache"]
    assert not list(tmp_path.iterdir())


# ---- 路径、变量、层、年份不在


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"root": "{root}/nowhere"},
            "data.root {root}/nowhere is not a directory; give data.root=FOLDER, the one that holds t2m_npy/",
        ),
        ({"variables": {"t2n": "single"}}, "no 't2n' (looked for {root}/t2n_npy); nearest: t2m"),
        ({"variables": {"humidity": "single"}}, "no 'humidity' (looked for {root}/humidity_npy); there: t2m, z"),
        ({"variables": {"z": ["level_03"]}}, "data.variables.z: no 'level_03' in {root}/z_npy; there: level_00"),
        ({"variables": {"z": "single"}}, "data.variables.z = single, but {root}/z_npy holds levels: level_00"),
        ({"variables": {"t2m": "all"}}, "data.variables.t2m = all: no levels in {root}/t2m_npy; write 'single'"),
        ({"variables": {"t2m": ["level_00"]}}, "data.variables.t2m: no 'level_00' in {root}/t2m_npy; there: none"),
        ({"variables": {}}, "data.variables is empty"),
        ({"variables": {"z": ["level_00", "level_00"]}}, "data.variables: listed twice: z_level_00"),
    ],
)
def test_missing_parts_of_the_tree(touched: Path, more: dict[str, Any], said: str):
    if "root" in more:
        more = {"root": more["root"].format(root=touched)}
    with pytest.raises(ValueError, match=re.escape(said.format(root=touched))):
        select_channels(DataConfig(**{**make_config(touched).model_dump(), **more}))


def test_missing_year_says_what_is_there(touched: Path):
    said = (
        f"channel z_level_00: no year 2001 (looked for {touched}/z_npy/level_00/2001); "
        "years there: 1999 to 2000 (2 years)"
    )
    (touched / "t2m_npy/2001").mkdir()
    with pytest.raises(ValueError, match=re.escape(said)):
        scan(make_config(touched), CHANNELS, [1999, 2000, 2001])
    shutil.rmtree(touched / "z_npy/level_00")
    (touched / "z_npy/level_00").mkdir()
    with pytest.raises(ValueError, match="years there: none"):
        scan(make_config(touched), ["z_level_00"], [1999])
