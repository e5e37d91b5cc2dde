"""样例数据：目录树、统计量、种子、损坏，以及动力是否像天气（球谐、平衡关系、持续性随时效变差）。"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import lpmv

from tests.engine.runs import ROOT
from tests.holding import held_elsewhere
from util.atomic import LOCK
from util.calendar import year_start
from util.commands import sample as command
from util.data.tree_files import read_field, read_mean_std
from util.sample import simulation, weather
from util.sample import tree as sample_tree
from util.sample.sphere import RADIUS, balance, legendre, make_transform, make_viewer, to_grid, to_spectrum, view
from util.variables import channel_folder

Frames = Iterator[tuple[int, list[np.ndarray]]]
CHANNELS = ["t2m", "tp", "u10", "v10", "r_level_00", "t_level_00", "u_level_00", "v_level_00", "z_level_00"]
SMALL = sample_tree.Settings((16, 32), (1979, 1979), (1979, 1979), 6, ("level_00",), 42, False, 0.0, 0.0)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """整年、6 小时、原始单位。"""
    root = tmp_path_factory.mktemp("plain") / "sample"
    assert command.main(["--root", str(root), "--grid", "16x32", "--years", "1979"]) == 0
    return root


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """闰年、每日一个、标准化、删掉 1 %、弄坏 2 %；内容换成随机数，省去模拟的时间。"""
    root = tmp_path_factory.mktemp("damaged") / "sample"
    options = ["--interval", "24", "--standardize", "--drop", "0.01", "--corrupt", "0.02", "--levels", "level_07"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_tree, "sample_frames", _random_frames)
        assert command.main(["--root", str(root), "--grid", "16x32", "--years", "1980", *options]) == 0
    return root


def _random_frames(settings: sample_tree.Settings, first: int, last: int, channels: list[str]) -> Frames:
    rng = np.random.default_rng(0)
    for hour in range(first, last, settings.interval):
        yield hour, [rng.normal(5e4, 3e3, settings.grid).astype(np.float32) for _ in channels]


@pytest.fixture(scope="module")
def fields() -> dict[str, np.ndarray]:
    """默认网格与截断，30 天，各通道 (N, 32, 64) float64。"""
    settings, first = SMALL._replace(grid=(32, 64)), year_start(1979)
    frames = [f for _, f in sample_tree.sample_frames(settings, first, first + 30 * 24, CHANNELS, spin_up=30 * 24)]
    return dict(zip(CHANNELS, np.stack(frames, axis=1).astype(np.float64), strict=True))


@pytest.fixture
def state() -> tuple[simulation.Planet, simulation.Flow]:
    planet = simulation.make_planet(42, 21)
    return planet, next(simulation.simulate(planet, 42, 0, 1, 1, spin_up=10 * 24))


def channel_files(root: Path, channel: str) -> list[Path]:
    return sorted((root / channel_folder(channel)).glob("*/*.npy"))


def test_layout(tree: Path) -> None:
    assert sorted(p.name for p in tree.iterdir()) == sorted(
        [*(f"{v}_npy" for v in ("r", "t", "t2m", "tp", "u", "u10", "v", "v10", "z")), "sample.json"]
    )
    assert [p.name for p in (tree / "z_npy").iterdir()] == ["level_00"]
    names = [f"1979-{6 * i:04d}.npy" for i in range(365 * 4)]
    for channel in CHANNELS:
        folder = tree / channel_folder(channel)
        assert sorted(p.name for p in folder.iterdir()) == ["1979", "mean_std.json", "min_max.json"]
        assert [p.name for p in channel_files(tree, channel)] == names
        assert read_field(folder / "1979" / "1979-8754.npy", (16, 32)).dtype == np.float32
    assert json.loads((tree / "sample.json").read_text())["files"] == 9 * 365 * 4


def test_statistics_are_those_of_the_files(tree: Path) -> None:
    for channel in CHANNELS:
        values = np.stack([np.load(path) for path in channel_files(tree, channel)]).astype(np.float64)
        np.testing.assert_allclose(read_mean_std(tree, channel), (values.mean(), values.std()), rtol=1e-9, atol=1e-12)
        extremes = json.loads((tree / channel_folder(channel) / "min_max.json").read_text())
        assert extremes == {"min": [values.min()], "max": [values.max()]}


def test_physical_ranges(tree: Path, fields: dict[str, np.ndarray]) -> None:
    """数值落在地球大气的范围里；降水时有时无。"""
    for name, low, high in (
        ("t2m", 210, 330),
        ("tp", 0, 0.02),
        ("r_level_00", 0, 100),
        ("t_level_00", 170, 280),
        ("z_level_00", 1.5e5, 2.3e5),
    ):
        assert low <= fields[name].min() < fields[name].max() <= high, name
        assert low <= min(np.load(path).min() for path in channel_files(tree, name)), name
    assert 0.2 < (fields["tp"] < 1e-6).mean() < 0.9
    assert max(np.abs(fields[name]).max() for name in ("u10", "v10", "u_level_00", "v_level_00")) < 120


def test_train_years(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """统计量只来自训练年份：两年各给一个常数场。"""
    frames = [(year_start(year), [np.full((8, 8), year, np.float32)] * 9) for year in (1979, 1980, 1981)]
    monkeypatch.setattr(sample_tree, "sample_frames", lambda *args: iter(frames))
    settings = SMALL._replace(years=(1979, 1981), train_years=(1979, 1980))
    sample_tree.write_tree(tmp_path, settings)
    assert read_mean_std(tmp_path, "t2m") == pytest.approx((1979.5, 0.5))
    for text, expected in (("1979-1982", (1979, 1980)), ("1979-1981", (1979, 1979)), ("1979", (1979, 1979))):
        assert command.read_arguments(["--root", "x", "--years", text])[1].train_years == expected


def test_seed(tree: Path) -> None:
    """同一种子逐字节相同（与命令写的文件也相同），另一种子不同；6 小时的序列是逐小时的抽样。"""
    first = year_start(1979)

    def run(settings: sample_tree.Settings, spin_up: int = 24) -> list[bytes]:
        return [b"".join(f.tobytes() for f in frame) for _, frame in sample_tree.sample_frames(
            settings, first, first + 24, CHANNELS, spin_up)]  # fmt: skip

    again = run(SMALL, simulation.SPIN_UP_HOURS)
    assert again[2] == b"".join(np.load(channel_files(tree, channel)[2]).tobytes() for channel in CHANNELS)
    short = run(SMALL)
    assert short == run(SMALL)
    assert short == run(SMALL._replace(interval=1))[::6]
    assert not set(short) & set(run(SMALL._replace(seed=43)))


def test_standardized_dropped_corrupted(damaged: Path) -> None:
    marker = json.loads((damaged / "sample.json").read_text())
    total = 366 * 9
    assert len(marker["dropped"]) == round(0.01 * total)
    assert len(marker["corrupted"]) == round(0.02 * total)
    assert not any((damaged / path).exists() for path in marker["dropped"])
    assert marker["files"] == len(list(damaged.rglob("*.npy"))) == total - len(marker["dropped"])
    expected = {"truncated": "unreadable", "nan": "non-finite", "shape": "shape"}
    assert set(marker["corrupted"].values()) == set(expected)
    for path, kind in marker["corrupted"].items():
        with pytest.raises(ValueError, match=expected[kind]):
            read_field(damaged / path, (16, 32))
    for channel in ("t2m", "z_level_07"):
        good = [p for p in channel_files(damaged, channel) if str(p.relative_to(damaged)) not in marker["corrupted"]]
        values = np.stack([read_field(path, (16, 32)) for path in good]).astype(np.float64)
        assert abs(values.mean()) < 0.01
        assert values.std() == pytest.approx(1, abs=0.01)
        assert read_mean_std(damaged, channel) == pytest.approx((5e4, 3e3), rel=0.01)  # json 里仍是物理单位的


def test_marker_and_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def quick(root: Path, settings: sample_tree.Settings) -> dict:
        arguments = sample_tree.settings_json(settings)
        assert arguments.pop("first_hour") == 0  # 从前的标记里没有，仍认得
        marker = {"arguments": arguments, "files": 0, "dropped": [], "corrupted": {}}
        (root / "sample.json").write_text(json.dumps(marker))
        return marker

    monkeypatch.setattr(sample_tree, "write_tree", quick)
    root = tmp_path / "sample"
    arguments = ["--root", str(root)]
    assert command.main(arguments) == 0
    (root / "witness").touch()
    assert command.main(arguments) == 0
    assert "already there" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"seed 42 \(asked: 7\).*--overwrite"):
        command.main([*arguments, "--seed", "7"])
    assert (root / "witness").exists()
    assert command.main([*arguments, "--seed", "7", "--overwrite"]) == 0
    assert not (root / "witness").exists()

    foreign = tmp_path / "own" / "t2m_npy"
    foreign.mkdir(parents=True)
    with pytest.raises(ValueError, match="did not write"):
        command.main(["--root", str(foreign.parent), "--overwrite"])
    assert foreign.exists()


def quick_tree(root: Path, settings: sample_tree.Settings) -> dict:
    """几个文件与标记；标记里是文件数。"""
    for number in range(5):
        (root / f"{settings.seed}-{number}").touch()
    marker = {"arguments": sample_tree.settings_json(settings), "files": 5, "dropped": [], "corrupted": {}}
    (root / "sample.json").write_text(json.dumps(marker))
    return marker


@pytest.mark.parametrize("step", range(9))
def test_overwrite_killed_at_any_step(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """在第几次删文件、改名的当口被杀：root 里总是完整的一份，或者没有；再来一次就好，什么也不留下。"""
    monkeypatch.setattr(sample_tree, "write_tree", quick_tree)
    root = tmp_path / "sample"
    command.main(["--root", str(root)])
    again = ["--root", str(root), "--seed", "7", "--overwrite"]
    child = multiprocessing.get_context("fork").Process(target=dies_at, args=(step, again))
    child.start()
    child.join()
    assert child.exitcode == (9 if step < 8 else 0)  # 改名两次，旧的六个文件逐个删
    if root.exists():
        (seed,) = {path.name[0] for path in root.iterdir() if path.name != "sample.json"}
        marker = json.loads((root / "sample.json").read_text())
        assert str(marker["arguments"]["seed"])[0] == seed and len(list(root.iterdir())) == 6
    assert command.main(again) == 0
    assert sorted(path.name for path in root.iterdir()) == [*(f"7-{n}" for n in range(5)), "sample.json"]
    assert list(tmp_path.iterdir()) == [root]


def dies_at(step: int, arguments: list[str]) -> None:
    """改名、删文件数着，第 step 次之前就死。"""
    left = itertools.count()

    def counted(action: Callable[..., Any]) -> Callable[..., Any]:
        def do(path: Any, *rest: Any, **more: Any) -> Any:
            if not str(path).endswith(LOCK) and next(left) == step:
                os._exit(9)
            return action(path, *rest, **more)

        return do

    Path.rename, os.unlink = counted(Path.rename), counted(os.unlink)
    command.main(arguments)


def test_two_samples_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """后来的一行；前一个刚写完的时候才占下的，不再写一遍。"""
    monkeypatch.setattr(sample_tree, "write_tree", quick_tree)
    root = tmp_path / "sample"
    busy = pytest.raises(ValueError, match="another sample is being written there, wait for it")
    with held_elsewhere(tmp_path / ".sample.partial"), busy:
        command.main(["--root", str(root)])
    settings = command.read_arguments(["--root", str(root)])[1]
    assert sample_tree.create(root, settings) and sample_tree.create(root, settings) is None
    assert list(tmp_path.iterdir()) == [root]


def test_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_tree, "sample_frames", stopped)
    with pytest.raises(KeyboardInterrupt):
        command.main(["--root", str(tmp_path / "sample")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--grid 32", "--grid 32: write it like 32x64"),
        ("--grid 4x8", "at least 8x8"),
        ("--years 1982-1979", "must not be after"),
        ("--years soon", "write it like 1979-1982"),
        ("--train-years 1979-1985", "within --years 1979-1982"),
        ("--interval 5", "invalid choice: 5"),
        ("--first-hour 6", "--first-hour 6: 0 to 5, below --interval 6"),
        ("--levels level_7", "nearest: level_07"),
        ("--drop 0.6 --corrupt 0.6", "together at most 1"),
        ("--drop nan", "shares of at least 0"),
        ("--seed -1", "must not be negative"),
        ("--grit 32x64", "unrecognized arguments: --grit"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        command.main(["--root", str(tmp_path / "sample"), *arguments.split()])
    assert list(tmp_path.iterdir()) == []


def test_command_line_error_is_one_line() -> None:
    done = subprocess.run([sys.executable, "dataset.py", "sample"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: the following arguments are required: --root"]


def test_legendre_against_scipy() -> None:
    from math import factorial

    mu = np.linspace(-0.99, 0.99, 25)
    values, slopes = legendre(13, mu)
    for m, degree in ((0, 0), (0, 7), (1, 1), (3, 5), (12, 12)):
        norm = np.sqrt((2 * degree + 1) / 2 * factorial(degree - m) / factorial(degree + m)) * (-1) ** m
        np.testing.assert_allclose(values[m, :, degree], norm * lpmv(m, degree, mu), atol=1e-12)
        numeric = (lpmv(m, degree, mu + 1e-6) - lpmv(m, degree, mu - 1e-6)) / 2e-6
        np.testing.assert_allclose(slopes[m, :, degree], norm * (1 - mu**2) * numeric, atol=1e-6)


def test_transform_round_trip() -> None:
    transform = make_transform(10)
    rng = np.random.default_rng(0)
    spectrum = np.tril(rng.standard_normal((11, 11))).T[..., None] + 0j  # l >= m
    grid = to_grid(transform, spectrum, 0, 1)[2]
    np.testing.assert_allclose(to_spectrum(transform, grid), spectrum, atol=1e-5)


def test_winds_come_from_the_stream_function(state: tuple[simulation.Planet, simulation.Flow]) -> None:
    """细网格上用中央差分重算：u = -∂ψ/∂y，v = ∂ψ/∂x，散度为零，∇²Φ = ∇·(f∇ψ)。"""
    planet, now = state
    step = np.deg2rad(0.5)
    latitude = np.deg2rad(np.arange(70.0, -70.1, -0.5))[:, None]
    longitudes = np.arange(0, 360, 0.5)
    now.flow[:, 20:, :3] = 0.0  # Φ 比 ψ 多一个波数，留出位置，平衡方程才精确成立
    stream = simulation.stream_function(planet, now.flow[..., :3])
    both = np.concatenate([stream, balance(stream, simulation.ROTATION)], axis=2)
    values = view(make_viewer(22, np.rad2deg(latitude[:, 0]), longitudes), both, 0)[0]
    psi, phi = values[0], values[3]

    def east(field: np.ndarray) -> np.ndarray:
        return (np.roll(field, -1, -1) - np.roll(field, 1, -1)) / (2 * step * RADIUS * np.cos(latitude))

    def north(field: np.ndarray) -> np.ndarray:
        return np.pad(field[:-2] - field[2:], ((1, 1), (0, 0))) / (2 * step * RADIUS)

    def divergence(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (east(x) + north(y * np.cos(latitude)) / np.cos(latitude))[3:-3]

    scene = weather.make_scene(planet, np.rad2deg(latitude[:, 0]), longitudes)
    snapshot = weather.take_snapshot(scene, planet, now)
    u, v = (weather.compute_field(scene, snapshot, f"{name}_level_00") for name in "uv")
    np.testing.assert_allclose(u[1:-1], -north(psi)[1:-1], atol=0.05)  # m/s，风速约 10
    np.testing.assert_allclose(v, east(psi), atol=0.05)
    vorticity = divergence(v, -u)
    assert np.abs(divergence(u, v)).max() < 1e-3 * np.abs(vorticity).max()
    coriolis = 2 * simulation.ROTATION * np.sin(latitude)
    left, right = divergence(east(phi), north(phi)), divergence(coriolis * east(psi), coriolis * north(psi))
    assert np.abs(left - right).max() < 5e-3 * np.abs(right).max()


def test_temperature_is_hydrostatic(state: tuple[simulation.Planet, simulation.Flow]) -> None:
    """测厚公式：相邻两层位势差 = R × 平均温度 × ln(p1/p2)。"""
    planet, now = state
    scene = weather.make_scene(planet, *sample_tree.coordinates((32, 64)))
    snapshot = weather.take_snapshot(scene, planet, now)

    def field(variable: str, level: int) -> np.ndarray:
        return weather.compute_field(scene, snapshot, f"{variable}_level_{level:02d}")

    for upper in range(8):  # 50 … 600 hPa，在边界层之上
        depth = np.log(weather.PRESSURES[upper + 1] / weather.PRESSURES[upper])
        mean = (field("z", upper) - field("z", upper + 1)) / (287.0 * depth)
        np.testing.assert_allclose(mean, (field("t", upper) + field("t", upper + 1)) / 2, atol=1.5)
    assert (np.diff([field("z", level).mean() for level in range(13)]) < 0).all()  # level_00 最高
    assert all(field("r", level).min() >= 0 and field("r", level).max() <= 100 for level in range(13))


def test_persistence_loses_skill(fields: dict[str, np.ndarray]) -> None:
    """6 小时持续性胜过（样本内、按钟点的）气候态，误差随时效增长，几天后不如气候态；降水的 6 小时误差小于 0.9 σ。"""
    weight = np.cos(np.deg2rad(sample_tree.coordinates((32, 64))[0]))[:, None]

    def rmse(error: np.ndarray) -> float:
        return float(np.sqrt((weight * error**2).mean() / weight.mean()))

    for name, values in fields.items():
        lag = [rmse(values[k:] - values[:-k]) for k in (1, 4, 12, 40)]
        climatology = rmse(np.concatenate([values[h::4] - values[h::4].mean(0) for h in range(4)]))
        assert lag[0] < 0.8 * climatology, (name, lag, climatology)
        assert lag[0] < lag[1] < lag[2], (name, lag)
        assert lag[3] > climatology, (name, lag, climatology)
    assert rmse(np.diff(fields["tp"], axis=0)) < 0.9 * fields["tp"].std()


def test_energy_is_stationary(fields: dict[str, np.ndarray]) -> None:
    for name in ("u10", "v10", "u_level_00", "v_level_00"):
        first, last = (half.std() for half in np.array_split(fields[name], 2))
        assert 0.7 < last / first < 1.4
