"""--source 写着的是哪几个来源：文件、文件夹、通配、ZIP、地址；ZIP 取出来的用完就没有了。"""

from __future__ import annotations

import stat
import tempfile
import zipfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from util.source import archive
from util.source.collection import Source, file_stamps, find_sources

NETCDF = b"CDF\x01"


def names(*texts: str | Path) -> list[str]:
    with ExitStack() as stack:
        return [source.name for source in find_sources([str(text) for text in texts], stack)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """两个变量各两年，一个 Zarr，几个不是数据的；在 tmp_path/data 里，它也是当前的文件夹。"""
    root = tmp_path / "data"
    for name in ("t2m/2000.nc", "t2m/2001.nc", "z/2000.nc", "z/2001.grib", "z/noname", "a.zarr/.zgroup"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(NETCDF)
    for name in ("README.md", "z/2001.grib.5b7b6.idx", "t2m/.2000.nc.part", ".hidden/x.nc", "a.zarr/x.nc"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"text" if name == "README.md" else b"")
    monkeypatch.chdir(root)
    return root


def test_a_mix_of_files_folders_and_patterns(folder: Path):
    everything = ["./a.zarr", "./t2m/2000.nc", "./t2m/2001.nc", "./z/2000.nc", "./z/2001.grib", "./z/noname"]
    assert names(".") == everything
    assert names("z/2000.nc", "t2m") == ["z/2000.nc", "t2m/2000.nc", "t2m/2001.nc"]
    assert names("*/2000.nc") == ["t2m/2000.nc", "z/2000.nc"]
    assert names("**/2001.*") == ["t2m/2001.nc", "z/2001.grib", "z/2001.grib.5b7b6.idx"]  # 点名要的就是要的
    assert names("t2m/2001.nc", "t2m", "t2m/*", folder / "t2m/2001.nc") == ["t2m/2001.nc", "t2m/2000.nc"]
    assert names("a.zarr") == ["a.zarr"]
    assert names("s3://bucket/a.zarr") == ["s3://bucket/a.zarr"]
    (folder / "t2m[1].nc").write_bytes(NETCDF)
    assert names("t2m[1].nc") == ["t2m[1].nc"]


def test_an_empty_file_in_a_folder_is_not_passed_over(folder: Path):
    """没有写成的 .nc 也是来源，打开时会说；它不在就少一年而不自知。"""
    (folder / "t2m/2002.nc").write_bytes(b"")
    assert names("t2m") == ["t2m/2000.nc", "t2m/2001.nc", "t2m/2002.nc"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("absent.nc", "^absent.nc: no such file or folder"),
        ("*/1999.nc", r"^\*/1999.nc: no such file or folder"),
        ("s3://bucket/t2m_*.nc", r"^s3://bucket/t2m_\*.nc: folders and patterns are not expanded at addresses; list"),
        ("readme.nc", r"^readme.nc: a ZIP without data files \(readme.txt\)$"),
        ("none", "^none: neither a Zarr store .* nor a folder with data files"),
    ],
)
def test_nothing_there(text: str, message: str, folder: Path):
    (folder / "none").mkdir()
    (folder / "none" / "README").write_text("nothing")
    pack(folder / "readme.nc", **{"readme.txt": b"nothing"})
    with pytest.raises(ValueError, match=message):
        names(text)


def pack(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name.replace("__", "/"), content)
    return path


def test_zip_by_its_content_not_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scratch, data = tmp_path / "scratch", tmp_path / "data"
    scratch.mkdir()
    data.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    pack(data / "cds.nc", **{"b.nc": NETCDF + b"b", "inner__a.nc": NETCDF, "README.txt": b"x"})
    pack(data / "store.zip", **{".zgroup": b"{}", "t__0.0": b"1"})
    pack(data / "outer.zip", **{"cds.zip": (data / "cds.nc").read_bytes()})
    with ExitStack() as stack:
        found = find_sources([str(data)], stack)
        assert [source.name.removeprefix(f"{data}/") for source in found] == [
            "cds.nc/b.nc",
            "cds.nc/inner/a.nc",
            "outer.zip/cds.zip/b.nc",
            "outer.zip/cds.zip/inner/a.nc",
            "store.zip",
        ]
        assert Path(found[0].path).read_bytes() == NETCDF + b"b"
        stamps = [file_stamps(source) for source in found]
    assert list(scratch.iterdir()) == []
    with ExitStack() as stack:  # 再取一次，戳不变：接着导入时认得出
        assert [file_stamps(source) for source in find_sources([str(data)], stack)] == stamps


@pytest.mark.parametrize("name", ["../a.nc", "/etc/a.nc", "x/../../a.nc", "C:/a.nc", "..\\a.nc", "link.nc"])
def test_unsafe_members_are_refused(name: str, tmp_path: Path):
    member = zipfile.ZipInfo(name)
    if name == "link.nc":
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
        file.writestr("good.nc", NETCDF)
        file.writestr(member, "/etc/passwd")
    with pytest.raises(ValueError, match=r"bad.zip: member .* points outside the archive"):
        names(tmp_path / "bad.zip")


@pytest.mark.parametrize("damage", ["cut", "bytes", "secret", "empty"])
def test_damaged_archives(damage: str, tmp_path: Path):
    path = pack(tmp_path / "cds.nc", **{"a.nc": NETCDF + bytes(range(256)) * 40})
    whole = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    if damage == "bytes":
        whole[60:80] = bytes(20)
        path.write_bytes(whole)
    if damage == "secret":
        place = whole.index(b"PK\x01\x02")
        whole[6] |= 1
        whole[place + 8] |= 1
        path.write_bytes(whole)
    if damage == "empty":
        pack(path)
    with pytest.raises(
        ValueError, match=r"cds.nc: (a ZIP that cannot be read|a ZIP without data files .empty)"
    ) as error:
        names(path)
    assert "\n" not in str(error.value)


def test_a_full_disk_is_said_before_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = pack(tmp_path / "cds.nc", **{"a.nc": NETCDF})
    usage = archive.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda _: usage._replace(free=3))
    with pytest.raises(ValueError, match=r"cds.nc: unpacking needs 0.0 GB in .*, 0.0 GB are free; set TMPDIR"):
        names(path)


def test_stamps_say_what_changed(folder: Path):
    store = Source(folder / "a.zarr", "a.zarr")
    before = file_stamps(store)
    assert [Path(name).name for name, *_ in before] == [".zgroup", "x.nc"]
    (folder / "a.zarr/x.nc").write_bytes(b"more")
    assert file_stamps(store) != before
