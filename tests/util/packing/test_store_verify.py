"""存档的块边读边核对（data.verify）：坏的一行说清，不会悄悄训练下去；核对过的，各读取进程、各轮都不再核对。"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.trees import DAYS, config_of
from tests.util.packing.stores import pack_small
from util.config import DataConfig
from util.data import store_origin
from util.data.batches import all_starts
from util.data.dataset import open_data
from util.data.feed import make_loader
from util.data.origin import DataError
from util.files.store_files import find_damage

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # 核少的机器上
CHUNK = "fields/1.0.0.0"


@pytest.fixture(scope="module")
def whole(make_tree, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("verify")
    tree = make_tree(folder / "tree", ("t2m", "z_level_00"), **DAYS)
    return pack_small(config_of(tree), folder / "store")


def read_all(config: DataConfig, workers: int = 0, rounds: int = 1) -> None:
    data = open_data(config)
    starts = all_starts(data.segments["train"], data.spec.window).tolist()
    for _ in range(rounds):
        for _ in make_loader(data.windows, [starts], workers, pin=False):
            pass


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(("how", "workers"), [("first_read", 0), ("first_read", 1), ("always", 0)])
def test_a_flipped_chunk_is_one_line(whole: DataConfig, tmp_path: Path, how: str, workers: int) -> None:
    shutil.copytree(str(whole.store), tmp_path / "store")
    flip(tmp_path / "store" / CHUNK)
    config = whole.model_copy(update={"store": str(tmp_path / "store"), "verify": how})
    with pytest.raises(
        DataError, match=rf"\A\S+/{CHUNK}: checksum differs; remove it and run .* verify --out \S+ lists"
    ):
        read_all(config, workers)
    read_all(config.model_copy(update={"verify": "never"}), workers)


@pytest.mark.parametrize(("how", "looked"), [("never", 0), ("first_read", 1), ("always", 2)])
def test_how_often_a_chunk_is_looked_at(
    whole: DataConfig, monkeypatch: pytest.MonkeyPatch, how: str, looked: int
) -> None:
    """一批读全部的块：always 每读一段都看。"""
    seen: list[str] = []

    def find(path: Path, digest: str) -> str | None:
        seen.append(path.name)
        return find_damage(path, digest)

    monkeypatch.setattr(store_origin, "find_damage", find)
    read_all(whole.model_copy(update={"verify": how}), rounds=2)
    assert min(seen.count("1.0.0.0"), 2) == looked


def test_reading_processes_share_what_they_know(whole: DataConfig) -> None:
    data = open_data(whole)
    starts = all_starts(data.segments["train"], data.spec.window).tolist()
    assert len(list(make_loader(data.windows, [starts], 1, pin=False))) == 1
    origin = data.windows.reader.origin
    assert isinstance(origin, store_origin.Store) and origin.checked[origin.places[CHUNK]]
