"""不随时间变的场：导入一次，进存档，导出写回；值与 NumPy 直接算的相同，用不了的一行说清。"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from tests.holding import held_elsewhere
from tests.trees import DAYS, config_of
from tests.util.exchange.test_import_fields import DATES, make_dataset
from tests.util.packing.stores import pack_small
from util.commands.import_fields import main
from util.config import Axis, DataConfig, read_mapping
from util.data.dataset import open_data
from util.data.tree_files import StaticField, read_static, write_static
from util.exchange.export import export
from util.inspection.check import check_static
from util.packing.verify import verify
from util.strict import validate

LATITUDES, LONGITUDES = np.linspace(67.5, -67.5, 4), np.arange(8) * 45.0
AXES = Axis(first=67.5, step=-45, count=4), Axis(first=0, step=45, count=8)


def surface() -> xr.Dataset:
    """海陆分布没有时间维，地形有一个时刻、次序打乱，植被有三个时刻。"""
    rng = np.random.default_rng(0)
    height = rng.normal(500, 300, (8, 1, 4))
    return xr.Dataset(
        {
            "lsm": (("latitude", "longitude"), rng.random((4, 8)), {"units": "(0 - 1)"}),
            "z": (("longitude", "time", "latitude"), 9.80665 * height, {"units": "m**2 s**-2"}),
            "slt": (("latitude", "longitude"), rng.integers(0, 8, (4, 8)).astype(np.float32), {"units": "~"}),
            "green": (("month", "latitude", "longitude"), rng.random((3, 4, 8))),
        },
        {"latitude": LATITUDES, "longitude": LONGITUDES, "time": [np.datetime64("2000-01-01", "ns")]},
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    surface().to_netcdf(tmp_path / "surface.nc")
    return tmp_path / "surface.nc"


def stored(root: Path, name: str) -> np.ndarray:
    return np.load(root / "static" / f"{name}.npy")


def test_import_against_numpy(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """没有日期也行；换单位写在 --map 里；统计量、单位、网格记在旁边。"""
    (tmp_path / "map.yaml").write_text(
        "static:\n  lsm: {}\n  height: {source: z, scale: 0.1019716, units: m}\n  soil: {source: slt}\n"
    )
    root = tmp_path / "tree"
    assert main(["--source", str(source), "--root", str(root), "--map", str(tmp_path / "map.yaml")]) == 0
    given = surface()
    expected = {
        "lsm": (given.lsm.values, "1"),
        "height": (given.z.isel(time=0).transpose("latitude", "longitude").values * 0.1019716, "m"),
        "soil": (given.slt.values, "1"),
    }
    for name, (values, units) in expected.items():
        np.testing.assert_array_equal(stored(root, name), values.astype(np.float32))
        about = json.loads((root / "static" / f"{name}.json").read_text())
        found = stored(root, name).astype(np.float64)
        numbers = [about[key][0] for key in ("mean", "std", "min", "max")]
        np.testing.assert_allclose(numbers, [found.mean(), found.std(), found.min(), found.max()], rtol=1e-12)
        assert about["units"] == units
        field = read_static(root, name, *AXES)
        np.testing.assert_array_equal(field.values, stored(root, name))
    assert "static    soil: 1, 0 to 7" in capsys.readouterr().out


def test_cropped_and_regridded(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """与各变量同样的裁剪、换网格；整数平均过了，说一声。"""
    words = ["--source", str(source), "--static", "slt=soil", "--static", "lsm=lsm"]
    assert main([*words, "--root", str(tmp_path / "a"), "--rows", "1:3", "--cols", "2:6"]) == 0
    np.testing.assert_array_equal(stored(tmp_path / "a", "lsm"), surface().lsm.values[1:3, 2:6].astype(np.float32))
    read_static(tmp_path / "a", "lsm", Axis(first=22.5, step=-45, count=2), Axis(first=90, step=45, count=4))
    grid = ["--regrid", "conservative", "--latitude", "45", "-90", "2", "--longitude", "22.5", "90", "4"]
    assert main([*words, "--root", str(tmp_path / "b"), *grid]) == 0
    edges = np.sin(np.deg2rad([90, 45, 0, -45, -90]))
    area = np.abs(np.diff(edges))  # (4,)
    values = surface().lsm.values
    for i in range(2):
        for j in range(4):
            cells, weights = values[2 * i : 2 * i + 2, 2 * j : 2 * j + 2], area[2 * i : 2 * i + 2, None]
            np.testing.assert_allclose(
                stored(tmp_path / "b", "lsm")[i, j], (cells * weights).sum() / weights.sum() / 2, rtol=1e-6
            )
    out = capsys.readouterr().out
    assert "soil: 1, " in out
    assert out.count("whole numbers were averaged") == 1


def run(source: Path, root: Path, *words: str) -> None:
    main(["--source", str(source), "--root", str(root), *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--static", "green=green"], r"variable green: dimension month \(3\); a static field has latitude and longit"),
        (["--static", "lms=lsm"], "surface.nc: no variable 'lms' in the file .*; there: lsm, z, slt, green"),
        (["--static", "lsm=a-b"], "--static lsm=a-b: write SOURCE=NAME"),
        (["--static", "lsm=z", "--variable", "z=z"], "'z' is both in variables and in static"),
        (["--static", "lsm=lsm", "--yaml", "set.yaml"], "--yaml is for the variables"),
        (["--variable", "z=z"], "--train START END, --val START END, --test START END: needed for the variables"),
    ],
)
def test_refusals(source: Path, tmp_path: Path, words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "tree", *words)
    assert not (tmp_path / "tree").exists()


def test_missing_points_are_refused(tmp_path: Path):
    """NaN 与填充值都算；没有写下半个。"""
    for value in (np.nan, 1e20):
        dataset = surface()
        dataset.lsm[1, 2:5] = value
        dataset.to_netcdf(tmp_path / "holes.nc")
        with pytest.raises(ValueError, match=r"lsm: 3 of 32 points are missing \(first: row 1, column 2\)"):
            run(tmp_path / "holes.nc", tmp_path / "tree", "--static", "slt=soil", "--static", "lsm=lsm")
    assert not (tmp_path / "tree").exists()


def test_what_is_there_is_kept(source: Path, tmp_path: Path, make_tree):
    tree = make_tree(tmp_path / "tree", ("t2m",), **DAYS)
    run(source, tree.root, "--static", "lsm=lsm")
    before = stored(tree.root, "lsm")
    with pytest.raises(ValueError, match=r"static.lsm.npy exists already; give --overwrite"):
        run(source, tree.root, "--static", "slt=lsm")
    with pytest.raises(ValueError, match="--static t2m: .* has a variable of this name"):
        run(source, tree.root, "--static", "lsm=t2m")
    with pytest.raises(ValueError, match="--static lsm: 2 x 8 points, the fields of .* have 4 x 8"):
        run(source, tree.root, "--static", "lsm=lsm", "--rows", "0:2", "--overwrite")
    with held_elsewhere(tree.root / "static"), pytest.raises(ValueError, match="static is in use by process"):
        run(source, tree.root, "--static", "slt=lsm", "--overwrite")
    np.testing.assert_array_equal(stored(tree.root, "lsm"), before)
    run(source, tree.root, "--static", "slt=lsm", "--overwrite")
    assert stored(tree.root, "lsm").max() == 7
    with pytest.raises(ValueError, match="--static alone writes into a tree"):
        main(["--source", str(source), "--store", str(tmp_path / "store"), "--static", "lsm=lsm"])


def mirrored(field: StaticField) -> StaticField:
    """统计量相同、值不同的另一个场。"""
    return field._replace(values=np.ascontiguousarray(field.values[::-1]))


def test_through_a_store(source: Path, tmp_path: Path, make_tree):
    """打包、查验、xarray、导出；后来才导入的、换过的、删了的，再打包一次就跟上，块不重做；窗口不变。"""
    tree = make_tree(tmp_path / "tree", ("t2m", "z_level_00"), **DAYS)
    config, store = config_of(tree), tmp_path / "store"
    packed = pack_small(config, store)
    stamp = (store / "fields/0.0.0.0").stat().st_mtime_ns
    run(source, tree.root, "--static", "lsm=lsm", "--static", "z=height")
    pack_small(config, store)
    assert (store / "fields/0.0.0.0").stat().st_mtime_ns == stamp
    asked = {"forcings": ["static/lsm", "static/height"]}
    of_store, of_tree = (open_data(one.model_copy(update=asked)).spec for one in (packed, config))
    assert of_store == of_tree and of_store.static.keys() == of_tree.static.keys()
    for name, field in of_store.static.items():
        np.testing.assert_array_equal(field, of_tree.static[name])
    with xr.open_zarr(store) as opened:
        assert opened.static_lsm.dims == ("latitude", "longitude")
        assert opened.static_lsm.attrs["units"] == "1"
        np.testing.assert_array_equal(opened.static_lsm.values, stored(tree.root, "lsm"))
    export(store, tmp_path / "again", tmp_path / "all.nc")
    for name in ("lsm", "height"):
        for suffix in ("npy", "json"):
            file = f"static/{name}.{suffix}"
            assert (tmp_path / "again" / file).read_bytes() == (tree.root / file).read_bytes()
    with xr.open_dataset(tmp_path / "all.nc") as written:
        np.testing.assert_array_equal(written.lsm.values, stored(tree.root, "lsm"))
    for folder in ("t2m_npy", "z_npy"):
        shutil.rmtree(tmp_path / "again" / folder)
    with pytest.raises(ValueError, match=r"static.height.npy exists already"):
        export(store, tmp_path / "again", None)

    write_static(tree.root, "lsm", mirrored(read_static(tree.root, "lsm", *AXES)), *AXES)
    for suffix in ("npy", "json"):
        (tree.root / f"static/height.{suffix}").unlink()
    pack_small(config, store)
    with xr.open_zarr(store) as opened:
        np.testing.assert_array_equal(opened.static_lsm.values, surface().lsm.values[::-1].astype(np.float32))
    assert not (store / "static_height").exists()
    assert (store / "fields/0.0.0.0").stat().st_mtime_ns == stamp
    assert not verify(store, 1)
    chunk = store / "static_lsm/0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    assert "static_lsm/0.0: checksum differs" in "".join(verify(store, 1))


def test_imported_together_with_the_fields(tmp_path: Path):
    """一条命令，树与存档相同；网格不同的不导入。"""
    dataset = make_dataset()
    dataset.to_netcdf(tmp_path / "fields.nc")
    words = ["--source", str(tmp_path / "fields.nc"), "--variable", "air=air", "--static", "mask=lsm", *DATES]
    out = str(tmp_path / "set.yaml")
    assert main([*words, "--root", str(tmp_path / "tree"), "--rows", "1:5", "--yaml", out]) == 0
    np.testing.assert_array_equal(stored(tmp_path / "tree", "lsm"), dataset.mask.values[1:5].astype(np.float32))
    store = [*words, "--store", str(tmp_path / "store"), "--rows", "1:5"]
    assert main([word for word in store if word not in ("--static", "mask=lsm")]) == 0
    stamp = (tmp_path / "store/fields/0.0.0.0").stat().st_mtime_ns
    assert main(store) == 0
    assert (tmp_path / "store/fields/0.0.0.0").stat().st_mtime_ns == stamp  # 只添它，块不重做
    values = read_mapping(out) | {"frames_in": 2, "cache_dir": str(tmp_path / "cache")}
    config: DataConfig = validate(DataConfig, values, "set")
    pack_small(config, tmp_path / "packed")
    for file in ("static_lsm/0.0", "static_lsm/.zattrs"):
        assert (tmp_path / "store" / file).read_bytes() == (tmp_path / "packed" / file).read_bytes()


BROKEN: dict[str, tuple[Any, str]] = {
    "another grid": (
        lambda root: write_static(root, "lsm", StaticField(np.ones((4, 8), np.float32), "1"), AXES[0], AXES[0]),
        r"lsm.npy: its longitude has 4 values from 67.5 to -67.5, data.longitude has 8 values",
    ),
    "no json": (lambda root: (root / "static/lsm.json").unlink(), "lsm.json: cannot be read .FileNotFoundError"),
    "half a json": (lambda root: (root / "static/lsm.json").write_text("{"), "lsm.json: cannot be read .JSONDecode"),
    "another key": (lambda root: (root / "static/lsm.json").write_text("{}"), "lsm.json: .*units"),
    "another field": (
        lambda root: np.save(root / "static/lsm.npy", np.arange(32, dtype=np.float32).reshape(4, 8)),
        "lsm.json: mean, std, min, max are .*, those of the field",
    ),
    "not finite": (lambda root: np.save(root / "static/lsm.npy", np.full((4, 8), np.nan, np.float32)), "32 non-finite"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_check_names_what_is_wrong(how: str, source: Path, tmp_path: Path, make_tree):
    tree = make_tree(tmp_path / "tree", ("t2m",), **DAYS)
    config = config_of(tree)
    assert check_static(config) == []
    run(source, tree.root, "--static", "slt=soil", "--static", "lsm=lsm")
    assert [(s.name, s.problem) for s in check_static(config)] == [("lsm", None), ("soil", None)]
    about = json.loads((tree.root / "static/lsm.json").read_text()) | {"units": ""}
    (tree.root / "static/lsm.json").write_text(json.dumps(about))
    assert check_static(config)[0].line.startswith("static lsm: units unknown, mean ")
    BROKEN[how][0](tree.root)
    wrong, right = check_static(config)
    assert right.problem is None
    with pytest.raises(ValueError, match=BROKEN[how][1]):
        raise ValueError(wrong.problem)
    with pytest.raises(ValueError, match=BROKEN[how][1]):
        pack_small(config, tmp_path / "store")
