"""导入：一个变量一个文件、一年一个文件，文件夹、ZIP、通配混着给，与一个文件的逐字节相同；缺的、重的说出是哪一个。"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from tests.util.exchange.test_import_fields import DATES, make_dataset
from tests.util.exchange.test_import_layouts import import_all
from util.commands.import_fields import main

WORDS = ("--variable", "air=air", "--variable", "wind=u")
EARLY, LATE = slice(0, 20), slice(20, None)


@pytest.fixture
def dataset() -> xr.Dataset:
    return make_dataset()


def write(path: Path, dataset: xr.Dataset, variable: str, part: slice) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    piece = dataset[[variable]].isel(time=part)
    piece.to_zarr(path, zarr_format=2) if path.suffix == ".zarr" else piece.to_netcdf(path)
    return path


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*") if path.is_file()}


def whole(dataset: xr.Dataset, folder: Path) -> dict[str, bytes]:
    """一个文件里都有的，导入成的树。"""
    dataset.to_netcdf(folder / "whole.nc")
    import_all([folder / "whole.nc"], folder / "whole", *WORDS)
    return files_of(folder / "whole")


def zipped(path: Path, *members: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for member in members:
            file.write(member, member.name)
            member.unlink()
    return path


def test_one_file_per_variable_and_year(dataset, tmp_path, capsys):
    """次序不拘；多出来的变量的文件不碍事，说出来。"""
    for name in ("wind", "air"):
        write(tmp_path / f"era5/{name}_2.nc", dataset, name, LATE)
        write(tmp_path / f"era5/{name}_1.nc", dataset, name, EARLY)
    dataset[["mask"]].to_netcdf(tmp_path / "era5/mask.nc")
    import_all([tmp_path / "era5"], tmp_path / "tree", *WORDS)
    assert files_of(tmp_path / "tree") == whole(dataset, tmp_path)
    said = capsys.readouterr().out
    assert f"sources   4 with the variables wanted\n          {tmp_path}/era5/air_1.nc: air\n" in said
    assert f"unused    1 hold none of them\n          {tmp_path}/era5/mask.nc\n" in said
    head = (tmp_path / "tree.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert all(f"era5/{name}_{i}.nc" in head for name in ("air", "wind") for i in (1, 2))


def test_a_mix_of_zip_folder_pattern_and_store(dataset, tmp_path, monkeypatch):
    """名字叫 .nc 的 ZIP 里有一半的变量；写成存档也一样；临时文件夹用完就没有了。"""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    members = [write(tmp_path / f"{name}.nc", dataset, name, EARLY) for name in ("air", "wind")]
    sources = [zipped(tmp_path / "cds.nc", *members)]
    sources += [write(tmp_path / "late/air.zarr", dataset, "air", LATE).parent]
    write(tmp_path / "b1.nc", dataset, "wind", slice(20, 30))
    write(tmp_path / "b2.nc", dataset, "wind", slice(30, None))
    sources += [tmp_path / "b?.nc"]
    import_all(sources, tmp_path / "tree", *WORDS)
    assert files_of(tmp_path / "tree") == whole(dataset, tmp_path)
    for store, given in (("one", [tmp_path / "whole.nc"]), ("many", sources)):
        words = ["--source", *map(str, given), "--store", str(tmp_path / store), *WORDS, *DATES]
        main([*words, "--yaml", str(tmp_path / f"{store}.yaml")])
    for path in sorted((tmp_path / "one").glob("*/[0-9]*")):
        if path.parent.name in ("fields", "valid", "time"):
            assert path.read_bytes() == (tmp_path / "many" / path.relative_to(tmp_path / "one")).read_bytes()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_store_from_a_zip_goes_on(dataset, tmp_path, caplog):
    """ZIP 每次取到别的临时文件夹里，仍认得第一遍做过了。"""
    source = zipped(tmp_path / "cds.zip", write(tmp_path / "air.nc", dataset, "air", slice(None)))
    words = ["--source", str(source), "--store", str(tmp_path / "store"), "--variable", "air=air", *DATES]
    main(words)
    caplog.clear()
    main(words)
    assert "blocks of the source are known already" in caplog.text


def test_what_is_missing_is_named(dataset, tmp_path):
    """变量缺一年：说是哪个变量、哪一年、它在哪几个文件里。"""
    later = dataset.assign_coords(time=dataset.time + np.timedelta64(366, "D"))  # 2001 年
    for name, one, year in (("air", dataset, 2000), ("air", later, 2001), ("wind", dataset, 2000)):
        write(tmp_path / f"{name}_{year}.nc", one, name, slice(None))
    message = r"u is missing in 2001 \(36 times\), first 2001-01-01T00, where air is there; u is in .*wind_2000.nc"
    with pytest.raises(ValueError, match=message):
        import_all([tmp_path], tmp_path / "tree", *WORDS)
    with pytest.raises(ValueError, match=r"'wnd' in any of the 3 files \(nearest: wind\); there: air, wind"):
        import_all([tmp_path], tmp_path / "tree", "--variable", "wnd=u")
    assert not (tmp_path / "tree").exists()


def test_an_axis_to_select_from_may_be_missing_in_other_variables(dataset, tmp_path):
    """air 没有成员维，wind 有；同一个变量在这里有、在那里没有的，不知道是哪一个成员。"""
    several = dataset.isel(number=[0, 0]).assign_coords(number=[3, 5])
    sources = [
        write(tmp_path / "air.nc", dataset.drop_vars("number"), "air", slice(None)),
        write(tmp_path / "w1.nc", several, "wind", EARLY),
        write(tmp_path / "w2.nc", several, "wind", LATE),
    ]
    import_all(sources, tmp_path / "tree", *WORDS, "--select", "number=5")
    assert files_of(tmp_path / "tree") == whole(dataset, tmp_path)
    sources[2] = write(tmp_path / "w3.nc", dataset.squeeze("number", drop=True), "wind", LATE)
    with pytest.raises(ValueError, match=r"u: select number: .*w1.nc has this axis, .*w3.nc has not"):
        import_all(sources, tmp_path / "other", *WORDS, "--select", "number=5")


def test_errors_in_an_archive_name_its_member(dataset, tmp_path):
    member = write(tmp_path / "air.nc", dataset, "air", slice(None))
    member.write_bytes(member.read_bytes()[:3000])
    source = zipped(tmp_path / "cds.zip", member)
    with pytest.raises(ValueError, match=r"^\S*/cds.zip/air.nc: cannot be opened") as error:
        import_all([source], tmp_path / "tree", "--variable", "air=air")
    assert tempfile.gettempdir() + "/ar_pred_" not in str(error.value)
