"""打包的命令：中断后接着做与一气呵成逐字节相同；坏一个字节找得到；磁盘满时一行说清；往后追加不重写。"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import yaml

from tests.engine.runs import ROOT, write_run
from tests.holding import held_elsewhere
from tests.models.small import small_spec
from tests.trees import DAYS, SPLITS, config_of, damage
from tests.util.packing.stores import assert_same, contents, from_store, outcomes, pack_small
from util.atomic import replacing
from util.calendar import parse_time
from util.commands import verify
from util.commands.dataset import dataset_command
from util.commands.pack import main
from util.config import DataConfig, load_config
from util.data.batches import all_starts, split_batches
from util.data.dataset import open_data
from util.data.index import SPLITS as NAMES
from util.data.store_origin import Store
from util.data.tree_files import field_path
from util.files.store_files import FILLS_KNOWN, read_mark, write_mark
from util.packing import chunks as chunks_module
from util.packing import pack as pack_module
from util.packing.pack import chunk_rows

T0 = parse_time("2000-01-01")
CHANNELS = ("t2m", "z_level_00")
CHUNK = 5 * len(CHANNELS) * 4 * 8 * 4  # 每块 5 行，1280 字节
HOOKED = """
from util.cli import run_command
from util.commands.dataset import dataset_command
from util.packing import chunks, pack
pack.CHUNK_BYTES = {chunk}
real = chunks.write_bytes
def hooked(path, data):
    {hook}
    return real(path, data)
chunks.write_bytes = hooked
run_command(dataset_command)
"""


@pytest.fixture
def tree(make_tree, tmp_path: Path):
    tree = make_tree(tmp_path / "tree", CHANNELS, **DAYS)
    for hour, how in ((30, "removed"), (54, "text"), (60, "not a number")):
        damage(tree, "t2m", T0 + hour, how)
    return tree


def write_config(tmp_path: Path, tree: Any, **changes: Any) -> Path:
    """相应的运行 YAML，路径都是绝对的。"""
    path = write_run(tmp_path, tree)
    values = yaml.safe_load(path.read_text())
    values["data"].update({"splits": SPLITS, "pressure_hpa": [50.0, 1000.0], **changes})
    path.write_text(yaml.safe_dump(values))
    return path


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def start(folder: Path, options: list[str]) -> subprocess.Popen[str]:
    """在 folder 里打包，每写一个文件先等一会儿。"""
    code = HOOKED.format(chunk=CHUNK, hook="import time; time.sleep(0.1)")
    return subprocess.Popen(
        [sys.executable, "-c", code, "pack", *options], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def all_windows(config: DataConfig) -> list[list[int]]:
    data = open_data(config)
    starts = np.concatenate([all_starts(data.segments[split], data.spec.window) for split in NAMES])
    return split_batches(starts, 4)


# ---- 中断


def test_killed_and_run_again(
    tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """两个进程打到一半 kill -9：没有完成的标志，没有孤儿接着写；再跑一次与一气呵成的逐字节相同，做完的块没有重写。"""
    options = ["--config", str(write_config(tmp_path, tree)), "--out", "store", "--workers", "2"]
    monkeypatch.setattr(pack_module, "CHUNK_BYTES", CHUNK)
    monkeypatch.chdir(make_folder(tmp_path / "whole"))
    assert main(options) == 0
    monkeypatch.chdir(make_folder(tmp_path / "parts"))
    killed = start(Path.cwd(), options)
    store = Path.cwd() / "store"
    while len(list(store.glob("pack/0*.json"))) < 3:
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.02)
    killed.kill()
    killed.communicate()  # 子进程也都退了，不然管道不会关
    assert not (store / "store.json").exists()
    with pytest.raises(ValueError, match="is not complete"):
        open_data(from_store(config_of(tree), store))
    done = [int(path.stem) for path in store.glob("pack/0*.json")]
    stamps = {number: (store / f"fields/{number}.0.0.0").stat().st_mtime_ns for number in done}
    assert 3 <= len(done) < 10
    capsys.readouterr()
    assert main(options) == 0
    assert f"{len(done)} of 11 chunks are done already" in capsys.readouterr().err
    assert stamps == {number: (store / f"fields/{number}.0.0.0").stat().st_mtime_ns for number in done}
    assert contents(store) == contents(tmp_path / "whole" / "store")
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()}
    assert main(options) == 0
    assert "complete already, nothing to do" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_any_number_of_processes_writes_the_same(tree, tmp_path: Path):
    config = config_of(tree)
    for workers in (1, 3):
        pack_small(config, tmp_path / f"store{workers}", workers=workers)
    assert contents(tmp_path / "store1") == contents(tmp_path / "store3")


def test_leftovers_are_swept_and_two_do_not_write_at_once(tree, tmp_path: Path):
    config, store = config_of(tree), tmp_path / "store"
    pack_small(config, store)
    whole = contents(store)
    (store / "store.json").unlink()
    (store / "fields" / ".1.0.0.0.0123456789abcdef.tmp").write_text("half")
    with held_elsewhere(store / "pack"), pytest.raises(ValueError, match="another packing is at work there"):
        pack_small(config, store)
    pack_small(config, store)
    assert contents(store) == whole


# ---- 查验


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fields/2.0.0.0", "checksum differs (times 2000-01-03T12 to 2000-01-04T12)"),
        ("pack/000002.raw", "checksum differs (times 2000-01-03T12 to 2000-01-04T12)"),
        ("mean/0", "checksum differs"),
        (".zmetadata", "checksum differs"),
        ("present.npy", "checksum differs"),
    ],
)
def test_a_flipped_byte_is_found(tree, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str):
    config, store = config_of(tree), tmp_path / "store"
    pack_small(config, store)
    whole = contents(store)
    assert verify.main(["--out", str(store)]) == 0
    assert "every checksum is right" in capsys.readouterr().out
    path = store / name
    values = bytearray(path.read_bytes())
    values[len(values) // 2] ^= 1
    path.write_bytes(values)
    assert verify.main(["--out", str(store), "--workers", "2"]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"{path}: {said}"
    assert last.startswith(f"{store}: 1 files are damaged; remove them and run the packing again")
    path.unlink()
    assert verify.main(["--out", str(store)]) == 1
    assert f"{path}: missing" in capsys.readouterr().out
    pack_small(config, store)  # 删去之后再打一次就修好
    assert contents(store) == whole


def test_damaged_times_and_a_damaged_chunk_are_both_listed(tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """时刻坏了，块的时刻就说不出，但坏的都要列出。"""
    store = tmp_path / "store"
    pack_small(config_of(tree), store)
    for name in ("time/0", "fields/0.0.0.0", "fields/2.0.0.0"):
        values = bytearray((store / name).read_bytes())
        values[7] ^= 64  # 第一个时刻的最高字节：远在 datetime 之外
        (store / name).write_bytes(values)
    assert verify.main(["--out", str(store)]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == [f"{store / name}: checksum differs" for name in ("fields/0.0.0.0", "fields/2.0.0.0", "time/0")]
    assert last.startswith(f"{store}: 3 files are damaged")


# ---- 磁盘满


def test_disk_full_before_it_starts(tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"store needs 0.00 GB more, its disk has 0.00 GB free"):
        pack_small(config_of(tree), tmp_path / "store")
    assert not (tmp_path / "store" / "store.json").exists()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full_on_the_way(tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, code: int):
    """写到第六块时满了：一行说清，没有完成的标志；腾出地方接着做，与没满过的相同。"""
    config, store = config_of(tree), tmp_path / "store"

    def full(path: Path):
        if path.name == "5.0.0.0":
            raise OSError(code, os.strerror(code))
        return replacing(path)

    with monkeypatch.context() as patch:
        patch.setattr(chunks_module, "replacing", full)
        with pytest.raises(ValueError, match=re.escape(f"{store}: {os.strerror(code)}; the store is not complete")):
            pack_small(config, store, workers=workers)
    assert not (store / "store.json").exists()
    assert not list(store.rglob("*.tmp"))
    pack_small(config, store)
    pack_small(config, tmp_path / "other")
    assert contents(store) == contents(tmp_path / "other")


def test_the_kernel_refuses_to_write_more(tree, tmp_path: Path):
    """文件大小的限额：写到一半由内核拒绝，临时文件也收走。"""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({CHUNK - 10}, {resource.RLIM_INFINITY}))"
    options = ["--config", str(write_config(tmp_path, tree)), "--out", str(tmp_path / "store"), "--workers", "1"]
    command = [sys.executable, "-c", HOOKED.format(chunk=CHUNK, hook=limit), "pack", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    room = r"more than \S+ MB needed, \S+ MB free"
    assert re.search(
        f"error: {tmp_path}/store: File too large, {room}; the store is not complete, make room", done.stderr
    )
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "store").rglob("*.tmp"))


# ---- 追加


@pytest.mark.parametrize("quiet_days", [0, 3])
def test_growing_by_a_year(make_tree, tmp_path: Path, quiet_days: int):
    """岁末的空缺在追加之后两侧都有文件；旧的块除了岁末的不动，与一次打成的相同，窗口与目录树相同。"""
    tree = make_tree(tmp_path / "tree", CHANNELS, (4, 8), "2000-12-10", "2001-01-20")
    damage(tree, "t2m", parse_time("2000-12-31T18"), "removed")
    for hour in range(0, 24 * quiet_days, 6):  # 岁首几天没有文件：沿用的变成补不上的
        damage(tree, "t2m", parse_time("2001-01-01") + hour, "removed")
    damage(tree, "t2m", parse_time("2000-12-12"), "text")
    first = {
        "train": ["2000-12-10", "2000-12-20"],
        "val": ["2000-12-21", "2000-12-25"],
        "test": ["2000-12-26", "2000-12-31"],
    }
    wider = {**first, "test": ["2000-12-26", "2001-01-20"]}
    store = tmp_path / "store"
    old = pack_small(config_of(tree, splits=first), store)
    before = {p.name: p.stat().st_mtime_ns for p in (store / "fields").glob("[0-9]*")}
    config = config_of(tree, splits=wider)
    grown = pack_small(config, store)
    kept = [name for name, stamp in before.items() if (store / "fields" / name).stat().st_mtime_ns == stamp]
    assert len(before) - len(kept) <= 2
    pack_small(config, tmp_path / "once")
    assert contents(store) == contents(tmp_path / "once")
    windows = all_windows(config)
    assert_same(outcomes(open_data(grown), windows), outcomes(open_data(config), windows))
    past = config_of(tree, splits=first)
    assert_same(outcomes(open_data(old), all_windows(past)), outcomes(open_data(past), all_windows(past)))
    with xr.open_zarr(store, chunks=None) as dataset:
        assert dataset.sizes["time"] == len(tree.hours) + 8  # 两端一天之内沿用


def test_a_store_packed_by_a_command_of_another_name(tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """命令改过名：已经打完的没有事可做；没有打完的接着打，两个命令都记着。"""
    store, config = tmp_path / "store", write_config(tmp_path, tree)
    pack_module.pack(load_config(config).data, store, "float32", 1, "python -m old.pack")
    words = ["--config", str(config), "--out", str(store), "--workers", "1"]
    assert main(words) == 0
    assert "complete already, nothing to do" in capsys.readouterr().err
    (store / "store.json").unlink()
    assert main(words) == 0
    history = f"python -m old.pack\npython dataset.py pack --config {config} --out {store}"
    assert json.loads((store / ".zattrs").read_text())["history"] == history


def test_a_store_from_before_first_hour_goes_on(tree, tmp_path: Path):
    """从前打到一半的：plan.json 里没有 first_hour，接着打，做完的块不重做，与一气呵成的相同。"""
    config, store = config_of(tree), tmp_path / "store"
    pack_small(config, store)
    (store / "store.json").unlink()
    (store / "pack" / "000003.json").unlink()
    plan = json.loads((store / "pack" / "plan.json").read_text())
    assert plan.pop("first_hour") == 0
    (store / "pack" / "plan.json").write_text(json.dumps(plan))
    kept = (store / "fields" / "2.0.0.0").stat().st_mtime_ns
    pack_small(config, store)
    assert (store / "fields" / "2.0.0.0").stat().st_mtime_ns == kept
    pack_small(config, tmp_path / "other")
    assert contents(store) == contents(tmp_path / "other")


def test_a_store_from_before_the_fills_is_packed_anew(tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """从前的块没有认过填充值：再打一次，每一块都重做，从此读的时候不必再看。"""
    config, store = config_of(tree), tmp_path / "store"
    with monkeypatch.context() as before:
        before.setattr(chunks_module, "FILLS_KNOWN", "")
        packed = pack_small(config, store)
    content = read_mark(store)
    write_mark(store, {key: value for key, value in content.items() if key not in ("format", FILLS_KNOWN)})
    assert not Store(packed).knows_fills
    chunks = sorted((store / "fields").glob("*.0"))
    old = {path: path.stat().st_ino for path in chunks}
    pack_small(config, store)
    assert Store(packed).knows_fills and all(path.stat().st_ino != old[path] for path in chunks)


def test_only_later_years_can_be_appended(make_tree, tmp_path: Path):
    tree = make_tree(tmp_path / "tree", CHANNELS, (4, 8), "2000-12-20", "2001-01-20")
    later = {
        "train": ["2001-01-01", "2001-01-10"],
        "val": ["2001-01-11", "2001-01-14"],
        "test": ["2001-01-15", "2001-01-20"],
    }
    pack_small(config_of(tree, splits=later), tmp_path / "store")
    earlier = {**later, "train": ["2000-12-20", "2001-01-10"]}
    with pytest.raises(
        ValueError, match=r"holds 2001, data.splits need 2000 to 2001: only later years can be appended"
    ):
        pack_small(config_of(tree, splits=earlier), tmp_path / "store")
    open_data(from_store(config_of(tree, splits=later), tmp_path / "store"))  # 还好好的


def test_years_in_between_cannot_be_appended(make_tree, tmp_path: Path):
    """报错说得出存档里空着的那一年。"""
    tree = make_tree(tmp_path / "tree", CHANNELS, (4, 8), "1999-12-25", "2002-01-05", interval=24)
    ends = {"val": ["2001", "2001"], "test": ["2002", "2002"]}
    config = config_of(tree, interval_hours=24, splits={"train": ["1999", "1999"], **ends})
    pack_small(config, tmp_path / "store")
    wider = config_of(tree, interval_hours=24, splits={"train": ["1999", "2000"], **ends})
    with pytest.raises(ValueError, match=r"holds 1999, 2001 to 2002, data.splits need 1999 to 2002: only later"):
        pack_small(wider, tmp_path / "store")
    with pytest.raises(ValueError, match=r"need 2000, the store .* holds 1999, 2001 to 2002; later years"):
        open_data(from_store(wider, tmp_path / "store"))


@pytest.mark.parametrize("left", ["", '{"channels": [', "7", "null"])
def test_a_damaged_plan(tree, tmp_path: Path, left: str):
    """一行说出是哪个文件、怎么办；照着做就接着打完。"""
    store, config = tmp_path / "store", config_of(tree)
    pack_small(config, store)
    whole = contents(store)
    (store / "store.json").unlink()
    (store / "pack/plan.json").write_text(left)
    said = (
        f"{store}/pack/plan.json: damaged; remove it and run the same command again, the chunks already packed are kept"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        pack_small(config, store)
    (store / "pack/plan.json").unlink()
    before = {p: p.stat().st_mtime_ns for p in (store / "fields").glob("[0-9]*")}
    pack_small(config, store)
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert contents(store) == whole


@pytest.mark.parametrize(
    ("changes", "dtype", "said"),
    [
        ({"variables": {"t2m": "single"}}, "float32", "channels = ['t2m', 'z_level_00'], this asks for ['t2m']"),
        ({"interval_hours": 12}, "float32", "was packed with interval_hours = 6, this asks for 12"),
        ({"max_gap_hours": 12}, "float32", "was packed with max_gap_hours = 24, this asks for 12"),
        ({}, "float16", "was packed with dtype = float32, this asks for float16"),
    ],
    ids=str,
)  # fmt: skip
def test_another_kind_of_store_needs_another_folder(
    tree, tmp_path: Path, changes: dict[str, Any], dtype: str, said: str
):
    store = tmp_path / "store"
    packed = pack_small(config_of(tree), store)
    with pytest.raises(ValueError, match=re.escape(said)):
        pack_small(config_of(tree, **changes), store, dtype)
    open_data(packed)
    with pytest.raises(ValueError, match="is a folder with other things in it"):
        pack_small(config_of(tree), tree.root)


def test_files_that_appeared_are_packed(tree, tmp_path: Path):
    """补上缺的文件再打一次：只有牵连到的块重做，与从头打的相同；序列末尾的沿用，因为更远处有了文件而补不上。"""
    store, config = tmp_path / "store", config_of(tree)
    pack_small(config, store)
    before = {p.name: p.stat().st_mtime_ns for p in (store / "fields").glob("[0-9]*")}
    np.save(field_path(tree.root, "t2m", T0 + 30), tree.fields[5, 0])
    np.save(field_path(tree.root, "t2m", T0 + 24 * 20), tree.fields[5, 0])
    packed = pack_small(config, store)
    changed = [name for name, stamp in before.items() if (store / "fields" / name).stat().st_mtime_ns != stamp]
    assert 2 <= len(changed) < len(before) - 3
    pack_small(config, tmp_path / "once")
    assert contents(store) == contents(tmp_path / "once")
    assert open_data(packed).windows[T0 + 24].valid[0, 1].tolist() == [True, True]


def test_files_that_changed_are_packed(tree, tmp_path: Path):
    """名字没有变，内容换了：坏的修好了、好的换了、插值的邻居换了，再打一次就与从头打的相同。"""
    store, config = tmp_path / "store", config_of(tree)
    damage(tree, "z_level_00", T0 + 96, "text")
    pack_small(config, store)
    before = {p.name: p.stat().st_mtime_ns for p in (store / "fields").glob("[0-9]*")}
    for channel, hour in (("z_level_00", 96), ("t2m", 24), ("z_level_00", 150)):
        np.save(field_path(tree.root, channel, T0 + hour), tree.fields[5, 0] + hour)
    pack_small(config, store)
    changed = [name for name, stamp in before.items() if (store / "fields" / name).stat().st_mtime_ns != stamp]
    assert 3 <= len(changed) < len(before) - 3
    pack_small(config, tmp_path / "once")
    assert contents(store) == contents(tmp_path / "once")


def test_a_chunk_holds_a_window():
    """69 个通道、128 × 256：一行 9 MB，窗口 8 帧，一块 8 行；再大的网格一块不过 256 MB。"""
    spec = small_spec(channels=69, grid=(128, 256), frames_in=7)
    assert chunk_rows(69 * 128 * 256 * 4, spec) == 8
    assert chunk_rows(9 * 128 * 256 * 4, spec) == 28
    assert chunk_rows(69 * 721 * 1440 * 4, spec) == 1


# ---- 命令


def test_command_line(tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = write_config(tmp_path, tree)
    for arguments, said in (
        (["pack", "--config", str(config), "--workers", "0"], "--workers 0: must be at least 1"),
        (["verify", "--workers", "0"], "--workers 0: must be at least 1"),
        (["verify"], "is not a store"),
    ):
        with pytest.raises(ValueError, match=said):
            dataset_command([*arguments, "--out", str(tmp_path / "s")])
    assert main(["--config", str(config), "data.workers=0", "--out", str(tmp_path / "s"), "--workers", "1"]) == 0
    said = capsys.readouterr().err
    assert re.search(r"pack: 100%.*B/s\]", said)
    assert "2000, 52 times in 1 chunks, float32" in said
    with xr.open_zarr(tmp_path / "s", chunks=None) as dataset:
        assert dataset.attrs["history"].startswith(f"python dataset.py pack --config {config}")
