"""区域：框与多边形逐格点写开、与 matplotlib 的判断相比；区域的统计量与写开的循环相比；写错了一行说清。"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.path import Path as Outline

from engine.reference.configs import CONFIG
from tests.models.small import small_spec
from util.batch import DataSpec
from util.grid import latitude_weights
from util.scores.metrics import pair_statistics
from util.scores.regional import BY_REGION, make_cells
from util.scores.regions import in_polygon, read_regions


def earth(step: float = 5.0, west: float = 0.0) -> DataSpec:
    """全球，北在上；格心不在极点上。"""
    latitudes = tuple(np.arange(90 - step / 2, -90, -step).tolist())
    longitudes = tuple((west + np.arange(0, 360, step)).tolist())
    spec = small_spec(channels=2, grid=(len(latitudes), len(longitudes)))
    return replace(spec, latitudes=latitudes, longitudes=longitudes)


def masks_of(tmp_path: Path, text: str, spec: DataSpec) -> dict[str, np.ndarray]:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return read_regions(path, spec)


def east_of(lon: float) -> float:
    return (lon + 180) % 360 - 180


@pytest.mark.parametrize("west", [0.0, -180.0])
def test_shipped_boxes_are_loops(west: float) -> None:
    """每个框逐格点判断；经度从 0 起的网格与从 −180 起的相同。"""
    spec = earth(2.5, west)
    found = read_regions(CONFIG / "regions.yaml", spec)
    rules = {
        "global": lambda lat, lon: True,
        "tropics": lambda lat, lon: abs(lat) <= 20,
        "extra-tropics": lambda lat, lon: abs(lat) >= 20,
        "northern-hemisphere": lambda lat, lon: lat >= 20,
        "southern-hemisphere": lambda lat, lon: lat <= -20,
        "europe": lambda lat, lon: 35 <= lat <= 75 and -12.5 <= east_of(lon) <= 42.5,
        "north-america": lambda lat, lon: 25 <= lat <= 60 and -120 <= east_of(lon) <= -75,
        "north-atlantic": lambda lat, lon: 25 <= lat <= 65 and -70 <= east_of(lon) <= -10,
        "north-pacific": lambda lat, lon: 25 <= lat <= 60 and (east_of(lon) >= 145 or east_of(lon) <= -130),
        "east-asia": lambda lat, lon: 25 <= lat <= 60 and 102.5 <= lon % 360 <= 150,
        "ausnz": lambda lat, lon: -45 <= lat <= -12.5 and 120 <= lon % 360 <= 175,
        "arctic": lambda lat, lon: lat >= 60,
        "antarctic": lambda lat, lon: lat <= -60,
    }
    assert list(found) == list(rules)
    for name, rule in rules.items():
        wanted = [[rule(lat, lon) for lon in spec.longitudes] for lat in spec.latitudes]
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)


@pytest.mark.parametrize("shift", [0, 170, -10, 355])
def test_a_polygon_is_matplotlibs_wherever_it_lies(shift: int) -> None:
    """同一个凹的多边形挪到 0° 与 180° 上也一样。"""
    corners = [(10.0, -31.0), (52.0, -17.0), (33.0, 4.0), (61.0, 22.0), (-20.0, 13.0)]
    moved = [(lat, east_of(lon + shift)) for lat, lon in corners]
    spec = earth(3.0)
    found = in_polygon(moved, np.array(spec.latitudes), np.array(spec.longitudes))
    outline = Outline([(lon, lat) for lat, lon in corners])
    wanted = [
        [outline.contains_point((east_of(lon - shift), lat)) for lon in spec.longitudes] for lat in spec.latitudes
    ]
    np.testing.assert_array_equal(found, wanted)
    assert found.any()


def test_land_and_sea_share_a_box(tmp_path: Path) -> None:
    spec = earth(10.0)
    land = np.random.default_rng(0).random((spec.height, spec.width)).astype(np.float32)
    np.save(tmp_path / "lsm.npy", land)
    text = f"land_sea: {tmp_path}/lsm.npy\nregions:\n"
    text += "".join(f"  {s}: {{latitude: [-30, 30], surface: {s}}}\n" for s in ("land", "sea"))
    found = masks_of(tmp_path, text, spec)
    band = np.abs(np.array(spec.latitudes))[:, None] <= 30
    np.testing.assert_array_equal(found["land"], band & (land > 0.5))
    np.testing.assert_array_equal(found["sea"], band & (land <= 0.5))


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ("{latitud: [0, 1]}", "unknown key regions.a.latitud = [0, 1]; nearest: regions.a.latitude"),
        ("{latitude: [20, -20]}", "regions.a.latitude = [20, -20]: write [south, north]"),
        ("{latitude: [20]}", "regions.a.latitude"),
        ("{longitude: [20, 20]}", "write [west, east]"),
        ("{longitude: [0, 400]}", "write [west, east]"),
        ("{latitude: north}", "regions.a.latitude"),
        ("{polygon: [[0, 0], [1, 1]]}", "a polygon has 3 corners or more, [latitude, longitude] each; found 2"),
        ("{polygon: [[0, 0], [1, 1], [100, 2]]}", "a corner is [latitude, longitude], -90 to 90"),
        ("{polygon: [[60, 0], [60, 120], [60, -120]]}", "goes round a pole"),
        ("{surface: land}", "regions.a.surface = 'land' needs land_sea"),
        ("{surface: lnad}", "regions.a.surface = 'lnad'"),
        ("{latitude: [0.1, 0.2]}", "no grid point lies inside; the grid has latitudes 85 to -85 (18), longitudes 0 to"),
        ("[{}, {longitude: [1, 1]}]", "regions.a[1].longitude"),
        ("3", "regions.a = 3"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, region: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  内容在下面查
        masks_of(tmp_path, f"regions:\n  a: {region}\n", earth(10.0))
    assert message in str(error.value) and str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("regions: {}\n", "regions"),
        ("region: {a: {}}\n", "unknown key region"),
        ("regions: {all: {}}\n", "another name, please"),
        ("land_sea: none.npy\nregions: {a: {}}\n", "none.npy"),
    ],
)
def test_mistakes_of_the_file_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        masks_of(tmp_path, text, earth(10.0))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("members", [1, 4])
def test_statistics_by_region_are_loops(members: int) -> None:
    """逐格点加起来除以权重之和；活跃度绕区域自己的平均。整个网格的数不因有区域而变。"""
    rng = np.random.default_rng(3)
    shape, spec = (3, 2, 6, 8), small_spec(channels=2, grid=(6, 8))
    forecast = rng.normal(size=(shape[0], members, *shape[1:])).astype(np.float32)
    truth, normal = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    masks = rng.random((3, 6, 8)) < 0.4
    masks[2] = True
    weights = latitude_weights(spec.latitudes)
    limits = torch.tensor([[0.3, math.nan], [math.nan, -0.2]], dtype=torch.float64)
    given = (torch.from_numpy(truth), torch.from_numpy(normal), weights, limits)
    models = {"m": torch.from_numpy(forecast)}
    found = pair_statistics(models, *given, cells=make_cells(torch.from_numpy(masks), weights))["m"]
    plain = pair_statistics(models, *given)["m"]
    assert all(torch.equal(found[key].nan_to_num(9), plain[key].nan_to_num(9)) for key in plain)
    regional = {key.removesuffix(BY_REGION): v.numpy() for key, v in found.items() if key.endswith(BY_REGION)}
    assert set(regional) == set(plain) - {"ssim"}
    for b, c, r in np.ndindex(3, 2, 3):
        x, y, n = forecast[b, :, c].astype(float), truth[b, c].astype(float), normal[b, c].astype(float)
        points = [(i, j, float(weights[i])) for i, j in np.argwhere(masks[r])]
        total = sum(w for _, _, w in points)

        def mean(field: np.ndarray, points=points, total=total) -> float:
            return sum(field[i, j] * w for i, j, w in points) / total

        mean_x = x.mean(0)
        spread = sum(np.abs(x[k] - x[m]) for k in range(members) for m in range(members))
        crps = np.abs(x - y).mean(0) - spread / (2 * members * max(members - 1, 1))
        expected = {
            "square": mean((mean_x - y) ** 2),
            "absolute": mean(np.abs(mean_x - y)),
            "error": mean(mean_x - y),
            "plain_square": float(np.mean([(mean_x - y)[i, j] ** 2 for i, j, _ in points])),
            "plain_absolute": float(np.mean([abs((mean_x - y)[i, j]) for i, j, _ in points])),
            "forecast_anomaly": mean((mean_x - n) ** 2),
            "truth_anomaly": mean((y - n) ** 2),
            "anomaly_product": mean((mean_x - n) * (y - n)),
            "forecast_activity": float(np.mean([mean((one - n - mean(one - n)) ** 2) for one in x])),
            "truth_activity": mean((y - n - mean(y - n)) ** 2),
            "crps": mean(crps),
        }
        if members > 1:
            expected["variance"] = mean(x.var(0, ddof=1))
        limit = (0.3, -0.2)[c]
        expected[f"brier_{c}"] = mean(((x > limit).mean(0) - (y > limit)) ** 2)
        assert {key: regional[key][b, c, r] for key in expected} == pytest.approx(expected, rel=2e-5, abs=1e-6)
        assert np.isnan(regional[f"brier_{1 - c}"][b, c, r])


def test_a_region_of_everything_is_the_whole_grid() -> None:
    rng, weights = np.random.default_rng(1), latitude_weights((60.0, 20.0, -20.0, -60.0))
    forecast, truth, normal = (torch.from_numpy(rng.normal(size=(2, 3, 4, 5)).astype(np.float32)) for _ in range(3))
    cells = make_cells(torch.ones(1, 4, 5, dtype=torch.bool), weights)
    found = pair_statistics({"m": forecast[:, None]}, truth, normal, weights, torch.zeros(3, 1), cells=cells)["m"]
    for key in [key for key in found if not key.endswith(BY_REGION) and key != "ssim"]:
        torch.testing.assert_close(found[f"{key}{BY_REGION}"][..., 0], found[key], rtol=1e-6, atol=1e-9)
