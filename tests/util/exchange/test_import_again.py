"""往同一棵树上再导入：统计量是树里全部训练日期的；训练不肯要的划分，导入之前就停。"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from tests.holding import held_elsewhere
from util.calendar import moment_of, parse_time
from util.commands.import_fields import main
from util.config import DataConfig, read_mapping
from util.data.dataset import open_data
from util.data.tree_files import field_path, read_mean_std, read_tendency
from util.inspection.statistics import channel_statistics
from util.strict import validate

BOTH = {
    "train": ["1999-12-25", "2000-01-02"],
    "val": ["2000-01-03", "2000-01-04"],
    "test": ["2000-01-05", "2000-01-06"],
}
EARLY = {
    "train": ["1999-12-25", "1999-12-27"],
    "val": ["1999-12-28", "1999-12-29"],
    "test": ["1999-12-30", "1999-12-31"],
}


def write_source(path: Path, first: str, days: int, mean: float, width: int = 8) -> np.ndarray:
    """days 天 6 小时的 t2m，4 × width；返回 (T, 4, width) float32。"""
    hours = parse_time(first) + np.arange(0, 24 * days, 6)
    values = np.random.default_rng(int(mean)).normal(mean, 5, (hours.size, 4, width)).astype(np.float32)
    times = np.array([moment_of(int(h)) for h in hours], "datetime64[ns]")
    grid = {"lat": np.linspace(67.5, -67.5, 4), "lon": np.arange(width) * (360.0 / width)}
    variables = {"t2m": (("time", "lat", "lon"), values, {"units": "K"})}
    xr.Dataset(variables, {"time": times, **grid}).to_netcdf(path)
    return values


def import_part(source: Path, root: Path, splits: dict[str, list[str]], *words: str) -> DataConfig:
    out = root.with_suffix(".yaml")
    dates = [word for name, days in splits.items() for word in (f"--{name}", *days)]
    main(["--source", str(source), "--root", str(root), "--variable", "t2m=t2m", *dates, "--yaml", str(out), *words])
    more = {"frames_in": 1, "workers": 0, "pin_memory": False, "cache_dir": str(root.with_suffix(".cache"))}
    return validate(DataConfig, read_mapping(out) | more, "set")


@pytest.fixture
def parts(tmp_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """两年各几天，均值差得远。"""
    return (
        write_source(tmp_path / "1999.nc", "1999-12-25", 7, 270.0),
        write_source(tmp_path / "2000.nc", "2000-01-01", 6, 290.0),
    )


def test_a_further_year_needs_no_flag(parts, tmp_path: Path) -> None:
    """没有要替换的文件就接着写，与一次导入的逐个文件相同；有一个要替换的就停，说出是哪个；已标准化的树不混进去。"""
    root, files = tmp_path / "tree", [tmp_path / "1999.nc", tmp_path / "2000.nc"]
    import_part(files[0], root, EARLY)
    before = {path: path.read_bytes() for path in root.rglob("*.npy")}
    root.with_suffix(".yaml").unlink()
    import_part(files[1], root, BOTH)
    import_part(files[0], tmp_path / "once", BOTH, "--source", str(files[1]))
    written, once = ({p.relative_to(r): p.read_bytes() for p in r.rglob("*.*")} for r in (root, tmp_path / "once"))
    assert written.keys() == once.keys()
    assert {path.name for path in written if written[path] != once[path]} <= {"mean_std.json"}  # 合并的次序不同
    np.testing.assert_allclose(read_mean_std(root, "t2m"), read_mean_std(tmp_path / "once", "t2m"), rtol=1e-14)
    assert all(path.read_bytes() == content for path, content in before.items())
    root.with_suffix(".yaml").unlink()
    with pytest.raises(ValueError, match=r"24 of the 24 files to write exist already, first 2000-0000.npy, 2000-0006"):
        import_part(files[1], root, BOTH)
    field_path(root, "t2m", parse_time("2000-01-01")).unlink()
    with pytest.raises(ValueError, match=r"23 of the 24 files to write exist already, first 2000-0006.npy"):
        import_part(files[1], root, BOTH)
    standard = (np.load(field_path(root, "t2m", parse_time("1999-12-25"))) - 270) / 5
    for hour in range(parse_time("2000-01-01"), parse_time("2000-01-07"), 6):
        field_path(root, "t2m", hour).unlink(missing_ok=True)
    np.save(field_path(root, "t2m", parse_time("1999-12-25")), standard.astype(np.float32))
    with pytest.raises(ValueError, match=r"1999-8592.npy is standardised, an import writes physical values"):
        import_part(files[1], root, BOTH)
    assert read_mean_std(root, "t2m")[1] > 1


@pytest.mark.parametrize("backwards", [False, True])
def test_statistics_are_of_all_the_training_dates(parts, tmp_path: Path, backwards: bool) -> None:
    """1999 全在训练日期里，2000 只有头两天；哪个先导入、再导入一遍，都是同样的数。"""
    early, late = parts
    root, files = tmp_path / "tree", [tmp_path / "1999.nc", tmp_path / "2000.nc"]
    if backwards:
        late_only = {"train": ["2000-01-01", "2000-01-02"], "val": BOTH["val"], "test": BOTH["test"]}
        import_part(files[1], root, late_only)
        config = import_part(files[0], root, BOTH, "--overwrite")
    else:
        import_part(files[0], root, EARLY)
        config = import_part(files[1], root, BOTH, "--overwrite")
    every = np.concatenate([early, late[:8]]).astype(np.float64)
    np.testing.assert_allclose(read_mean_std(root, "t2m"), (every.mean(), every.std()), rtol=1e-12)
    limits = json.loads((root / "t2m_npy/min_max.json").read_text())
    assert limits == {"min": [every.min()], "max": [every.max()]}
    moments = channel_statistics(config)["t2m"].moments
    assert read_mean_std(root, "t2m") == (moments.mean, moments.std)
    assert open_data(config).samples("train") == 36
    import_part(files[0], root, BOTH, "--overwrite")
    assert read_mean_std(root, "t2m") == (moments.mean, moments.std)


def test_a_further_year_into_a_store(parts, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """存档里有的不算：说要连同从前的来源；那样给、训练日期不变，就接着长，与一次导入的逐字节相同。"""
    grown = {**EARLY, "test": ["1999-12-30", "2000-01-06"]}
    files, store = [str(tmp_path / name) for name in ("1999.nc", "2000.nc")], str(tmp_path / "store")
    early, both = (
        ["--variable", "t2m=t2m", *(word for name, days in splits.items() for word in (f"--{name}", *days))]
        for splits in (EARLY, grown)
    )
    main(["--source", files[0], *early, "--store", store])
    assert "t2m: 0 fields interpolated, 4 repeated beyond the ends, 0 left out" in caplog.text  # 12-24 全天
    said = "data.splits need 1999, .* within it, or its earlier sources too: a store grows from all years as --source"
    with pytest.raises(ValueError, match=said) as refused:
        main(["--source", files[1], *both, "--store", store])
    assert "tree" not in str(refused.value)
    caplog.clear()
    for out in (store, str(tmp_path / "once")):
        main(["--source", *files, *both, "--store", out])
    assert "1 of 2 blocks of the source are known already" in caplog.text  # 从前的不再读
    found, once = ({p.name: p.read_bytes() for p in (Path(s) / "fields").iterdir()} for s in (store, tmp_path / "once"))
    assert found == once


def test_statistics_that_cannot_be_are_not_written(parts, tmp_path: Path) -> None:
    """旧的一年里有坏文件：说出来，不留下只有一半的统计量；另一种网格，一个文件也不写。"""
    root = tmp_path / "tree"
    import_part(tmp_path / "1999.nc", root, EARLY)
    write_source(tmp_path / "wide.nc", "2000-01-01", 6, 290.0, width=16)
    before = {path: path.read_bytes() for path in root.rglob("*.*")}
    with pytest.raises(ValueError, match=r"shape \(4, 8\), expected \(4, 16\): the tree holds another grid"):
        import_part(tmp_path / "wide.nc", root, BOTH, "--overwrite")
    assert before == {path: path.read_bytes() for path in root.rglob("*.*")}
    field_path(root, "t2m", parse_time("1999-12-26")).write_bytes(b"broken")
    with pytest.raises(ValueError, match="t2m: 1 files of earlier imports .* so no statistics are written"):
        import_part(tmp_path / "2000.nc", root, BOTH, "--overwrite")
    assert not list(root.rglob("*.json"))


def test_tendency_of_former_fields_is_dropped(parts, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """场换了，从前算的变化的标准差就不对了：去掉，并说一声。"""
    root, words = tmp_path / "tree", ["--overwrite"]
    import_part(tmp_path / "1999.nc", root, EARLY, *words)
    path = root / "t2m_npy/mean_std.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tendency_std": [1.0], "tendency_hours": [6]}))
    import_part(tmp_path / "2000.nc", root, BOTH, *words)
    assert "mean_std.json loses its tendency_std" in caplog.text
    assert read_tendency(root, "t2m") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ["1998-12-01", "2000-01-02"]}, r"data.splits need 1998, .* t2m.* holds 2000-01-01T00"),
        ({"test": ["2000-01-05", "2001-02-01"]}, "data.splits need 2001"),
        ({"test": ["2000-03-05", "2000-03-06"]}, "data.splits.test = .*: empty, no samples there"),
        ({"val": ["2000-01-02", "2000-01-04"]}, "data.splits.val = .* overlaps data.splits.train"),
    ],
)
@pytest.mark.parametrize("kind", ["--root", "--store"])
def test_splits_that_training_refuses_are_refused(parts, tmp_path: Path, change, message: str, kind: str) -> None:
    splits = {**BOTH, "train": ["2000-01-01", "2000-01-02"], **change}
    dates = [word for name, days in splits.items() for word in (f"--{name}", *days)]
    words = ["--source", str(tmp_path / "2000.nc"), "--variable", "t2m=t2m", *dates]
    with pytest.raises(ValueError, match=message):
        main([*words, kind, str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_short_splits_are_named(parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """放不下两帧的划分：窗口多长由运行的 YAML 定，所以照样导入，但说出来；导入了的，训练确实不肯。"""
    splits = {**BOTH, "train": ["2000-01-01", "2000-01-02"]}
    with xr.open_dataset(tmp_path / "2000.nc") as source:
        source.isel(time=slice(2, None, 4)).to_netcdf(tmp_path / "daily.nc")
    config = import_part(tmp_path / "daily.nc", tmp_path / "tree", {**splits, "val": ["2000-01-03", "2000-01-03"]})
    message = "data.splits.val = ['2000-01-03', '2000-01-03']: the longest run without a gap has 1 samples"
    assert f"training  would refuse this: {message}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the longest run without a gap has 1 samples"):
        open_data(config)


def test_too_many_missing_fields_are_foretold(parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """缺的时刻、含缺测的场合起来超过 max_missing：导入时说出同样的一句。"""
    splits = {**BOTH, "train": ["2000-01-01", "2000-01-02"]}
    with xr.open_dataset(tmp_path / "2000.nc") as source:
        holed = source.isel(time=np.delete(np.arange(24), [5])).load()
        holed.t2m[9, 0, 0] = np.nan
        holed.to_netcdf(tmp_path / "holed.nc")
    config = import_part(tmp_path / "holed.nc", tmp_path / "tree", splits)
    message = r"t2m: 2 of 24 files are missing or unreadable (8.3 %), above data.max_missing = 0.01"
    assert f"training  would refuse this: {message}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=re.escape(message)):
        open_data(config)


@pytest.mark.parametrize(
    ("latitudes", "longitudes", "message"),
    [
        ([95, 65, 35, 5], np.arange(8) * 45.0, "data.latitude: runs from 95 to 5, outside -90 to 90"),
        ([60, 30, 0, -30], np.linspace(0, 360, 8), r"data.longitude: covers more than 360 degrees.*--cols"),
    ],
)
def test_axes_that_training_refuses_are_refused(parts, latitudes, longitudes, message, tmp_path: Path) -> None:
    with xr.open_dataset(tmp_path / "2000.nc") as source:
        source.assign_coords(lat=np.array(latitudes, float), lon=longitudes).to_netcdf(tmp_path / "off.nc")
    splits = {**BOTH, "train": ["2000-01-01", "2000-01-02"]}
    with pytest.raises(ValueError, match=message):
        import_part(tmp_path / "off.nc", tmp_path / "tree", splits)
    assert not (tmp_path / "tree").exists()
    if longitudes[-1] == 360:
        assert import_part(tmp_path / "off.nc", tmp_path / "tree", splits, "--cols", "0:7").longitude.count == 7


def test_two_imports_do_not_write_one_variable_at_once(parts, tmp_path: Path):
    root = tmp_path / "tree"
    with (
        held_elsewhere(root / "t2m_npy"),
        pytest.raises(ValueError, match=r"t2m_npy is in use by process .*; wait for"),
    ):
        import_part(tmp_path / "1999.nc", root, EARLY)
    assert list((root / "t2m_npy").iterdir()) == []
    import_part(tmp_path / "1999.nc", root, EARLY)
    assert sorted(p.name for p in (root / "t2m_npy").iterdir()) == ["1999", "mean_std.json", "min_max.json"]
